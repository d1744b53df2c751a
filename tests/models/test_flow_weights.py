"""Weights of SiT and REPA: pipelines that compute and sample what their authors' code does."""

import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.hooks import FirstBlockCacheConfig
from peft import LoraConfig
from their_networks import (
    HEADS,
    originals,
    projectors,
    repa_euler,
    repa_velocity,
    run,
    sit_euler,
    sit_velocity,
)

from sddit_diffusers import PlainDiTTransformer2DModel, SDDiTPipeline, SDDiTTransformer2DModel
from sddit_diffusers.schedulers.scheduling_interpolant import InterpolantScheduler

LABELS = [3, 1]


def weights_of(origin):
    return originals() if origin == "sit" else originals(out_channels=3) | projectors()


def save(weights, path):
    """As their training scripts; only the averaged weights are those that are given."""
    torch.save({"model": {name: weight + 1 for name, weight in weights.items()}, "ema": weights}, path)


@pytest.fixture(params=["sit", "repa"])
def origin(request):
    return request.param


@pytest.fixture
def pipe(origin, tmp_path, capsys):
    save(weights_of(origin), tmp_path / "theirs.pt")
    run(tmp_path / "theirs.pt", tmp_path / "out", "--origin", origin, "--transformer", HEADS)
    pipe = SDDiTPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def noise():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def euler(pipe, noise, **arguments):
    """Samples of the pipeline, by Euler's method unless it has another scheduler."""
    if isinstance(pipe.scheduler, InterpolantScheduler):
        pipe.scheduler = InterpolantScheduler.from_config(pipe.scheduler.config, solver="euler")
    arguments = {"num_inference_steps": 5, "guidance_scale": 1.5} | arguments
    return pipe(LABELS, latents=noise, output_type="latent", **arguments).images


