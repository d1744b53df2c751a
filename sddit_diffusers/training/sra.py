"""Self-representation alignment (SRA; Jiang et al., arXiv 2505.02831): an early block learns from a late one.

The student's tokens after an early block are to be those that its own average, the teacher, has after a later
block at less noise. No other network has a part.

Shapes: b batch, n patches, m patches that the student's block sees, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cli import option
from ..models.transformer_sddit import PatchTransformer2DModel, check_number, gather_tokens
from .auxiliary import AuxiliaryLoss, Process, View, check_layer, network_inputs
from .teacher import Teacher

BETA = 0.05  # of smooth L1: where squares become lengths


@dataclass
class SRAOptions:
    """The options of SRA; the defaults are the paper's and its code's."""

    _argument_group_name = "auxiliary losses: SRA"

    sra_weight: float = option(0.2, "factor of SRA's loss", low=0)
    sra_layer: int = option(0, "block whose tokens are aligned; 0: 8 of 28, and in proportion", low=0)
    sra_teacher_layer: int = option(0, "the teacher's block; 0: 20 of 28, and in proportion", low=0)
    sra_interval: float = option(
        0.2, "the teacher's time is up to so much lower, in time of the linear path", low=0, high=1
    )
    sra_momentum: float = option(0.9999, "momentum of the teacher", low=0, high=1)


class SRADraws(NamedTuple):
    """What is random in the teacher's view."""

    interval: Tensor  # [b, 1, 1, 1], how much lower its time is, of the linear path


class SRA(AuxiliaryLoss):
    """SRA: smooth L1 of a head's output for the student's tokens from the tokens of the teacher.

    The teacher sees the same image with the same noise and label, at a time that is lower by U(0, interval).
    Tokens are those of the patches without [CLS]; with a mask the teacher sees all patches, as L_D's does,
    and its tokens at the student's places count. The loss is a mean over images, patches and channels.

    # Paper silent: other processes than the linear interpolant's. Times are compared by the ratio r of noise
    to signal, r / (1 + r) being the time of the linear path, and on no process is the teacher's lower than
    where sampling ends. The code lets the weight fall after 150 epochs; here it is constant.

    Args:
        transformer: the student, which is trained.
        weight: factor of the loss, at least 0.
        layer: block of the student, counted from 1; 0 for 2/7 of the depth, rounded up.
        teacher_layer: block of the teacher; 0 for 5/7 of the depth, rounded down, at least 1. The teacher
            has no blocks behind it.
        interval: the largest difference of times, in 0..1.
        momentum: of the teacher, in 0..1.

    Raises:
        ValueError: a number out of its range, or a block that the network does not have.
    """

    name = "sra"

    def __init__(
        self,
        transformer: PatchTransformer2DModel,
        *,
        weight: float = 0.2,
        layer: int = 0,
        teacher_layer: int = 0,
        interval: float = 0.2,
        momentum: float = 0.9999,
    ):
        check_number("sra_weight", weight, low=0)
        check_number("sra_interval", interval, low=0, high=1)
        check_number("sra_momentum", momentum, low=0, high=1)
        depth = len(transformer.transformer_blocks)
        layer, teacher_layer = layer or math.ceil(2 * depth / 7), teacher_layer or max(1, 5 * depth // 7)
        check_layer("sra_layer", layer, transformer)
        check_layer("sra_teacher_layer", teacher_layer, transformer)
        super().__init__(weight)
        self.layers, self.teacher_layer = (layer,), teacher_layer
        self.interval, self.momentum = interval, momentum
        dim = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        for linear in (self.head[0], self.head[2]):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.teacher = Teacher(transformer, layers=teacher_layer)

    def draw(
        self, shape: tuple[int, ...], process: Process, generator: torch.Generator | None, device
    ) -> SRADraws:
        """By how much the teacher's times are lower."""
        return SRADraws(self.interval * torch.rand(shape[0], 1, 1, 1, generator=generator, device=device))

    def forward(self, view: View, process: Process, draws: SRADraws) -> dict[str, Tensor]:
        """`loss_sra`, in float32."""
        tokens, ids = view.layers[self.layers[0]]  # [b, m, D]
        with torch.no_grad():
            t = lower_times(process, view.t, draws.interval)
            inputs = network_inputs(process, process.noised(view.batch.x0, view.noise, t), t)
            target = self.teacher.encoder.encode(*inputs, view.class_labels)[:, view.has_cls :]  # [b, n, D]
            if ids is not None:
                target = gather_tokens(target, ids)
        aligned = self.head(tokens)
        return {"loss_sra": F.smooth_l1_loss(aligned.float(), target.float(), beta=BETA)}

    def after_step(self, transformer: nn.Module, reduce: Callable[[Tensor], Tensor], moved: bool) -> None:
        """Moves the teacher."""
        self.teacher.update(transformer, None, self.momentum if moved else 1.0)

    def identity(self) -> dict[str, int]:
        """The blocks."""
        return {"sra_layer": self.layers[0], "sra_teacher_layer": self.teacher_layer}


def lower_times(process: Process, t: Tensor, interval: Tensor) -> Tensor:
    """Times that are lower than t by `interval` on the linear path, at least the lowest of sampling.

    None is higher than t. All are of the same shape.
    """
    linear = 1 / (1 + 1 / process.ratio_of(t))  # sigma / (alpha + sigma), also at pure noise
    linear = (linear - interval).clamp(min=0)
    lower = process.time_of(linear / (1 - linear)).clamp(min=process.interval[0])
    return torch.minimum(lower, t)
