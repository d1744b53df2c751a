"""EDM's preconditioning and its second-order Heun sampler (Karras et al. 2022, Table 1 and Algorithm 2).

These are the sampler and the preconditioning of SD-DiT (supplementary, Eqs. 1-3 and Table A1): 40 steps,
79 network evaluations. The scheduler owns sigma_data and c_skip, c_out, c_in, c_noise; training and sampling
both ask it. Its config keys and method names are those of diffusers' EDM schedulers, which therefore swap in
and out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

_MOST_STEPS = 10**6


@dataclass
class EDMHeunSchedulerOutput(BaseOutput):
    """What [`EDMHeunScheduler.step`] returns.

    Attributes:
        prev_sample: the sample to evaluate next, `[b, c, h, w]`, float32 or wider.
        pred_original_sample: the denoised D(x; sigma) of this evaluation, of the same shape.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class EDMProcess:
    """EDM's diffusion process, of a scheduler with a config: how samples are noised, what the network gives.

    A time t is the noise level sigma itself, which is the noise-to-signal ratio.
    """

    config: Any

    def training_times(self, normal: Tensor) -> Tensor:
        """Noise levels of standard normal draws, of the same shape (supplementary, Eq. 2)."""
        return (self.config.p_mean + self.config.p_std * normal).exp()

    def time_of(self, ratio: float | Tensor) -> float | Tensor:
        """The time at which the noise is `ratio` times as large as the signal, of any shape."""
        return ratio

    def ratio_of(self, t: Tensor) -> Tensor:
        """The noise-to-signal ratio at times, of the same shape."""
        return t

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = x0 + sigma n, `[b, c, h, w]`, of noise of unit variance and t `[b, 1, 1, 1]`."""
        return x0 + t * noise

    def error(self, model_output: Tensor, sample: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """lambda(sigma) (D - x0)^2, `[b, c, h, w]`, of the network's output F for a noised sample (Eq. 9).

        # Paper silent: the weight is EDM's, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2. In float32: at
        small sigma it is large, and D - x0 the small difference of large numbers.
        """
        denoised, sigma_data = (
            self.precondition_outputs(sample, model_output.float(), t),
            self.config.sigma_data,
        )
        return (t**2 + sigma_data**2) / (t * sigma_data) ** 2 * (denoised - x0) ** 2

    @property
    def interval(self) -> tuple[float, float]:
        """The lowest and the highest time of sampling."""
        return self.config.sigma_min, self.config.sigma_max

    def solve(self, model_output: Tensor, sample: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """The data D and the noise (x - D) / sigma that the output stands for, both `[b, c, h, w]`."""
        denoised = self.precondition_outputs(sample, model_output, t)
        return denoised, (sample - denoised) / t

    def velocity(self, model_output: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """dx / dsigma of the probability-flow ODE, which is the noise, `[b, c, h, w]`."""
        return self.solve(model_output, sample, t)[1]

    def moved(self, sample: Tensor, x0: Tensor, noise: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """The sample at another time, as far as the noise stays what it is: Euler's step."""
        return sample + (end - t) * noise

    # Preconditioning (EDM, Table 1, last column; supplementary, Eq. 1)

    def precondition_inputs(self, sample: Tensor, sigma: float | Tensor) -> Tensor:
        """c_in(sigma) x, where c_in = 1 / sqrt(sigma^2 + sigma_data^2)."""
        return sample / (sigma**2 + self.config.sigma_data**2) ** 0.5

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """c_noise(sigma) = ln(sigma) / 4, the timestep that the network takes."""
        return torch.as_tensor(sigma).log() / 4

    def precondition_outputs(self, sample: Tensor, model_output: Tensor, sigma: float | Tensor) -> Tensor:
        """D(x; sigma) = c_skip x + c_out F."""
        sigma_data = self.config.sigma_data
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
        if self.config.prediction_type == "v_prediction":
            c_out = -c_out
        return c_skip * sample + c_out * model_output


