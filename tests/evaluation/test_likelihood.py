"""Likelihoods by the ODE: against Gaussians, exact traces and uniform densities."""

import json
import math

import pytest
import torch
from bad_input import refusal
from conftest import TINY, make_latent_pipe, randomize
from diffusers import ConfigMixin, EDMEulerScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config

from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel, evaluate
from sddit_diffusers.data.pictures import ImageDataset
from sddit_diffusers.evaluation import likelihood
from sddit_diffusers.evaluation.likelihood import bits_per_dim, dequantized, likelihoods, log_density
from sddit_diffusers.pipelines.ode import VelocityField, dopri5
from sddit_diffusers.schedulers.scheduling_interpolant import InterpolantScheduler
from sddit_diffusers.seeds import generator_for

STD = 0.35


class OfGaussians(ModelMixin, ConfigMixin):
    """What a perfect network gives where the data of class k are N(0, (STD (k + 1))^2)."""

    @register_to_config
    def __init__(self, process="edm", sample_size=4, in_channels=1, num_classes=2, patch_size=1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, timestep, labels, return_dict=True):
        variance = (STD * (labels + 1.0).view(-1, 1, 1, 1)) ** 2
        timestep = timestep.double()
        if self.config.process == "edm":
            sigma = (4 * timestep).exp()
            x = x * (sigma**2 + 0.5**2).sqrt()
            denoised = variance / (variance + sigma**2) * x
            c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25).sqrt()
            return ((denoised - c_skip * x) / c_out,)
        t = timestep / 1000
        if self.config.process == "linear":
            alpha, sigma, d_alpha, d_sigma = 1 - t, t, -1, 1
        elif self.config.process == "gvp":
            angle = math.pi / 2 * t
            alpha, sigma = angle.cos(), angle.sin()
            d_alpha, d_sigma = -math.pi / 2 * sigma, math.pi / 2 * alpha
        else:
            beta, log = 0.1 + 19.9 * t, -0.05 * t - 19.9 / 4 * t**2
            alpha, sigma = log.exp(), (1 - (2 * log).exp()).sqrt()
            d_alpha, d_sigma = -beta * alpha / 2, beta * alpha**2 / (2 * sigma)
        factor = (d_alpha * alpha * variance + d_sigma * sigma) / (alpha**2 * variance + sigma**2)
        return (factor * x,)


def gaussian_pipe(process, **config):
    scheduler = EDMHeunScheduler() if process == "edm" else InterpolantScheduler(path=process)
    return SDDiTPipeline(OfGaussians(process, **config), scheduler)


def noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(shape, seed=1):
    return noise(shape, seed).sign()


@pytest.mark.parametrize("process", ["edm", "linear", "gvp", "vp"])
def test_of_gaussians_it_is_the_closed_form(process):
    x0 = STD * noise((6, 1, 4, 4))
    field = VelocityField(gaussian_pipe(process), [0, 1] * 3)
    found = log_density(field, x0, signs(x0.shape), 1e-7, 1e-7)
    std = STD * torch.tensor([1.0, 2.0] * 3, dtype=torch.float64).view(-1, 1, 1, 1)
    expected = torch.distributions.Normal(0.0, std).log_prob(x0).flatten(1).sum(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)  # of tens of nats


class Field:
    """dx/dt = tanh(W x) t, whose trace is known."""

    interval, scheduler = (0.0, 1.0), InterpolantScheduler()

    def __init__(self, size=6):
        self.weight = noise((size, size), 2) / 2

    def __call__(self, t, x):
        return t * (x.flatten(1) @ self.weight.T).tanh().view(x.shape)

    def trace(self, t, x):
        jacobian = torch.func.jacrev(lambda x: self(t, x[None, None, None]).flatten())
        return torch.stack([jacobian(row).trace() for row in x.flatten(1)])


def test_over_many_signs_it_is_that_of_the_exact_trace():
    field, x0 = Field(), noise((1, 1, 1, 6), 3)

    def exact(t, state):
        return field(t, state[0]), field.trace(t, state[0])

    x, gained = dopri5(exact, (x0, torch.zeros(1, dtype=torch.float64)), 0.0, 1.0, 1e-9, 1e-9)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum() + gained
    # All 64 signs of six numbers: their mean is no estimate.
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6).view(64, 1, 1, 6)
    found = log_density(field, x0.expand(64, -1, -1, -1), every, 1e-9, 1e-9)
    torch.testing.assert_close(found.mean(), expected[0], rtol=0, atol=1e-6)
    assert gained.abs() > 0.1 and found.std() > 0.01


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_uniform_density_has_the_bits_of_its_levels(levels):
    width = levels * 2 / (levels - 1)  # of all cells together
    log_p = torch.tensor([-12 * math.log(width)], dtype=torch.float64)
    torch.testing.assert_close(bits_per_dim(log_p, 12, levels).item(), math.log2(levels))
    pixels = torch.arange(levels) / (levels - 1) * 2 - 1
    ends = [dequantized(pixels, levels, torch.full((levels,), u, dtype=torch.float64)) for u in (0.0, 1.0)]
    torch.testing.assert_close(ends[0][1:], ends[1][:-1])  # the cells leave no gap
    torch.testing.assert_close((ends[1][-1] - ends[0][0]).item(), width)
    torch.testing.assert_close((ends[0] + ends[1]) / 2, pixels.double(), rtol=0, atol=1e-6)


