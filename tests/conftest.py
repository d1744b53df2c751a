"""Small real components that the tests share."""

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel, prepare_latents

TINY = dict(
    sample_size=8,
    patch_size=2,
    in_channels=3,
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=8,
    num_decoder_layers=2,
    decoder_num_attention_heads=2,
    decoder_attention_head_dim=6,
    num_classes=4,
)


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights without the zeros of the initialisation, behind which a mistake would hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture
def transformer():
    return randomize(SDDiTTransformer2DModel(**TINY))


@pytest.fixture
def pipe(transformer):
    pipe = SDDiTPipeline(
        transformer,
        EDMHeunScheduler(),
        id2label={0: "cat", 1: "golden retriever, retriever", 2: "goldfish", 3: "truck"},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_latents(folder, rows, shard_size):
    """Latents of a source of ten classes, sorted by class, as the program writes them.

    The moments are made up: the means of row 4321 are 4 in the first channel and 321 in the second.
    """
    source = folder.parent / f"{folder.name}-source"
    for i in range(10):
        (source / str(i)).mkdir(parents=True)
        for row in range(rows * i // 10, rows * (i + 1) // 10):
            Image.new("RGB", (4, 4)).save(source / str(i) / f"{row:06d}.png")

    class Numbers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.device, self.dtype, self.row = {"scaling_factor": 0.5}, "cpu", torch.float32, 0

        def encode(self, pixels):
            numbers = torch.arange(self.row, self.row + len(pixels)).view(-1, 1, 1, 1)
            self.row += len(pixels)
            # fp16 holds integers up to 2048.
            mean = torch.cat([numbers // 1000, numbers % 1000], dim=1).float().expand(-1, -1, 2, 2)
            posterior = type("", (), {"mean": mean, "std": torch.full_like(mean, 0.25)})
            return type("", (), {"latent_dist": posterior})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_latents, "load_vae", lambda name: Numbers())
        options = ["--dataset_name", source, "--vae", "numbers", "--output_dir", folder, "--resolution", 4]
        prepare_latents.main([str(option) for option in [*options, "--shard_size", shard_size]])
    AcceleratorState._reset_state(True)


def global_batch(parts, step, accumulation):
    """The rows of a step's global batch, from the micro-batches of each process."""
    micro_batches = range(step * accumulation, (step + 1) * accumulation)
    return [row for micro in micro_batches for part in parts for row in part[micro]]
