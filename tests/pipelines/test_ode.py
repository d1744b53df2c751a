"""dopri5 on a pipeline's ODE: against the fixed-step samplers, closed forms and a naive field."""

import math
import sys

import pytest
import torch
from conftest import TINY, randomize
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel
from sddit_diffusers.pipelines.ode import Dopri5Sampler, VelocityField, dopri5
from sddit_diffusers.pipelines.sampling import generators
from sddit_diffusers.schedulers.scheduling_interpolant import InterpolantScheduler

SCHEDULERS = {
    # Heun's 200 steps are fine ones; the network's sinusoids of time turn slowly.
    "edm": EDMHeunScheduler(sigma_min=0.05, sigma_max=3.0),
    "linear": InterpolantScheduler(num_train_timesteps=10),
    "gvp score": InterpolantScheduler(path="gvp", prediction_type="score"),
}


def small_pipe(scheduler, scale=0.25):
    """A random network that is smooth in its input, as trained ones are."""
    transformer = randomize(SDDiTTransformer2DModel(**TINY)).double()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(scale)
    pipe = SDDiTPipeline(transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.long
@pytest.mark.parametrize("name", ["edm", "linear"])
def test_dopri5_and_heun_come_to_the_same_images(name):
    pipe = small_pipe(SCHEDULERS[name])
    sampler = Dopri5Sampler(pipe, rtol=1e-7, atol=1e-7)
    found = sampler([0, 3], generator=generators(range(2)), output_type="latent").images
    arguments = {"generator": generators(range(2)), "output_type": "latent", "num_inference_steps": 200}
    expected = pipe([0, 3], **arguments).images
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-4)
    other = pipe([1, 3], **arguments | {"generator": generators(range(2))}).images
    assert (other[0] - expected[0]).abs().max() > 2e-3  # the class acts


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_field_is_the_guided_velocity(name):
    """dx/dt by the definition of the process, of the D that the network tells."""
    pipe, x = small_pipe(SCHEDULERS[name]), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    scheduler, t = pipe.scheduler, torch.tensor(0.4, dtype=torch.float64)
    field = VelocityField(pipe, [0, 3], guidance_scale=3.0, guidance_interval=(0.1, 1.0))

    def velocity(labels):
        scaled = scheduler.precondition_inputs(x, t)
        output = pipe.transformer(scaled, scheduler.precondition_noise(t), torch.tensor(labels)).sample
        denoised = scheduler.precondition_outputs(x, output, t)
        if name == "edm":
            return (x - denoised) / t
        one = torch.ones((), dtype=torch.float64)
        alpha, sigma = scheduler.noised(one, 0 * one, t), scheduler.noised(0 * one, one, t)
        noise = (x - alpha * denoised) / sigma
        h = 1e-6
        ahead, behind = (scheduler.noised(denoised, noise, t + step) for step in (h, -h))
        return (ahead - behind) / (2 * h)

    conditional, null = velocity([0, 3]), velocity([4, 4])
    with torch.no_grad():
        torch.testing.assert_close(field(t, x), null + 3 * (conditional - null), rtol=1e-6, atol=1e-6)
        assert field.evaluations == 1
        field = VelocityField(pipe, [0, 3], guidance_scale=3.0, guidance_interval=(5.0, math.inf))
        torch.testing.assert_close(field(t, x), conditional, rtol=1e-6, atol=1e-6)


def test_an_interval_of_guidance_is_the_samplers():
    """The solver's steps end where guidance begins and ends."""
    pipe = small_pipe(SCHEDULERS["edm"])
    guidance = {"guidance_scale": 4.0, "guidance_interval": (0.3, 2.0)}
    sampler = Dopri5Sampler(pipe, rtol=1e-4, atol=1e-4)
    found = sampler([0], generator=generators([0]), output_type="latent", **guidance).images
    assert VelocityField(pipe, [0], **guidance).jumps == [0.3, 2.0]
    assert VelocityField(pipe, [0], guidance_interval=(0.3, 2.0)).jumps == []
    expected, plain = (
        pipe([0], generator=generators([0]), output_type="latent", num_inference_steps=100, **options).images
        for options in (guidance, {})
    )
    assert (found - expected).abs().max() < 0.1 * (plain - expected).abs().max()


@pytest.mark.parametrize("power", [1, 0.001])  # the solver tries a long first step on a slow field
def test_the_solver_is_exact_both_ways_and_stays_within(power):
    asked = []

    def derivative(t, x):
        asked.append(t.item())
        return -power * x / t  # x t^power is constant

    start = torch.tensor([[2.0, -3.0]], dtype=torch.float64)
    for ends in ((0.5, 4.0), (4.0, 0.5)):
        found = dopri5(derivative, start, *ends, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found, start * (ends[0] / ends[1]) ** power, rtol=1e-8, atol=0)
    assert min(asked) == 0.5 and max(asked) == 4.0


def test_steps_end_where_the_derivative_jumps():
    """x' = 1 before 0.3 and -1 after."""
    asked = []

    def derivative(t, x):
        asked.append(t.item())
        return torch.where(t < 0.3, 1.0, -1.0) * torch.ones_like(x)

    counts = []
    for jumps in ([0.3], []):
        asked.clear()
        found = dopri5(derivative, torch.zeros(2, dtype=torch.float64), 0.0, 1.0, 1e-9, 1e-9, jumps)
        torch.testing.assert_close(found, torch.full_like(found, -0.4), rtol=0, atol=1e-6)
        counts.append(len(asked))
    assert counts[0] < counts[1] / 2


def test_the_last_step_is_to_the_data_where_the_scheduler_ends_there():
    images = {}
    for final in ("zero", "sigma_min"):
        pipe = small_pipe(EDMHeunScheduler(sigma_min=0.5, final_sigmas_type=final))
        sampler = Dopri5Sampler(pipe)
        images[final] = sampler([0], generator=generators([0]), output_type="latent").images
        if final == "zero":
            evaluations = sampler.evaluations
    assert sampler.evaluations == evaluations - 1
    x, sigma = images["sigma_min"], torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        denoised = VelocityField(pipe, [0]).denoised(sigma, x)
    torch.testing.assert_close(images["zero"], denoised)


def test_evaluations_are_those_of_the_network():
    pipe, calls = small_pipe(SCHEDULERS["linear"]), []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(None))
    sampler = Dopri5Sampler(pipe)
    for _ in range(2):  # of the last call alone
        calls.clear()
        sampler([0], generator=generators([0]))
        assert sampler.evaluations == len(calls) > 7


def test_what_is_not_finite_names_its_seed():
    pipe = small_pipe(SCHEDULERS["linear"])
    torch.nn.init.constant_(next(pipe.transformer.parameters()), torch.nan)
    with pytest.raises(FloatingPointError, match=r"image 0 \(seed 7\).* not finite"):
        Dopri5Sampler(pipe)([0, 1], generator=generators([7, 8]))


def test_tolerances_that_cannot_be_kept():
    def derivative(t, x):
        return torch.where(t < 0.5, 1e15 * torch.randn(x.shape, dtype=x.dtype), 0.0 * x)

    with pytest.raises(FloatingPointError, match="no step that keeps to rtol 1e-09 and atol 1e-12"):
        dopri5(derivative, torch.ones(3, dtype=torch.float64), 1.0, 0.0, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_other_schedulers_are_refused(pipe, scheduler):
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=f"{type(scheduler).__name__} tells no velocity"):
        Dopri5Sampler(pipe)


def test_without_torchdiffeq(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ValueError, match=r"torchdiffeq: pip install 'sddit-diffusers\[ode\]'"):
        Dopri5Sampler(pipe)
