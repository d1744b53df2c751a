"""What an auxiliary loss is: a module beside the network, which sees each step and has its say in the loss.

Shapes: b batch, c channels, h x w pixels of the sample, n patches, k visible patches, D encoder width.
"""

from collections.abc import Callable, Sequence
from inspect import signature
from numbers import Integral
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.order import Batch
from ..models.transformer_sddit import check_number


class Process(Protocol):
    """What training asks of a scheduler: how samples are noised, and what the network is to give.

    `ratio_of`, `interval` and `time_of` of a tensor are for losses that move to another noise level; `config`
    and `from_config` are those of diffusers' schedulers.
    """

    @property
    def config(self) -> Any: ...
    @classmethod
    def from_config(cls, config: Any) -> Any: ...
    @property
    def interval(self) -> tuple[float, float]: ...
    def training_times(self, normal: Tensor) -> Tensor: ...
    def time_of(self, ratio: float | Tensor) -> float | Tensor: ...
    def ratio_of(self, t: Tensor) -> Tensor: ...
    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def precondition_inputs(self, sample: Tensor, t: Tensor) -> Tensor: ...
    def precondition_noise(self, t: Tensor) -> Tensor: ...
    def precondition_outputs(self, sample: Tensor, model_output: Tensor, t: Tensor) -> Tensor: ...
    def error(self, model_output: Tensor, sample: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...


class Tokens(NamedTuple):
    """What a layer has of the patches, without [CLS]."""

    values: Tensor  # [b, m, D]
    ids: Tensor | None  # [b, m], the patches' places; None: all, in their order


class Pass(NamedTuple):
    """What the network made of a noised view."""

    sample: Tensor  # [b, c, h, w], the noised view
    output: Tensor  # [b, c, h, w], the network's
    tokens: Tensor  # of the encoder's last block, [b, k, D], or [b, 1 + k, D] with [CLS] first
    layers: dict[int, Tokens]  # after each of the blocks that auxiliary losses ask for, counted from 1


class View(NamedTuple):
    """What an auxiliary loss sees of a step."""

    batch: Batch
    class_labels: Tensor | None  # [b], some of which have become the null class
    t: Tensor  # [b, 1, 1, 1], of the noised view
    noise: Tensor  # [b, c, h, w], of the noised view
    visible_ids: Tensor | None  # [b, k], patches that `tokens` are of; None: all
    patch_order: Tensor  # [b, n], all patches at random, first those of `visible_ids`
    has_cls: bool
    sample: Tensor  # these four as of [`Pass`]
    output: Tensor
    tokens: Tensor
    layers: dict[int, Tokens]
    scored_ids: Tensor | None = None  # [b, k], patches that the generative loss is the mean of; None: all


class AuxiliaryLoss(nn.Module):
    """A loss beside the generative one; it owns its weight, draws, schedules, teacher and other state.

    It is made with the network that is trained. `forward` alone must be written.

    Args:
        weight: factor of the loss, at least 0.

    Attributes:
        name: of the metric `loss_NAME`, which is the loss without its weight.
        layers: blocks of the network whose tokens the loss sees, counted from 1.
        frozen: networks that stay as they are, such as a pretrained encoder; no checkpoint has them.
        tells: whether this step's metrics are written, so that what costs time may be left out of others.

    Raises:
        ValueError: a weight that is none.
    """

    name: str
    layers: tuple[int, ...] = ()
    frozen: Sequence[nn.Module] = ()
    tells = True

    def __init__(self, weight: float):
        check_number("weight", weight, low=0)
        super().__init__()
        self.weight = weight

    @classmethod
    def from_options(cls, transformer: nn.Module, options: Any, *others: Any) -> "AuxiliaryLoss":
        """The loss that a run's options ask for: each keyword argument ARG is their `NAME_ARG`.

        Args:
            others: arguments that stand after the network.
        """
        names = [each.name for each in signature(cls).parameters.values() if each.kind is each.KEYWORD_ONLY]
        return cls(transformer, *others, **{name: getattr(options, f"{cls.name}_{name}") for name in names})

    def draw(
        self, shape: tuple[int, ...], process: Process, generator: torch.Generator | None, device
    ) -> tuple | None:
        """What is random in a step for images of `shape` `[b, c, h, w]`, a row for each."""
        return None

    def forward(self, view: View, process: Process, draws: Any) -> dict[str, Tensor]:
        """The loss, as `loss_NAME`, and what else the run's metrics tell, all scalars."""
        raise NotImplementedError

    def follow(self, step: int, steps: int, steps_per_epoch: int) -> dict[str, float]:
        """Sets what changes from step to step; returns it for the metrics."""
        return {}

    def after_step(self, transformer: nn.Module, reduce: Callable[[Tensor], Tensor], moved: bool) -> None:
        """What follows an optimizer step.

        Args:
            transformer: the network that was trained.
            reduce: averages a tensor over the processes.
            moved: whether weights were moved; fp16 leaves out steps whose gradients overflow.
        """

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it goes on with, in JSON's types."""
        return {}


def part_of(count: int, share: float) -> int:
    """A share of some tokens, at least one of them; no rounding error loses one."""
    return max(1, int(count * share + 1e-6))


def check_layer(name: str, layer: int, network: nn.Module) -> None:
    """Raises a ValueError for a block that a network does not have."""
    check_number(name, layer, low=1, high=len(network.transformer_blocks), kind=Integral)


def check_pairs(options, name: str) -> None:
    """Raises a ValueError where a chosen loss compares images, and a micro-batch has one.

    Args:
        options: a run's configuration.
        name: of the loss among the auxiliary ones.
    """
    if name in options.auxiliaries and options.train_batch_size < 2:
        raise ValueError(
            f"train_batch_size is {options.train_batch_size}; the {name} loss compares the images of a "
            "micro-batch, so it must be at least 2."
        )


def by_patch(values: Tensor, patch_size: int) -> Tensor:
    """Means of patches, `[b, c, h, w]` to `[b, n]`."""
    return F.avg_pool2d(values.mean(1, keepdim=True), patch_size).flatten(1)


def network_inputs(process: Process, sample: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What a network takes of samples `[b, c, h, w]` at times `[b, 1, 1, 1]`: c_in x and c_noise `[b]`."""
    return process.precondition_inputs(sample, t), process.precondition_noise(t).flatten()
