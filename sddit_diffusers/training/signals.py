"""What a signal does to a run: its step ends, all is saved, and it leaves as the signal would."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed


class Signals:
    """Those that stop a run.

    Args:
        go_on: the command with which the run goes on.

    Attributes:
        number: of the signal that came; None until then.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        go_on: str = "the same command with --resume_from_checkpoint latest",
    ):
        self.accelerator, self.go_on = accelerator, go_on
        self.number, self.time = None, 0.0
        self.group = None
        if accelerator.num_processes > 1 and accelerator.device.type != "cpu":
            # Of CPUs: to agree on a device would be to wait for it.
            self.group = distributed.new_group(backend="gloo", timeout=timedelta(hours=2))

    @property
    def name(self) -> str:
        """Of the signal that came; accelerate's trigger, which others can set, counts as SIGTERM."""
        return signal.Signals(self.number or signal.SIGTERM).name

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Lets the step end before a signal stops the run, on all processes if one gets it.

        A second Ctrl-C leaves at once; one within a second is the first, which a launcher has passed on.
        """

        def note(number, frame) -> None:
            if number == signal.SIGINT and self.number and time.monotonic() > self.time + 1:
                raise KeyboardInterrupt
            if not self.number:
                self.number, self.time = number, time.monotonic()
                if number == signal.SIGINT:
                    self.tell_of_the_second()

        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has no more than two
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        # nohup lets SIGHUP be ignored, and so it stays.
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        earlier = {number: signal.signal(number, note) for number in heard}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def tell_of_the_second(self) -> None:
        """Says at once what happens; what prints may be what the signal has interrupted, so past it."""
        line = "Ctrl-C: the run is saved after this step. To leave at once: Ctrl-C again, or kill -INT"
        if self.accelerator.is_main_process:
            with suppress(OSError):
                os.write(2, f"\n{line} {os.getpid()}\n".encode())

    def came(self) -> bool:
        """Whether any process is to stop; all processes call it, and none waits for its device."""
        stops = self.number is not None or self.accelerator.flag_tensor is not None
        if self.accelerator.num_processes == 1:
            return stops
        flag = torch.tensor(int(stops))
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.group)
        return bool(flag)

    def leave(self, step: int) -> None:
        """Says how to go on, and leaves as a signal does."""
        self.accelerator.print(
            f"Stopped by {self.name} after step {step}, with all of it saved. Go on: {self.go_on}"
        )
        self.accelerator.end_training()
        sys.exit(128 + signal.Signals[self.name])

    def leave_at_once(self, checkpoint: Path | None) -> None:
        """Says what is kept of a run that a second Ctrl-C ends.

        Args:
            checkpoint: the last one.
        """
        if checkpoint is None:
            told = "nothing of it is saved. With --checkpointing_steps N it is saved every N steps"
        else:
            told = f"the last checkpoint is {checkpoint}. Go on: {self.go_on}"
        self.accelerator.print(f"Left at once; {told}")
