"""Contrastive flow matching (Stoica et al. 2025, arXiv 2506.05350): away from what other images ask for."""

from dataclasses import dataclass

from torch import Tensor

from ..cli import option
from ..models.transformer_sddit import PatchTransformer2DModel, check_number
from .auxiliary import AuxiliaryLoss, Process, View, by_patch, check_pairs
from .configuration import BELOW_1


@dataclass
class ContrastiveOptions:
    """The option of the contrastive loss; the default is the paper's."""

    _argument_group_name = "auxiliary losses: contrastive"

    contrastive_weight: float = option(
        0.05, "lambda, factor of the distance from another image's target; at 1 the loss would have no end",
        low=0, high=BELOW_1,
    )  # fmt: skip

    def check(self) -> None:
        """Raises a ValueError for micro-batches that have no two images."""
        check_pairs(self, "contrastive")


class Contrastive(AuxiliaryLoss):
    """- ||F - F*_j||^2: the distance of the output from what another image j asks for (Eq. 5).

    The target F*_j is that of image j with its own noise at the time of image i, whatever the process has as
    a target: velocity, noise, score, data, or EDM's raw network. It is weighted as the process's own error.
    j is the image before i in the micro-batch, and before the first the last: never i itself.

    # Paper silent: images that lost their label, for guidance. Here, as in the default of the authors' code,
    they have part as the others have, and j may be of i's class. Where the generative loss is of some
    patches alone, as MaskDiT's, this one is of the same: what nothing draws near could be driven off without
    end.

    Args:
        transformer: the network.
        weight: lambda, in [0, 1).

    Raises:
        ValueError: a weight out of its range.
    """

    name = "contrastive"

    def __init__(self, transformer: PatchTransformer2DModel, *, weight: float = 0.05):
        check_number("contrastive_weight", weight, low=0, high=BELOW_1)
        super().__init__(weight)
        self.patch_size = transformer.config.patch_size

    def forward(self, view: View, process: Process, draws: None) -> dict[str, Tensor]:
        """`loss_contrastive`, at most 0, in float32.

        Raises:
            ValueError: there are no two images.
        """
        if len(view.output) < 2:
            raise ValueError("The contrastive loss compares images, and the batch has one.")
        x0, noise = view.batch.x0.roll(1, 0), view.noise.roll(1, 0)  # of j
        sample = process.noised(x0, noise, view.t)
        error = process.error(view.output, sample, x0, noise, view.t)  # [b, c, h, w]
        if view.scored_ids is not None:
            error = by_patch(error, self.patch_size).gather(1, view.scored_ids)  # [b, k]
        return {"loss_contrastive": -error.mean()}
