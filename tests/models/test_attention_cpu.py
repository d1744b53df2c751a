"""The attention for bfloat16 on CPUs, against attention as it is written."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, randomize

from sddit_diffusers import SDDiTTransformer2DModel
from sddit_diffusers.models import attention_cpu
from sddit_diffusers.models.attention_cpu import CPUAttnProcessor, attention, use_cpu_attention


@pytest.fixture
def groups():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(5, 7, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]


@pytest.mark.parametrize("scores", [1, 2 * 49, 2**20])  # a head, two heads, all heads at once
def test_equals_attention_as_it_is_written(groups, monkeypatch, scores):
    monkeypatch.setattr(attention_cpu, "_SCORES", scores)
    query, key, value = groups
    expected = (query @ key.transpose(1, 2) / 2).softmax(-1) @ value
    torch.testing.assert_close(attention(query, key, value), expected)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    ours = torch.autograd.grad((attention(query, key, value) * weight).sum(), groups)
    torch.testing.assert_close(ours, torch.autograd.grad((expected * weight).sum(), groups))


def test_its_derivative_is_the_limit_of_differences(groups):
    torch.autograd.gradcheck(attention, groups)


def test_is_an_operator_that_torch_can_trace(groups):
    torch.library.opcheck(attention, groups)


def test_training_in_bfloat16_is_as_near_to_float32_as_usual(monkeypatch):
    inputs = torch.randn(4, 3, 8, 8), torch.randn(4), torch.tensor([0, 1, 2, 3])

    def gradients(processor, dtype):
        model = randomize(SDDiTTransformer2DModel(**TINY))
        if processor:
            use_cpu_attention(model)
            assert {type(used) for used in model.attn_processors.values()} == {CPUAttnProcessor}
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            model(*inputs).sample.float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = gradients(False, torch.float32)
    # In float32 it is the usual attention, to the bit.
    assert torch.equal(gradients(True, torch.float32), exact)
    calls = []
    monkeypatch.setattr(attention_cpu, "attention", lambda *groups: calls.append(1) or attention(*groups))
    ours = gradients(True, torch.bfloat16)
    assert len(calls) == TINY["num_layers"] + TINY["num_decoder_layers"]
    usual = gradients(False, torch.bfloat16)
    assert (ours - exact).norm() < 2 * (usual - exact).norm()
    assert F.cosine_similarity(ours, exact, dim=0) > 0.999
