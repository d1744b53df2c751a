"""Dispersive loss (Wang & He 2025, arXiv 2506.09027): a batch's images are kept apart within the network."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cli import option
from ..models.transformer_sddit import PatchTransformer2DModel, check_number
from .auxiliary import AuxiliaryLoss, Process, View, check_layer, check_pairs


@dataclass
class DispersiveOptions:
    """The options of the dispersive loss; the defaults are those of the authors' code."""

    _argument_group_name = "auxiliary losses: dispersive"

    dispersive_weight: float = option(0.25, "factor of the dispersive loss", low=0)
    dispersive_temperature: float = option(1.0, "tau of its squared distances", low=1e-3)
    dispersive_layer: int = option(0, "block after which it is taken; 0: a quarter of the depth", low=0)

    def check(self) -> None:
        """Raises a ValueError for micro-batches that have no two images."""
        check_pairs(self, "dispersive")


class Dispersive(AuxiliaryLoss):
    """ln mean exp(-||z_i - z_j||^2 / (d tau)) over all pairs of images (Eq. 6, the l2 variant of InfoNCE).

    z_i, of d numbers, are the patches' tokens of image i after one block, end to end. The mean is over all
    b x b pairs of the micro-batch, those of an image with itself among them, as in the authors' code: the
    loss is at least -ln b.

    # Paper silent: masks. Where a block sees a part of the patches, which is another in each image, z_i is
    the mean of the visible tokens, whose width is d: tokens of different places cannot be compared.

    Args:
        transformer: the network.
        weight: factor of the loss, at least 0.
        temperature: tau, above 0. The distances are divided by d already.
        layer: block after which the tokens are taken, counted from 1; 0 for a quarter of the depth, at least
            1.

    Raises:
        ValueError: a number out of its range, or a block that the network does not have.
    """

    name = "dispersive"

    def __init__(
        self,
        transformer: PatchTransformer2DModel,
        *,
        weight: float = 0.25,
        temperature: float = 1.0,
        layer: int = 0,
    ):
        check_number("dispersive_weight", weight, low=0)
        check_number("dispersive_temperature", temperature, above=0)
        layer = layer or max(1, len(transformer.transformer_blocks) // 4)
        check_layer("dispersive_layer", layer, transformer)
        super().__init__(weight)
        self.temperature = temperature
        self.layers = (layer,)

    def forward(self, view: View, process: Process, draws: None) -> dict[str, Tensor]:
        """`loss_dispersive`, in float32.

        Raises:
            ValueError: there are no two images.
        """
        tokens, ids = view.layers[self.layers[0]]  # [b, m, D]
        if len(tokens) < 2:
            raise ValueError("The dispersive loss compares images, and the batch has one.")
        tokens = tokens.float()
        z = tokens.flatten(1) if ids is None else tokens.mean(1)  # [b, d]
        with torch.autocast(z.device.type, enabled=False):
            return {"loss_dispersive": dispersive_loss(z, self.temperature)}


def dispersive_loss(z: Tensor, temperature: float) -> Tensor:
    """The loss of vectors `[b, d]`."""
    # Products in place of b x b differences of length d. Their center goes first: it changes no distance, and
    # the squares of what is left are not much larger than the distances.
    z = z - z.mean(0)
    squares = z.square().sum(1)
    distances = (squares[:, None] + squares - 2 * z @ z.T).clamp(min=0)  # [b, b], squared
    distances = distances.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), 0)
    return (-distances / (z.shape[1] * temperature)).logsumexp((0, 1)) - 2 * math.log(len(z))