def test_levels_of_pictures():
    digits = ImageDataset("digits", "image", "label", 1, 8)
    assert digits.levels == len(digits.pixels(range(300)).unique()) == 17
    assert ImageDataset("digits", "image", "label", 1, 16).levels == 256  # resized
    cells = dequantized(digits.__getitems__([0, 1])[0], 17, torch.tensor(0.5))
    torch.testing.assert_close(cells, (cells * 8).round() / 8)  # bytes are rounded, levels are even


@pytest.fixture
def grey_pipe():
    transformer = randomize(SDDiTTransformer2DModel(**TINY | {"in_channels": 1, "num_classes": 10}))
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(0.5)  # of a smooth field
    return SDDiTPipeline(transformer, InterpolantScheduler(num_train_timesteps=10))


class Rising:
    """Pictures of one grey each, of 256 levels, without labels."""

    labels, levels = None, 256

    def __len__(self):
        return 10

    def __getitems__(self, rows):
        return (torch.tensor(rows) * 20 / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 1, 4, 4), None


def test_it_is_that_of_dequantized_pictures_drawn_by_row():
    """Without labels, of the null class."""
    pipe = gaussian_pipe("linear", num_classes=1)
    bits, evaluations = likelihoods(pipe, Rising(), 6, rtol=1e-6, atol=1e-6)
    rows = torch.randperm(10, generator=generator_for(0))[:6]
    normal = torch.distributions.Normal(0.0, 2 * STD)
    for row, found in zip(rows.tolist(), bits, strict=True):
        uniform = torch.rand(1, 4, 4, generator=generator_for(0, 2, row)).double()
        x0 = row * 20 / 127.5 - 1 + (uniform - 0.5) * 2 / 255
        expected = -normal.log_prob(x0).mean() / math.log(2) + math.log2(255 / 2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert evaluations > 7


def test_batches_change_only_the_solvers_steps(grey_pipe):
    digits = ImageDataset("digits", "image", "label", 1, 8)
    found = {size: likelihoods(grey_pipe, digits, 3, size, 1e-4, 1e-4)[0] for size in (3, 2, 1)}
    for size in (2, 1):
        torch.testing.assert_close(found[size], found[3], rtol=0, atol=3e-4)
    assert found[3].std() > 3e-3
    digits.labels = None
    assert (likelihoods(grey_pipe, digits, 3, 3, 1e-4, 1e-4)[0] - found[3]).abs().max() > 1e-3


def test_signs_are_drawn_once_a_picture(monkeypatch):
    drawn = []
    monkeypatch.setattr(likelihood, "generator_for", lambda *key: drawn.append(key) or generator_for(*key))
    _, evaluations = likelihoods(gaussian_pipe("linear"), Rising(), 5, 2)
    assert len(drawn) == len(set(drawn)) == 1 + 5 and evaluations > 7  # the order, and each row


def test_what_has_no_likelihood_in_bits_is_refused(grey_pipe):
    digits = ImageDataset("digits", "image", "label", 1, 8)
    with pytest.raises(ValueError, match="The pipeline has a VAE"):
        likelihoods(make_latent_pipe("kl"), digits, 2)
    grey_pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler tells no velocity"):
        likelihoods(grey_pipe, digits, 2)


def test_the_program_prints_and_saves_it(grey_pipe, tmp_path, capsys):
    model, output = tmp_path / "model", tmp_path / "bits.json"
    grey_pipe.save_pretrained(model)
    arguments = ["--likelihood", str(model), "digits", "--likelihood_samples", "4", "--output", str(output)]
    evaluate.main(arguments)
    printed, record = capsys.readouterr().out, json.loads(output.read_text())
    bits, evaluations = likelihoods(grey_pipe, ImageDataset("digits", "image", "label", 1, 8), 4)
    assert record["bits_per_dim"] == pytest.approx(bits.mean().item(), rel=1e-6)
    assert record["standard_error"] == pytest.approx((bits.var() / 4).sqrt().item(), rel=1e-6)
    assert record["evaluations"] == evaluations and record["levels"] == 17 and record["conditional"]
    assert f"{record['bits_per_dim']:.3f} \u00b1 {record['standard_error']:.3f} bits a dimension" in printed
    assert "4 pictures of digits, 17 levels, given their classes" in printed
    evaluate.main([*arguments, "--unconditional"])
    other = json.loads(output.read_text())
    assert other["bits_per_dim"] != record["bits_per_dim"] and not other["conditional"]
    assert "unconditional" in capsys.readouterr().out
    output.unlink()
    for options, message in (
        (["--likelihood_samples", "1"], "likelihood_samples is 1; it must be at least 2"),
        (["--rtol", "0"], "rtol is 0.0; it must be in"),
        (["--probe", str(model)], "one at a time"),
        (["--image_column", "picture"], "digits has no column 'picture'"),
    ):
        with refusal(capsys, message, untouched=tmp_path):
            evaluate.main([*arguments, *options])


def test_labels_that_the_pipeline_has_not(grey_pipe, tmp_path, capsys):
    few = randomize(SDDiTTransformer2DModel(**TINY | {"in_channels": 1}))
    SDDiTPipeline(few, InterpolantScheduler()).save_pretrained(tmp_path / "four")
    with refusal(capsys, "is out of range; allowed are integers from 0 to 3", untouched=tmp_path):
        evaluate.main(["--likelihood", str(tmp_path / "four"), "digits"])
