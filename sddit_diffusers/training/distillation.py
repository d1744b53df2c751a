"""Self-distillation: a trained model made better at a fixed small number of steps, by itself (SSD and iSSD).

Source: "Diffusion Model is Effectively Its Own Teacher", supplement: Algorithms 1 and 2, Eqs. 5, 6, 11, 17.
Its predictions are of the noise; here they are dx/dt of the process's ODE, which is the noise on EDM and the
velocity on an interpolant (Eq. 17 is SSD with lambda = 1 there).

Shapes: b batch, c channels, h x w pixels of the sample.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.order import Batch
from ..models.transformer_sddit import PatchTransformer2DModel, SDDiTBlock, check_number
from .auxiliary import Process, View, network_inputs
from .objective import Draws, Objective


class StepDraws(NamedTuple):
    """What is random in a step beside the base draws, a row for each image."""

    t: Tensor  # [b, 1, 1, 1], the time after one step of the sampler from the noised view's
    guidance_scale: Tensor  # [b, 1, 1, 1]


class SelfDistillation(Objective):
    """SSD (Algorithm 1): at the sampler's time s the student learns what the teacher says a little later.

    From x_s a step of the solver leads to x_t; the target is (1 - lambda) v_T(x_s, s) + lambda v_T(x_t, t),
    a first-order estimate of v between the two (Eq. 11).

    Args:
        transformer: the student, which begins as the teacher.
        scheduler: the process and, by its steps, the sampler for which it is trained.
        mix: lambda, in 0..1.
        guidance_scales: the range from which the guidance of the step from x_s to x_t is drawn; 1 is off.
        distil_guidance: whether the student learns the guided prediction itself.
        teacher_momentum: of the teacher's averages; 1 keeps it as it was.
        label_dropout: as of [`Objective`].

    Raises:
        ValueError: a number out of its range, or fewer than two steps of the sampler.
    """

    def __init__(
        self,
        transformer: PatchTransformer2DModel,
        scheduler: Process,
        *,
        mix: float,
        guidance_scales: tuple[float, float] = (1.0, 1.0),
        distil_guidance: bool = False,
        teacher_momentum: float = 1.0,
        label_dropout: float = 0.1,
    ):
        check_number("mix", mix, low=0, high=1)
        check_number("teacher_momentum", teacher_momentum, low=0, high=1)
        super().__init__(transformer, scheduler, label_dropout=label_dropout)
        self.times = scheduler.times[:: scheduler.order]  # at which the sampler's steps begin
        if len(self.times) < 2:
            raise ValueError(f"num_inference_steps is {len(self.times)}; self-distillation needs at least 2.")
        self.mix, self.guidance_scales = mix, guidance_scales
        self.distil_guidance, self.teacher_momentum = distil_guidance, teacher_momentum
        self.teacher = copy.deepcopy(transformer).requires_grad_(False).eval()

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None, device=None) -> Draws:
        """As of [`Objective`], with a step of the sampler for each image, all of them alike likely.

        The last step, whose end is the data, has no later prediction and is left out.
        """
        draws = super().draw(shape, generator, device)
        options = dict(generator=generator, device=device)
        place = (torch.rand(len(draws.t), **options) * (len(self.times) - 1)).long().cpu()
        s, t = (self.times[i].to(draws.t).view(-1, 1, 1, 1) for i in (place, place + 1))
        low, high = self.guidance_scales
        scale = low + (high - low) * torch.rand(len(draws.t), 1, 1, 1, **options)
        return draws._replace(t=s, auxiliaries={"step": StepDraws(t, scale)})

    def denoise(self, batch: Batch, draws: Draws) -> tuple[dict[str, Tensor], View]:
        """The loss of the student's prediction, and what auxiliary losses would see."""
        s, (t, scale) = draws.t, draws.auxiliaries["step"]
        x_s = self.scheduler.noised(batch.x0, draws.noise, s)
        with torch.no_grad():
            v_s, x_t = self.step(x_s, batch.labels, s, t, scale)
            v_t = self.predict(self.teacher, x_t, t, batch.labels, scale)
            target = v_s + self.mix * (v_t - v_s)
        output = self.evaluate(x_s, s, batch.labels, None)
        loss = (self.scheduler.velocity(output.sample.float(), x_s, s) - target).square().mean()
        return self.told(loss), self.view(batch, draws, output.encoder_hidden_states)

    def step(
        self, x_s: Tensor, labels: Tensor | None, s: Tensor, t: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The teacher's prediction at s, and the sample at t to which one step of Euler's leads."""
        output = self._output(self.teacher, x_s, s, labels)
        guided = self._guided(self.teacher, output, x_s, s, labels, scale)
        x_t = self.scheduler.moved(x_s, *self.scheduler.solve(guided, x_s, s), s, t)
        learnt = guided if self.distil_guidance else output
        return self.scheduler.velocity(learnt, x_s, s), x_t

    def predict(
        self, network: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None, scale: Tensor
    ) -> Tensor:
        """dx/dt as a network has it, guided where guidance is learnt; `[b, c, h, w]`."""
        output = self._output(network, x, t, labels)
        if self.distil_guidance:
            output = self._guided(network, output, x, t, labels, scale)
        return self.scheduler.velocity(output, x, t)

    def _output(self, network: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return network(*network_inputs(self.scheduler, x, t), labels).sample.float()

    def _guided(
        self, network: nn.Module, output: Tensor, x: Tensor, t: Tensor, labels: Tensor | None, scale: Tensor
    ) -> Tensor:
        if labels is None or self.guidance_scales == (1.0, 1.0):
            return output
        null = self._output(network, x, t, torch.full_like(labels, self.transformer.config.num_classes))
        return null + scale * (output - null)

    def told(self, loss: Tensor) -> dict[str, Tensor]:
        return {"loss": loss, "loss_generative": loss}

    def after_step(self, reduce: Callable[[Tensor], Tensor] = torch.clone, moved: bool = True) -> None:
        """Moves the teacher towards the student, where it is no fixed one."""
        super().after_step(reduce, moved)
        if moved and self.teacher_momentum < 1:
            with torch.no_grad():
                pairs = zip(self.teacher.parameters(), self.transformer.parameters(), strict=True)
                for mean, parameter in pairs:
                    mean.lerp_(parameter, 1 - self.teacher_momentum)


class ImplicitSelfDistillation(SelfDistillation):
    """iSSD (Algorithm 2): helped by its layers' work on x_s, the student says of x_t what the teacher does.

    Each block's own contribution, its output less its input, is mixed with that of the pass over x_s, which
    has no gradient (Eq. 6). # Paper silent: the place of the mix; the running stream itself, mixed block by
    block, makes the child worse.
    """

    def denoise(self, batch: Batch, draws: Draws) -> tuple[dict[str, Tensor], View]:
        """As of [`SelfDistillation`]."""
        s, (t, scale) = draws.t, draws.auxiliaries["step"]
        x_s, kept = self.scheduler.noised(batch.x0, draws.noise, s), {}
        with torch.no_grad():
            with fused(self.transformer, keep, kept):
                self.evaluate(x_s, s, batch.labels, None)
            _, x_t = self.step(x_s, batch.labels, s, t, scale)
            target = self.predict(self.teacher, x_t, t, batch.labels, scale)
        with fused(self.transformer, mixed(self.mix), kept):
            output = self.evaluate(x_t, t, batch.labels, None)
        loss = (self.scheduler.velocity(output.sample.float(), x_t, t) - target).square().mean()
        return self.told(loss), self.view(batch, draws, output.encoder_hidden_states)


@contextmanager
def fused(network: nn.Module, change: Callable, kept: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Lets `change` see, and change, what each block adds to its input.

    Args:
        change: of the block, its contribution and `kept`; gives the contribution.
    """

    def hook(block: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return inputs[0] + change(block, output - inputs[0], kept)

    blocks = [module for module in network.modules() if isinstance(module, SDDiTBlock)]
    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keep(block: nn.Module, contribution: Tensor, kept: dict[nn.Module, Tensor]) -> Tensor:
    """Keeps the contribution, and leaves it as it is."""
    kept[block] = contribution.detach()
    return contribution


def mixed(share: float) -> Callable:
    """A change to (1 - share) of the contribution and `share` of the kept one."""

    def change(block: nn.Module, contribution: Tensor, kept: dict[nn.Module, Tensor]) -> Tensor:
        return contribution + share * (kept[block] - contribution)

    return change


OBJECTIVES = {"ssd": SelfDistillation, "issd": ImplicitSelfDistillation}
