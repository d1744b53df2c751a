"""What a training of a billion samples on a thousand processes asks of one: `benchmarks/scale.py --simulate`.

Each part is a table, measured in processes of their own; none of them trains.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from train_step import flops_of, optimizer_of, resident

from sddit_diffusers import PRESETS, EDMHeunScheduler, SDDiTObjective, SDDiTTransformer2DModel
from sddit_diffusers.data.blocks import Blocks, write_block
from sddit_diffusers.data.latents import BLOCK, LANES, LatentDataset
from sddit_diffusers.data.order import Batch, BatchSampler
from sddit_diffusers.seeds import generator_for
from sddit_diffusers.training.checkpointing import choose_checkpoint, load_state, save_checkpoint
from sddit_diffusers.training.engines import Alone
from sddit_diffusers.training.memory import _Unfilled
from sddit_diffusers.training.step import train_step

PROCESSES, BATCH, BILLION = 1024, 32, 10**9  # what is simulated; BATCH is of one process
NETWORKS = {name: PRESETS[name] for name in ("SD-DiT-S/2", "SD-DiT-B/2", "SD-DiT-L/2", "SD-DiT-XL/2")} | {
    "of 40 x 3072": PRESETS["SD-DiT-XL/2"]
    | {"num_layers": 40, "num_attention_heads": 24, "attention_head_dim": 128}
}


def apart(function: Callable, *arguments):
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def timed(function: Callable) -> tuple[float, object]:
    """Seconds, and what came of it."""
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def objective_of(network: dict, scheduler: EDMHeunScheduler | None = None) -> SDDiTObjective:
    return SDDiTObjective(SDDiTTransformer2DModel(**network), scheduler or EDMHeunScheduler())


# --- the order of pictures and of latents ---


def simulate_stream() -> None:
    print(f"Order of pictures, one of {PROCESSES} processes of batch {BATCH}:")
    print(f"{'rows':>14}{'first batch':>14}{'a batch':>12}{'memory':>14}")
    for rows in (10**6, 10**7, 10**8, BILLION):
        first, later, memory = apart(order_of_pictures, rows)
        print(f"{rows:>14,}{first:>12.3f} s{later * 1e6:>9.0f} µs{memory:>10.3f} GiB")
    seconds, memory = apart(order_of_all, BILLION)
    print(f"Two steps of all processes, {BILLION:,} rows, none twice: {seconds:.1f} s, {memory:.3f} GiB")
    print(f"Order of {BILLION:,} latents: the first block of each of {LANES} lanes of an epoch:")
    for size in (4096, 65536):
        seconds, memory = apart(order_of_latents, size)
        print(f"{BILLION // size:>9,} shards of {size:>6,}: {seconds:.2f} s, {memory:.3f} GiB")


def order_of_pictures(rows: int) -> tuple[float, float, float]:
    before = resident("VmRSS")
    batches = iter(BatchSampler(rows, BATCH, 1, PROCESSES - 1, PROCESSES, 0))
    first, _ = timed(lambda: next(batches))
    count = min(200, rows // (BATCH * PROCESSES) - 1)
    seconds, _ = timed(lambda: [next(batches) for _ in range(count)])
    return first, seconds / count, resident("VmHWM") - before


def order_of_all(rows: int) -> tuple[float, float]:
    """Rows of the first and the last step of an epoch, by the samplers of all processes."""
    before, last = resident("VmRSS"), rows // (BATCH * PROCESSES) - 1

    def steps() -> list[int]:
        return [
            row
            for step in (0, last)
            for rank in range(PROCESSES)
            for row in next(iter(BatchSampler(rows, BATCH, 1, rank, PROCESSES, 0, step)))
        ]

    seconds, found = timed(steps)
    if len(set(found)) != 2 * BATCH * PROCESSES or not 0 <= min(found) <= max(found) < rows:
        raise AssertionError("the processes do not share the rows")
    return seconds, resident("VmHWM") - before


class NumberedLatents(LatentDataset):
    """Shards that are there as numbers only."""

    def __init__(self, shards: int, size: int):
        self._rows = np.full(shards, size)

    def _read_shard(self, shard: int, skipped: int):
        for start in range(skipped, int(self._rows[shard]), BLOCK):
            yield np.arange(start, min(start + BLOCK, int(self._rows[shard]))), None, None


def order_of_latents(size: int) -> tuple[float, float]:
    before, dataset = resident("VmRSS"), NumberedLatents(BILLION // size, size)
    rows = BILLION // size * size

    def first() -> list:
        starts = [rows * lane // LANES for lane in range(LANES + 1)]
        pairs = zip(starts, starts[1:], strict=False)
        return [next(dataset._blocks(0, 0, start, stop)) for start, stop in pairs]

    seconds, _ = timed(first)
    return seconds, resident("VmHWM") - before


# --- noise ---


def simulate_noise(rounds: int) -> None:
    print(f"What is random in a step, of {PROCESSES} processes with batch {BATCH}, latents of 4 x 32 x 32:")
    for name, seconds, memory in apart(noise, rounds):
        print(f"{name:<44}{seconds:>9.4f} s{memory:>9.2f} GiB")


def noise(rounds: int) -> list[tuple[str, float, float]]:
    objective = objective_of(PRESETS["SD-DiT-S/2"] | {"num_layers": 1, "num_decoder_layers": 1})

    def drawn(images: int) -> None:
        shape = (images, 4, 32, 32)
        objective.draw(shape, generator_for(0, 1, 0), "cpu")
        torch.randn(shape, generator=generator_for(0, 2, 0))  # of the latents

    def image_by_image() -> None:
        for row in range(BATCH):
            generator = generator_for(0, 1, 0, row)
            objective.draw((1, 4, 32, 32), generator, "cpu")
            torch.randn(1, 4, 32, 32, generator=generator)

    drawn(BATCH)
    before, steps = resident("VmRSS"), {
        f"of the {BATCH} images of one, together": lambda: drawn(BATCH),
        f"of the {BATCH} of one, a generator an image": image_by_image,
        "of 256 images": lambda: drawn(256),
        f"of all {BATCH * PROCESSES:,} images, as each process does": lambda: drawn(BATCH * PROCESSES),
    }  # fmt: skip
    seconds = {name: [] for name in steps}
    memory = {}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step)[0])
            memory.setdefault(name, resident("VmHWM") - before)
    return [(name, statistics.median(values), memory[name]) for name, values in seconds.items()]


# --- the shuffle of prepare_latents ---


def simulate_shuffle() -> None:
    few, many = 100_000, 1_000_000
    (a, low), (b, high) = apart(shuffle, few), apart(shuffle, many)
    row = (high - low) * 2**30 / (many - few)
    print(f"The shuffle of prepare_latents: {few:,} rows take {a:.1f} s, {many:,} take {b:.1f} s; "
          f"{row:.0f} bytes of memory a row")  # fmt: skip


def shuffle(rows: int) -> tuple[float, float]:
    """Seconds and GiB of what a process knows of the rows, without their latents."""
    with tempfile.TemporaryDirectory() as folder:
        size = 50_000
        for first in range(0, rows, size):
            made = [
                {"row": first + i, "label": str(i % 1000), "moments": b"", "flipped": False}
                for i in range(size)
            ]
            write_block(Path(folder), 0, first, size, made)
        del made
        source = SimpleNamespace(
            name="", units=1, label_column="label", class_names=None, has_named_labels=False
        )
        before = resident("VmRSS")
        seconds, _ = timed(lambda: Blocks(Path(folder), source, 0))
        return seconds, resident("VmHWM") - before


# --- checkpoints ---


def state_of(network: dict, device: str) -> dict:
    """What `Engine.gather` gives, of no values in particular."""
    with torch.device("meta"):
        objective = objective_of(network, EDMHeunScheduler())

    def like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, device=device) if device == "meta" else torch.rand(tensor.shape)

    trained = {name: weight for name, weight in objective.named_parameters() if weight.requires_grad}
    moments = {
        name: {"step": torch.tensor(1.0), "exp_avg": like(weight), "exp_avg_sq": like(weight)}
        for name, weight in trained.items()
    }
    return {
        "objective": {name: like(weight) for name, weight in objective.state_dict().items()},
        "optimizer": {"state": moments, "param_groups": [{"params": list(trained)}]},
        "ema": {"shadow_params": [like(weight) for weight in objective.transformer.parameters()]},
        "scaler": None,
    }


def bytes_of(state) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return sum(map(bytes_of, parts))


def fitting(limit: float) -> dict:
    """XL/2, of as many blocks as leave its checkpoint at most `limit` GiB."""
    for layers in range(28, 0, -1):
        network = PRESETS["SD-DiT-XL/2"] | {"num_layers": layers}
        if bytes_of(state_of(network, "meta")) <= limit * 2**30:
            return network
    raise ValueError(f"--checkpoint_gib is {limit}; the smallest network needs more.")


def simulate_checkpoint(limit: float, folder: str) -> None:
    print(f"{'':<14}{'trained':>12}{'checkpoint':>16}")
    for name, network in NETWORKS.items():
        with torch.device("meta"):
            objective = objective_of(network)
        count = sum(weight.numel() for weight in objective.parameters() if weight.requires_grad)
        print(f"{name:<14}{count / 1e6:>10,.1f} M{bytes_of(state_of(network, 'meta')) / 2**30:>12.2f} GiB")
    network = fitting(limit)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        size, writing = apart(written, network, place)
        checking, reading = apart(read, place)
    print(f"XL/2 of {network['num_layers']} blocks, {size:.2f} GiB:")
    for name, seconds in (("written", writing), ("hash compared", checking), ("read", reading)):
        print(f"{name:<14}{seconds:>8.1f} s{size / seconds:>8.2f} GiB/s")


def written(network: dict, folder: str) -> tuple[float, float]:
    state = state_of(network, "cpu")
    seconds, made = timed(lambda: save_checkpoint(Path(folder), 1, state, {}))
    return os.path.getsize(made / "state.pt") / 2**30, seconds


def read(folder: str) -> tuple[float, float]:
    """Seconds of the check and of the reading, each from the disk."""
    path = Path(folder) / "checkpoint-1"
    forget(path / "state.pt")
    checking, _ = timed(lambda: choose_checkpoint(Path(folder), "latest"))
    forget(path / "state.pt")

    def load() -> None:
        state = load_state(path)
        for part in (state["objective"], *state["optimizer"]["state"].values()):
            for tensor in part.values():
                tensor.sum()
        for tensor in state["ema"]["shadow_params"]:
            tensor.sum()

    return checking, timed(load)[0]


def forget(path: Path) -> None:
    """Lets the system forget what it keeps of a file in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- operations ---


