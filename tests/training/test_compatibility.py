"""What version 0.1.0 left: its losses, pipelines and a checkpoint. Its code made `saved-0.1.0`."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_sddit
from sddit_diffusers import SDDiTPipeline
from sddit_diffusers.training.metrics import read_metrics

EARLIER = Path(__file__).parents[1] / "saved-0.1.0"
METHODS = ["sddit", "dit", "maskdit", "mdt"]
DECODER = dict(num_decoder_layers=1, decoder_num_attention_heads=2, decoder_attention_head_dim=8)
DECODERS = {"sddit": DECODER, "maskdit": DECODER, "mdt": {"num_decoder_layers": 1}}
RECIPE = dict(learning_rate=0.003, lr_scheduler="constant", p_mean=-1.2, p_std=1.2, sigma_data=0.5)  # its own
NEAR = dict(rel=1e-5, abs=1e-7)  # other processors sum in another order


def train(method, folder, *options):
    network = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8) | DECODERS.get(method, {})
    head = ["--num_prototypes", "32", "--head_hidden_dim", "16", "--head_bottleneck_dim", "8"]
    arguments = ["--method", method, "--transformer", json.dumps(network), "--max_train_steps", "20"]
    arguments += ["--train_batch_size", "16", "--evaluation_steps", "0", "--num_validation_images", "0"]
    arguments += [f"--{name}={value}" for name, value in RECIPE.items()]
    train_sddit.main(
        [*arguments, *(head if method == "sddit" else []), "--output_dir", str(folder), *options]
    )
    return read_metrics(folder / "metrics.jsonl")


def assert_near(rows, earlier):
    for row, before in zip(rows, earlier, strict=True):
        for name, value in before.items():
            assert row[name] == pytest.approx(value, **NEAR), f"{name} of step {row['step']}"


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_before(method, tmp_path):
    assert_near(train(method, tmp_path / "run"), read_metrics(EARLIER / method / "metrics.jsonl"))


def test_a_checkpoint_of_before_goes_on(tmp_path):
    shutil.copytree(EARLIER / "sddit/checkpoint-10", tmp_path / "run/checkpoint-10")
    rows = train("sddit", tmp_path / "run", "--resume_from_checkpoint", "latest")
    assert_near(rows, read_metrics(EARLIER / "sddit/metrics.jsonl")[10:])


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    options = dict(guidance_scale=1.5, num_inference_steps=4, generator=generators, output_type="pt")
    return pipe([3, 7], **options).images


@pytest.mark.parametrize("method", METHODS)
def test_pipelines_of_before_give_their_images(method):
    expected = load_file(EARLIER / "images.safetensors")[method]
    torch.testing.assert_close(
        sample(SDDiTPipeline.from_pretrained(EARLIER / method)), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.thorough
@pytest.mark.process
def test_the_code_beside_a_pipeline_of_before_still_runs(tmp_path):
    """In a process that cannot import the package."""
    program = f"""
import sys
sys.path.append({sysconfig.get_path("purelib")!r})
sys.modules["sddit_diffusers"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(EARLIER / "sddit")!r}, trust_remote_code=True)
generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
options = dict(guidance_scale=1.5, num_inference_steps=4, generator=generators, output_type="pt")
torch.save(pipe([3, 7], **options).images, {str(tmp_path / "images.pt")!r})
"""
    subprocess.run([sys.executable, "-S", "-c", program], check=True, capture_output=True, cwd=tmp_path)
    expected = load_file(EARLIER / "images.safetensors")["sddit"]
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), expected, rtol=1e-5, atol=1e-5)
