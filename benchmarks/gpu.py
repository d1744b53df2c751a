"""The first minutes on a GPU: `python benchmarks/gpu.py [--minutes 8] [--latents FOLDER] [--output gpu.md]`

Runs what must hold and what is to be measured, in the order of its worth, and writes a Markdown table:
- the card, and the rate of its products;
- `pytest -m gpu`;
- training steps of S/2 and B/2 at batches of 256 and 64, and of XL/2 at 32: DiT in TF32, alone and (at 64
  and less) with the VAE that its authors' script runs; DiT and SD-DiT in bfloat16, all but XL/2 compiled
  too; and memory beside what `--dry_run` says;
- sampling at XL/2;
- with a folder of latents, training on them for the rest of the time; options of its follow `--`.
Each part is a process that has a limit. One that fails or is stopped is named with what it has given, and
the others go on. One that does not fit any more is named as not run. The file is whole after each part.
Without a GPU the same list is run small on the CPU, to see that it works.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
GRACE = 10  # seconds that a part has to end when it is told to
SHOWN = 40  # lines of a part that prints no Markdown


class Part(NamedTuple):
    """One of what is run."""

    title: str
    arguments: list[str]  # of Python; {seconds} is what it has
    needs: float  # seconds without which it is not begun
    limit: float  # seconds after which it is stopped
    is_markdown: bool = True  # what it prints


class Outcome(NamedTuple):
    """What became of a part."""

    text: str = ""  # what it printed
    problem: str = ""  # why it is not complete
    seconds: float | None = None  # that it took; None where it was not run


def run_parts(
    parts: Sequence[Part],
    seconds: float,
    run: Callable[[Part, float], tuple[str, str]],
    keep: Callable[[dict[str, Outcome]], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Outcome]:
    """Runs the parts in their order, as far as the time goes.

    Args:
        seconds: that all may take together.
        run: runs a part for so many seconds at most; what it printed, and why it is not complete, if so.
        keep: is given all outcomes so far, by title, after each part.
        clock: tells the time in seconds.
    """
    start = clock()
    outcomes = {part.title: Outcome(problem="Not run yet.") for part in parts}
    for number, part in enumerate(parts, 1):
        begun = clock()
        left = seconds - (begun - start)
        if left < part.needs:
            outcomes[part.title] = Outcome(
                problem=f"Not run: it needs {part.needs:.0f} s, and {max(0, left):.0f} were left."
            )
        else:
            limit = min(part.limit, left)
            told(f"\n[{begun - start:3.0f} s] {number}/{len(parts)} {part.title}, at most {limit:.0f} s")
            try:
                text, problem = run(part, limit)
            except Exception as error:
                text, problem = "", f"Failed: {type(error).__name__}: {error}"
            outcomes[part.title] = Outcome(text, problem, clock() - begun)
        if problem := outcomes[part.title].problem:
            told(f"{part.title}: {problem}")
        keep(outcomes)
    return outcomes


def run_process(part: Part, limit: float) -> tuple[str, str]:
    """Runs a part in a process of its own, and shows what it prints as it comes."""
    arguments = [argument.format(seconds=limit) for argument in part.arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "KINETO_LOG_LEVEL": "99"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    printed, errors = [], []
    readers = [
        threading.Thread(target=read, args=(stream, lines), daemon=True)
        for stream, lines in ((process.stdout, printed), (process.stderr, errors))
    ]
    for reader in readers:
        reader.start()
    problem = ""
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        problem = f"Stopped after {limit:.0f} s; what it had by then is above."
    finally:
        end(process)
    for reader in readers:
        reader.join(5)
    if not problem and process.returncode:
        last = [line.strip() for line in errors or printed if line.strip()][-1:]
        problem = f"Failed: {''.join(last)[:300] or f'exit code {process.returncode}'}"
    if not part.is_markdown:
        printed = ["```\n", *printed[-SHOWN:], "```\n"]
    return "".join(printed), problem


def read(stream, lines: list[str]) -> None:
    """Keeps the lines of a stream, and shows them."""
    for line in stream:
        lines.append(line)
        told(f"    {line.rstrip()}")


def end(process: subprocess.Popen) -> None:
    """Ends a process that may still run, and what it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break


