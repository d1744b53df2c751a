"""What every program asks of `accelerate` before it begins."""

import ctypes
import inspect
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

T = TypeVar("T")


def check_machine(accelerator: Accelerator) -> None:
    """Makes sure that all processes work together, and uses a CPU's cores and memory well.

    Raises:
        ValueError: processes that do not know of one another, or a precision that the device does not have.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision is 'fp16', which needs a GPU; the CPU has 'bf16' and 'no'.")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but accelerate joins {accelerator.num_processes}."
        )
    if accelerator.device.type != "cpu":
        return
    keep_freed_memory()
    # Launchers set OMP_NUM_THREADS=1 where nobody chose a number: share the machine's cores instead.
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and torch.get_num_threads() == 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed for the next tensor.

    It would give large blocks back to the system at once, and get the next ones from there page by page, each
    filled with zeros: on a CPU that is a sixth of the time of a training step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # another C library
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never


def on_main_process(action: Callable[[], T], accelerator: Accelerator) -> T:
    """What `action` returns on the main process; an error of its is raised on all processes."""
    result = together(lambda: action() if accelerator.is_main_process else None, accelerator)
    return broadcast_object_list([result])[0]


def together(action: Callable[[], T], accelerator: Accelerator) -> T:
    """What `action` returns, on each process its own; an error of any process is raised on all.

    The action waits for no other process.
    """
    result = error = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    failures = [failure for failure in gather_object([error and _sent(error)]) if failure is not None]
    if failures:
        raise error or failures[0]
    return result


def main_first(action: Callable[[], T], accelerator: Accelerator) -> T:
    """As [`together`], but the others begin when the main process is done, and find what it has fetched."""
    main = accelerator.is_main_process
    first = together(lambda: action() if main else None, accelerator)
    rest = together(lambda: None if main else action(), accelerator)
    return first if main else rest


def _sent(error: Exception) -> Exception:
    """An error as other processes can read it."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def progress_bar(accelerator: Accelerator, desc: str, **arguments) -> "tqdm | ProgressLines":
    """A bar of the first process's share, as [`bar`] makes it."""
    processes = accelerator.num_processes
    return bar(
        desc=desc + (f" (process 1 of {processes})" if processes > 1 else ""),
        disable=not accelerator.is_main_process, **arguments,
    )  # fmt: skip


def bar(iterable: Iterable | None = None, **arguments) -> "tqdm | ProgressLines":
    """tqdm's bar where standard error is a terminal or nothing is shown, else lines now and then.

    Args:
        arguments: tqdm's; `total`, `desc` and `unit` among them.
    """
    if arguments.get("disable") or sys.stderr.isatty():
        return tqdm(iterable, mininterval=0.5, dynamic_ncols=True, **arguments)
    names = inspect.signature(ProgressLines).parameters
    return ProgressLines(iterable, **{name: value for name, value in arguments.items() if name in names})


class ProgressLines:
    """What tqdm shows, for a log file: a line when a tenth more is done, at most one in ten seconds.

    A tenth may take long. So there is a line too when there has been none for a minute, or for a fifth of the
    time so far if that is longer: ten lines for minutes, some fifty for a day. The last line is always there.

    Args:
        iterable: what is gone through, if it is not counted by `update`.
        total: how much there is to do; None where nobody knows.
        desc: what is done.
        unit: of what is counted.
        initial: how much was done before.
        leave: whether there is a last line.
    """

    def __init__(
        self, iterable: Iterable | None = None, total: int | None = None, desc: str = "", unit: str = "step",
        initial: int = 0, leave: bool = True,
    ):  # fmt: skip
        self.iterable, self.desc, self.unit, self.leave = iterable, desc, unit, leave
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self.n = self.initial = initial
        self.postfix = ""
        self.start = self.told_at = time.monotonic()
        self.told = initial  # what the last line said
        self.closed = False

    def update(self, n: int = 1) -> None:
        """Counts what is done."""
        self.n += n
        now = time.monotonic()
        since, much = now - self.told_at, self.total and 10 * (self.n - self.told) >= self.total
        last = self.total is not None and self.n >= self.total  # told of when it is closed
        if not last and (since >= 10 and much or since >= max(60, (now - self.start) / 5)):
            self._tell(now)

    def __iter__(self) -> Iterator:
        with self:
            for one in self.iterable:
                yield one
                self.update()

    def set_postfix(self, values: dict[str, str], refresh: bool = False) -> None:
        """What the next lines end with."""
        self.postfix = "".join(f", {name} {value}" for name, value in values.items())

    def write(self, text: str, file=None) -> None:
        """A line of somebody else's."""
        print(text, file=file or sys.stderr, flush=True)

    def close(self) -> None:
        """Ends with a line, unless the last one has said all."""
        if not self.closed and self.leave and self.n > self.told:
            self._tell(time.monotonic())
        self.closed = True

    def _tell(self, now: float) -> None:
        self.told, self.told_at = self.n, now
        passed = max(now - self.start, 1e-9)
        rate = (self.n - self.initial) / passed
        parts = [f"{self.desc or self.unit} {self.n}"]
        if self.total:
            parts[0] += f"/{self.total} ({self.n / self.total:.0%})"
        parts.append(f"{rate:.3g} {self.unit}{'e' * self.unit.endswith('ch')}s/s")
        left = (self.total - self.n) / rate if self.total and rate else 0
        parts.append(f"{_clock(left)} left" if left > 0 else f"{_clock(passed)} in all")
        print(", ".join(parts) + self.postfix, file=sys.stderr, flush=True)

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
