"""Interpolants x_t = alpha(t) x0 + sigma(t) eps, and their samplers by ODE and SDE (SiT, Ma et al. 2024).

Time runs as in the paper and in diffusers' flows: t = 0 is data, t = 1 noise. On the linear path t is
diffusers' flow sigma, the velocity is eps - x0, and the network's timestep is 1000 t, so diffusers' flow
schedulers swap in. SiT's code has its time the other way round, and its diffusion coefficient is half of the
paper's w, which is meant here; the score is s = -eps / sigma.
"""

import math
from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class Path:
    """How signal and noise are mixed over time: functions of t, of any shape.

    Attributes:
        alpha, sigma, d_alpha, d_sigma: factors of signal and noise, and their derivatives.
        time_of: the time at which sigma / alpha is a ratio.
        interval: the times at which all that a velocity needs is finite.
        inner: the same of noise, score and data.
    """

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]
    time_of: Callable[[Tensor], Tensor]
    interval: tuple[float, float] = (0.0, 1.0)
    inner: tuple[float, float] = (1e-3, 1 - 1e-3)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma and their derivatives."""
        return self.alpha(t), self.sigma(t), self.d_alpha(t), self.d_sigma(t)


def _vp_alpha(t: Tensor) -> Tensor:
    return (-0.25 * 19.9 * t**2 - 0.5 * 0.1 * t).exp()


def _vp_sigma(t: Tensor) -> Tensor:
    return (-(-0.5 * 19.9 * t**2 - 0.1 * t).expm1()).sqrt()  # of 1 - alpha^2


def _vp_time_of(ratio: Tensor) -> Tensor:
    log = (ratio**2).log1p().clamp(max=1e6)  # -2 ln alpha, also where the ratio is infinite
    return 2 * log / (0.1 + (0.01 + 2 * 19.9 * log).sqrt())


_QUARTER = math.pi / 2
PATHS = {
    "linear": Path(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        d_alpha=lambda t: -torch.ones_like(t),
        d_sigma=torch.ones_like,
        time_of=lambda ratio: 1 / (1 + 1 / ratio),
    ),
    "gvp": Path(
        alpha=lambda t: (_QUARTER * (1 - t)).sin(),  # cos of t, and 0 at 1
        sigma=lambda t: (_QUARTER * t).sin(),
        d_alpha=lambda t: -_QUARTER * (_QUARTER * t).sin(),
        d_sigma=lambda t: _QUARTER * (_QUARTER * (1 - t)).sin(),
        time_of=lambda ratio: ratio.atan() / _QUARTER,
    ),
    # beta(t) = 0.1 + 19.9 t, as SiT's code has it; sigma's derivative has no end at t = 0.
    "vp": Path(
        alpha=_vp_alpha,
        sigma=_vp_sigma,
        d_alpha=lambda t: -0.5 * (0.1 + 19.9 * t) * _vp_alpha(t),
        d_sigma=lambda t: 0.5 * (0.1 + 19.9 * t) * _vp_alpha(t) ** 2 / _vp_sigma(t),
        time_of=_vp_time_of,
        interval=(1e-5, 1.0),
        inner=(1e-5, 1.0),
    ),
}


def _tensor(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


PREDICTIONS = ("flow_prediction", "score", "epsilon", "sample")
WEIGHTINGS = ("none", "velocity", "likelihood")
DISTRIBUTIONS = ("uniform", "lognormal")
DIFFUSIONS = (
    "none", "sigma", "kl", "kl-eta", "sbdm", "linear", "constant", "increasing-decreasing", "decreasing",
)  # fmt: skip
LAST_STEPS = ("none", "mean", "tweedie", "euler")
SOLVERS = ("euler", "heun")


@dataclass
class InterpolantSchedulerOutput(BaseOutput):
    """What [`InterpolantScheduler.step`] returns.

    Attributes:
        prev_sample: the sample to evaluate next, `[b, c, h, w]`, float32 or wider.
        pred_original_sample: the denoised D(x; t) of this evaluation, of the same shape.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class InterpolantProcess:
    """An interpolant, of a scheduler with a config: how samples are noised, what the network gives."""

    config: Any

    @property
    def path(self) -> Path:
        return PATHS[self.config.path]

    @property
    def interval(self) -> tuple[float, float]:
        """The lowest and the highest time, as in SiT's code: 0 and 1 for a velocity, nearly for others."""
        config = self.config
        is_plain = config.prediction_type == "flow_prediction" and config.loss_weighting != "likelihood"
        return self.path.interval if is_plain else self.path.inner

    def training_times(self, normal: Tensor) -> Tensor:
        """Times of standard normal draws, of the same shape.

        Uniform in the interval; or "lognormal", ln(sigma / alpha) ~ N(p_mean, p_std^2), on the linear path
        the sigmoid of a normal.
        """
        low, high = self.interval
        if self.config.time_distribution == "uniform":
            return low + (high - low) * torch.special.ndtr(normal)
        ratio = (self.config.p_mean + self.config.p_std * normal).exp()
        return self.path.time_of(ratio).clamp(low, high)

    def time_of(self, ratio: float | Tensor) -> float | Tensor:
        """The time at which the noise is `ratio` times as large as the signal, in the interval.

        Of a tensor, one of its shape.
        """
        low, high = self.interval
        if isinstance(ratio, Tensor):
            return self.path.time_of(ratio).clamp(low, high)
        return min(max(self.path.time_of(_tensor(ratio)).item(), low), high)

    def ratio_of(self, t: Tensor) -> Tensor:
        """The noise-to-signal ratio sigma / alpha at times, of the same shape; infinite at pure noise."""
        return self.path.sigma(t) / self.path.alpha(t)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, `[b, c, h, w]`, of noise of unit variance and t `[b, 1, 1, 1]`."""
        return self.path.alpha(t) * x0 + self.path.sigma(t) * noise

    def error(self, model_output: Tensor, sample: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The weighted squared error of the network's output, `[b, c, h, w]`, in float32 (SiT, Sec. 2).

        Of a score s it is that of sigma s, whose target is -eps. With the weight "velocity" the error of any
        prediction is that of the velocity which follows from it; with "likelihood" it is that times
        alpha / (sigma det), the weight of Song et al. (2021), where det = alpha sigma' - alpha' sigma.
        """
        alpha, sigma, d_alpha, d_sigma = self.path.at(t)
        output, prediction = model_output.float(), self.config.prediction_type
        if prediction == "flow_prediction":
            error = output - (d_alpha * x0 + d_sigma * noise)
        elif prediction == "score":
            error = sigma * output + noise
        else:
            error = output - (noise if prediction == "epsilon" else x0)
        if self.config.loss_weighting == "none":
            return error**2
        det = alpha * d_sigma - d_alpha * sigma
        if prediction != "flow_prediction":
            error = error * det / (sigma if prediction == "sample" else alpha)
        if self.config.loss_weighting == "likelihood":
            return alpha / (sigma * det) * error**2
        return error**2

    def solve(self, model_output: Tensor, sample: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """The data x0 and the noise eps that the network's output stands for, both `[b, c, h, w]`."""
        alpha, sigma, d_alpha, d_sigma = self.path.at(_tensor(t))
        prediction = self.config.prediction_type
        if prediction == "flow_prediction":
            det = alpha * d_sigma - d_alpha * sigma
            x0 = (d_sigma * sample - sigma * model_output) / det
            return x0, (alpha * model_output - d_alpha * sample) / det
        if prediction == "sample":
            return model_output, (sample - alpha * model_output) / sigma
        noise = model_output if prediction == "epsilon" else -sigma * model_output
        return (sample - sigma * noise) / alpha, noise

    def velocity(self, model_output: Tensor, sample: Tensor, t: float | Tensor) -> Tensor:
        """dx / dt of the probability-flow ODE, `[b, c, h, w]`."""
        t = _tensor(t)
        x0, noise = self.solve(model_output, sample, t)
        return self.path.d_alpha(t) * x0 + self.path.d_sigma(t) * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """x_t of clean samples `[b, c, h, w]` at timesteps `[b]`."""
        t = (timestep.to(sample.device) / self.config.num_train_timesteps).view(-1, *[1] * (sample.ndim - 1))
        return self.noised(sample, noise, t)

    def moved(self, sample: Tensor, x0: Tensor, noise: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """The sample at another time, as far as x0 and eps stay what they are."""
        path = self.path
        return sample + (path.alpha(end) - path.alpha(t)) * x0 + (path.sigma(end) - path.sigma(t)) * noise

    # As those of EDM, so that networks are called alike

    def precondition_inputs(self, sample: Tensor, t: float | Tensor) -> Tensor:
        """The sample as it is."""
        return sample

    def precondition_noise(self, t: float | Tensor) -> Tensor:
        """The timestep that the network takes, t times `num_train_timesteps`."""
        return self.config.num_train_timesteps * _tensor(t)

    def precondition_outputs(self, sample: Tensor, model_output: Tensor, t: float | Tensor) -> Tensor:
        """The denoised D(x; t)."""
        return self.solve(model_output, sample, t)[0]


class InterpolantSDE(InterpolantProcess):
    """The SDEs with an interpolant's marginals: dx = (v - w s / 2) dt + sqrt(w) dW (SiT, Sec. 2)."""

    @property
    def _has_last_step(self) -> bool:
        return self.config.diffusion != "none" and self.config.last_step != "none"

    def _noise_decays(self, begins: Tensor, ends: Tensor) -> Tensor:
        """exp(-A) of the steps, with the midpoint's value of w / (2 sigma^2)."""
        middle = (begins + ends) / 2
        return (-(begins - ends) * self.diffusion(middle) / (2 * self.path.sigma(middle) ** 2)).exp()

    def diffusion(self, t: float | Tensor) -> Tensor:
        """w(t), in the paper's convention; the noise of a time dt has the variance w dt."""
        t = _tensor(t)
        name, n = self.config.diffusion, self.config.diffusion_norm
        if name in ("kl", "kl-eta", "sbdm"):
            alpha, sigma, d_alpha, d_sigma = self.path.at(t)
            w = 2 * sigma * (alpha * d_sigma - d_alpha * sigma) / alpha
            return n * (w / (1 + 2 * self.config.diffusion_eta * w**2).sqrt() if name == "kl-eta" else w)
        return {
            "none": lambda: torch.zeros_like(t),
            "sigma": lambda: n * self.path.sigma(t),
            "linear": lambda: n * t,
            "constant": lambda: n * torch.ones_like(t),
            "increasing-decreasing": lambda: n * (math.pi * t).sin() ** 2,
            "decreasing": lambda: (1 - n * (math.pi * t).cos()) ** 2 / 4,
        }[name]()

    def _renoised(self, sample: Tensor, z: Tensor, down: Tensor, end: Tensor, decay: Tensor) -> Tensor:
        """The sample of t_down at the end of its step."""
        path = self.path
        return path.alpha(end) / path.alpha(down) * sample + path.sigma(end) * (1 - decay**2).sqrt() * z

    def _last_step(self, sample: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """From t to the data, in one step without noise."""
        if self.config.last_step == "tweedie":
            return x0
        drift = self.path.d_alpha(t) * x0 + self.path.d_sigma(t) * noise
        if self.config.last_step == "mean":
            drift = drift + self.diffusion(t) / (2 * self.path.sigma(t)) * noise
        return sample - t * drift


class InterpolantScheduler(InterpolantSDE, SchedulerMixin, ConfigMixin):
    """Samples an interpolant by its ODE or, with a `diffusion`, by one of its SDEs.

    A step from t to t' goes by the ODE to a time t_down <= t' of less noise, and what is missing is added:
    x' = alpha' x0 + sigma' (exp(-A) eps + sqrt(1 - exp(-2 A)) z), where A is the integral of w / (2 sigma^2)
    over the step. That is Euler-Maruyama with the noise eps kept exact, whose SDE is linear: it has the same
    limit, and stays finite where w is not, at pure noise. The ODE's part is Euler's or Heun's, of dx =
    x0 dalpha + eps dsigma; the last step is Euler's, which ends in D: N or 2 N - 1 evaluations.

    Args:
        path: "linear", "gvp" or "vp".
        prediction_type: what the network gives: "flow_prediction", the velocity; "score"; "epsilon", the
            noise; "sample", the data.
        solver: "euler" or "heun".
        diffusion: w by name: "none" for the ODE; "kl", 2 sigma (alpha sigma' - alpha' sigma) / alpha, which
            "sbdm" is too; "kl-eta", the same damped; "sigma"; "linear", t; "constant", 1;
            "increasing-decreasing", sin^2(pi t); "decreasing", towards the data, (1 - n cos(pi t))^2 / 4.
        diffusion_norm: n, a factor of w but in "decreasing", at least 0.
        diffusion_eta: eta of "kl-eta", above 0: w / sqrt(1 + 2 eta w^2) of the w of "kl". # Paper silent: its
            eta; and the loss over time, by which it is divided there, counts as constant here.
        last_step: of an SDE, from `last_step_size` to the data: "none" for one like the others, "mean", their
            drift alone, "tweedie", D, or "euler", the velocity's (SiT, Sec. 3).
        last_step_size: the time at which it begins, 0.04 in the paper.
        shift: of the steps' times, t becomes shift t / (1 + (shift - 1) t); 1 leaves them evenly spaced.
        num_train_timesteps: the network's timestep at t = 1.
        time_distribution, p_mean, p_std: of training, see `training_times`.
        loss_weighting: "none", "velocity" or "likelihood", see `error`.
        num_inference_steps: steps of a pipeline that is not told how many.
        use_flow_sigmas: not used; tells diffusers' multistep solvers what they are made for.

    Raises:
        ValueError: a name that is not there, or a number out of its range.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        path: str = "linear",
        prediction_type: str = "flow_prediction",
        solver: str = "heun",
        diffusion: str = "none",
        diffusion_norm: float = 1.0,
        diffusion_eta: float = 0.1,
        last_step: str = "mean",
        last_step_size: float = 0.04,
        shift: float = 1.0,
        num_train_timesteps: int = 1000,
        time_distribution: str = "uniform",
        p_mean: float = 0.0,
        p_std: float = 1.0,
        loss_weighting: str = "none",
        num_inference_steps: int = 40,
        use_flow_sigmas: bool = True,
    ):
        check_config(self.config)
        # Others that are made of this config get its defaults too, and know whose the other settings are.
        self.register_to_config(_use_default_values=[], _class_name=type(self).__name__)
        self.order = 1 + (solver == "heun")
        self.set_timesteps(num_inference_steps)

    # The schedule

    @property
    def init_noise_sigma(self) -> float:
        """What unit noise is multiplied by at the start."""
        return self.sigmas[self.begin_index or 0].item()

    @property
    def noise_levels(self) -> Tensor:
        """Noise-to-signal ratios sigma / alpha of the evaluations; infinite at pure noise."""
        return self.sigmas[:-1] / self.path.alpha(self.times)

    @property
    def step_index(self) -> int:
        """The evaluation that comes next, an index into `timesteps`."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The evaluation to begin with, None for the first."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begins at another evaluation, one that opens a step.

        Raises:
            ValueError: `begin_index` is the second half of a step, or past the end.
        """
        if begin_index not in range(0, len(self.timesteps), self.order):
            raise ValueError(
                f"begin_index is {begin_index!r:.80}; steps begin at every index below {len(self.timesteps)} "
                f"that is a multiple of {self.order}."
            )
        self._begin_index: int | None = begin_index
        self._step_index = begin_index
        self._first_half: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Tensor | list[float] | None = None,
        timesteps: Tensor | list[float] | None = None,
    ) -> None:
        """Lays out the evaluations of a run.

        Args:
            num_inference_steps: steps N.
            device: where `timesteps` live; all else stays on the CPU.
            sigmas: the N noise scales at which steps begin, decreasing; on the linear path alone, as times.
            timesteps: the same on any path, times `num_train_timesteps`.

        Raises:
            ValueError: no or a wrong number of steps (a million are the most), times that do not decrease
                within the interval and above 0, or one step of an SDE whose last step is another.
        """
        if sigmas is not None and self.config.path != "linear":
            raise ValueError(f"The {self.config.path} path takes timesteps in place of sigmas.")
        if sigmas is not None:
            begins = _times("sigmas", sigmas, 1, self.interval[1])
        elif timesteps is not None:
            begins = _times("timesteps", timesteps, self.config.num_train_timesteps, self.interval[1])
        else:
            _check("num_inference_steps", num_inference_steps, 1, _MOST_STEPS, Integral)
            assert num_inference_steps is not None  # which was an error
            begins = self._grid(num_inference_steps)
        if len(begins) == 1 and self._has_last_step:
            raise ValueError("num_inference_steps is 1; an SDE with a last step needs at least 2.")
        self.num_inference_steps = len(begins)
        self._ends = torch.cat([begins[1:], begins.new_zeros(1)])
        self._decays = self._noise_decays(begins, self._ends)
        self._downs = self._ends
        if self.config.diffusion != "none":
            self._downs = self.path.time_of(self.ratio_of(self._ends) * self._decays)
        self.times = begins
        if self.order == 2:  # the last step is Euler's
            self.times = torch.stack([begins, self._downs], dim=1).flatten()[:-1]
        self.sigmas = torch.cat([self.path.sigma(self.times), begins.new_zeros(1)])
        self.timesteps = self.precondition_noise(self.times).to(device=device, dtype=torch.float32)
        self._begin_index = None
        self._step_index = 0
        self._first_half = None

    def _grid(self, n: int) -> Tensor:
        """The times at which n steps begin, float64."""
        high = self.interval[1]
        end, shift = high / n, self.config.shift
        if self._has_last_step:  # which is not shifted
            size = self.config.last_step_size
            end = size / (shift - (shift - 1) * size)
        t = torch.linspace(high, end, n, dtype=torch.float64, device="cpu")
        return shift * t / (1 + (shift - 1) * t)

    def refined(self, parts: int) -> Tensor:
        """Times `[N, parts + 1]` of the steps, in parts as a finer grid has them, float64; the last is 0."""
        times = self._grid(parts * self.num_inference_steps)
        return torch.cat([times, times.new_zeros(1)]).unfold(0, parts + 1, parts)

    # The sampler

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> InterpolantSchedulerOutput | tuple:
        """One evaluation: Euler's step or, with Heun's at every second call, its correction.

        The place in the schedule is counted, not looked up, so a rounded `timestep` does no harm.

        Args:
            model_output: what the network gives for `sample`, `[b, c, h, w]`.
            timestep: the entry of `timesteps` that was evaluated; not used.
            sample: the sample that was evaluated, `[b, c, h, w]`.
            generator: for an SDE's noise; a list gives each image its own.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: the schedule has come to its end.
        """
        if self.step_index >= len(self.timesteps):
            raise ValueError(f"All {self.step_index} evaluations are done; set_timesteps begins another run.")
        dtype = torch.promote_types(sample.dtype, torch.float32)
        sample, model_output = sample.to(dtype), model_output.to(dtype)
        place, t = self.step_index // self.order, self.times[self.step_index]
        x0, noise = self.solve(model_output, sample, t)
        self._step_index += 1
        is_last = self._step_index == len(self.timesteps)
        if is_last and self._has_last_step:
            prev_sample = self._last_step(sample, x0, noise, t)
        elif self.order == 2 and self._first_half is None and not is_last:
            self._first_half = sample, x0, noise, t
            prev_sample = self.moved(sample, x0, noise, t, self._downs[place])
        else:
            start, d0, d1, begin = sample, x0, noise, t
            if self._first_half is not None:
                start, d0, d1, begin = self._first_half
                d0, d1 = (d0 + x0) / 2, (d1 + noise) / 2
                self._first_half = None
            prev_sample = self.moved(start, d0, d1, begin, self._downs[place])
            if self.config.diffusion != "none" and not is_last:
                z = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=dtype)
                step = self._downs[place], self._ends[place], self._decays[place]
                prev_sample = self._renoised(prev_sample, z, *step)
        if not return_dict:
            return (prev_sample, x0)
        return InterpolantSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _times(name: str, given, unit: float, high: float) -> Tensor:
    """The times that steps are to begin with, float64, of what was given in a unit."""
    try:
        times = torch.as_tensor(given, dtype=torch.float64, device="cpu") / unit
    except (TypeError, ValueError, RuntimeError):
        times = torch.empty(0)
    falls = times.ndim == 1 and len(times) > 0 and times[-1] > 0 and (times.diff() < 0).all()
    if not falls or not times[0] <= high:
        given = given.tolist() if isinstance(given, Tensor) else given
        raise ValueError(f"{name} must decrease from at most {high * unit:g} to above 0; got {given!r:.200}.")
    return times


def _check(name: str, value: Any, low: float, high: float, kind: Any = Real) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        what = "a whole number" if kind is Integral else "a number"
        raise ValueError(f"{name} is {value!r:.80}; it must be {what} in {low}..{high}.")


def check_config(config: Mapping) -> None:
    """Raises a ValueError for settings that make no process or no sampler."""
    for name, allowed in (
        ("path", tuple(PATHS)), ("prediction_type", PREDICTIONS), ("solver", SOLVERS),
        ("diffusion", DIFFUSIONS), ("last_step", LAST_STEPS), ("time_distribution", DISTRIBUTIONS),
        ("loss_weighting", WEIGHTINGS),
    ):  # fmt: skip
        if config[name] not in allowed:
            raise ValueError(
                f"{name} is {config[name]!r:.80}; it must be one of {', '.join(map(repr, allowed))}."
            )
    for name, low, high in (
        ("diffusion_norm", 0, 1000), ("diffusion_eta", 1e-6, 1e6), ("last_step_size", 1e-5, 0.5),
        ("shift", 0.01, 100), ("p_mean", -20, 20), ("p_std", 0, 20),
    ):  # fmt: skip
        _check(name, config[name], low, high)
    _check("num_train_timesteps", config["num_train_timesteps"], 1, _MOST_STEPS, Integral)
