"""Whether losses and gradients are finite: decided on the device, and told of when somebody asks.

A device works behind the program that tells it what to do. Whoever looks at a value waits until all before it
is done, and the device then waits for new work. So a step is judged where it is made, and looked at later.
"""

import math

import torch
from torch import Tensor, nn

from .engines import Engine, whole
from .step import Step

_MOST = 100  # steps that are kept until they are looked at
_SHOWN = 12  # names in a message


class Health:
    """Of a run's steps; all processes call its methods, and see the same reduced values.

    Args:
        engine: what takes the steps.
        model: what is trained.
    """

    def __init__(self, engine: Engine, model: nn.Module):
        self.engine, self.model = engine, model
        self.failed: Tensor | None = None
        self.unseen: list[tuple[int, Step]] = []

    def judge(self, number: int, step: Step, at_once: bool = False) -> Tensor:
        """Takes in a step before any weight has moved.

        Args:
            number: of the step, from 0.
            at_once: whether to wait for the device, so that nothing else moves either, such as centers.

        Returns:
            1 if it or one before it is not finite, so that no weight may move; 0 otherwise; float32 on the
            device.
        """
        # fp16's loss scaler leaves out steps whose gradients overflow; these are no failures.
        values = torch.cat([step.losses, step.norm.view(1)]) if step.moved else step.losses
        failed = 1 - values.isfinite().all().float()
        self.failed = failed if self.failed is None else torch.maximum(self.failed, failed)
        self.unseen.append((number, step))
        if at_once or self.engine.looks_at_once or len(self.unseen) == _MOST:
            self.check()
        return self.failed

    def check(self) -> None:
        """Waits for the device.

        Raises:
            FloatingPointError: a step was not finite; the first one, with the names of what was not.
        """
        steps, self.unseen = self.unseen, []
        if self.failed is None or not self.failed.item():
            return
        self.failed = None
        for number, step in steps:
            if wrong := self._wrong(step):
                more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
                raise FloatingPointError(
                    f"Step {number + 1}: not finite: {', '.join(wrong[:_SHOWN])}{more}. "
                    "No weight was moved in this step."
                )

    def _wrong(self, step: Step) -> list[str]:
        values = dict(zip(step.names, step.losses.tolist(), strict=True))
        of_losses = not all(map(math.isfinite, values.values()))
        if step.moved and not of_losses:
            values["grad_norm"] = step.norm.item()
        wrong = [f"{name} ({value})" for name, value in values.items() if not math.isfinite(value)]
        if not wrong:
            return wrong
        for name, parameter in self.model.named_parameters():
            if not whole(parameter).isfinite().all():  # as they were in that step, since none has moved
                wrong.append(f"the weights {name}")
            elif not of_losses and not self._has_finite_gradient(step, name, parameter):
                wrong.append(f"the gradient of {name}")
        return wrong

    def _has_finite_gradient(self, step: Step, name: str, parameter: Tensor) -> bool:
        if step.norms is None:  # the step has just been made
            gradient = self.engine.gradient(parameter)
            return gradient is None or bool(gradient.isfinite().all())
        return name not in step.norms or bool(whole(step.norms[name]).isfinite())
