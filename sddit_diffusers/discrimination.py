"""Self-supervised discrimination (Sec. 3.4): projection head, teacher, centers, and the loss L_D.

The student's tokens, as distributions over K prototypes, are to agree with those of a teacher that sees the
same image almost without noise. The teacher is an exponential moving average (EMA) of the student's encoder
and head.

Shapes: b batch, k visible patches, D encoder width, K prototypes. Token 0 is [CLS].
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .transformer_sddit import SDDiTTransformer2DModel


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
        features = self.mlp(tokens).float()
        # In float32 also under autocast: what bf16 rounds off a cosine is up to a tenth of a nat once divided
        # by a temperature of 0.04, and the squares in a norm can overflow fp16.
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(F.normalize(features, dim=-1), F.normalize(self.prototypes.float(), dim=-1))


class Teacher(nn.Module):
    """T and its head j': the EMA of the student's encoder and head, moved by a diffusers `EMAModel`.

    Its weights are the `EMAModel`'s shadow parameters themselves, so there is one copy of them; none takes a
    gradient.
    """

    def __init__(self, transformer: SDDiTTransformer2DModel, head: ProjectionHead):
        super().__init__()
        self.encoder = SDDiTTransformer2DModel.from_config(transformer.config, num_decoder_layers=0)
        self.head = copy.deepcopy(head)
        self.requires_grad_(False)
        # An update_after_step of -1 leaves out EMAModel's warm-up, whose first step would copy the student.
        self.ema = EMAModel([], update_after_step=-1, foreach=True)
        for shadow, parameter in zip(*self._pair_with(transformer, head), strict=True):
            shadow.copy_(parameter.detach())  # theta' = theta, the first line of Algorithm A1

    def update(self, transformer: SDDiTTransformer2DModel, head: ProjectionHead, momentum: float) -> None:
        """theta' = beta theta' + (1 - beta) theta (Algorithm A1); beta 1 freezes, 0 copies to rounding."""
        self.ema.shadow_params, parameters = self._pair_with(transformer, head)
        self.ema.decay = self.ema.min_decay = momentum
        self.ema.step(parameters)

    def _pair_with(self, transformer: nn.Module, head: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's parameters, and the student's of the same names."""
        student = dict(transformer.named_parameters("encoder")) | dict(head.named_parameters("head"))
        shadows = dict(self.named_parameters())
        return list(shadows.values()), [student[name] for name in shadows]


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
    def add(self, teacher_logits: Tensor) -> None:
        """Collects a batch of logits `[b, tokens, K]`."""
        self.total += teacher_logits.mean(dim=(0, 1))
        self.batches += 1

    @torch.no_grad()
    def move(self, momentum: float, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """C = m C + (1 - m) mean(logits) (Algorithm A1); `reduce` averages a tensor over the processes."""
        if self.batches == 0:
            return
        mean = self.total / self.batches
        if reduce is not None:
            mean = reduce(mean)
        self.value.mul_(momentum).add_(mean, alpha=1 - momentum)
        self.total.zero_()
        self.batches = 0


def cross_entropy(
    teacher_logits: Tensor,
    student_logits: Tensor,
    center: Tensor,
    teacher_temperature: float,
    student_temperature: float,
) -> tuple[Tensor, Tensor]:
    """H of Algorithm A1 with Eqs. 10 and 11, and the teacher's entropy, which is its smallest possible value.

    Logits `[b, tokens, K]`; both results are means over batch and tokens, in nats.
    """
    teacher = F.log_softmax((teacher_logits.detach() - center) / teacher_temperature, dim=-1)
    student = F.log_softmax(student_logits / student_temperature, dim=-1)
    probabilities = teacher.exp()
    return -(probabilities * student).sum(-1).mean(), -(probabilities * teacher).sum(-1).mean()


def teacher_momentum(step: int, max_steps: int, start: float = 0.996, end: float = 0.999) -> float:
    """beta at a step: a cosine from `start` to `end` over the run (Table A1).

    # Paper silent: the curve is DINO's.
    """
    progress = min(step / max_steps, 1.0)
    return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2


def teacher_temperature(step: int, warmup_steps: int, start: float = 0.09, end: float = 0.099) -> float:
    """tau_T at a step: a line from `start` to `end` over the warm-up, then `end` (Table A1)."""
    return end if step >= warmup_steps else start + (end - start) * step / warmup_steps
