"""Small real components that the tests share."""

import pytest
import torch

from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel

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
