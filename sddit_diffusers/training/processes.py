"""The diffusion processes by name; what a process is stands in its scheduler's config."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial

from ..cli import option
from ..schedulers.scheduling_edm_heun import EDMHeunScheduler
from ..schedulers.scheduling_interpolant import DISTRIBUTIONS, WEIGHTINGS, InterpolantScheduler
from .auxiliary import Process

# What `--prediction` is called by diffusers' schedulers.
PREDICTIONS = {"velocity": "flow_prediction", "score": "score", "noise": "epsilon", "denoised": "sample"}


@dataclass
class LogNormalOptions:
    """Of training's times: ln of the noise-to-signal ratio is normal."""

    _argument_group_name = "process"

    p_mean: float = option(-1.2, "mean of ln(sigma / alpha) in training", low=-20, high=20)
    p_std: float = option(1.2, "its standard deviation", low=0, high=20)


@dataclass
class EDMOptions:
    """Of EDM's preconditioning."""

    _argument_group_name = "process"

    sigma_data: float = option(
        0.5,
        "of EDM: standard deviation that the data are taken to have; it scales nothing",
        low=1e-6,
        high=1e6,
    )


@dataclass
class InterpolantOptions:
    """The options of the interpolants, SiT's processes."""

    _argument_group_name = "process"

    prediction: str = option(
        "velocity", "of interpolants: what the network gives",
        choices=PREDICTIONS.keys(),
    )  # fmt: skip
    time_distribution: str = option(
        "uniform",
        "of interpolants: training's times; 'lognormal' is by p_mean and p_std",
        choices=DISTRIBUTIONS,
    )
    loss_weighting: str = option(
        "none", "of interpolants: 'velocity' makes the loss of any prediction the velocity's, 'likelihood' "
        "weighs as maximum likelihood does", choices=WEIGHTINGS,
    )  # fmt: skip


@dataclass(frozen=True)
class ProcessRow:
    """A process.

    Args:
        title: for people.
        build: makes its scheduler of the options.
        options: dataclasses of its options, which `TrainingConfig` takes in; processes may share them.
        settings: what it changes in `TrainingConfig`.
    """

    title: str
    build: Callable[[object], Process]
    options: tuple[type, ...] = ()
    settings: dict = field(default_factory=dict)

    def names(self) -> list[str]:
        """Of its options."""
        return [each.name for options in self.options for each in fields(options)]


def _interpolant(path: str, options) -> InterpolantScheduler:
    return InterpolantScheduler(
        path=path, prediction_type=PREDICTIONS[options.prediction], loss_weighting=options.loss_weighting,
        time_distribution=options.time_distribution, p_mean=options.p_mean, p_std=options.p_std,
    )  # fmt: skip


def _interpolant_row(title: str, path: str) -> ProcessRow:
    options = LogNormalOptions, InterpolantOptions
    return ProcessRow(title, partial(_interpolant, path), options, {"p_mean": 0.0, "p_std": 1.0})


PROCESSES = {
    "edm": ProcessRow(
        "EDM",
        lambda options: EDMHeunScheduler(
            sigma_data=options.sigma_data, p_mean=options.p_mean, p_std=options.p_std
        ),
        (LogNormalOptions, EDMOptions),
    ),
    "linear": _interpolant_row("linear interpolant", "linear"),
    "gvp": _interpolant_row("GVP interpolant", "gvp"),
    "vp": _interpolant_row("VP interpolant", "vp"),
}
