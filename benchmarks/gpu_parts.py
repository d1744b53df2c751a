"""What `benchmarks/gpu.py` measures, each part in a process: prints Markdown, a row as soon as it is there.

`python benchmarks/gpu_parts.py machine | steps | samples | training [options]`; without a GPU, on the CPU.
"""

import argparse
import gc
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from loops import open_feed
from sample import build as build_pipeline
from sample import count_rows, flops_of_row, precision
from train_step import FLOAT32, WITH_VAE, dit_step, flops_of, sddit_step

from sddit_diffusers import PRESETS, EDMHeunScheduler, SDDiTObjective, SDDiTTransformer2DModel
from sddit_diffusers.models.attention_cpu import use_cpu_attention
from sddit_diffusers.training.memory import step_memory

T = TypeVar("T")
HALF = torch.bfloat16
# A network for a CPU that takes a GPU's place.
PRESETS["small"] = PRESETS["SD-DiT-S/2"] | {"sample_size": 8, "num_layers": 2, "num_decoder_layers": 1}
TITLES = {"DiT fp32": "DiT, TF32", WITH_VAE: "DiT and the VAE, TF32", "DiT": "DiT, bfloat16",
          "SD-DiT": "**SD-DiT, bfloat16**"}  # fmt: skip
PIPELINES = {"DiTPipeline fp32": "DiTPipeline, TF32", "DiTPipeline": "DiTPipeline, bfloat16",
             "SDDiTPipeline": "**SDDiTPipeline, bfloat16**",
             "interval": "guided at σ of 0.28 to 2.9 alone"}  # fmt: skip
