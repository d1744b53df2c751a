import json
import math
import re

import numpy as np
import pytest
import torch
from bad_input import refusal
from conftest import TINY, randomize
from diffusers import AutoencoderKL

import sddit_diffusers.evaluation.probe as probe_module
from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel, evaluate
from sddit_diffusers.data.pictures import ImageDataset
from sddit_diffusers.evaluation.probe import encoder_features, linear, nearest_neighbours, probe, read_samples


@pytest.fixture
def grey_pipe():
    transformer = randomize(SDDiTTransformer2DModel(**TINY | {"in_channels": 1}))
    return SDDiTPipeline(transformer, EDMHeunScheduler())


@torch.no_grad()
def test_features_are_the_encoders_with_the_null_label(grey_pipe):
    x0 = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noised = x0 + 0.3 * torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = encoder_features(grey_pipe, noised, 0.3)
    c_in = 1 / math.sqrt(0.3**2 + 0.5**2)

    def encoded(labels):
        output = grey_pipe.transformer(c_in * noised, math.log(0.3) / 4, torch.tensor(labels))
        return output.encoder_hidden_states

    tokens = encoded([4] * 5)  # of four classes the null class
    torch.testing.assert_close(found["[CLS]"], tokens[:, 0])
    torch.testing.assert_close(found["patches"], tokens[:, 1:].mean(1))
    torch.testing.assert_close(found["input"], noised.flatten(1))
    assert (encoded([0] * 5)[:, 0] - found["[CLS]"]).abs().max() > 1e-3  # a label would be seen


def test_probes_find_classes_that_are_there_and_no_others():
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    features = rng.normal(size=(300, 6)) + 4 * np.eye(6)[labels]
    for classify in (nearest_neighbours, linear):
        found = classify(features[:200], labels[:200], features[200:])
        assert (found == labels[200:]).mean() > 0.95
        found = classify(rng.normal(size=(200, 6)), labels[:200], rng.normal(size=(100, 6)))
        assert (found == labels[200:]).mean() < 0.5
    # Nearness is by angle, and near ones count more: two at 0 degrees against three at 50.
    angles = np.radians([0, 1, 50, 50, 50])
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * [[1], [9], [1], [2], [3]]
    assert nearest_neighbours(points, np.array([0, 0, 1, 1, 1]), np.array([[7.0, 0.1]])) == [0]


@pytest.mark.long
def test_accuracies_are_of_held_out_pictures_by_noise_level(grey_pipe):
    digits = ImageDataset("digits", "image", "label", 1, 8)
    rows = probe(grey_pipe, digits, [0.002, 20.0], num_samples=600)
    assert len(rows) == 2 * 3 * 2
    of_input = {row["sigma"]: row["accuracy"] for row in rows if row["features"] == "input"}
    assert of_input[0.002] > 0.9 and of_input[20.0] < 0.4
    assert rows == probe(grey_pipe, digits, [0.002, 20.0], num_samples=600, batch_size=64)
    with pytest.raises(ValueError, match="4 pictures are too few for a probe; at least 5"):
        probe(grey_pipe, digits, [1.0], num_samples=4)
    with pytest.raises(ValueError, match="digits has no labels to probe for"):
        probe(grey_pipe, ImageDataset("digits", "image", "", 1, 8), [1.0], num_samples=40)


def test_figures_do_not_depend_on_the_batch_size_or_on_other_levels(monkeypatch):
    """To the bit of the features, for widths that are multiples of 16 and samples of any size."""
    widths = {"in_channels": 1, "attention_head_dim": 16, "sample_size": 6}
    pipe = SDDiTPipeline(randomize(SDDiTTransformer2DModel(**TINY | widths)), EDMHeunScheduler())
    digits = ImageDataset("digits", "image", "label", 1, 6)
    seen = {}
    monkeypatch.setitem(probe_module.PROBES, "linear", lambda features, labels, held_out: seen.setdefault(
        key, []
    ).append((features, held_out)) or labels[: len(held_out)])  # fmt: skip
    for key, sigmas, batch_size in (  # noqa: B007, the probe's stand-in reads key
        ("a", [1.0], 64),
        ("b", [1.0], 7),
        ("c", [3.0, 1.0], 100),
    ):
        probe(pipe, digits, sigmas, 120, batch_size)
    assert [len(parts) for parts in seen.values()] == [3, 3, 6]
    for one, other, third in zip(seen["a"], seen["b"], seen["c"][3:], strict=True):
        for i in range(2):
            np.testing.assert_array_equal(one[i], other[i])
            np.testing.assert_array_equal(one[i], third[i])


def test_an_encoder_that_is_not_finite_has_no_figures(grey_pipe):
    for parameter in grey_pipe.transformer.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    with pytest.raises(FloatingPointError, match="at sigma 0.3 is not finite"):
        probe(grey_pipe, ImageDataset("digits", "image", "label", 1, 8), [0.3], 20)


def test_pictures_are_encoded_where_the_pipeline_has_a_vae():
    vae = AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=3, scaling_factor=0.3,
    )  # fmt: skip
    pipe = SDDiTPipeline(SDDiTTransformer2DModel(**TINY), EDMHeunScheduler(), vae=vae)
    digits = ImageDataset("digits", "image", "label", 3, 16)
    with torch.no_grad():
        x0, labels = read_samples(pipe, digits, torch.arange(3), batch_size=2)
        expected = vae.encode(digits.__getitems__([0, 1, 2])[0]).latent_dist.mean * 0.3
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [0, 1, 2]


def test_the_program_prints_and_saves_them(grey_pipe, tmp_path, capsys):
    grey_pipe.save_pretrained(tmp_path / "model")
    options = ["--probe", tmp_path / "model", "digits", "--probe_samples", 200, "--probe_sigmas", 0.1, 1]
    evaluate.main([str(option) for option in [*options, "--output", tmp_path / "probe.json"]])
    printed = capsys.readouterr().out
    assert "accuracy on 40 of 200 pictures" in printed
    record = json.loads((tmp_path / "probe.json").read_text())
    first = record["accuracies"][0]
    assert re.search(rf"^0.1 +{first['accuracy']:.1%}", printed, re.M) and first["sigma"] == 0.1
    with refusal(capsys, "The pipeline '/none' cannot be loaded"):
        evaluate.main(["--probe", "/none", "digits"])