def told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parts_on_gpu() -> list[Part]:
    """In the order of their worth."""
    of_steps, of_samples = measured("steps", "--rounds", 7), measured("samples", "--rounds", 3)
    xl = ["--preset", "SD-DiT-XL/2", "--batch_sizes", "32"]
    both = ["--batch_sizes", "256", "64", "--compile"]
    return [
        Part("The machine", measured("machine"), 5, 40),
        Part("`pytest -m gpu`", tests("gpu"), 60, 150, is_markdown=False),
        Part("Training steps of SD-DiT-S/2", [*of_steps, "--preset", "SD-DiT-S/2", *both], 40, 110),
        Part("Training steps of SD-DiT-B/2", [*of_steps, "--preset", "SD-DiT-B/2", *both], 40, 110),
        Part("Training steps of SD-DiT-XL/2", [*of_steps, *xl], 35, 60),
        Part("Sampling at SD-DiT-XL/2", [*of_samples, *xl], 35, 60),
    ]


def parts_on_cpu() -> list[Part]:
    """The same, small."""
    small = ["--preset", "small", "--rounds", "1", "--vae_batch", "1", "--batch_sizes"]
    return [
        Part("The machine", measured("machine"), 5, 60),
        Part("`pytest -m gpu`", tests("gpu and not slow"), 20, 120, is_markdown=False),
        Part("Training steps of a small network", [*measured("steps"), *small, "2", "1"], 15, 200),
        Part("Sampling of a small network",
             [*measured("samples", "--num_inference_steps", 3), *small, "2"], 15, 60),
    ]  # fmt: skip


def measured(part: str, *options) -> list[str]:
    return [str(ROOT / "benchmarks" / "gpu_parts.py"), part, *map(str, options)]


def tests(mark: str) -> list[str]:
    """One process, whatever the settings of the tests say: there is one GPU."""
    return ["-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "-rfEs", "--tb=short",
            "-m", mark, str(ROOT / "tests" / "test_gpu.py")]  # fmt: skip


def training(latents: str, output: Path, batch_size: int, options: list[str]) -> Part:
    """For the rest of the time."""
    arguments = ["--latents", latents, "--output_dir", str(output.with_suffix("")) + "-run"]
    arguments += ["--preset", "cifar10-latent", "--batch_sizes", str(batch_size), "--seconds", "{seconds}"]
    command = measured("training", *arguments, "--of_training", *options)
    return Part(f"Training on {Path(latents).name}", command, 45, 3600)


def report(outcomes: dict[str, Outcome], on: str, command: str) -> str:
    """All outcomes as Markdown."""
    lines = [f"# The first minutes {on}\n", f"`{command}`\n"]
    if on == "on a CPU":
        lines.append("There was no GPU: this is the list of one, small, and its figures say nothing.\n")
    for title, (text, problem, seconds) in outcomes.items():
        lines.append(f"## {title}\n")
        if text.strip():
            lines.append(f"{text.strip()}\n")
        if problem:
            lines.append(f"**{problem}**\n")
        if seconds is not None:
            lines.append(f"It took {seconds:.0f} s.\n")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="that all may take together")
    parser.add_argument("--latents", default="", help="folder of latents of 8 x 8 x 4 to train on at the end")
    parser.add_argument("--output", type=Path, default=Path("gpu.md"))
    parser.add_argument("of_training", nargs="*", help="after --: options of train_sddit.py")
    options = parser.parse_args()
    if options.latents and not Path(options.latents).is_dir():
        parser.error(f"--latents is {options.latents!r}; it must be a folder of latents")
    import torch  # after the mistakes, for it takes seconds

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    on_gpu, output = torch.cuda.is_available(), options.output.resolve()
    parts, on = (parts_on_gpu(), "on a GPU") if on_gpu else (parts_on_cpu(), "on a CPU")
    if options.latents:
        latents = str(Path(options.latents).resolve())
        parts.append(training(latents, output, 256 if on_gpu else 8, options.of_training))
    command = "python benchmarks/gpu.py " + " ".join(sys.argv[1:])

    def keep(outcomes: dict[str, Outcome]) -> None:
        aside = output.with_name(f"{output.name}.part")
        aside.write_text(report(outcomes, on, command.strip()))
        aside.replace(output)

    outcomes = run_parts(parts, 60 * options.minutes, run_process, keep)
    if not options.latents:
        outcomes["Training on latents"] = Outcome(problem="Not run: there is no --latents.")
        keep(outcomes)
    told(f"\n{output} has all of it.")
    if any(outcome.problem and outcome.seconds is not None for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