class EDMHeunScheduler(EDMProcess, SchedulerMixin, ConfigMixin):
    """Heun's method on the probability-flow ODE: an Euler step to sigma_{i+1}, then the trapezoid's
    correction.

    `timesteps` and `sigmas` list the 2N - 1 evaluations in their order: sigma_0, then sigma_1 .. sigma_{N-1}
    twice each, and a last sigma of the end point that is not evaluated. `step` takes them one at a time. With
    the solver "euler" there is no correction, and N evaluations.

    Args:
        sigma_min, sigma_max: the ends of the schedule, 0.002 and 80; in 1e-6..1e6.
        sigma_data: standard deviation of the data, 0.5; in 1e-6..1e6.
        sigma_schedule: "karras" (supplementary, Eq. 3) or "exponential".
        num_train_timesteps: unused; kept so that diffusers' EDM schedulers can be made from this config.
        prediction_type: "epsilon", the sign of c_out in EDM, or "v_prediction", its negative.
        rho: curvature of the "karras" schedule, 7; in 0.1..1000.
        final_sigmas_type: the end point, "zero" or "sigma_min".
        p_mean, p_std: of training's noise levels, ln(sigma) ~ N(p_mean, p_std^2) (supplementary, Eq. 2).
        num_inference_steps: steps of a pipeline that is not told how many.
        solver: "heun" or "euler".

    Raises:
        ValueError: an unknown `sigma_schedule`, `prediction_type` or `final_sigmas_type`, a number out of its
            range, or a sigma_min that is not below sigma_max.
    """

    order = 2

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
        p_mean: float = -1.2,
        p_std: float = 1.2,
        num_inference_steps: int = 40,
        solver: str = "heun",
    ):
        check_config(self.config)
        check_steps("num_train_timesteps", num_train_timesteps)
        self.order = 1 + (solver == "heun")
        self.set_timesteps(num_inference_steps)

    # The schedule

    @property
    def init_noise_sigma(self) -> float:
        """What unit noise is multiplied by at the start: sigma_0 (EDM starts from sigma_max itself)."""
        return self.sigmas[self.begin_index or 0].item()

    @property
    def times(self) -> Tensor:
        """Noise levels of the evaluations."""
        return self.sigmas[:-1]

    @property
    def step_index(self) -> int:
        """The evaluation that comes next, an index into `timesteps`."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The evaluation to begin with, None for the first."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begins at another evaluation, one that opens a step: with Heun's method an even index.

        Raises:
            ValueError: `begin_index` is the second half of a step, or past the end.
        """
        if begin_index not in range(0, len(self.timesteps), self.order):
            raise ValueError(
                f"begin_index is {begin_index!r:.80}; a Heun step begins at the even indices below "
                f"{len(self.timesteps)}."
            )
        self._begin_index: int | None = begin_index
        self._step_index = begin_index
        self._interval: tuple[Tensor, Tensor, Tensor] | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Tensor | list[float] | None = None,
    ) -> None:
        """Lays out the evaluations of a run.

        Args:
            num_inference_steps: steps N; Heun's evaluate the network 2N - 1 times.
            device: where `timesteps` live; `sigmas` stay on the CPU, so that reading them never waits for a
                GPU.
            sigmas: the N noise levels themselves, decreasing and positive, in place of the configured
                schedule.

        Raises:
            ValueError: neither or a wrong number of steps is given (a million are the most), or `sigmas` do
                not decrease to above 0.
        """
        if sigmas is None:
            check_steps("num_inference_steps", num_inference_steps)
            sigmas = self._schedule(num_inference_steps)
        given = sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas
        try:
            sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            sigmas = torch.empty(0)
        decreasing = sigmas.ndim == 1 and len(sigmas) > 0 and sigmas[-1] > 0 and (sigmas.diff() < 0).all()
        if not decreasing or not sigmas.isfinite().all():
            raise ValueError(f"sigmas must be finite, decrease and stay above 0; got {given!r:.200}.")
        self.num_inference_steps = len(sigmas)
        final = sigmas[-1:] if self.config.final_sigmas_type == "sigma_min" else sigmas.new_zeros(1)
        evaluated = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(self.order)])  # 2N - 1, or N
        self.sigmas = torch.cat([evaluated, final])
        self.timesteps = self.precondition_noise(evaluated).to(device=device, dtype=torch.float32)
        self._begin_index = None
        self._step_index = 0
        self._interval = None

    def _schedule(self, n: Any) -> Tensor:
        """The N noise levels from sigma_max to sigma_min (supplementary, Eq. 3), float64."""
        ramp = torch.linspace(0, 1, n, dtype=torch.float64, device="cpu")
        if self.config.sigma_schedule == "exponential":
            low, high = math.log(self.config.sigma_min), math.log(self.config.sigma_max)
            return (high + ramp * (low - high)).exp()
        rho = self.config.rho
        low, high = self.config.sigma_min ** (1 / rho), self.config.sigma_max ** (1 / rho)
        return (high + ramp * (low - high)) ** rho

    def refined(self, parts: int) -> Tensor:
        """Noise levels `[N - 1, parts + 1]` of the steps, in parts as a finer schedule has them, float64.

        The last step, which ends at no noise, is left out.
        """
        return self._schedule(parts * (self.num_inference_steps - 1) + 1).unfold(0, parts + 1, parts)

    # The sampler

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """c_in x for the evaluation that comes next."""
        return self.precondition_inputs(sample, self.sigmas[self.step_index])

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EDMHeunSchedulerOutput | tuple:
        """One evaluation of Algorithm 2: the Euler step or, at every second call, its correction.

        The place in the schedule is counted, not looked up, so a rounded `timestep` does no harm.

        Args:
            model_output: the raw network output F for `sample`, `[b, c, h, w]`.
            timestep: the entry of `timesteps` that was evaluated; not used.
            sample: the sample that was evaluated, `[b, c, h, w]`.
            s_churn, s_tmin, s_tmax, s_noise: Algorithm 2's stochasticity. The noise that a step adds must be
                there before the network sees its sample, so it is added when the step before is completed,
                and the raised noise level is written into `sigmas` and `timesteps`: read `timesteps` as you
                go. The first step starts at sigma_0 as it is, as it does in EDM's own settings, whose s_tmax
                is below sigma_max.
            generator: for the churn's noise; a list gives each image its own.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: the schedule has come to its end.
        """
        if self.step_index >= len(self.timesteps):
            raise ValueError(f"All {self.step_index} evaluations are done; set_timesteps begins another run.")
        dtype = torch.promote_types(sample.dtype, torch.float32)
        sample, model_output = sample.to(dtype), model_output.to(dtype)
        sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        denoised = self.precondition_outputs(sample, model_output, sigma)
        slope = (sample - denoised) / sigma  # d_i (line 7) or d_i' (line 10)

        if self._interval is None:
            prev_sample = sample + (sigma_next - sigma) * slope  # line 8
            # The last step is Euler's alone.
            completed = self.order == 1 or self.step_index + 1 == len(self.timesteps)
            if not completed:
                self._interval = (sample, slope, sigma_next - sigma)
        else:
            start, first_slope, width = self._interval
            prev_sample = start + width * (first_slope + slope) / 2  # line 11
            completed = True
            self._interval = None
        self._step_index += 1
        if completed and self.step_index < len(self.timesteps):
            prev_sample = self._churn(prev_sample, s_churn, s_tmin, s_tmax, s_noise, generator)

        if not return_dict:
            return (prev_sample, denoised)
        return EDMHeunSchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised)

    def _churn(
        self, sample: Tensor, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float, generator
    ) -> Tensor:
        """Raises the sample to sigma_hat = (1 + gamma) sigma before its step (Algorithm 2, lines 4-6)."""
        sigma = self.sigmas[self.step_index].item()
        if s_churn <= 0 or not s_tmin <= sigma <= s_tmax:
            return sample
        sigma_hat = sigma * (1 + min(s_churn / self.num_inference_steps, 2**0.5 - 1))
        self.sigmas[self.step_index] = sigma_hat
        self.timesteps[self.step_index] = math.log(sigma_hat) / 4
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        return sample + (sigma_hat**2 - sigma**2) ** 0.5 * s_noise * noise

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def check_steps(name: str, value: Any) -> None:
    """Raises a ValueError for what is no number of steps."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= int(value) <= _MOST_STEPS:
        raise ValueError(f"{name} is {value!r:.80}; it must be a whole number in 1..{_MOST_STEPS}.")


def check_config(config: Mapping) -> None:
    """Raises a ValueError for settings that make no schedule."""
    for name, allowed in (
        ("sigma_schedule", ("karras", "exponential")),
        ("prediction_type", ("epsilon", "v_prediction")),
        ("final_sigmas_type", ("zero", "sigma_min")),
        ("solver", ("heun", "euler")),
    ):
        if config[name] not in allowed:
            raise ValueError(
                f"{name} is {config[name]!r:.80}; it must be one of {', '.join(map(repr, allowed))}."
            )
    for name, low, high in (
        ("sigma_min", 1e-6, 1e6), ("sigma_max", 1e-6, 1e6), ("sigma_data", 1e-6, 1e6), ("rho", 0.1, 1000),
        ("p_mean", -20, 20), ("p_std", 0, 20),
    ):  # fmt: skip
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, Real) or not low <= config[name] <= high:
            raise ValueError(f"{name} is {value!r:.80}; it must be a number in {low}..{high}.")
    if not config["sigma_min"] < config["sigma_max"]:
        raise ValueError(
            f"sigma_min is {config['sigma_min']}; it must be below sigma_max, {config['sigma_max']}."
        )
