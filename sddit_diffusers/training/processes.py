"""The diffusion processes by name; what a process is stands in its scheduler's config."""

from collections.abc import Callable
from dataclasses import dataclass

from ..cli import option
from ..schedulers.scheduling_edm_heun import EDMHeunScheduler
from .auxiliary import Process


@dataclass
class EDMOptions:
    """The options of EDM's process."""

    _argument_group_name = "process"

    p_mean: float = option(-1.2, "mean of ln(sigma) in training", low=-20, high=20)
    p_std: float = option(1.2, "its standard deviation", low=0, high=20)


@dataclass(frozen=True)
class ProcessRow:
    """A process.

    Args:
        title: for people.
        build: makes its scheduler of the options.
        options: a dataclass of its options, which `TrainingConfig` takes in; None without.
    """

    title: str
    build: Callable[[object], Process]
    options: type | None = None


PROCESSES = {
    "edm": ProcessRow(
        "EDM", lambda options: EDMHeunScheduler(p_mean=options.p_mean, p_std=options.p_std), EDMOptions
    ),
}
