"""Algorithm A1 of SD-DiT's supplementary: the two views, the two losses, and what follows an optimizer step.

Shapes: b batch, c channels, h x w pixels of the sample, n patches, k visible patches, D encoder width, K
prototypes.
"""

import math
from collections.abc import Callable
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from ..models.transformer_sddit import SDDiTTransformer2DModel, check_number
from ..schedulers.scheduling_edm_heun import EDMHeunScheduler
from .denoising import DenoisingObjective, Draws
from .discrimination import Center, ProjectionHead, Teacher, cross_entropy


class SDDiTObjective(DenoisingObjective):
    """The student, its teacher, and the loss L_G + L_D that trains them.

    Args:
        transformer: the student, trained in place.
        scheduler: gives preconditioning and sigma_data.
        mask_ratio: share of the patches hidden from the student's encoder, in [0, 1); 0.2 in the paper.
        discriminative_weight: factor of L_D; 0 trains without L_D, head and teacher (Table 3).
        teacher_sigma: noise level of the teacher's view, or "student" to draw it as the student's is (Fig.
            6).
        num_prototypes: K.
        head_hidden_dim, head_bottleneck_dim: widths of the projection head.
        student_temperature: tau_S.
        center_momentum: m_c and m_p of Algorithm A1. # Paper silent: DINO's 0.9.
        label_dropout: probability that an image's label becomes the null class, for guidance.
        p_mean, p_std: ln(sigma_S) ~ N(p_mean, p_std^2) (supplementary, Eq. 2).

    Attributes:
        teacher_temperature: tau_T, moved by the training loop from step to step.

    Raises:
        ValueError: a number out of its range, a teacher noise that is neither above 0 nor "student", or a
            transformer without decoder or with other channels going out than in.
    """

    def __init__(
        self,
        transformer: SDDiTTransformer2DModel,
        scheduler: EDMHeunScheduler,
        *,
        mask_ratio: float = 0.2,
        discriminative_weight: float = 1.0,
        teacher_sigma: float | Literal["student"] = 0.002,
        num_prototypes: int = 8192,
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        student_temperature: float = 0.1,
        center_momentum: float = 0.9,
        label_dropout: float = 0.1,
        p_mean: float = -1.2,
        p_std: float = 1.2,
    ):
        super().__init__(
            transformer, scheduler,
            mask_ratio=mask_ratio, label_dropout=label_dropout, p_mean=p_mean, p_std=p_std,
        )  # fmt: skip
        config = transformer.config
        check_number("discriminative_weight", discriminative_weight, low=0)
        check_number("student_temperature", student_temperature, above=0)
        check_number("center_momentum", center_momentum, low=0, high=1)
        check_number("num_prototypes", num_prototypes, low=2, kind=Integral)
        check_number("head_hidden_dim", head_hidden_dim, low=1, kind=Integral)
        check_number("head_bottleneck_dim", head_bottleneck_dim, low=1, kind=Integral)
        if teacher_sigma != "student" and (
            isinstance(teacher_sigma, str) or not 0 < teacher_sigma < math.inf
        ):
            raise ValueError(
                f"teacher_sigma is {teacher_sigma!r}; it must be a number above 0, or 'student'."
            )
        if transformer.decoder is None:
            raise ValueError(
                "The transformer has no decoder (num_decoder_layers is 0); the objective needs one."
            )
        self.discriminative_weight = discriminative_weight
        self.teacher_sigma = teacher_sigma
        self.student_temperature = student_temperature
        self.teacher_temperature = 0.09
        self.center_momentum = center_momentum
        if discriminative_weight > 0:
            dim = config.num_attention_heads * config.attention_head_dim
            self.head = ProjectionHead(dim, num_prototypes, head_hidden_dim, head_bottleneck_dim)
            self.teacher = Teacher(transformer, self.head)
            self.center_cls, self.center_patch = Center(num_prototypes), Center(num_prototypes)

    def forward(
        self, x0: Tensor, class_labels: Tensor | None = None, draws: Draws | None = None
    ) -> dict[str, Tensor]:
        """Algorithm A1, from the views to the loss.

        Args:
            x0: clean samples, `[b, c, h, w]`, of standard deviation about sigma_data.
            class_labels: integers `[b]`; None for a model without classes.
            draws: what is random in this step; None draws it here.

        Returns:
            Scalars: `loss` = `loss_generative` + weight x `loss_discriminative`, and the signs of a collapse:
            `teacher_entropy` as a share of ln K (0: always one prototype, 1: all alike), `kl` of the
            student's distribution from the teacher's in nats, `prototypes_used` as the share of the K that
            are some token's first choice, and the norms of both centers.

        Raises:
            ValueError: a `teacher_temperature` that is not above 0.
        """
        check_number("teacher_temperature", self.teacher_temperature, above=0)
        if draws is None:
            draws = self.draw(x0.shape, device=x0.device)
        class_labels = self.drop_labels(class_labels, draws)

        # Construct noised student and teacher views.
        sigma_s, sigma_t = draws.sigma_s, draws.sigma_t
        x_s = x0 + sigma_s * draws.noise_s
        x_t = x0 + sigma_t * draws.noise_t

        # Forward the visible patches through the student's encoder, and the complete set through its decoder.
        student = self.transformer(*self.inputs(x_s, sigma_s), class_labels, draws.visible_ids)
        e_s = student.encoder_hidden_states  # [b, 1 + k, D]

        # L_G (Eq. 9) over all patches.
        denoised = self.denoised(x_s, student.sample, sigma_s)
        loss_generative = (self.weight(sigma_s) * (denoised - x0) ** 2).mean()
        if self.teacher is None:
            return {"loss": loss_generative, "loss_generative": loss_generative}

        # Forward the full view through the teacher's encoder, and [CLS] and the visible patches of both
        # through their heads.
        with torch.no_grad():
            e_t = self.teacher.encoder(*self.inputs(x_t, sigma_t), class_labels).encoder_hidden_states
            # Unit features [b, 1 + k, d] and prototypes [K, d], whose products are the logits.
            j_t, prototypes_t = self.teacher.head.project(keep_visible(e_t, draws.visible_ids))
        j_s, prototypes_s = self.head.project(e_s)

        # L_D (Eq. 12), the mean over the visible patches and the [CLS] term.
        cls, patch = (
            cross_entropy(
                (j_t[:, tokens], prototypes_t),
                (j_s[:, tokens], prototypes_s),
                center.value,
                self.teacher_temperature,
                self.student_temperature,
            )
            for tokens, center in ((slice(0, 1), self.center_cls), (slice(1, None), self.center_patch))
        )
        loss_discriminative = patch.loss + cls.loss
        if self.training:
            self.center_cls.add(cls.mean_logits)
            self.center_patch.add(patch.mean_logits)

        entropy = (cls.entropy + patch.entropy) / 2
        return {
            "loss": loss_generative + self.discriminative_weight * loss_discriminative,
            "loss_generative": loss_generative,
            "loss_discriminative": loss_discriminative,
            "teacher_entropy": entropy / math.log(len(prototypes_t)),
            "kl": loss_discriminative / 2 - entropy,
            "prototypes_used": patch.used.mean(),
            "center_norm_cls": self.center_cls.value.norm(),
            "center_norm_patch": self.center_patch.value.norm(),
        }

    def update_teacher(self, momentum: float, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """The teacher and center updates that follow an optimizer step (Algorithm A1).

        Args:
            momentum: beta of this step, in 0..1.
            reduce: averages a tensor over the processes; None where there is one.

        Raises:
            ValueError: a momentum out of its range.
        """
        check_number("momentum", momentum, low=0, high=1)
        if self.teacher is not None:
            self.teacher.update(self.transformer, self.head, momentum)
            self.center_cls.move(self.center_momentum, reduce)
            self.center_patch.move(self.center_momentum, reduce)


def keep_visible(tokens: Tensor, visible_ids: Tensor | None) -> Tensor:
    """[CLS] and the visible patches of all tokens, `[b, 1 + n, D]` to `[b, 1 + k, D]`."""
    if visible_ids is None:
        return tokens
    index = visible_ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, index)], dim=1)
