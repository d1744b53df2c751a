"""Self-distillation: a trained model made better at a fixed small number of steps, by itself.

SSD and iSSD: "Diffusion Model is Effectively Its Own Teacher", supplement, Algorithms 1 and 2, Eqs. 5, 6, 11
and 17. Its predictions are of the noise; here they are dx/dt of the process's ODE, which is the noise on EDM
and the velocity on an interpolant (Eq. 17 is SSD with lambda = 1 there). Progressive: Salimans and Ho,
"Progressive Distillation for Fast Sampling of Diffusion Models", Algorithm 2, in one stage with as many of
the teacher's steps as are asked for.

Shapes: b batch, c channels, h x w pixels of the sample, k steps of the teacher.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.order import Batch
from ..models.transformer_sddit import check_number
from .auxiliary import Process, View, network_inputs
from .objective import Draws, Objective


class StepDraws(NamedTuple):
    """What is random in a step beside the base draws, a row for each image."""

    t: Tensor  # [b, k, 1, 1, 1], the times after each of the teacher's steps from the noised view's
    guidance_scale: Tensor  # [b, 1, 1, 1]


class SelfDistillation(Objective):
    """What a student learns at a sampler's own times of its frozen copy, the teacher.

    Args:
        transformer: the student, which begins as the teacher.
        scheduler: the process and, by its steps and solver, the sampler for which it is trained.
        teacher_steps: k, of the teacher in each of the sampler's.
        guidance_scales: the range from which the guidance of the teacher's steps is drawn; (1, 1) is off.
        distil_guidance: whether the student learns the guided prediction itself.
        apart: whether the prediction without a label is learnt beside that with it in each step (A.2); no
            label is dropped then.
        teacher_momentum: of the teacher's averages; 1 keeps it as it was.
        label_dropout: as of [`Objective`].

    Raises:
        ValueError: a number out of its range, fewer than two steps of the sampler, or `apart`
            without classes.
    """

    def __init__(
        self,
        transformer: nn.Module,
        scheduler: Process,
        *,
        teacher_steps: int = 1,
        guidance_scales: tuple[float, float] = (1.0, 1.0),
        distil_guidance: bool = False,
        apart: bool = False,
        teacher_momentum: float = 1.0,
        label_dropout: float = 0.1,
    ):
        check_number("teacher_momentum", teacher_momentum, low=0, high=1)
        if not transformer.config.num_classes and (apart or guidance_scales != (1.0, 1.0)):
            raise ValueError("The model has no classes: it needs guidance_scale 1, and cannot learn apart.")
        super().__init__(transformer, scheduler, label_dropout=0.0 if apart else label_dropout)
        self._no_split_modules = [*transformer._no_split_modules]
        if (steps := scheduler.num_inference_steps) < 2:
            raise ValueError(f"num_inference_steps is {steps}; self-distillation needs at least 2.")
        self.register_buffer("times", scheduler.refined(teacher_steps), persistent=False)  # [steps, k + 1]
        self.guidance_scales, self.apart = guidance_scales, apart
        self.distil_guidance, self.teacher_momentum = distil_guidance, teacher_momentum
        for name, parameter in transformer.named_parameters():
            if name.split(".")[0] in getattr(transformer, "only_with_mask", ()):
                parameter.requires_grad_(False)  # there is none here
        self.teacher = copy.deepcopy(transformer).requires_grad_(False).eval()

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None, device=None) -> Draws:
        """As of [`Objective`], with a step of the sampler for each image, all of them alike likely."""
        draws = super().draw(shape, generator, device)
        options = dict(generator=generator, device=device)
        place = (torch.rand(len(draws.t), **options) * len(self.times)).long()
        times = self.times[place].to(draws.noise)[..., None, None, None]
        low, high = self.guidance_scales
        scale = low + (high - low) * torch.rand(len(draws.t), 1, 1, 1, **options)
        step = StepDraws(times[:, 1:], scale)
        return draws._replace(t=times[:, 0], visible_ids=None, auxiliaries={"step": step})

    def doubled(self, x: Tensor, t: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """A batch as the student sees it: twice, without labels the second time, where both are learnt."""
        if not self.apart:
            return x, t, labels
        return x.repeat(2, 1, 1, 1), t.repeat(2, 1, 1, 1), self.both(labels)

    def both(self, labels: Tensor) -> Tensor:
        """The labels, and the null class as many times."""
        return torch.cat([labels, torch.full_like(labels, self.transformer.config.num_classes)])

    def step(
        self, x_s: Tensor, labels: Tensor | None, s: Tensor, t: Tensor, scale: Tensor, order: int
    ) -> tuple[Tensor, Tensor]:
        """What is learnt of the teacher at s, and the sample at t to which a step of Euler's (order 1) or
        Heun's (2) leads; to time 0 it is Euler's."""
        process = self.scheduler
        at_s, guided = self.outputs(self.teacher, x_s, s, labels, scale, stepping=True)
        x0, noise = process.solve(guided, x_s, s)
        x_t = process.moved(x_s, x0, noise, s, t)
        if order == 2:
            end = t.clamp(min=process.interval[0])
            guided = self.outputs(self.teacher, x_t, end, labels, scale, stepping=True)[1]
            x0_t, noise_t = process.solve(guided, x_t, end)
            both = process.moved(x_s, (x0 + x0_t) / 2, (noise + noise_t) / 2, s, t)
            x_t = torch.where(t > 0, both, x_t)
        return self.velocity(at_s, x_s, s), x_t

    def predict(
        self, network: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None, scale: Tensor
    ) -> Tensor:
        """dx/dt as a network has it, of what is learnt: `[b, c, h, w]`, or `[2 b, c, h, w]` apart."""
        return self.velocity(self.outputs(network, x, t, labels, scale)[0], x, t)

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt of outputs for a batch, or for a batch twice."""
        times = len(output) // len(x)
        return self.scheduler.velocity(output, x.repeat(times, 1, 1, 1), t.repeat(times, 1, 1, 1))

    def outputs(
        self, network: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None, scale: Tensor,
        stepping: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """A network's output that is learnt, and the one by which the sampler steps."""
        is_guided = labels is not None and self.guidance_scales != (1.0, 1.0)
        if not self.apart and not (is_guided and (stepping or self.distil_guidance)):
            output = self.output(network, x, t, labels)
            return output, output
        twice = self.output(network, x.repeat(2, 1, 1, 1), t.repeat(2, 1, 1, 1), self.both(labels))
        output, null = twice.chunk(2)
        guided = null + scale * (output - null) if is_guided else output
        if self.distil_guidance:
            return torch.cat([guided, null]) if self.apart else guided, guided
        return twice if self.apart else output, guided

    def output(self, network: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """What a network gives for samples `[b, c, h, w]`."""
        return network(*network_inputs(self.scheduler, x, t), labels).sample.float()

    def after_step(self, reduce: Callable[[Tensor], Tensor] = torch.clone, moved: bool = True) -> None:
        """Moves the teacher towards the student, where it is no fixed one."""
        super().after_step(reduce, moved)
        if moved and self.teacher_momentum < 1:
            with torch.no_grad():
                pairs = zip(self.teacher.parameters(), self.transformer.parameters(), strict=True)
                for mean, parameter in pairs:
                    mean.lerp_(parameter, 1 - self.teacher_momentum)


class ExplicitSelfDistillation(SelfDistillation):
    """SSD (Algorithm 1): at the sampler's time s the student learns what the teacher says a little later.

    From x_s a step of the solver leads to x_t; the target is (1 - lambda) v_T(x_s, s) + lambda v_T(x_t, t),
    a first-order estimate of v between the two (Eq. 11). The last step, whose end is the data, has no later
    prediction and is left out.

    Args:
        fusion_weight: lambda, in 0..1.

    Raises:
        ValueError: as of [`SelfDistillation`].
    """

    def __init__(self, transformer: nn.Module, scheduler: Process, *, fusion_weight: float, **arguments):
        check_number("fusion_weight", fusion_weight, low=0, high=1)
        super().__init__(transformer, scheduler, **arguments)
        self.times = self.times[: scheduler.num_inference_steps - 1]
        self.fusion_weight = fusion_weight

    def denoise(self, batch: Batch, draws: Draws) -> tuple[dict[str, Tensor], View]:
        """The loss of the student's prediction, and what auxiliary losses would see."""
        s, (t, scale), labels = draws.t, draws.auxiliaries["step"], batch.labels
        x_s, t = self.scheduler.noised(batch.x0, draws.noise, s), t[:, 0]
        with torch.no_grad():
            at_s, x_t = self.step(x_s, labels, s, t, scale, self.scheduler.order)
            at_t = self.predict(self.teacher, x_t, t, labels, scale)
            target = at_s + self.fusion_weight * (at_t - at_s)
        made = self.evaluate(*self.doubled(x_s, s, labels), None)
        return self.loss(made.output, x_s, s, target), self.view(batch, draws, made)

    def loss(self, output: Tensor, x: Tensor, t: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The mean squared difference of dx/dt from the target."""
        loss = (self.velocity(output.float(), x, t) - target).square().mean()
        return {"loss": loss, "loss_generative": loss}


class ImplicitSelfDistillation(ExplicitSelfDistillation):
    """iSSD (Algorithm 2): helped by its layers' work on x_s, the student says of x_t what the teacher does.

    Each block's own contribution, its output less its input, is mixed with that of the pass over x_s, which
    has no gradient (Eq. 6). # Paper silent: the place of the mix; the running stream itself, mixed block by
    block, makes the child worse.

    Raises:
        ValueError: the network has no blocks of one stream, and as of [`SelfDistillation`].
    """

    def __init__(self, transformer: nn.Module, scheduler: Process, **arguments):
        super().__init__(transformer, scheduler, **arguments)
        names = getattr(transformer, "stream_blocks", transformer._no_split_modules)
        blocks = [module for module in transformer.modules() if type(module).__name__ in names]
        if not blocks:
            raise ValueError("objective is 'issd'; this network has no blocks of one stream, so take 'ssd'.")
        self.stored: dict[nn.Module, Tensor] = {}  # what each block adds at s
        self.stores = False
        for block in blocks:  # they stay: activation checkpoints come by again in the backward pass
            block.register_forward_hook(self.fuse, with_kwargs=True)

    def fuse(self, block: nn.Module, inputs: tuple, named: dict, output: Tensor) -> Tensor | None:
        """Stores a block's contribution, or mixes it with the stored one."""
        before = inputs[0] if inputs else named["hidden_states"]
        if self.stores:
            self.stored[block] = output - before
        elif block in self.stored:
            return output + self.fusion_weight * (self.stored[block] - (output - before))
        return None

    def denoise(self, batch: Batch, draws: Draws) -> tuple[dict[str, Tensor], View]:
        """As of [`SelfDistillation`]."""
        s, (t, scale), labels = draws.t, draws.auxiliaries["step"], batch.labels
        x_s, t = self.scheduler.noised(batch.x0, draws.noise, s), t[:, 0]
        with torch.no_grad():
            self.stores = True
            self.evaluate(*self.doubled(x_s, s, labels), None)
            self.stores = False
            torch.clear_autocast_cache()  # its weights in half precision take no gradient
            _, x_t = self.step(x_s, labels, s, t, scale, self.scheduler.order)
            target = self.predict(self.teacher, x_t, t, labels, scale)
        made = self.evaluate(*self.doubled(x_t, t, labels), None)
        return self.loss(made.output, x_t, t, target), self.view(batch, draws, made)


class ProgressiveDistillation(SelfDistillation):
    """Progressive distillation: one of Euler's steps leads the student where k of Heun's lead the teacher.

    The loss is the mean squared difference of the two places over the step's length, so that it is one of
    dx/dt. The teacher's steps divide the student's as its sampler's own schedule would.

    Raises:
        ValueError: the sampler is Heun's, the guidance is not that which is learnt, and as of
            [`SelfDistillation`].
    """

    def __init__(self, transformer: nn.Module, scheduler: Process, **arguments):
        super().__init__(transformer, scheduler, **arguments)
        if scheduler.order != 1:
            raise ValueError("solver is 'heun'; progressive distillation is for steps of 'euler'.")
        if self.apart:
            raise ValueError("apart is set; progressive distillation learns one prediction.")
        if self.guidance_scales != (1.0, 1.0) and not self.distil_guidance:
            raise ValueError(
                f"guidance_scale is {self.guidance_scales}; progressive distillation learns where guided "
                "steps lead, so it needs distil_guidance too."
            )

    def denoise(self, batch: Batch, draws: Draws) -> tuple[dict[str, Tensor], View]:
        """As of [`ExplicitSelfDistillation`]."""
        s, (times, scale), process = draws.t, draws.auxiliaries["step"], self.scheduler
        x_s = process.noised(batch.x0, draws.noise, s)
        with torch.no_grad():
            x_t, t = x_s, s
            for end in times.unbind(1):
                x_t, t = self.step(x_t, batch.labels, t, end, scale, order=2)[1], end
        made = self.evaluate(x_s, s, batch.labels, None)
        x0, noise = process.solve(made.output.float(), x_s, s)
        error = (process.moved(x_s, x0, noise, s, t) - x_t) / (t - s)
        loss = error.square().mean()
        return {"loss": loss, "loss_generative": loss}, self.view(batch, draws, made)


OBJECTIVES = {
    "ssd": ExplicitSelfDistillation,
    "issd": ImplicitSelfDistillation,
    "progressive": ProgressiveDistillation,
}
