"""The methods by name: SD-DiT and those that it is compared with, each a network and what trains it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..models.transformer_baselines import (
    MaskDiTTransformer2DModel,
    MDTTransformer2DModel,
    PlainDiTTransformer2DModel,
    TREADTransformer2DModel,
)
from ..models.transformer_sddit import PatchTransformer2DModel, SDDiTTransformer2DModel
from .objective import MaskDiTObjective, MDTObjective, Objective


def _without_decoder(network: dict) -> dict:
    return {name: value for name, value in network.items() if "decoder" not in name}


def _routed(network: dict) -> dict:
    """Two blocks before the route in all of the paper's sizes, at most half of a small network's."""
    return _without_decoder(network) | {"route_start": min(2, network["num_layers"] // 2), "route_end": None}


@dataclass(frozen=True)
class Method:
    """A network and its objective.

    Args:
        title: for people.
        transformer: class of the network.
        objective: class of what trains it.
        settings: what the method changes in `TrainingConfig`.
        options: those that it has and others have not; they are arguments of the objective.
        network: the network's arguments, of those of SD-DiT's.
        has_mask: whether the network can leave patches out, of all its encoder or of some blocks.
    """

    title: str
    transformer: type[PatchTransformer2DModel]
    objective: type[Objective] = Objective
    settings: dict = field(default_factory=dict)
    options: tuple[str, ...] = ()
    network: Callable[[dict], dict] = dict
    has_mask: bool = True


METHODS = {
    "sddit": Method("SD-DiT", SDDiTTransformer2DModel, settings={"auxiliary": ["discrimination"]}),
    "dit": Method(
        "DiT", PlainDiTTransformer2DModel, settings={"mask_ratio": 0.0}, network=_without_decoder,
        has_mask=False,
    ),
    "maskdit": Method(
        "MaskDiT", MaskDiTTransformer2DModel, MaskDiTObjective, {"mask_ratio": 0.5}, ("mae_weight",)
    ),
    "mdt": Method(
        "MDT", MDTTransformer2DModel, MDTObjective, {"mask_ratio": 0.3},
        network=lambda network: _without_decoder(network) | {"num_decoder_layers": 2},  # in all sizes
    ),
    "tread": Method("TREAD", TREADTransformer2DModel, settings={"mask_ratio": 0.5}, network=_routed),
}  # fmt: skip
