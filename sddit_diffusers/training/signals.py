"""What a signal does to a run: its step ends, all is saved, and it leaves as the signal would."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from torch import distributed


class Signals:
    """Those that stop a run.

    Attributes:
        number: of the signal that came; None until then.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
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
            f"Stopped by {self.name} after step {step}, with all of it saved. "
            "Go on: the same command with --resume_from_checkpoint latest"
        )
        self.accelerator.end_training()
        sys.exit(128 + signal.Signals[self.name])