SIDE, SIDE_ON_CPU = 4096, 1024  # of the matrices whose products are timed


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_of(work: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """What `work` returns, and the bytes of the tensors that it has alive at once at most."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = work()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return result, most


def product_rate(dtype: torch.dtype, device: torch.device, tf32: bool = False) -> float:
    """Multiplications and additions a second of products of square matrices, the best of three times."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    side, count = (SIDE, 50) if device.type == "cuda" else (SIDE_ON_CPU, 1)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(4):  # the first warms up
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 * count / min(seconds[1:])


def median_seconds(
    steps: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Of a step, all in turn; on a GPU of several in a row, between which the host does not wait."""
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            count = 5 if device.type == "cuda" and name != WITH_VAE else 1
            synchronize(device)
            start = time.perf_counter()
            for _ in range(count):
                step()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine(options: argparse.Namespace, device: torch.device) -> None:
    print("| | |\n|---|---|")
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        print(f"| card | {card.name}, {card.total_memory / 2**30:.0f} GiB |")
        print(f"| CUDA, cuDNN | {torch.version.cuda}, {torch.backends.cudnn.version()} |")
    print(f"| torch | {torch.__version__} |", flush=True)
    kinds = [("float32", torch.float32, False), ("TF32", torch.float32, True), ("bfloat16", HALF, False)]
    kinds += [("float16", torch.float16, False)]
    side = SIDE if device.type == "cuda" else SIDE_ON_CPU
    for title, dtype, tf32 in kinds if device.type == "cuda" else [kinds[0], kinds[2]]:
        rate = product_rate(dtype, device, tf32)
        print(f"| products of {side}×{side}, {title} | {rate / 1e12:,.3g} TFLOP/s |", flush=True)


def step_of(
    name: str, preset: str, batch_size: int, device: torch.device, compiled: bool
) -> Callable[[], None]:
    """A contestant's step, which waits for nothing at its end, after two of it."""
    network = PRESETS[preset]
    of = dit_step if name.startswith("DiT") else sddit_step
    half = None if name in FLOAT32 else HALF
    move = of(name, network, open_feed(name, network, batch_size, device), half, device, compiled)
    move()
    move()
    return move


def dry_run_of(preset: str, batch_size: int, device: torch.device) -> int:
    """Bytes that `train_sddit.py --dry_run` says for SD-DiT in bfloat16."""
    scheduler = EDMHeunScheduler()

    def build() -> SDDiTObjective:
        objective = SDDiTObjective(SDDiTTransformer2DModel(**PRESETS[preset]), scheduler)
        if device.type == "cpu":
            use_cpu_attention(objective)
        return objective

    return step_memory(build, batch_size, device.type, HALF).total


def steps(options: argparse.Namespace, device: torch.device) -> None:
    """Rows of DiT and SD-DiT for each batch; those that are compiled come last, for that takes long."""
    of_half, of_float = product_rate(HALF, device), product_rate(torch.float32, device, True)
    rates = {name: of_float if name in FLOAT32 else of_half for name in TITLES}
    torch.backends.cudnn.allow_tf32 = True
    print("| batch | | images/s | to DiT's in TF32 | TFLOP a step | MFU | peak memory | `--dry_run` |")
    print("|---" * 8 + "|", flush=True)
    flops, plain = {}, {}
    for compiled in [False, True] if options.compile else [False]:
        for batch_size in options.batch_sizes:
            names = [name for name in TITLES if name != WITH_VAE or batch_size <= options.vae_batch]
            names = ["DiT", "SD-DiT"] if compiled else names
            built, cells = build_all(names, options.preset, batch_size, device, compiled)
            for name in built:
                if name not in flops:
                    flops[name] = flops_of(step_of(name, options.preset, 2, device, False)) / 2
            seconds = median_seconds(built, options.rounds, device)
            if not compiled:
                plain[batch_size] = seconds.get("DiT fp32")
            for name in names:
                title = TITLES[name] + (", compiled" if compiled else "")
                if name in seconds:
                    work, value, first = flops[name] * batch_size, seconds[name], plain.get(batch_size)
                    ratio = f"{first / value:.2f}" if first else ""
                    shown = f"{batch_size / value:,.1f} | {ratio} | {work / 1e12:.3g} | "
                    shown += f"{work / value / rates[name]:.0%} | {cells[name]}"
                else:
                    shown = f"{cells[name]} | | | | | "
                print(f"| {batch_size} | {title} | {shown} |", flush=True)
            del built
            release(device)


def build_all(
    names: list[str], preset: str, batch_size: int, device: torch.device, compiled: bool
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Those of the steps that work; of each its memory, or why there is none."""
    built, cells = {}, {}
    for name in names:
        told(f"batch {batch_size}: {name}{', compiled' * compiled}")
        said = ""
        try:
            built[name], bytes_ = peak_of(
                lambda name=name: step_of(name, preset, batch_size, device, compiled), device
            )
            if name == "SD-DiT" and not compiled:
                said = dry_run_cell(preset, batch_size, device)
            cells[name] = f"{bytes_ / 2**30:.2f} GiB | {said}"
        except Exception as error:  # such as too little memory; the others go on
            cells[name] = f"failed: {one_line(error)}"
            told(cells[name])
            del error
        release(device)
    return built, cells


def dry_run_cell(preset: str, batch_size: int, device: torch.device) -> str:
    try:
        return f"{dry_run_of(preset, batch_size, device) / 2**30:.2f} GiB"
    except Exception as error:
        return f"failed: {one_line(error)}"


def samples(options: argparse.Namespace, device: torch.device) -> None:
    """Rows of latents that pipelines make in N steps of Heun's method, and DiT's in as many evaluations."""
    (batch_size,), n = options.batch_sizes, options.num_inference_steps
    rates = {HALF: product_rate(HALF, device), torch.float32: product_rate(torch.float32, device, True)}
    torch.backends.cudnn.allow_tf32 = True
    built, shown = {}, {}
    for name in PIPELINES:
        told(name)
        make, transformer = build_pipeline(name, options.preset, batch_size, n, HALF, device)
        rows, peak = peak_of(lambda made=(make, transformer): count_rows(*made), device)
        built[name], shown[name] = make, (flops_of_row(transformer), rows / batch_size, peak / 2**30)
    print(f"Batch {batch_size}, {2 * n - 1} evaluations:\n")
    print("| | images/s | to DiT's in TF32 | rows | TFLOP an image | MFU | memory of the images |")
    print("|---" * 7 + "|", flush=True)
    seconds = median_seconds(built, options.rounds, device)
    for name, value in seconds.items():
        flops, rows, memory = shown[name]
        work, rate = flops * rows * batch_size, rates[precision(name, HALF)]
        ratio = seconds["DiTPipeline fp32"] / value
        print(f"| {PIPELINES[name]} | {batch_size / value:,.3g} | {ratio:.2f} | {rows:.0f} | "
              f"{flops * rows / 1e12:.3g} | {work / value / rate:.0%} | {memory:.3g} GiB |",
              flush=True)  # fmt: skip


def training(options: argparse.Namespace, device: torch.device) -> None:
    """What `train_sddit.py` does with a folder of latents until the time is over, and how fast."""
    folder, batch_size = Path(options.output_dir), options.batch_sizes[0]
    command = [sys.executable, Path(__file__).parents[1] / "train_sddit.py", "--preset", options.preset]
    command += ["--dataset_name", options.latents, "--vae", "none", "--output_dir", folder]
    command += ["--train_batch_size", batch_size, "--logging_steps", 10, "--num_validation_images", 0]
    command += ["--max_train_steps", 10**7, "--mixed_precision", "bf16", "--overwrite_output_dir", "True"]
    command += options.of_training
    deadline = time.monotonic() + options.seconds - 15  # for the last checkpoint
    process = subprocess.Popen([*map(str, command)], stdout=sys.stderr)
    seen, rows = [], []
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
            rows = rows_of(folder / "metrics.jsonl")
            if rows and (not seen or seen[-1][0] != rows[-1]["step"]):
                seen.append((rows[-1]["step"], time.monotonic()))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
    if len(seen) > 1:
        seen = seen[len(seen) // 4 :]  # the first steps are slow
        (first, began), (last, ended) = seen[0], seen[-1]
        rate = (last - first) / (ended - began) if ended > began else 0
        of_training = " ".join(["--preset", options.preset, *options.of_training])
        print(f"{last:,} steps of {batch_size} (`{of_training}`): {rate * batch_size:,.0f} images/s.\n")
    names = ["step", "loss", *sorted({name for row in rows for name in row if name.startswith("fid")})]
    print(f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|")
    shown = [row for row in rows if any(name in row for name in names[2:])] or rows[:: max(1, len(rows) // 8)]
    for row in shown:
        print("| " + " | ".join(f"{row[name]:.4g}" if name in row else "" for name in names) + " |")
    if not seen or code not in (0, 128 + signal.SIGTERM):
        sys.exit(f"train_sddit.py ended with {code} after {len(rows)} rows of metrics")


def rows_of(path: Path) -> list[dict]:
    """Those lines of a file of metrics that are whole."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0].replace("|", "/")
    return text if len(text) <= 160 else f"{text[:157]}..."


def release(device: torch.device) -> None:
    """Gives back what nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


PARTS = {part.__name__: part for part in (machine, steps, samples, training)}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--preset", default="SD-DiT-S/2", choices=PRESETS)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--vae_batch", type=int, default=64, help="the largest batch of DiT with the VAE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--num_inference_steps", type=int, default=10, help="N")
    parser.add_argument("--latents", default="")
    parser.add_argument("--output_dir", default="gpu-run")
    parser.add_argument("--seconds", type=float, default=60, help="of the training, with its end")
    parser.add_argument("--of_training", nargs=argparse.REMAINDER, default=[], help="its options; the last")
    return parser


def main() -> None:
    options = parser().parse_args()
    PARTS[options.part](options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
