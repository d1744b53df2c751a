"""What SD-DiT shares with the methods beside it: what is random in a step, the noised view, EDM's loss.

Shapes: b batch, c channels, h x w pixels of the sample, n patches, k visible patches.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.transformer_sddit import PatchTransformer2DModel, SDDiTBlock, check_number
from ..schedulers.scheduling_edm_heun import EDMHeunScheduler


class Draws(NamedTuple):
    """All that is random in one step of Algorithm A1, a row for each image."""

    sigma_s: Tensor  # [b, 1, 1, 1], noise level of the student's view
    noise_s: Tensor  # [b, c, h, w], of unit variance
    visible_ids: Tensor | None  # [b, k], patches that the mask leaves visible; None: all
    label_dropped: Tensor  # [b], bool
    sigma_t: Tensor  # [b, 1, 1, 1], noise level of the teacher's view
    noise_t: Tensor  # [b, c, h, w], of unit variance

    def rows(self, rows: slice) -> "Draws":
        """The draws of some of the images."""
        return Draws(*(None if tensor is None else tensor[rows] for tensor in self))


class DenoisingObjective(nn.Module):
    """A network, and what trains it to denoise; each method adds its `forward`.

    Args:
        transformer: the network, trained in place.
        scheduler: gives preconditioning and sigma_data.
        mask_ratio: share of the patches hidden from the encoder, in [0, 1); may be moved from step to step.
        label_dropout: probability that an image's label becomes the null class, for guidance.
        p_mean, p_std: ln(sigma_S) ~ N(p_mean, p_std^2) (supplementary, Eq. 2).

    Raises:
        ValueError: a mask ratio outside [0, 1), a label dropout outside 0..1, a p_std below 0, a p_mean that
            is not finite, or a transformer with other channels going out than in.
    """

    _no_split_modules = ["SDDiTBlock"]  # what FSDP shards and gathers as one

    def __init__(
        self,
        transformer: PatchTransformer2DModel,
        scheduler: EDMHeunScheduler,
        *,
        mask_ratio: float = 0.0,
        label_dropout: float = 0.1,
        p_mean: float = -1.2,
        p_std: float = 1.2,
    ):
        super().__init__()
        config = transformer.config
        check_number("p_mean", p_mean)
        check_number("p_std", p_std, low=0)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio is {mask_ratio}; it must be at least 0 and below 1.")
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout is {label_dropout}; it must be in 0..1.")
        if (config.out_channels or config.in_channels) != config.in_channels:
            raise ValueError(
                f"The transformer takes {config.in_channels} channels and returns {config.out_channels}; "
                "both must be equal."
            )
        self.transformer = transformer
        self.scheduler = scheduler
        self.mask_ratio = mask_ratio
        self.label_dropout = label_dropout
        self.p_mean, self.p_std = p_mean, p_std
        self.teacher, self.teacher_sigma = None, 0.002

    def compile_blocks(self, dynamic: bool = False) -> None:
        """Compiles all blocks in place; shapes and names of the weights stay.

        Args:
            dynamic: once for any number of tokens, where it changes from step to step.
        """
        for module in self.modules():
            if isinstance(module, SDDiTBlock):
                module.compile(dynamic=dynamic)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None, device=None) -> Draws:
        """Draws noise levels, noises, masks and dropped labels for images of `shape` `[b, c, h, w]`.

        The order of the draws does not depend on any setting, so runs of one seed differ by their settings
        alone.
        """
        b, _, h, w = shape
        options = dict(generator=generator, device=device)
        n = (h // self.transformer.config.patch_size) * (w // self.transformer.config.patch_size)
        k = max(1, int(n * (1 - self.mask_ratio) + 1e-6))
        sigma_s = (self.p_mean + self.p_std * torch.randn(b, 1, 1, 1, **options)).exp()
        noise_s = torch.randn(shape, **options)
        patch_order = torch.rand(b, n, **options).argsort(dim=1)
        label_dropped = torch.rand(b, **options) < self.label_dropout
        noise_t = torch.randn(shape, **options)
        sigma_t = (self.p_mean + self.p_std * torch.randn(b, 1, 1, 1, **options)).exp()
        if self.teacher_sigma != "student":
            sigma_t = torch.full_like(sigma_t, self.teacher_sigma)
        visible_ids = patch_order[:, :k] if k < n else None
        return Draws(sigma_s, noise_s, visible_ids, label_dropped, sigma_t, noise_t)

    def drop_labels(self, class_labels: Tensor | None, draws: Draws) -> Tensor | None:
        """Labels `[b]`, of which some are the null class now."""
        if class_labels is None:
            return None
        return class_labels.masked_fill(draws.label_dropped, self.transformer.config.num_classes)

    def inputs(self, sample: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_in x and c_noise, what the network takes."""
        c_noise = self.scheduler.precondition_noise(sigma).flatten()
        return self.scheduler.precondition_inputs(sample, sigma), c_noise

    def denoised(self, sample: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        """D of a noised sample and the network's output F, `[b, c, h, w]`.

        In float32: at small sigma, EDM's weight is large and D - x0 the small difference of large numbers.
        """
        return self.scheduler.precondition_outputs(sample, output.float(), sigma)

    def weight(self, sigma: Tensor) -> Tensor:
        """EDM's lambda. # Paper silent: the paper follows EDM in all else."""
        sigma_data = self.scheduler.config.sigma_data
        return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2

    def generative_loss(
        self, x0: Tensor, class_labels: Tensor | None, sigma: Tensor, noise: Tensor, *visible_ids: Tensor
    ) -> Tensor:
        """L_G (Eq. 9), the mean over all patches, of a view with this noise and, if given, this mask."""
        x_s = x0 + sigma * noise
        output = self.transformer(*self.inputs(x_s, sigma), class_labels, *visible_ids).sample
        return (self.weight(sigma) * (self.denoised(x_s, output, sigma) - x0) ** 2).mean()

    def update_teacher(self, momentum: float, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """What follows an optimizer step; nothing, where there is no teacher."""


def mask_ratio_at(step: int, max_steps: int, start: float) -> float:
    """A ratio that falls from `start` to 0 with the fourth power of a cosine: MaskDiT's unmask tuning."""
    return start * math.cos(math.pi / 2 * min(step / max_steps, 1.0)) ** 4
