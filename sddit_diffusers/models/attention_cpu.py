"""Self-attention in bfloat16 on a CPU, where `scaled_dot_product_attention` is slow, above all backward.

Plain matrix products, of a few heads at a time, so that their scores stay in the cache; the scores are taken
again in the backward pass. Scores and probabilities are rounded to bfloat16, as in attention written out
under autocast; `scaled_dot_product_attention` keeps them in float32.

Shapes: g images times heads, n tokens, d head dim.
"""

import torch
from torch import Tensor, nn

from .transformer_sddit import SDDiTAttention, SDDiTAttnProcessor

_SCORES = 2**20  # that are there at once


class CPUAttnProcessor(SDDiTAttnProcessor):
    """[`SDDiTAttnProcessor`] with this file's attention for bfloat16 on a CPU."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.device.type != "cpu" or query.dtype != torch.bfloat16:
            return super().attend(query, key, value)
        groups = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [g, n, d]
        attended = attention(*groups)
        return attended.unflatten(0, (len(query), -1)).transpose(1, 2)  # [b, n, heads, d]


def use_cpu_attention(model: nn.Module) -> None:
    """Gives all attention of a model [`CPUAttnProcessor`]."""
    for module in model.modules():
        if isinstance(module, SDDiTAttention):
            module.set_processor(CPUAttnProcessor())


def _probabilities(query: Tensor, key: Tensor) -> Tensor:
    scores = torch.baddbmm(
        query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=query.shape[-1] ** -0.5
    )
    return scores.softmax(-1)


def _parts(query: Tensor) -> list[slice]:
    groups, n, _ = query.shape
    size = max(1, _SCORES // n**2)
    return [slice(i, i + size) for i in range(0, groups, size)]


@torch.library.custom_op("sddit::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V; all are `[g, n, d]`."""
    attended = torch.empty_like(query)
    for part in _parts(query):
        torch.bmm(_probabilities(query[part], key[part]), value[part], out=attended[part])
    return attended


@torch.library.custom_op("sddit::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    none, scale = query.new_empty(()), query.shape[-1] ** -0.5
    for part in _parts(query):
        q, k, v, g = query[part], key[part], value[part], grad[part]
        grad_q, grad_k, grad_v = (tensor[part] for tensor in grads)
        p = _probabilities(q, k)  # [., n, n]
        torch.bmm(p.transpose(1, 2), g, out=grad_v)
        grad_p = torch.bmm(g, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
        torch.baddbmm(none, grad_scores, k, beta=0, alpha=scale, out=grad_q)
        torch.baddbmm(none, grad_scores.transpose(1, 2), q, beta=0, alpha=scale, out=grad_k)
    return grads


@attention.register_fake
def _(query, key, value):
    return torch.empty_like(query)


@_attention_backward.register_fake
def _(grad, query, key, value):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _backward(ctx, grad):
    return _attention_backward(grad.contiguous(), *ctx.saved_tensors)


attention.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
