"""The auxiliary losses by name."""

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import nn

from ..models.transformer_sddit import PatchTransformer2DModel, SDDiTTransformer2DModel
from .auxiliary import AuxiliaryLoss
from .contrastive import Contrastive, ContrastiveOptions
from .discrimination import Discrimination, DiscriminationOptions
from .dispersive import Dispersive, DispersiveOptions
from .repa import REPA, REPAOptions
from .sra import SRA, SRAOptions


@dataclass(frozen=True)
class Auxiliary:
    """A loss beside the generative one.

    Args:
        title: for people.
        build: makes it of the network and the options; None where it has no part.
        options: a dataclass of its options, which `TrainingConfig` takes in; None without.
        networks: the class of the networks that it works with.
        looks_at_pictures: whether it does, of the options; batches have them then.
    """

    title: str
    build: Callable[[nn.Module, object], AuxiliaryLoss | None]
    options: type | None = None
    networks: type = PatchTransformer2DModel
    looks_at_pictures: Callable[[object], bool] = lambda options: False

    def names(self) -> list[str]:
        """Of its options."""
        return [each.name for each in fields(self.options)] if self.options else []


AUXILIARIES = {
    "discrimination": Auxiliary(
        "self-supervised discrimination (L_D)", Discrimination.from_options, DiscriminationOptions,
        SDDiTTransformer2DModel,
    ),
    "repa": Auxiliary(
        "representation alignment (REPA)", REPA.from_options, REPAOptions,
        looks_at_pictures=REPA.looks_at_pictures,
    ),
    "dispersive": Auxiliary("dispersive loss", Dispersive.from_options, DispersiveOptions),
    "contrastive": Auxiliary("contrastive flow matching", Contrastive.from_options, ContrastiveOptions),
    "sra": Auxiliary("self-representation alignment (SRA)", SRA.from_options, SRAOptions),
}  # fmt: skip
