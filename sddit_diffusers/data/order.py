"""The order of data, which follows from (seed, step) alone, and reading ahead."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..seeds import generator_for

WHOLE = 10**8  # rows up to which an epoch's permutation is made as a whole, of 8 bytes a row
_ROUNDS = 6  # of the network that permutes more


class Batch(NamedTuple):
    """What a dataset gives for a step."""

    x0: Tensor  # clean samples, [b, c, h, w], as the network is to make them
    labels: Tensor | None  # class numbers [b]; None without classes
    pictures: Tensor | None = None  # what x0 is of, as bytes [b, 3, h', w'], where a loss looks at them


class BatchSampler(Sampler):
    """Row numbers of every micro-batch of one process, from `start_step` to `max_steps`.

    An epoch is a new permutation of the dataset; what is left at its end, less than one global batch, is
    dropped. Beyond `WHOLE` rows a process computes the rows of its own positions alone ([`permuted`]).

    Args:
        size: number of rows.
        batch_size: rows of a micro-batch in one process.
        accumulation: micro-batches of a step.
        rank, processes: which of how many processes.

    Raises:
        ValueError: the dataset is smaller than one global batch.
    """

    def __init__(
        self, size: int, batch_size: int, accumulation: int, rank: int, processes: int, seed: int,
        start_step: int = 0, max_steps: int = 2**63,
    ):  # fmt: skip
        self.global_batch = batch_size * accumulation * processes
        if size < self.global_batch:
            raise ValueError(
                f"There are {size} rows to train on, fewer than one global batch of {self.global_batch}: "
                "give a --train_batch_size that they fill."
            )
        self.size, self.seed, self.accumulation = size, seed, accumulation
        self.batch_size, self.rank, self.processes = batch_size, rank, processes
        self.start_step, self.max_steps = start_step, max_steps
        self.steps_per_epoch = size // self.global_batch

    def rows(self, micro: int) -> slice:
        """This process's part of the global batch in a micro-batch."""
        start = (micro * self.processes + self.rank) * self.batch_size
        return slice(start, start + self.batch_size)

    def order(self, epoch: int) -> Callable[[slice], list[int]]:
        """What gives the rows at some positions of an epoch."""
        generator = generator_for(self.seed, 0, epoch)
        if self.size <= WHOLE:
            permutation = torch.randperm(self.size, generator=generator)
            return lambda part: permutation[part].tolist()
        keys = torch.randint(2**63 - 1, (_ROUNDS,), generator=generator).numpy()
        return lambda part: permuted(np.arange(part.start, part.stop), self.size, keys).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        order, order_epoch = None, None
        for step in range(self.start_step, self.max_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, self.order(epoch)
            first = position * self.global_batch
            for micro in range(self.accumulation):
                rows = self.rows(micro)
                yield order(slice(first + rows.start, first + rows.stop))


def permuted(positions: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a permutation of 0 to `size` - 1 takes some positions, without memory for the others.

    A Feistel network (Luby and Rackoff 1988) permutes the numbers of an even number of bits, the fewest that
    hold all; a number that is none of them goes through it again (cycle walking, Black and Rogaway 2002).

    Args:
        positions: integers `[n]`, from 0 to `size` - 1.
        keys: integers, one a round; each choice of them is another permutation.

    Returns:
        int64 `[n]`.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask, found = (np.uint64(1) << half) - np.uint64(1), positions.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for key in keys.astype(np.uint64):
            left, right = right, left ^ (_mixed(right + key) & mask)
        found[outside] = left << half | right
        outside = found >= size
    return found.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """64 bits of which each depends on all that are given (SplitMix64's last steps, Steele et al. 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def read_out(items: Iterable) -> Iterator:
    """The items of a parquet reader; closed early, it first reads the rest.

    pyarrow reads ahead in threads that crash an interpreter, or hold it for ever, if it ends before them.
    """
    items = iter(items)
    try:
        for item in items:  # noqa: UP028, "yield from" would close them
            yield item
    finally:
        for _ in items:
            pass


def prefetch(items: Iterator, depth: int = 4) -> Iterator:
    """The items, up to `depth` of them made ahead in a thread; closing it closes them too."""
    ready, closed, end = queue.Queue(depth), threading.Event(), object()

    def put(item) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def read() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(end)
        except BaseException as error:
            put(error)
        finally:
            items.close()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()


def ahead(items: Iterable[tuple[Tensor | None, ...]], device: torch.device) -> Iterator[tuple]:
    """Tensors that were read, on a device; on a GPU the next ones are copied while it works on these.

    The copies have a stream of their own, and from pinned memory nobody waits for them.
    """
    if device.type != "cuda":
        for item in items:
            yield on_device(item, device)
        return
    stream, earlier = torch.cuda.Stream(device), None
    for item in items:
        with torch.cuda.stream(stream):
            copied, event = on_device(item, device), stream.record_event()
        if earlier is not None:
            yield _arrived(*earlier)
        earlier = copied, event
    if earlier is not None:
        yield _arrived(*earlier)


def on_device(item: tuple[Tensor | None, ...], device: torch.device) -> tuple[Tensor | None, ...]:
    """The tensors of a micro-batch on a device."""
    return tuple(None if part is None else part.to(device, non_blocking=True) for part in item)


def _arrived(item: tuple[Tensor | None, ...], event: torch.cuda.Event) -> tuple[Tensor | None, ...]:
    """What another stream has copied, for this one to work with once it is there."""
    stream = torch.cuda.current_stream()
    stream.wait_event(event)
    for part in item:
        if part is not None:
            part.record_stream(stream)  # its memory is not given away before this stream is done with it
    return item
