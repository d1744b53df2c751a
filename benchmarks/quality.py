"""What does an image of equal quality cost? `python benchmarks/quality.py PIPELINE REFERENCE OUTPUT_DIR`

Each setting's samples, of the same seeds and classes, are scored against the reference by the Fréchet
distance of pixels; then batches of all settings are made in turn, round by round, decoding and all. The
recommended setting is the fastest of the pipeline's whose score is at most the tolerance above its best.
Settings are words joined by colons, in any order after the first two:

    SOLVER:STEPS   heun, euler (the pipeline's own scheduler), diffusers-euler, diffusers-dpm (its EDM
                   schedulers); with --dit, of a `DiTPipeline`: ddim, dpm (`DPMSolverMultistepScheduler`)
    guided=W       guidance at all noise levels; interval: at sigma 0.28 to 2.9 alone
    bf16, compile  the network in bfloat16, compiled
    fbc=THRESHOLD  `FirstBlockCacheConfig`; taylor=INTERVAL: `TaylorSeerCacheConfig`

Scores are kept in OUTPUT_DIR/scores.json as they come: what was stopped goes on. One OUTPUT_DIR a reference.
--also adds pipelines as they sample by themselves, such as distilled ones: NAME=FOLDER.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.utils import logging

from sddit_diffusers.evaluation.features import extract
from sddit_diffusers.evaluation.judge import Judge, score
from sddit_diffusers.files import written_aside
from sddit_diffusers.launching import keep_freed_memory
from sddit_diffusers.pipelines.loading import load_pipeline, scheduler_of, sha256_of_weights
from sddit_diffusers.pipelines.sampling import class_of, generators, image_size, sample

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SOLVERS = {
    "heun": ("", {"solver": "heun"}),
    "euler": ("", {"solver": "euler"}),
    "diffusers-euler": ("EDMEulerScheduler", {}),
    "diffusers-dpm": ("EDMDPMSolverMultistepScheduler", {}),
}
DIT_SOLVERS = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}
GUIDANCE_INTERVAL = (0.28, 2.9)
SETTINGS = [
    *(f"heun:{steps}" for steps in (3, 5, 8, 10, 16, 40)),
    *(f"euler:{steps}" for steps in (5, 10, 20, 40)),
    *(f"diffusers-euler:{steps}" for steps in (10, 20)),
    *(f"diffusers-dpm:{steps}" for steps in (5, 8, 10, 15, 20)),
    "heun:40:bf16", "heun:40:compile", "heun:40:guided=1.5", "heun:40:guided=1.5:interval",
    "heun:40:fbc=0.05", "heun:40:fbc=0.2", "heun:40:taylor=2", "heun:40:taylor=4",
    "diffusers-dpm:10:bf16", "diffusers-dpm:10:compile",
]  # fmt: skip
DIT_SETTINGS = ["ddim:250", "ddim:50", "ddim:20", "dpm:25", "dpm:15", "dpm:10"]


def read_setting(text: str, solvers) -> tuple[str, int, dict[str, float]]:
    """Solver, steps, and the other words with their values, 1 for those that have none.

    Raises:
        ValueError: it is no setting.
    """
    solver, steps, *words = text.split(":") + [""] * (":" not in text)
    if solver not in solvers:
        raise ValueError(f"The solver of {text!r} is {solver!r}; there are {', '.join(solvers)}.")
    if not steps.isdecimal() or int(steps) < 1:
        raise ValueError(f"The steps of {text!r} are {steps!r}; they must be a whole number from 1.")
    found = {}
    for word in words:
        name, given, value = word.partition("=")
        try:
            found[name] = float(value) if given else 1.0
        except ValueError:
            raise ValueError(f"{name} of {text!r} is {value!r}; it must be a number.") from None
        allowed = ("guided=", "fbc=", "taylor=") if given else ("interval", "bf16", "compile")
        if name + given not in allowed:
            raise ValueError(
                f"{word!r} of {text!r} is unknown; there are guided=, interval, bf16, compile, fbc=, taylor=."
            )
    return solver, int(steps), found


def prepare(transformer: torch.nn.Module, words: dict[str, float]) -> None:
    """Precision, cache and compilation of a setting."""
    if "bf16" in words:
        transformer.to(torch.bfloat16)
    if "fbc" in words:
        transformer.enable_cache(FirstBlockCacheConfig(threshold=words["fbc"]))
    if "taylor" in words:
        transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=int(words["taylor"])))
    if "compile" in words:
        transformer.compile()


def maker(folder: str, setting: str) -> tuple[Callable[[range], np.ndarray], torch.nn.Module]:
    """What makes images of seeds, uint8 `[n, h, w, channels]`, by a setting ("": its own); its network."""
    pipe, arguments = load_pipeline(folder), {}
    pipe.set_progress_bar_config(disable=True)
    if setting:
        solver, steps, words = read_setting(setting, SOLVERS)
        pipe.scheduler = scheduler_of(pipe.scheduler, *SOLVERS[solver], steps)
        prepare(pipe.transformer, words)
        arguments = {"num_inference_steps": steps, "guidance_scale": words.get("guided", 1.0)}
        if "interval" in words:
            arguments["guidance_interval"] = GUIDANCE_INTERVAL
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")

    def make(seeds: range) -> np.ndarray:
        labels = [class_of(pipe, ["random"], 0, seed) for seed in seeds]
        return sample(pipe, seeds, labels, **arguments)

    return make, pipe.transformer


def dit_maker(
    folder: str, setting: str, classes: int
) -> tuple[Callable[[range], np.ndarray], torch.nn.Module]:
    """The same of a `DiTPipeline` of diffusers."""
    pipe = DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    solver, steps, words = read_setting(setting, DIT_SOLVERS)
    pipe.scheduler = DIT_SOLVERS[solver].from_config(pipe.scheduler.config)
    prepare(pipe.transformer, words)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")

    def make(seeds: range) -> np.ndarray:
        labels = [int(torch.randint(classes, (), generator=each)) for each in generators(seeds)]
        images = pipe(
            labels, words.get("guided", 1.0), generator(seeds), num_inference_steps=steps, output_type="np"
        ).images
        return (images * 255 + 0.5).clip(0, 255).astype(np.uint8)

    def generator(seeds: range) -> list[torch.Generator]:
        return generators(seed + 2**32 for seed in seeds)

    return make, pipe.transformer


def scores_of(make: Callable, judge: Judge, batch_size: int, repeats: int) -> list[float]:
    """The Fréchet distances of so many sets of samples, which have no seed in common."""
    found, n, (view,) = [], judge.num_samples, judge.views
    for first in range(0, n * repeats, n):
        batches = (make(range(i, i + batch_size)) for i in range(first, first + n, batch_size))
        parts = (torch.from_numpy(batch).permute(0, 3, 1, 2).expand(-1, 3, -1, -1) for batch in batches)
        features = extract(parts, view.extractor, judge.accelerator)
        found.append(score(features, view.reference, ["fid"])["fid"])
    return found


def measure(
    makers: dict[str, tuple], judge: Judge, batch_size: int, rounds: int, repeats: int, path: Path
) -> list[dict]:
    """Of each setting the scores and their mean, the evaluations of a batch, the median images a second.

    Args:
        path: of the scores, which are kept there as they come; those that it has are not computed again.
    """
    known = json.loads(path.read_text()) if path.is_file() else {}
    rows, seconds = [], {name: [] for name in makers}
    for name, (make, transformer) in makers.items():
        sets = f"{repeats} times {judge.num_samples} in batches of {batch_size}"
        key = f"{name} of {sha256_of_weights(transformer)}, {sets}"
        if key not in known:
            calls = []
            hook = transformer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            scores = scores_of(make, judge, batch_size, repeats)
            hook.remove()
            evaluations = len(calls) * batch_size / (judge.num_samples * repeats)
            known[key] = {"scores": scores, "evaluations": evaluations}
            with written_aside(path, "w") as file:
                file.write(json.dumps(known, indent=1) + "\n")
        rows.append({"setting": name, "score": statistics.mean(known[key]["scores"]), **known[key]})
        print(rows[-1], flush=True)
    for _ in range(rounds):
        for name, (make, _) in makers.items():
            start = time.perf_counter()
            make(range(batch_size))
            seconds[name].append(time.perf_counter() - start)
    for row in rows:
        row["images_a_second"] = batch_size / statistics.median(seconds[row["setting"]])
    return rows


def pareto(rows: list[dict]) -> list[dict]:
    """The settings that no other is both faster and better than, from the fastest on."""
    front = []
    for row in sorted(rows, key=lambda row: (-row["images_a_second"], row["score"])):
        if not front or row["score"] < front[-1]["score"]:
            front.append(row)
    return front


def recommended(rows: list[dict], tolerance: float) -> dict:
    """The fastest whose score is at most (1 + tolerance) times the best.

    Raises:
        ValueError: there are none to choose from, or the tolerance is below 0.
    """
    if not rows or not tolerance >= 0:
        raise ValueError(f"{len(rows)} settings, tolerance {tolerance}; there must be one, and 0 or more.")
    limit = min(row["score"] for row in rows) * (1 + tolerance)
    return max((row for row in rows if row["score"] <= limit), key=lambda row: row["images_a_second"])


def table(rows: list[dict], chosen: dict) -> str:
    """Markdown, best scores first; the Pareto front has a mark, the recommended setting is bold."""
    front = pareto(rows)
    lines = ["| setting | Fréchet ↓ | evaluations | images/s | front |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["score"]):
        name = f"**`{row['setting']}`**" if row is chosen else f"`{row['setting']}`"
        spread = f" ± {statistics.stdev(row['scores']):.3f}" if len(row["scores"]) > 1 else ""
        lines.append(
            f"| {name} | {row['score']:.3f}{spread} | {row['evaluations']:g} | "
            f"{row['images_a_second']:.1f} | "
            f"{'•' * (row in front)} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], chosen: dict, path: Path) -> None:
    """Scores against images a second, a color a solver; the Pareto front is a line."""
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    front = pareto(rows)
    axis.step(
        [row["images_a_second"] for row in front], [row["score"] for row in front],
        where="post", color="0.6", linestyle="--", zorder=0, label="Pareto front",
    )  # fmt: skip
    kinds = list(dict.fromkeys(row["setting"].split(":")[0] for row in rows))
    for i, kind in enumerate(kinds):
        own = [row for row in rows if row["setting"].split(":")[0] == kind]
        own_x, own_y = [row["images_a_second"] for row in own], [row["score"] for row in own]
        axis.scatter(own_x, own_y, s=24, color=f"C{i % 10}", label=kind)
    told = []
    for row in sorted(rows, key=lambda row: row["images_a_second"]):
        x, y = row["images_a_second"], row["score"]
        near = sum(x / left < 1.3 and abs(np.log(y / height)) < 0.1 for left, height in told)
        told.append((x, y))
        offset = (3, (4, 13, -10, -19)[near % 4])  # so that neighbours' names do not cover one another
        axis.annotate(
            row["setting"].partition(":")[2], (x, y), offset, textcoords="offset points", fontsize=6
        )
    axis.scatter(
        chosen["images_a_second"],
        chosen["score"],
        s=150,
        facecolors="none",
        edgecolors="k",
        label="recommended",
    )
    axis.set(xscale="log", yscale="log", xlabel="images a second", ylabel="Fréchet distance of pixels")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline")
    parser.add_argument("reference", help="as that of sddit_diffusers.evaluate")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--settings", nargs="*", default=SETTINGS)
    parser.add_argument("--also", nargs="*", default=[], help="NAME=FOLDER, pipelines as they come")
    parser.add_argument("--dit", default="", help="folder of a DiTPipeline of diffusers")
    parser.add_argument("--dit_settings", nargs="*", default=DIT_SETTINGS)
    parser.add_argument("--num_samples", type=int, default=1024, help="a multiple of the batch size")
    parser.add_argument("--repeats", type=int, default=1, help="sets of samples, each of other seeds")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=0.05, help="of the score, relative to the best")
    options = parser.parse_args()
    if options.batch_size < 1 or options.num_samples % options.batch_size:
        parser.error(f"num_samples is {options.num_samples}; it must be a multiple of {options.batch_size}.")
    if options.repeats < 1 or options.rounds < 1:
        parser.error(f"repeats are {options.repeats}, rounds {options.rounds}; both must be at least 1.")
    logging.set_verbosity_error()
    keep_freed_memory()
    pipe = load_pipeline(options.pipeline)
    size, classes = (image_size(pipe),) * 2, pipe.transformer.config.num_classes
    judge = Judge(
        options.reference, ["pixels"], size, options.num_samples, options.image_column, "", Accelerator()
    )
    makers = {setting: maker(options.pipeline, setting) for setting in options.settings}
    for name, _, folder in (each.partition("=") for each in options.also):
        makers[name] = maker(folder, "")
    for setting in options.dit_settings if options.dit else ():
        makers[f"DiTPipeline-{setting}"] = dit_maker(options.dit, setting, classes)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    scores = options.output_dir / "scores.json"
    rows = measure(makers, judge, options.batch_size, options.rounds, options.repeats, scores)
    chosen = recommended([row for row in rows if row["setting"] in options.settings], options.tolerance)
    Path(options.output_dir, "quality.json").write_text(json.dumps(rows, indent=1) + "\n")
    Path(options.output_dir, "quality.md").write_text(table(rows, chosen))
    draw(rows, chosen, options.output_dir / "quality.png")
    print(table(rows, chosen))


if __name__ == "__main__":
    main()
