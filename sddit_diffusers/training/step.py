"""One optimizer step, as the trainer, the memory model and the benchmarks take it."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from ..data.order import Batch
from .engines import Alone
from .objective import Draws


class Step(NamedTuple):
    """What an optimizer step tells."""

    names: tuple[str, ...]  # of the losses
    losses: Tensor  # their means over micro-batches and processes
    norm: Tensor  # of the gradients
    moved: bool  # whether weights were moved


def train_step(
    engine: Alone,
    ema: EMAModel,
    micro_batches: Iterable[tuple[Batch, Draws | None]],
    max_grad_norm: float = 0.0,
    inspect: Callable[[Step], None] | None = None,
) -> Step:
    """The body of Algorithm A1's loop: losses, back-propagation, the student's update, and what follows it.

    Args:
        engine: has the objective and its optimizer.
        ema: averages of the network's weights.
        micro_batches: what gradients are summed over, with their draws.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
        inspect: sees the step before a weight is moved, and may raise an error.
    """
    objective, total, count = engine.model, 0.0, 0
    for batch, draws in micro_batches:
        with engine.accumulating():
            losses = engine.forward(batch.x0, batch.labels, draws, batch.pictures)
            engine.backward(losses["loss"])
        total, count = total + torch.stack([loss.detach().float() for loss in losses.values()]), count + 1
    means, norm = engine.reduce(total / count), engine.gradient_norm()
    # fp16's loss scaler leaves out a step whose gradients overflow, and scales the next one less.
    moved = engine.scaler is None or bool(norm.isfinite())
    step = Step(tuple(losses), means, norm, moved)
    del losses  # and with them what the backward pass has left
    if inspect is not None:
        inspect(step)
    engine.step(norm, max_grad_norm)
    if moved:
        ema.step(objective.transformer.parameters())
    objective.after_step(engine.reduce, moved)
    return step
