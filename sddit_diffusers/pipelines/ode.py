"""A pipeline's probability-flow ODE, and dopri5 on it: the reference for samplers of fixed steps.

dopri5 chooses its steps by an estimate of the error, as in SiT's evaluation (Ma et al. 2024). The estimate is
one number a batch, so an image depends a little on the others of its batch. The state is float64; the network
has its own dtype.
"""

import math
from collections.abc import Callable, Sequence

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .pipeline_sddit import (
    Generators,
    Label,
    SDDiTPipeline,
    check_finite,
    check_generator,
    check_number,
    check_range,
)

RTOL, ATOL = 1e-3, 1e-6  # SiT's


def check_ode(pipe: SDDiTPipeline) -> None:
    """Raises a ValueError where dopri5 cannot be had, or not for the pipeline's scheduler."""
    _odeint()
    if not hasattr(pipe.scheduler, "velocity"):
        raise ValueError(
            f"{type(pipe.scheduler).__name__} tells no velocity of an ODE; "
            "EDMHeunScheduler and InterpolantScheduler do."
        )


def _odeint() -> Callable:
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise ValueError("dopri5 needs torchdiffeq: pip install 'sddit-diffusers[ode]'.") from None
    return odeint


class VelocityField:
    """dx / dt of a pipeline's probability-flow ODE for a batch, with classifier-free guidance.

    Args:
        pipe: its scheduler tells what the network's output means, and what the times are.
        labels: class numbers, one an image.
        guidance_scale, guidance_interval: as in the pipeline's call.
        generator: what the images were drawn with, for messages.

    Attributes:
        interval: the lowest and the highest time.
        jumps: times within it at which guidance begins or ends.
        evaluations: of the network so far; with guidance one is of twice the batch.

    Raises:
        ValueError: see [`check_ode`].
    """

    def __init__(
        self,
        pipe: SDDiTPipeline,
        labels: Sequence[int],
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        generator: Generators = None,
    ):
        check_ode(pipe)
        self.transformer, self.scheduler, self.generator = pipe.transformer, pipe.scheduler, generator
        self.labels = torch.as_tensor(labels, device=pipe.device)
        self.guidance_scale = guidance_scale
        self.interval = low, high = self.scheduler.interval
        self._guided = [self.scheduler.time_of(ratio) for ratio in guidance_interval]
        self.jumps = [t for t in dict.fromkeys(self._guided) if guidance_scale != 1 and low < t < high]
        self.evaluations = 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """The velocity at a time, of samples `[b, c, h, w]`.

        Raises:
            FloatingPointError: it is not finite.
        """
        velocity = self.scheduler.velocity(self._output(t, x), x, t)
        check_finite(velocity, self.generator)
        return velocity

    def denoised(self, t: Tensor, x: Tensor) -> Tensor:
        """D(x; t), `[b, c, h, w]`."""
        return self.scheduler.precondition_outputs(x, self._output(t, x), t)

    def _output(self, t: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        model_input = self.scheduler.precondition_inputs(x, t).to(self.transformer.dtype)
        timestep, labels = self.scheduler.precondition_noise(t).float(), self.labels
        is_guided = self.guidance_scale != 1 and self._guided[0] <= t <= self._guided[1]
        if is_guided:
            null = torch.full_like(labels, self.transformer.config.num_classes)
            model_input, labels = torch.cat([model_input] * 2), torch.cat([labels, null])
        output = self.transformer(model_input, timestep, labels, return_dict=False)[0].to(x.dtype)
        if is_guided:
            conditional, unconditional = output.chunk(2)
            output = unconditional + self.guidance_scale * (conditional - unconditional)
        return output


def dopri5(
    derivative: Callable,
    state: Tensor | tuple[Tensor, ...],
    start: float,
    end: float,
    rtol: float = RTOL,
    atol: float = ATOL,
    jumps: Sequence[float] = (),
):
    """The state at `end`, by the method of Dormand and Prince (1980), of orders 5 and 4.

    Args:
        derivative: of (t, state); it is not evaluated outside of start..end.
        state: a tensor, or several, whose largest error counts.
        start, end: times, in either order.
        rtol, atol: an error of atol + rtol |state| is allowed, in the root mean square.
        jumps: times within, at which the derivative jumps.

    Raises:
        FloatingPointError: no step is small enough.
        ValueError: torchdiffeq is not installed.
    """
    device = (state if isinstance(state, Tensor) else state[0]).device
    times = torch.tensor([start, end], dtype=torch.float64, device=device)
    low, high = sorted((start, end))

    def within(t, state):  # the first try of a step may be too long
        return derivative(t.clamp(low, high), state)

    # Without a step that ends there the last one goes beyond, where a noise level may be negative.
    options = {"step_t": times[1:], "jump_t": times.new_tensor(jumps)}
    try:
        found = _odeint()(within, state, times, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError:  # a step below the resolution of time
        raise FloatingPointError(
            f"dopri5 finds no step that keeps to rtol {rtol:g} and atol {atol:g}; take larger ones."
        ) from None
    return found[-1] if isinstance(state, Tensor) else tuple(part[-1] for part in found)


class Dopri5Sampler:
    """Samples a pipeline's ODE by dopri5; called as the pipeline is.

    From noise at the highest time to the lowest, and where that is above 0, by one step to D, as the
    pipeline's own scheduler ends.

    Args:
        pipe: a pipeline with an `EDMHeunScheduler` or an `InterpolantScheduler`.
        rtol, atol: see [`dopri5`].

    Attributes:
        evaluations: of the network in the last call.

    Raises:
        ValueError: see [`check_ode`].
    """

    def __init__(self, pipe: SDDiTPipeline, rtol: float = RTOL, atol: float = ATOL):
        check_ode(pipe)
        self.pipe, self.rtol, self.atol = pipe, rtol, atol
        self.evaluations = 0

    @property
    def transformer(self) -> torch.nn.Module:
        return self.pipe.transformer

    @property
    def device(self) -> torch.device:
        return self.pipe.device

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        generator: Generators = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """One image for every label; arguments and errors as in the pipeline's call."""
        check_number("guidance_scale", guidance_scale)
        check_range("guidance_interval", guidance_interval)
        pipe, config = self.pipe, self.transformer.config
        labels = pipe.get_label_ids(class_labels)
        check_generator(generator, len(labels))
        field = VelocityField(pipe, labels, guidance_scale, guidance_interval, generator)
        low, high = field.interval

        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        noise = randn_tensor(shape, generator=generator, device=pipe.device, dtype=torch.float32).double()
        x = pipe.scheduler.noised(torch.zeros_like(noise), noise, torch.tensor(high, dtype=torch.float64))
        x = dopri5(field, x, high, low, self.rtol, self.atol, field.jumps)
        if low > 0 and pipe.scheduler.config.get("final_sigmas_type") != "sigma_min":
            x = field.denoised(torch.tensor(low, dtype=x.dtype), x)
        self.evaluations = field.evaluations
        return ImagePipelineOutput(images=pipe.decode(x, output_type, generator=generator))
