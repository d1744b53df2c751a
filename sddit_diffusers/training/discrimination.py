"""Self-supervised discrimination (Sec. 3.4): the loss L_D, its draws, schedules and options.

The student's tokens, as distributions over K prototypes, are to agree with those of a teacher that sees the
same image almost without noise. The teacher is an exponential moving average (EMA) of the student's encoder
and head. [`Discrimination`] is the second half of Algorithm A1.

Shapes: b batch, k visible patches, D encoder width, K prototypes. Token 0 is [CLS].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..cli import MOST_WIDTH, option, shortened
from ..models.transformer_sddit import SDDiTTransformer2DModel, check_number, gather_tokens
from .auxiliary import AuxiliaryLoss, Process, View, network_inputs, part_of
from .prototypes import Center, ProjectionHead, cross_entropy
from .teacher import Teacher


@dataclass
class DiscriminationOptions:
    """The options of L_D; the defaults are the paper's (Table A1)."""

    _argument_group_name = "auxiliary losses: discrimination (L_D)"

    discriminative_weight: float = option(1.0, "factor of L_D; 0 trains without teacher", low=0)
    num_prototypes: int = option(8192, "prototypes K", low=2, high=2**20)
    head_hidden_dim: int = option(2048, "hidden width of the projection head", low=1, high=MOST_WIDTH)
    head_bottleneck_dim: int = option(
        256, "width of the projection head before the prototypes", low=1, high=MOST_WIDTH
    )
    student_temperature: float = option(0.1, "the student's, tau_S", low=1e-3)
    teacher_temperature_start: float = option(0.09, "the teacher's, tau_T, at the start", low=1e-3)
    teacher_temperature_end: float = option(0.099, "the teacher's after the warm-up", low=1e-3)
    teacher_temperature_warmup_epochs: float = option(5, "epochs of this warm-up", low=0)
    teacher_momentum_start: float = option(0.996, "the teacher's, beta, at the start", low=0, high=1)
    teacher_momentum_end: float = option(0.999, "the teacher's at the end", low=0, high=1)
    teacher_sigma: str = option(
        "0.002", "noise over signal of the teacher's view, or 'student' for the student's distribution",
        metavar="SIGMA",
    )  # fmt: skip
    center_momentum: float = option(0.9, "momentum of the teacher's centers", low=0, high=1)
    discriminative_token_ratio: float = option(
        1.0, "share of the visible patches that L_D is of, at random; fewer are cheaper", low=1e-3, high=1
    )

    def check(self) -> None:
        """Raises a ValueError for a `teacher_sigma` that is neither a number above 0 nor 'student'."""
        check_teacher_sigma(self.teacher_noise())

    def teacher_noise(self) -> float | str:
        """`teacher_sigma` as [`Discrimination`] takes it."""
        try:
            return float(self.teacher_sigma)
        except ValueError:
            return self.teacher_sigma


def check_teacher_sigma(sigma: float | str) -> None:
    """Raises a ValueError for what is neither a number above 0 nor "student"."""
    is_number = isinstance(sigma, Real) and not isinstance(sigma, bool)
    if sigma != "student" and not (is_number and 0 < sigma < math.inf):
        raise ValueError(f"teacher_sigma is {shortened(sigma)}; it must be a number above 0 or 'student'.")


class DiscriminationDraws(NamedTuple):
    """What is random in the teacher's view."""

    noise: Tensor  # [b, c, h, w], of unit variance
    t: Tensor  # [b, 1, 1, 1]


