"""Tokens as distributions over prototypes: the projection head, centers, and the cross entropy of L_D.

Shapes: b batch, D encoder width, d width of the head's features, K prototypes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logits that are there at once: on a CPU as many as its cache holds, elsewhere enough for all cores.
_CHUNK = {"cpu": 2**21}


class ProjectionHead(nn.Module):
    """The three-layer head j and the prototypes: tokens `[..., D]` to K logits, cosines in -1..1.

    One head serves [CLS] and patches, as in iBOT. # Paper silent: widths and normalisation are DINO's, and
    nearly the initialisation. DINO's fixed deviation of 0.02 would leave the features of a small head so
    short that normalising them makes the first gradients tens of times larger.
    """

    def __init__(self, dim: int, num_prototypes: int, hidden_dim: int = 2048, bottleneck_dim: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.prototypes)  # only their directions count

    def forward(self, tokens: Tensor) -> Tensor:
        features, prototypes = self.project(tokens)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features, prototypes)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors whose products are the logits: of the tokens `[..., d]`, of the prototypes `[K, d]`.

        They are float32 also under autocast: what bf16 rounds off a cosine is up to a tenth of a nat once
        divided by a temperature of 0.04, and the squares in a norm can overflow fp16.
        """
        features = self.mlp(tokens).float()
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(features, dim=-1), F.normalize(self.prototypes.float(), dim=-1)


class Center(nn.Module):
    """Running mean of the teacher's logits, `[K]`, which keeps one prototype from winning everywhere (DINO).

    The batches of one optimizer step are collected with `add`; `move` averages them over the processes and
    moves the center once.
    """

    def __init__(self, num_prototypes: int):
        super().__init__()
        self.register_buffer("value", torch.zeros(num_prototypes))
        self.register_buffer("total", torch.zeros(num_prototypes), persistent=False)
        self.batches = 0

    @torch.no_grad()
    def add(self, mean_logits: Tensor) -> None:
        """Collects the mean of a batch's logits, `[K]`."""
        self.total += mean_logits
        self.batches += 1

    @torch.no_grad()
    def move(self, momentum: float, reduce: Callable[[Tensor], Tensor] = torch.clone) -> None:
        """C = m C + (1 - m) mean(logits) (Algorithm A1); `reduce` averages a tensor over the processes."""
        if self.batches == 0:
            return
        mean = reduce(self.total / self.batches)
        self.value.mul_(momentum).add_(mean, alpha=1 - momentum)
        self.total.zero_()
        self.batches = 0


class Agreement(NamedTuple):
    """What [`cross_entropy`] tells, means over batch and tokens, in nats."""

    loss: Tensor
    mean_logits: Tensor  # of the teacher, [K]
    entropy: Tensor | None = None  # of the teacher, the smallest loss that there could be; None if not told
    used: Tensor | None = None  # [K], 1 for prototypes that are the teacher's first choice for some token


def cross_entropy(
    teacher: tuple[Tensor, Tensor],
    student: tuple[Tensor, Tensor],
    center: Tensor,
    teacher_temperature: float,
    student_temperature: float,
    tells: bool = True,
) -> Agreement:
    """H of Algorithm A1 with Eqs. 10 and 11, a chunk of tokens at a time.

    The logits of all tokens would be the largest tensors of a step, 1.7 GB each at batch 256. They are never
    there as a whole: a chunk's gradient is taken while its logits are there; the backward pass needs none.
    The logits are float32; under autocast to bfloat16 the products that make gradients of them are rounded as
    those of any other layer.

    Args:
        teacher, student: what [`ProjectionHead.project`] gives, `[b, tokens, d]` and `[K, d]`; no gradient
            goes to the teacher's.
        center: `[K]`.
        tells: whether entropy and used prototypes are wanted.
    """
    (teacher_features, teacher_prototypes), (student_features, student_prototypes) = teacher, student
    device, rounded = center.device.type, student_features.dtype
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        rounded = torch.bfloat16  # not float16, in which gradients of a mean vanish
    with torch.autocast(device, enabled=False):
        loss, entropy, used = _CrossEntropy.apply(
            student_features.flatten(0, 1),
            student_prototypes,
            teacher_features.flatten(0, 1).detach(),
            teacher_prototypes.detach(),
            center,
            teacher_temperature,
            student_temperature,
            rounded,
            tells,
        )
        mean_logits = F.linear(teacher_features.detach().mean((0, 1)), teacher_prototypes.detach())
    return Agreement(loss, mean_logits, entropy, used) if tells else Agreement(loss, mean_logits)


class _CrossEntropy(torch.autograd.Function):
    """The loss of tokens `[n, d]`, and its gradients, which are computed with it."""

    @staticmethod
    def forward(
        ctx, features, prototypes, teacher_features, teacher_prototypes, center, tau_t, tau_s, rounded, tells
    ):
        n, wanted = len(features), any(ctx.needs_input_grad[:2])
        loss, entropy = features.new_zeros(()), features.new_zeros(())
        used = torch.zeros_like(center)
        grad_features = torch.empty_like(features, dtype=rounded) if wanted else None
        grad_prototypes = torch.zeros_like(prototypes) if wanted else None
        to_features, to_prototypes = prototypes.to(rounded), features.to(rounded)
        size = max(1, _CHUNK.get(features.device.type, 2**26) // len(prototypes))
        for i in range(0, n, size):
            part = slice(i, i + size)
            logits = torch.addmm(center, teacher_features[part], teacher_prototypes.T, beta=-1).div_(tau_t)
            t = logits.softmax(-1)
            if tells:
                used.index_fill_(0, logits.argmax(-1), 1)
                entropy += _cross(t, logits, t)
            logits = torch.mm(features[part], prototypes.T, out=logits).div_(tau_s)
            s = logits.softmax(-1)
            loss += _cross(t, logits, s)
            if wanted:
                grad_logits = s.sub_(t).div_(n * tau_s).to(rounded)  # of the mean
                torch.mm(grad_logits, to_features, out=grad_features[part])
                if rounded == grad_prototypes.dtype:
                    grad_prototypes.addmm_(grad_logits.T, to_prototypes[part])
                else:
                    grad_prototypes += grad_logits.T @ to_prototypes[part]
        ctx.save_for_backward(grad_features, grad_prototypes)
        ctx.mark_non_differentiable(entropy, used)
        return loss / n, entropy / n, used

    @staticmethod
    def backward(ctx, grad_loss, grad_entropy, grad_used):
        grad_features, grad_prototypes = ctx.saved_tensors
        grad_features = grad_features.to(grad_prototypes.dtype)
        return grad_loss * grad_features, grad_loss * grad_prototypes, *[None] * 7


def _cross(t: Tensor, logits: Tensor, probabilities: Tensor) -> Tensor:
    """-sum t ln p of all rows, `[n, K]`, where p is the softmax of the logits.

    ln p = logits - z, and the largest of a row tells its z; its t sum up to 1.
    """
    z = logits.amax(-1) - probabilities.amax(-1).log()
    return (z - torch.linalg.vecdot(t, logits)).sum()
