"""How does a training step grow? `python benchmarks/scale.py [--what batch tokens processes]`

One whole step of SD-DiT (views, teacher, losses, backward, AdamW, averages, centers):
- batch: of growing batches, of samples of the preset's size;
- tokens: of growing samples, whose tokens grow as the square of the side, in batches of one size;
- processes: of one global batch, shared by a growing number of processes under DDP and under FSDP2, beside a
  process without either. On a CPU they share its cores, too.
Batches and tokens are measured all in turn, round by round, processes a launch at a time. The exponent is the
slope of log time against log size: in the table from the size before, in the end over all, by least squares.
Memory is the peak of a process of its own, above what it has before the first step (on a GPU: of the
allocator); of several processes, that of the main one.

With `--simulate` instead: what a billion samples and 1,024 processes ask of one of them (`simulated.py`).
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from simulated import simulate
from train_step import build, in_turn, optimizer_of, peak_memory, printed_apart

from sddit_diffusers import PRESETS, EDMHeunScheduler, SDDiTObjective, SDDiTTransformer2DModel
from sddit_diffusers.data.order import Batch
from sddit_diffusers.launching import check_machine, keep_freed_memory
from sddit_diffusers.models.attention_cpu import use_cpu_attention
from sddit_diffusers.training.engines import check_engine, prepare
from sddit_diffusers.training.step import train_step

CONFIGS = Path(__file__).parents[1] / "configs"


def step_of(options: argparse.Namespace, what: str, size: int, device: torch.device) -> Callable[[], None]:
    """A step of a batch of `size`, or of samples of that side."""
    preset, batch_size = options.preset, size
    if what == "tokens":
        preset, batch_size = f"{options.preset} at {size}", options.batch_size
        PRESETS[preset] = PRESETS[options.preset] | {"sample_size": size}
    return build("SD-DiT", preset, batch_size, getattr(torch, options.dtype), device)


def times_of(options: argparse.Namespace, what: str, sizes: list[int], device: torch.device) -> list[float]:
    """Median seconds of a step of each size, all in turn."""
    steps = {size: step_of(options, what, size, device) for size in sizes}
    keep_freed_memory()
    for step in steps.values():
        step()
    return list(in_turn(steps, options.rounds).values())


def measure_sizes(options: argparse.Namespace, what: str, device: torch.device) -> str:
    """Prints the table of batches or of tokens; returns its last line."""
    given = options.batch_sizes if what == "batch" else options.sizes
    # Before this process keeps what it frees.
    memory = [printed_apart(__file__, "--memory_of", what, str(size)) for size in given]
    seconds = times_of(options, what, given, device)
    torch.cuda.empty_cache()
    sizes, images = given, given
    if what == "tokens":
        patch_size = PRESETS[options.preset]["patch_size"]
        sizes, images = [(side // patch_size) ** 2 for side in given], [options.batch_size] * len(given)
    print(f"{what:<14}{'images/s':>10}{'s/step':>10}{'exponent':>10}{'memory':>12}")
    for i, (size, value) in enumerate(zip(sizes, seconds, strict=True)):
        slope = f"{exponent(sizes[i - 1 : i + 1], seconds[i - 1 : i + 1]):.2f}" if i else ""
        print(f"{size:<14}{images[i] / value:>10.2f}{value:>10.2f}{slope:>10}{memory[i]:>8.2f} GiB")
    return f"time grows with {what} to the power of {exponent(sizes, seconds):.2f}"


def exponent(sizes: Iterable[float], seconds: Iterable[float]) -> float:
    """The slope of log time against log size."""
    return statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, seconds)]).slope


def measure_processes(options: argparse.Namespace, device: torch.device) -> list[str]:
    """Prints the table of processes; returns its last lines."""
    known, lines = options.processes, []
    if device.type == "cuda":
        known = [number for number in known if number <= torch.cuda.device_count()]
        if known != options.processes:
            print(f"There are {torch.cuda.device_count()} GPUs: processes {known} of {options.processes}.")
    print(f"{'processes':<14}{'engine':>12}{'images/s':>10}{'s/step':>10}{'speedup':>10}{'memory':>12}")
    alone = None
    for engine, number in [("none", 1), *itertools.product(options.engines, known)]:
        found = launch(options, engine, number, device)
        value, alone = found["seconds"], alone or found["seconds"]
        print(f"{number:<14}{found['engine']:>12}{options.global_batch / value:>10.2f}{value:>10.2f}"
              f"{alone / value:>10.2f}{found['memory']:>8.2f} GiB")  # fmt: skip
        if number > 1:
            lines.append(f"{engine}: speedup from 1 process alone to {number}: {alone / value:.2f}")
    return lines


def launch(options: argparse.Namespace, engine: str, number: int, device: torch.device) -> dict:
    """What the workers of one engine measured."""
    environment = os.environ | settings_of(engine)
    if device.type == "cpu":
        threads = max(1, torch.get_num_threads() // number)
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)}
    launcher = []
    if engine != "none":
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    command = [sys.executable, *launcher, __file__, *sys.argv[1:], "--worker"]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])


def settings_of(engine: str) -> dict[str, str]:
    """What `accelerate launch` tells its processes about the engine, from its configuration file."""
    if engine == "none":
        return {}
    settings = yaml.safe_load((CONFIGS / f"{engine}.yaml").read_text()).get("fsdp_config", {})
    sharded = {"ACCELERATE_USE_FSDP": "true"} if settings else {}
    return sharded | {name.upper(): str(value).lower() for name, value in settings.items()}


def work(options: argparse.Namespace) -> None:
    """What a worker does: the step of `train_sddit.py`, on random data; the main one prints its median."""
    accelerator = Accelerator(
        mixed_precision="bf16" if options.dtype == "bfloat16" else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    check_machine(accelerator)
    check_engine(accelerator)
    torch.manual_seed(0)  # FSDP2 shards the weights of each process as they are
    step = worker_step(accelerator, options.preset, options.global_batch // accelerator.num_processes)
    memory = peak_memory(step, accelerator.device)
    seconds = in_turn({"step": step}, options.rounds)["step"]
    if accelerator.is_main_process:
        engine = accelerator.distributed_type.value
        print(json.dumps({"engine": engine, "seconds": seconds, "memory": memory}), flush=True)
    accelerator.end_training()


def worker_step(accelerator: Accelerator, preset: str, batch_size: int) -> Callable[[], None]:
    """A step of `batch_size` images on this process."""
    network, device = PRESETS[preset], accelerator.device
    shape = (batch_size, network["in_channels"], network["sample_size"], network["sample_size"])
    x0, labels = torch.randn(shape, device=device), torch.randint(1000, (batch_size,), device=device)
    objective = SDDiTObjective(SDDiTTransformer2DModel(**network), EDMHeunScheduler())
    if device.type == "cpu":
        use_cpu_attention(objective)
    engine = prepare(accelerator, objective, optimizer_of(objective), batch_size, 1, 0.0)
    ema = EMAModel(objective.transformer.parameters(), decay=0.9999, foreach=True)

    def step() -> None:
        train_step(engine, ema, [(Batch(x0, labels), None)])
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", default=["batch", "tokens", "processes"],
                        choices=["batch", "tokens", "processes"])  # fmt: skip
    parser.add_argument("--preset", default="SD-DiT-S/2", choices=[name for name in PRESETS if "/" in name])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128], help="sides of the samples")
    parser.add_argument("--batch_size", type=int, default=1, help="of the samples of --sizes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engines", nargs="+", default=["ddp", "fsdp2"], choices=["ddp", "fsdp2"])
    parser.add_argument("--global_batch", type=int, default=32, help="of all processes together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    known = ["stream", "noise", "shuffle", "checkpoint", "operations"]
    parser.add_argument("--simulate", nargs="*", choices=known, help="all parts if none is named")
    parser.add_argument("--checkpoint_gib", type=float, default=6, help="of the one that is written")
    parser.add_argument("--checkpoint_dir", default=".", help="where it is written, and then removed")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.simulate is not None:
        simulate(options.simulate or known, options.rounds, options.checkpoint_gib, options.checkpoint_dir)
        return
    if uneven := [number for number in options.processes if options.global_batch % number]:
        parser.error(f"--global_batch is {options.global_batch}, which {uneven[0]} processes cannot share")
    if options.worker:
        work(options)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.memory_of:
        what, size = options.memory_of
        print(peak_memory(step_of(options, what, int(size), device), device))
        return

    lines = []
    print(f"{options.preset}, {options.dtype}, {device.type}")
    for what in options.what:
        if what == "processes":
            lines += measure_processes(options, device)
        else:
            lines.append(measure_sizes(options, what, device))
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
