"""What trains the methods that SD-DiT is compared with, all in EDM's formulation, at its noise levels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.transformer_sddit import check_number
from .denoising import DenoisingObjective, Draws


class DiTObjective(DenoisingObjective):
    """DiT: L_G over all patches, of a network that sees them all."""

    def forward(
        self, x0: Tensor, class_labels: Tensor | None = None, draws: Draws | None = None
    ) -> dict[str, Tensor]:
        """As of `SDDiTObjective`: `loss`, which is `loss_generative`."""
        draws = self.draw(x0.shape, device=x0.device) if draws is None else draws
        class_labels = self.drop_labels(class_labels, draws)
        loss = self.generative_loss(x0, class_labels, draws.sigma_s, draws.noise_s)
        return {"loss": loss, "loss_generative": loss}


class MaskDiTObjective(DenoisingObjective):
    """MaskDiT: L_DSM on visible patches, and L_MAE on masked ones, of which the noised patch is the target.

    Args:
        mae_weight: factor of L_MAE, at least 0; MaskDiT's 0.1.
        transformer, scheduler, mask_ratio, label_dropout, p_mean, p_std: as of [`DenoisingObjective`].

    Raises:
        ValueError: an `mae_weight` out of its range, and as of [`DenoisingObjective`].
    """

    def __init__(self, *args, mae_weight: float = 0.1, **kwargs):
        super().__init__(*args, **kwargs)
        check_number("mae_weight", mae_weight, low=0)
        self.mae_weight = mae_weight

    def forward(
        self, x0: Tensor, class_labels: Tensor | None = None, draws: Draws | None = None
    ) -> dict[str, Tensor]:
        """As of `SDDiTObjective`: `loss` = `loss_generative` (L_DSM) + weight x `loss_mae`."""
        draws = self.draw(x0.shape, device=x0.device) if draws is None else draws
        class_labels = self.drop_labels(class_labels, draws)
        x_s = x0 + draws.sigma_s * draws.noise_s
        output = self.transformer(*self.inputs(x_s, draws.sigma_s), class_labels, draws.visible_ids).sample
        denoised = self.denoised(x_s, output, draws.sigma_s)
        denoising = self._by_patch(self.weight(draws.sigma_s) * (denoised - x0) ** 2)
        if draws.visible_ids is None:
            unused = 0 * self.transformer.mask_token.sum()  # for DDP, which waits for all gradients
            loss = denoising.mean() + unused
            return {"loss": loss, "loss_generative": loss, "loss_mae": torch.zeros_like(loss)}
        reconstruction = self._by_patch((denoised - x_s) ** 2)
        masked = torch.ones_like(denoising).scatter(1, draws.visible_ids, 0.0)  # [b, n]
        loss_generative = (denoising * (1 - masked)).sum() / (1 - masked).sum()
        loss_mae = (reconstruction * masked).sum() / masked.sum()
        return {
            "loss": loss_generative + self.mae_weight * loss_mae,
            "loss_generative": loss_generative,
            "loss_mae": loss_mae,
        }

    def _by_patch(self, values: Tensor) -> Tensor:
        """Means of patches, `[b, c, h, w]` to `[b, n]`."""
        return F.avg_pool2d(values.mean(1, keepdim=True), self.transformer.config.patch_size).flatten(1)


class MDTObjective(DenoisingObjective):
    """MDT: L_G of all patches twice a step, seen whole and with a mask, of one noise level and two noises."""

    def forward(
        self, x0: Tensor, class_labels: Tensor | None = None, draws: Draws | None = None
    ) -> dict[str, Tensor]:
        """As of `SDDiTObjective`: `loss` = `loss_generative`, of the whole view, + `loss_masked`."""
        draws = self.draw(x0.shape, device=x0.device) if draws is None else draws
        class_labels = self.drop_labels(class_labels, draws)
        visible_ids = draws.visible_ids
        if visible_ids is None:  # the side-interpolater has nothing to fill, and its part all the same
            n = x0[0, 0].numel() // self.transformer.config.patch_size**2
            visible_ids = torch.arange(n, device=x0.device).expand(len(x0), -1)
        whole = self.generative_loss(x0, class_labels, draws.sigma_s, draws.noise_s)
        masked = self.generative_loss(x0, class_labels, draws.sigma_s, draws.noise_t, visible_ids)
        return {"loss": whole + masked, "loss_generative": whole, "loss_masked": masked}
