"""What every program asks of `accelerate` before it begins."""

import ctypes
import os
import pickle
import sys
from collections.abc import Callable
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
    # accelerate launch sets OMP_NUM_THREADS=1 where nobody chose a number: share the machine's cores instead.
    if torch.get_num_threads() == 1:
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


def progress_bar(accelerator: Accelerator, desc: str, **arguments) -> tqdm:
    """A bar of the first process's share; in a log file it moves every half a minute only."""
    processes = accelerator.num_processes
    return tqdm(
        desc=desc + (f" (process 1 of {processes})" if processes > 1 else ""),
        disable=not accelerator.is_main_process, dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30, **arguments,
    )  # fmt: skip
