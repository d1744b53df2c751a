"""Runs on latents."""

import json

import numpy as np
import pytest
import torch
from conftest import write_latents
from diffusers import AutoencoderKL
from PIL import Image
from small_runs import NETWORK, batches_of, make_trainer, train

from sddit_diffusers import SDDiTPipeline
from sddit_diffusers.seeds import generator_for

LATENTS = json.dumps(NETWORK | {"in_channels": 2, "sample_size": 2, "patch_size": 1})


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "latents"
    write_latents(folder, 300, shard_size=64)
    return folder


def test_latents_are_drawn_anew_each_step(tmp_path, latents):
    options = ["--transformer", LATENTS, "--dataset_name", latents, "--vae", "none"]
    trainer, seen = make_trainer(tmp_path, *options), []
    trainer.engine.prepared.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    moments, labels = next(batches_of(trainer))
    for step in (0, 1):
        trainer.train_step(step, iter([(moments, labels)]))
    for step, x0 in enumerate(seen):
        noise = torch.randn(16, 2, 2, 2, generator=generator_for(0, 2, step))
        torch.testing.assert_close(x0, 0.5 * (moments[:, 0].float() + 0.25 * noise))


def test_latents_make_a_pipeline_with_their_vae(tmp_path, latents):
    """A VAE that decodes them is saved with the pipeline, which makes pictures."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16], norm_num_groups=4, latent_channels=2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    options = ["--transformer", LATENTS, "--dataset_name", latents, "--vae", tmp_path / "vae"]
    pictures = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", pictures)
    options += ["--evaluation_steps", 2, "--evaluation_samples", 5]
    options += ["--evaluation_reference", tmp_path / "pictures.npz"]
    with pytest.warns(UserWarning, match="is not the one that made the latents"):
        metrics = train(tmp_path / "run", "--max_train_steps", 2, "--num_validation_images", 20, *options)
    assert metrics[-1]["fid_pixels"] > 0
    pipe = SDDiTPipeline.from_pretrained(tmp_path / "run")
    assert pipe(["7"], num_inference_steps=2).images[0].size == (4, 4)
    assert Image.open(tmp_path / "run/samples.png").height == 2 * 66


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "latents are 2 x 2 x 2; the network takes 1 x 8 x 8"),
        (
            ["--transformer", LATENTS, "--vae", "/nowhere/vae"],
            "The VAE '/nowhere/vae' cannot be loaded: .* Name another with --vae, or",
        ),
        (
            ["--transformer", LATENTS, "--vae", "none", "--evaluation_steps", 1],
            "--evaluation_steps needs --evaluation_reference: images, or their statistics",
        ),
        (
            ["--transformer", LATENTS, "--vae", "none", "--evaluation_steps", 1]
            + ["--evaluation_reference", "digits"],
            "--evaluation_steps needs a VAE, which decodes the samples",
        ),
    ],
)
def test_latents_of_another_shape_or_vae(tmp_path, latents, options, message):
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        train(tmp_path, "--dataset_name", latents, *options)
