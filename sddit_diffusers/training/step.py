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
    norm: Tensor  # of all gradients together
    norms: dict[str, Tensor] | None  # of each, by the parameter's name; None where the engine has none apart
    moved: bool  # whether weights are moved, if all is finite


def train_step(
    engine: Alone,
    ema: EMAModel,
    micro_batches: Iterable[tuple[Batch, Draws | None]],
    max_grad_norm: float = 0.0,
    judge: Callable[[Step], Tensor | None] | None = None,
) -> Step:
    """The body of Algorithm A1's loop: losses, back-propagation, the student's update, and what follows it.

    Args:
        engine: has the objective and its optimizer.
        ema: averages of the network's weights.
        micro_batches: what gradients are summed over, with their draws.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
        judge: sees the step before a weight is moved; may raise an error, or return a number on the device,
            float32: where it is 1 no weight moves.
    """
    objective, total, count = engine.model, 0.0, 0
    for batch, draws in micro_batches:
        with engine.accumulating():
            losses = engine.forward(batch.x0, batch.labels, draws, batch.pictures)
            engine.backward(losses["loss"])
        total, count = total + torch.stack([loss.detach().float() for loss in losses.values()]), count + 1
    means, (norm, norms) = engine.reduce(total / count), engine.gradient_norm()
    # fp16's loss scaler leaves out a step whose gradients overflow, and scales the next one less. The
    # averages must know, so the device is waited for; in other precisions nothing here looks at a value.
    moved = engine.scaler is None or bool(norm.isfinite())
    step = Step(tuple(losses), means, norm, norms, moved)
    del losses  # and with them what the backward pass has left
    engine.step(norm, max_grad_norm, None if judge is None else judge(step))
    if moved:
        ema.step(objective.transformer.parameters())
    objective.after_step(engine.reduce, moved)
    return step
