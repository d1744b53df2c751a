"""Presets, and the changes to them."""

import pytest
import torch
from conftest import NETWORKS

from sddit_diffusers import PRESETS, EDMHeunScheduler, PlainDiTTransformer2DModel
from sddit_diffusers.models.presets import read_changes
from sddit_diffusers.training.methods import METHODS
from sddit_diffusers.training.objective import Objective

SIT = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # its Table 9
MILLIONS = {"S": 33, "B": 130, "L": 458, "XL": 675}  # its Table 1


@pytest.mark.parametrize("size", SIT)
def test_sit_s_networks_are_the_published_ones(size):
    network = METHODS["dit"].network(PRESETS[f"SiT-{size}/2"])
    with torch.device("meta"):
        model = METHODS["dit"].transformer(**network)
    layers, width, heads = SIT[size]
    assert (len(model.transformer_blocks), model.proj_out.in_features) == (layers, width)
    assert model.config.num_attention_heads == heads
    assert model.num_parameters() / 1e6 == pytest.approx(MILLIONS[size], abs=1)
    t = torch.tensor(0.25)
    assert model.config.timestep_scale * 1000 * t + model.config.timestep_shift == 1 - t


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_sit_s_sizes(method):
    network = METHODS[method].network(PRESETS["SiT-S/2"])
    with torch.device("meta"):
        model = METHODS[method].transformer(**network)
    assert model.config.timestep_scale == -1e-3 and model.config.timestep_shift == 1


def test_a_resumed_run_must_have_the_same_time():
    network, process = NETWORKS["dit"], EDMHeunScheduler()
    plain, scaled = (
        Objective(PlainDiTTransformer2DModel(**network, **changes), process).identity()
        for changes in ({}, {"timestep_scale": 1e-3})
    )
    assert scaled == plain | {"timestep_scale": 1e-3}
    assert "timestep_shift" not in plain  # version 0.1.0 had no such settings


@pytest.mark.parametrize("preset", ["digits", "SiT-S/2"])
def test_changes_of_the_time(preset):
    changes = read_changes('{"timestep_scale": 1e-3, "timestep_shift": -2}', PRESETS[preset])
    assert changes == {"timestep_scale": 0.001, "timestep_shift": -2}
    for value in ('"1"', "NaN", "true", "null"):
        with pytest.raises(ValueError, match="transformer: timestep_shift is .*; it must be a"):
            read_changes(f'{{"timestep_shift": {value}}}', PRESETS[preset])
    with pytest.raises(ValueError, match="num_layers is 2.5; it must be a whole number"):
        read_changes('{"num_layers": 2.5}', PRESETS[preset])
    with pytest.raises(ValueError, match="there are .*, mlp_ratio, timestep_scale, timestep_shift") as error:
        read_changes('{"layers": 2}', PRESETS["digits"])
    assert str(error.value).count("mlp_ratio") == 1
