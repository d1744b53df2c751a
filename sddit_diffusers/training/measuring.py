"""What a study measures beside the metrics of its runs: speeds, probes, samplings."""

import copy
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from accelerate import Accelerator
from diffusers import SchedulerMixin
from tqdm.auto import tqdm

from ..evaluation.judge import Judge
from ..evaluation.probe import labelled_pictures, probe
from ..files import locked, remove
from ..launching import on_main_process
from ..pipelines.loading import load_pipeline, scheduler_of
from ..pipelines.pipeline_sddit import SDDiTPipeline
from ..pipelines.sampling import class_of, image_size, sample
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


def steps_a_second(configs: dict[str, RunConfig], folder: Path, accelerator: Accelerator) -> dict[str, float]:
    """Of trainings by name, all in turn, round by round; medians.

    Args:
        folder: is theirs meanwhile.
    """
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    with ExitStack() as stack:
        on_main_process(lambda: stack.enter_context(locked(folder)), accelerator)
        trainers: dict[str, tuple[Trainer, Iterator]] = {}
        for i, (name, config) in enumerate(configs.items()):
            config = copy.copy(config)
            config.output_dir, config.evaluation_steps = str(folder / str(i)), 0
            config.max_train_steps = SPEED_ROUNDS + 2
            trainer = Trainer(config, build=builder(config))
            data = stack.enter_context(closing(trainer.dataset.batches(trainer.sampler)))
            trainers[name] = trainer, data
        for step in tqdm(range(SPEED_ROUNDS + 2), desc="speed", unit="round", leave=False):
            for name, (trainer, data) in trainers.items():
                start = time.perf_counter()
                trainer.train_step(step, data)  # its metrics are read back from the device
                seconds[name].append(time.perf_counter() - start)
    if accelerator.is_main_process:
        remove(folder)
    return {name: 1 / statistics.median(values[2:]) for name, values in seconds.items()}


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


def call_arguments(sampling: dict) -> dict:
    """What a sampling gives to the pipeline's call."""
    return {name: value for name, value in sampling.items() if not name.startswith("scheduler")}


def images_a_second(
    ways: list[tuple[str, dict]], folders: dict[str, Path], batch: int, accelerator: Accelerator
) -> list[float]:
    """Of samplings, all in turn, round by round; medians.

    Args:
        ways: names of trainings, each with a sampling.
        folders: of the trainings by name.
        batch: images at once.
    """

    def measure() -> list[float]:
        pipes = {name: open_pipeline(folder, accelerator) for name, folder in folders.items()}
        schedulers = [sampler(pipes[name].scheduler, sampling) for name, sampling in ways]
        seconds: list[list[float]] = [[] for _ in ways]
        for _ in tqdm(range(SAMPLING_ROUNDS + 1), desc="sampling", unit="round", leave=False):
            for i, (name, sampling) in enumerate(ways):
                pipe = pipes[name]
                pipe.scheduler = schedulers[i]
                labels = [class_of(pipe, ["random"], 0, seed) for seed in range(batch)]
                start = time.perf_counter()
                sample(pipe, range(batch), labels, **call_arguments(sampling))
                seconds[i].append(time.perf_counter() - start)
        return [batch / statistics.median(values[1:]) for values in seconds]

    return on_main_process(measure, accelerator)


def probe_training(
    folder: Path, config: RunConfig, accelerator: Accelerator, sigmas: list[float]
) -> list[dict]:
    """What a training's encoder knows of the pictures that it is scored against."""
    pipe, name = load_training(folder, config, accelerator)
    dataset = labelled_pictures(pipe, name, config.image_column, config.label_column)
    return on_main_process(lambda: probe(pipe, dataset, sigmas, 10_000), accelerator)


def score_training(
    folder: Path, config: RunConfig, accelerator: Accelerator, metric: str, sampling: dict
) -> float | None:
    """The score of a training's samples, made in another way."""
    pipe, name = load_training(folder, config, accelerator)
    pipe.scheduler = sampler(pipe.scheduler, sampling)
    judge = Judge(
        name, config.evaluation_extractor, (image_size(pipe),) * 2, config.evaluation_samples,
        config.image_column, config.label_column, accelerator,
    )  # fmt: skip
    return judge(pipe, config.train_batch_size, **call_arguments(sampling)).get(metric)


def load_training(folder: Path, config: RunConfig, accelerator: Accelerator) -> tuple[SDDiTPipeline, str]:
    """A training's pipeline, and the name of what it is scored against."""
    return open_pipeline(folder, accelerator), config.evaluation_reference or config.dataset_name


def open_pipeline(folder: Path, accelerator: Accelerator) -> SDDiTPipeline:
    """A training's pipeline, on the device and silent."""
    pipe = load_pipeline(str(folder)).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