@torch.no_grad()
def test_velocity_is_theirs(origin, pipe, noise):
    weights, scheduler = weights_of(origin), pipe.scheduler
    assert (scheduler.config.path, scheduler.config.prediction_type) == ("linear", "flow_prediction")
    scheduler.set_timesteps(timesteps=[1000.0, 730.0, 500.0, 1.0])
    assert len(scheduler.timesteps) == 7
    for timestep in scheduler.timesteps:
        t = timestep / 1000
        actual = pipe.transformer(noise, timestep, torch.tensor(LABELS), return_dict=False)[0]
        for i, label in enumerate(LABELS):
            if origin == "sit":  # whose time begins at noise
                expected = -sit_velocity(weights, noise[i], 1 - t, label)
            else:
                expected = repa_velocity(weights, noise[i], t, label)
            torch.testing.assert_close(actual[i], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_sit_s_outputs_need_not_be_doubled(noise, tmp_path):
    weights = originals(out_channels=3)
    save(weights, tmp_path / "a.pt")
    run(tmp_path / "a.pt", tmp_path / "a.safetensors", "--origin", "sit", "--transformer", HEADS)
    model = PlainDiTTransformer2DModel.from_single_file(tmp_path / "a.safetensors")
    expected = -sit_velocity(weights, noise[0], torch.tensor(0.7), 2)
    actual = model(noise[:1], 300.0, torch.tensor([2])).sample[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_samples_are_theirs(origin, pipe, noise):
    actual = euler(pipe, noise)
    sampler = {"sit": sit_euler, "repa": repa_euler}[origin]
    for i, label in enumerate(LABELS):
        expected = sampler(weights_of(origin), noise[i], label, steps=5, guidance=1.5)
        torch.testing.assert_close(actual[i], expected, rtol=0, atol=1e-4)


def test_diffusers_flow_scheduler_swaps_in(pipe, noise):
    plain = euler(pipe, noise)
    interpolant = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(interpolant.config)
    actual, sigmas = euler(pipe, noise), pipe.scheduler.sigmas[:-1].tolist()
    assert len(sigmas) == 5 and not torch.allclose(actual, plain, atol=1e-3)  # its steps are others
    pipe.scheduler = interpolant
    expected = euler(pipe, noise, num_inference_steps=None, sigmas=sigmas)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_sde_samples(pipe, noise):
    ode = euler(pipe, noise)
    pipe.scheduler = InterpolantScheduler.from_config(pipe.scheduler.config, diffusion="sigma")
    sde = euler(pipe, noise, generator=torch.Generator().manual_seed(0))
    assert sde.isfinite().all() and not torch.allclose(sde, ode, atol=0.1)


def test_lora_attaches(pipe, noise):
    expected = euler(pipe, noise)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.allclose(euler(pipe, noise), expected, atol=1e-3)
    pipe.transformer.disable_adapters()
    torch.testing.assert_close(euler(pipe, noise), expected)


def test_first_block_cache_runs(pipe, noise):
    expected, ran = euler(pipe, noise), []
    pipe.transformer.transformer_blocks[1].norm1.register_forward_hook(lambda *_: ran.append(1))
    for threshold, evaluations in ((0.0, 5), (1e6, 1)):
        ran.clear()
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        actual = euler(pipe, noise)
        pipe.transformer.disable_cache()
        assert len(ran) == evaluations
        assert torch.allclose(actual, expected, atol=1e-4) == (evaluations == 5)


def test_what_is_not_used_is_told(origin, tmp_path, capsys):
    save(weights_of(origin), tmp_path / "theirs.pt")
    run(tmp_path / "theirs.pt", tmp_path / "out", "--origin", origin, "--transformer", HEADS)
    first, title, *unused = capsys.readouterr().out.splitlines()
    assert "PlainDiTTransformer2DModel" in first and title.endswith("but not used:")
    expected = r"  final_layer.linear.* \(variance\)" if origin == "sit" else r"  projectors\."
    assert unused and all(re.match(expected, line) for line in unused)


def test_a_single_file_tells_its_scheduler_and_becomes_a_pipeline(pipe, noise, tmp_path, capsys):
    capsys.readouterr()
    run(tmp_path / "out", tmp_path / "a.safetensors")
    wanted = "InterpolantScheduler(path='linear', prediction_type='flow_prediction')."
    assert capsys.readouterr().out.splitlines()[1:] == [f"It is sampled with {wanted}"]
    model = PlainDiTTransformer2DModel.from_single_file(tmp_path / "a.safetensors")
    assert model.config.timestep_scale == pipe.transformer.config.timestep_scale
    assert model.config.timestep_shift == pipe.transformer.config.timestep_shift
    run(tmp_path / "a.safetensors", tmp_path / "again")
    again = SDDiTPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    assert euler(again, noise).equal(euler(pipe, noise))


def test_a_start_for_sddit(origin, tmp_path):
    weights = weights_of(origin)
    save(weights, tmp_path / "theirs.pt")
    run(tmp_path / "theirs.pt", tmp_path / "out", "--origin", origin, "--method", "sddit",
        "--transformer", HEADS)  # fmt: skip
    pipe = SDDiTPipeline.from_pretrained(tmp_path / "out")
    model = pipe.transformer
    assert isinstance(model, SDDiTTransformer2DModel) and isinstance(pipe.scheduler, InterpolantScheduler)
    assert model.config.timestep_scale == {"sit": -1e-3, "repa": 1e-3}[origin]
    assert model.transformer_blocks[2].ff[2].weight.equal(weights["blocks.2.mlp.fc2.weight"])


def test_repa_s_earlier_files_have_their_blocks_in_two_rows(noise, tmp_path):
    weights = weights_of("repa")
    earlier = {re.sub(r"^blocks\.2", "decoder_blocks.0", name): weight for name, weight in weights.items()}
    outputs = []
    for name, each in (("now", weights), ("earlier", earlier)):
        save(each, tmp_path / f"{name}.pt")
        run(tmp_path / f"{name}.pt", tmp_path / f"{name}.safetensors", "--transformer", HEADS)
        model = PlainDiTTransformer2DModel.from_single_file(tmp_path / f"{name}.safetensors")
        outputs.append(model(noise, 300.0, torch.tensor(LABELS)).sample)
    assert outputs[0].equal(outputs[1])
