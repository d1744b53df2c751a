"""What a study measures beside the metrics of its runs: speeds, probes, samplings."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin

from ..evaluation.judge import Judge
from ..evaluation.probe import labelled_pictures, probe
from ..evaluation.studies import Study
from ..files import read_json, remove
from ..launching import bar, on_main_process
from ..pipelines.loading import load_pipeline, scheduler_of
from ..pipelines.pipeline_sddit import SDDiTPipeline
from ..pipelines.sampling import class_of, image_size, sample
from .auxiliary import Process
from .building import build_objective
from .configuration import RunConfig
from .distill_options import DistillConfig
from .distilling import build_distillation
from .trainer import Builder, Trainer

SPEED_ROUNDS = 20
SAMPLING_ROUNDS = 5


def builder(config: RunConfig) -> Builder:
    """What makes the objective of a run."""
    return build_distillation if isinstance(config, DistillConfig) else build_objective


def steps_a_second(
    configs: dict[str, RunConfig], folder: Path, accelerator: Accelerator, runs: list[str]
) -> dict[str, float]:
    """Of trainings by name, all in turn, round by round; medians.

    Args:
        folder: is theirs meanwhile, and theirs alone.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with ExitStack() as stack:
        trainers: dict[str, tuple[Trainer, Iterator]] = {}
        for i, name in enumerate(runs):
            config = copy.copy(configs[name])
            config.output_dir, config.evaluation_steps = str(folder / str(i)), 0
            config.max_train_steps = SPEED_ROUNDS + 2
            trainer = Trainer(config, build=builder(config))
            data = stack.enter_context(closing(trainer.dataset.batches(trainer.sampler)))
            trainers[name] = trainer, data
        for step in bar(range(SPEED_ROUNDS + 2), desc="speed", unit="round", leave=False):
            for name, (trainer, data) in trainers.items():
                take_turn(trainer)
                start = time.perf_counter()
                trainer.train_step(step, data)  # its metrics are read back from the device
                seconds[name].append(time.perf_counter() - start)
    if accelerator.is_main_process:
        remove(folder)
    return {name: 1 / statistics.median(values[2:]) for name, values in seconds.items()}


def take_turn(trainer: Trainer) -> None:
    """Sets what a process has once as this run wants it; the one that was opened last had it."""
    config = trainer.config
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    trainer.accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps


def sampler(process: SchedulerMixin, sampling: dict) -> SchedulerMixin:
    """The scheduler by which a sampling of a process is made, its steps laid out.

    Raises:
        ValueError: there is none such.
    """
    return scheduler_of(
        process,
        sampling.get("scheduler_class", ""),
        sampling.get("scheduler", {}),
        sampling.get("num_inference_steps"),
    )


def count_evaluations(study: Study, process_of: Callable[[str], Process]) -> dict[tuple[str, str], int]:
    """Of the network, by run and sampling.

    Raises:
        ValueError: there is no such sampling, or two of a line would stand in one place.
    """
    found = {}
    for table in study.tables:
        for (run, name), sampling in table.sampled.items():
            try:
                found[run, name] = len(sampler(process_of(run), sampling).timesteps)
            except ValueError as error:
                raise ValueError(f"{table.title}: {run}, {name or 'by itself'}: {error}") from None
        for line, points in table.points.items():
            counts = [found[place] for place in points]
            if len(set(counts)) < len(counts):
                raise ValueError(f"{table.title}: {line} has one number of evaluations twice: {counts}.")
    return found


def call_arguments(sampling: dict) -> dict:
    """What a sampling gives to the pipeline's call."""
    return {name: value for name, value in sampling.items() if not name.startswith("scheduler")}


def images_a_second(
    configs: dict[str, RunConfig], accelerator: Accelerator, ways: list[tuple[str, str, dict]]
) -> list[float]:
    """Of samplings of finished trainings, all in turn, round by round; medians.

    Args:
        ways: of each sampling the training, a name and what it changes.
    """

    def measure() -> list[float]:
        pipes = {run: open_pipeline(configs[run], accelerator) for run, *_ in ways}
        schedulers = [sampler(pipes[run].scheduler, sampling) for run, _, sampling in ways]
        batch = min(configs[run].train_batch_size for run in pipes)
        seconds: list[list[float]] = [[] for _ in ways]
        for _ in bar(range(SAMPLING_ROUNDS + 1), desc="sampling", unit="round", leave=False):
            for i, (run, _, sampling) in enumerate(ways):
                pipe = pipes[run]
                pipe.scheduler = schedulers[i]
                labels = [class_of(pipe, ["random"], 0, seed) for seed in range(batch)]
                start = time.perf_counter()
                sample(pipe, range(batch), labels, **call_arguments(sampling))
                seconds[i].append(time.perf_counter() - start)
        return [batch / statistics.median(values[1:]) for values in seconds]

    return on_main_process(measure, accelerator)


def probe_training(config: RunConfig, accelerator: Accelerator, sigmas: list[float]) -> list[dict]:
    """What a training's encoder knows of the pictures that it is scored against."""
    pipe, name = open_pipeline(config, accelerator), reference_of(config)
    dataset = labelled_pictures(pipe, name, config.image_column, config.label_column)
    return on_main_process(lambda: probe(pipe, dataset, sigmas, 10_000), accelerator)


def score_training(config: RunConfig, accelerator: Accelerator, metric: str, sampling: dict) -> float | None:
    """The score of a training's samples, made in another way."""
    pipe = open_pipeline(config, accelerator)
    pipe.scheduler = sampler(pipe.scheduler, sampling)
    judge = Judge(
        reference_of(config), config.evaluation_extractor, (image_size(pipe),) * 2, config.evaluation_samples,
        config.image_column, config.label_column, accelerator,
    )  # fmt: skip
    return judge(pipe, config.train_batch_size, **call_arguments(sampling)).get(metric)


def reference_of(config: RunConfig) -> str:
    """The name of what a training is scored against."""
    return config.evaluation_reference or config.dataset_name


def open_pipeline(config: RunConfig, accelerator: Accelerator) -> SDDiTPipeline:
    """What a training left, on the device and silent."""
    pipe = load_pipeline(config.output_dir).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_kept(path: Path, of: list | dict, structure: Any, default):
    """What `Reproduction.keep` found of something, or else the default.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return default
    kept = read_json(path, {"of": (list, dict), "found": structure}, "measurement of a study")
    return kept["found"] if kept["of"] == of else default