def simulate_operations() -> None:
    print(f"{'':<14}{'GFLOP an image':>16}")
    for name in ("SD-DiT-XL/2", "of 40 x 3072"):
        print(f"{name:<14}{apart(operations, NETWORKS[name]) / 1e9:>16,.0f}")


def operations(network: dict, images: int = 4) -> float:
    """Counted, of a step of tensors without memory, for an image."""
    scheduler = EDMHeunScheduler()
    warnings.simplefilter("ignore")  # a copied tensor without memory has no address
    with _Unfilled(), torch.device("cpu"):
        objective: nn.Module = objective_of(network, scheduler)
        x0, labels = torch.zeros(images, 4, 32, 32), torch.zeros(images, dtype=torch.long)
        engine = Alone(objective, optimizer_of(objective), "cpu", torch.bfloat16)
        ema = EMAModel(objective.transformer.parameters(), foreach=True)
        return flops_of(lambda: train_step(engine, ema, [(Batch(x0, labels), None)])) / images


def simulate(parts: list[str], rounds: int, limit: float, folder: str) -> None:
    """Prints the tables."""
    tables = {
        "stream": simulate_stream,
        "noise": lambda: simulate_noise(rounds),
        "shuffle": simulate_shuffle,
        "checkpoint": lambda: simulate_checkpoint(limit, folder),
        "operations": simulate_operations,
    }
    for part in parts:
        tables[part]()
        print(flush=True)