class Discrimination(AuxiliaryLoss):
    """L_D: what the student's tokens say of the image is what its teacher's say (Sec. 3.4, Algorithm A1).

    Args:
        transformer: the student, which is trained.
        weight: factor of L_D, above 0.
        teacher_sigma: noise-to-signal ratio of the teacher's view, or "student" to draw its time as the
            student's is (Fig. 6).
        num_prototypes: K.
        head_hidden_dim, head_bottleneck_dim: widths of the projection head.
        student_temperature: tau_S.
        center_momentum: m_c and m_p of Algorithm A1. # Paper silent: DINO's 0.9.
        discriminative_token_ratio: share of the visible patches that L_D is of, others in each step, above 0;
            the paper's is 1. [CLS] and one patch are always there. Both heads see these tokens alone.
        teacher_temperature_start, teacher_temperature_end, teacher_temperature_warmup_epochs: of tau_T.
        teacher_momentum_start, teacher_momentum_end: of beta.

    Attributes:
        teacher_temperature, teacher_momentum: tau_T and beta of this step, which `follow` moves.

    Raises:
        ValueError: a number out of its range, a teacher noise that is neither above 0 nor "student", or a
            network that is not SD-DiT's.
    """

    name = "discriminative"

    def __init__(
        self,
        transformer: SDDiTTransformer2DModel,
        *,
        weight: float = 1.0,
        teacher_sigma: float | Literal["student"] = 0.002,
        num_prototypes: int = 8192,
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        student_temperature: float = 0.1,
        center_momentum: float = 0.9,
        discriminative_token_ratio: float = 1.0,
        teacher_temperature_start: float = 0.09,
        teacher_temperature_end: float = 0.099,
        teacher_temperature_warmup_epochs: float = 5,
        teacher_momentum_start: float = 0.996,
        teacher_momentum_end: float = 0.999,
    ):
        for name, temperature in (
            ("student_temperature", student_temperature),
            ("teacher_temperature_start", teacher_temperature_start),
            ("teacher_temperature_end", teacher_temperature_end),
        ):
            check_number(name, temperature, above=0)
        for name, momentum in (
            ("center_momentum", center_momentum),
            ("teacher_momentum_start", teacher_momentum_start),
            ("teacher_momentum_end", teacher_momentum_end),
        ):
            check_number(name, momentum, low=0, high=1)
        check_number("teacher_temperature_warmup_epochs", teacher_temperature_warmup_epochs, low=0)
        check_number("discriminative_token_ratio", discriminative_token_ratio, above=0, high=1)
        check_number("num_prototypes", num_prototypes, low=2, kind=Integral)
        check_number("head_hidden_dim", head_hidden_dim, low=1, kind=Integral)
        check_number("head_bottleneck_dim", head_bottleneck_dim, low=1, kind=Integral)
        check_teacher_sigma(teacher_sigma)
        if not isinstance(transformer, SDDiTTransformer2DModel):
            raise ValueError(
                f"Discrimination compares [CLS] and patches of SD-DiT's encoder; the network is a "
                f"{type(transformer).__name__}."
            )
        super().__init__(weight)
        self.teacher_sigma = teacher_sigma
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum
        self.token_ratio = discriminative_token_ratio
        self.temperatures = teacher_temperature_start, teacher_temperature_end
        self.warmup_epochs = teacher_temperature_warmup_epochs
        self.momenta = teacher_momentum_start, teacher_momentum_end
        self.teacher_temperature, self.teacher_momentum = teacher_temperature_start, teacher_momentum_start
        dim = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.head = ProjectionHead(dim, num_prototypes, head_hidden_dim, head_bottleneck_dim)
        self.teacher = Teacher(transformer, self.head)
        self.center_cls, self.center_patch = Center(num_prototypes), Center(num_prototypes)

    @classmethod
    def from_options(
        cls, transformer: SDDiTTransformer2DModel, options: DiscriminationOptions
    ) -> "Discrimination | None":
        """What the options ask for; None where its weight is 0."""
        if not options.discriminative_weight:
            return None
        names = [
            name for name in DiscriminationOptions.__dataclass_fields__ if name != "discriminative_weight"
        ]
        arguments = {name: getattr(options, name) for name in names}
        return cls(
            transformer,
            weight=options.discriminative_weight,
            **arguments | {"teacher_sigma": options.teacher_noise()},
        )

    def draw(
        self, shape: tuple[int, ...], process: Process, generator: torch.Generator | None, device
    ) -> DiscriminationDraws:
        """The noise and the time of the teacher's view."""
        noise = torch.randn(shape, generator=generator, device=device)
        t = process.training_times(torch.randn(shape[0], 1, 1, 1, generator=generator, device=device))
        if self.teacher_sigma != "student":
            t = torch.full_like(t, process.time_of(self.teacher_sigma))
        return DiscriminationDraws(noise, t)

    def forward(self, view: View, process: Process, draws: DiscriminationDraws) -> dict[str, Tensor]:
        """The discriminative lines of Algorithm A1.

        Returns:
            `loss_discriminative`, and where it `tells`, the signs of a collapse: `teacher_entropy` as a share
            of ln K (0: always one prototype, 1: all alike), `kl` of the student's distribution from the
            teacher's in nats, `prototypes_used` as the share of the K that are some token's first choice, and
            the norms of both centers.

        Raises:
            ValueError: a `teacher_temperature` that is not above 0.
        """
        check_number("teacher_temperature", self.teacher_temperature, above=0)
        e_s, ids = view.tokens, view.visible_ids
        if self.token_ratio < 1:
            ids = view.patch_order[:, : part_of(e_s.shape[1] - 1, self.token_ratio)]
            e_s = keep_visible(e_s, ids) if view.visible_ids is None else e_s[:, : 1 + ids.shape[1]]
        with torch.no_grad():
            # The teacher's encoder sees all patches of its own view, its head those of the student's head.
            x_t = process.noised(view.batch.x0, draws.noise, draws.t)
            inputs = *network_inputs(process, x_t, draws.t), view.class_labels
            e_t = self.teacher.encoder(*inputs).encoder_hidden_states
            # Unit features [b, 1 + k, d] and prototypes [K, d], whose products are the logits.
            j_t, prototypes_t = self.teacher.head.project(keep_visible(e_t, ids))
        j_s, prototypes_s = self.head.project(e_s)

        # L_D (Eq. 12): of the [CLS] token, and the mean over the visible patches.
        cls, patch = (
            cross_entropy(
                (j_t[:, tokens], prototypes_t),
                (j_s[:, tokens], prototypes_s),
                center.value,
                self.teacher_temperature,
                self.student_temperature,
                self.tells,
            )
            for tokens, center in ((slice(0, 1), self.center_cls), (slice(1, None), self.center_patch))
        )
        loss = patch.loss + cls.loss
        if self.training:
            self.center_cls.add(cls.mean_logits)
            self.center_patch.add(patch.mean_logits)

        if not self.tells:
            return {"loss_discriminative": loss}
        entropy = (cls.entropy + patch.entropy) / 2
        return {
            "loss_discriminative": loss,
            "teacher_entropy": entropy / math.log(len(prototypes_t)),
            "kl": loss / 2 - entropy,
            "prototypes_used": patch.used.mean(),
            "center_norm_cls": self.center_cls.value.norm(),
            "center_norm_patch": self.center_patch.value.norm(),
        }

    def follow(self, step: int, steps: int, steps_per_epoch: int) -> dict[str, float]:
        """Sets beta and tau_T."""
        self.teacher_momentum = teacher_momentum(step, steps, *self.momenta)
        warmup_steps = self.warmup_epochs * steps_per_epoch
        self.teacher_temperature = teacher_temperature(step, warmup_steps, *self.temperatures)
        return {"teacher_momentum": self.teacher_momentum, "teacher_temperature": self.teacher_temperature}

    def after_step(self, transformer: nn.Module, reduce: Callable[[Tensor], Tensor], moved: bool) -> None:
        """The teacher and center updates of Algorithm A1.

        Raises:
            ValueError: a `teacher_momentum` out of 0..1.
        """
        check_number("teacher_momentum", self.teacher_momentum, low=0, high=1)
        self.teacher.update(transformer, self.head, self.teacher_momentum if moved else 1.0)
        self.center_cls.move(self.center_momentum, reduce)
        self.center_patch.move(self.center_momentum, reduce)

    def identity(self) -> dict[str, int]:
        """Sizes of the head."""
        bottleneck, hidden = self.head.mlp[-1].weight.shape
        sizes = {"num_prototypes": len(self.center_cls.value), "head_hidden_dim": hidden}
        return sizes | {"head_bottleneck_dim": bottleneck}


def keep_visible(tokens: Tensor, visible_ids: Tensor | None) -> Tensor:
    """[CLS] and the visible patches of all tokens, `[b, 1 + n, D]` to `[b, 1 + k, D]`."""
    if visible_ids is None:
        return tokens
    return torch.cat([tokens[:, :1], gather_tokens(tokens[:, 1:], visible_ids)], dim=1)


def teacher_momentum(step: int, max_steps: int, start: float = 0.996, end: float = 0.999) -> float:
    """beta at a step: a cosine from `start` to `end` over the run (Table A1).

    # Paper silent: the curve is DINO's.
    """
    progress = min(step / max_steps, 1.0)
    return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2


def teacher_temperature(step: int, warmup_steps: int, start: float = 0.09, end: float = 0.099) -> float:
    """tau_T at a step: a line from `start` to `end` over the warm-up, then `end` (Table A1)."""
    return end if step >= warmup_steps else start + (end - start) * step / warmup_steps
