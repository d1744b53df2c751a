"""Runs a distillation: what is built for a stage, and a chain of stages."""

import copy
import gc
import os
import sys
from contextlib import closing
from functools import partial

import torch
from accelerate import PartialState
from accelerate.state import is_initialized

from ..data.order import BatchSampler
from ..data.shards import Manifest, find_latents
from ..models.attention_cpu import use_cpu_attention
from ..seeds import generator_for
from .auxiliary import Process
from .building import set_checkpointing
from .distill_options import DistillConfig
from .distillation import OBJECTIVES, SelfDistillation
from .foreign import ForeignUNet
from .memory import dry_run
from .objective import blank
from .output import is_complete
from .trainer import Trainer, training


def build_sampler(config: DistillConfig) -> Process:
    """The parent's process with the sampler that is distilled for.

    Raises:
        ValueError: it cannot take the steps.
    """
    return config.parent.sampler(config.trial_steps, config.solver)


def build_distillation(
    config: DistillConfig, network: dict, device: str, process: Process | None = None
) -> SelfDistillation:
    """The student, a copy of its parent, and what trains it, on a kind of device.

    Args:
        network: the arguments of the parent's network.
        device: type of the device.
        process: for a dry run, which has no weights: the parent's with the wanted sampler.

    Raises:
        ValueError: the parent cannot be distilled, or has other classes than the data.
    """
    parent = config.parent
    if isinstance(parent.network, ForeignUNet):
        parent.network.kept.captions = captions_of(config.dataset_name)
    if network["num_classes"] != parent.network.config.num_classes:
        raise ValueError(
            f"{config.dataset_name} has {network['num_classes']} classes; {parent.name} was trained with "
            f"{parent.network.config.num_classes}."
        )
    student = copy.deepcopy(parent.network) if process is None else blank(parent.network)
    student.train().requires_grad_(True)
    set_checkpointing(student, config.gradient_checkpointing)
    own = {"fusion_weight": config.fusion_weight[-1]} if config.fusion_weight else {}
    objective = OBJECTIVES[config.objective](
        student,
        process or build_sampler(config),
        **own,
        teacher_steps=config.teacher_steps_each,
        guidance_scales=(config.guidance_scale[0], config.guidance_scale[-1]),
        distil_guidance=config.distil_guidance,
        apart=config.apart,
        teacher_momentum=config.teacher_momentum,
        label_dropout=config.label_dropout,
    )
    if device == "cpu":
        use_cpu_attention(objective)
    return objective


def captions_of(name: str) -> tuple[str, ...]:
    """The captions of a folder of latents, which are the names of its classes.

    Raises:
        ValueError: it has none.
    """
    names = Manifest.read(find_latents(name)).class_names
    if not names:
        raise ValueError(
            f"{name} has no captions; prepare_latents takes them from a --label_column of texts."
        )
    return tuple(names)


def distil(config: DistillConfig) -> None:
    """Runs all stages of a distillation; those that are complete already are left as they are.

    Raises:
        ValueError: the settings are wrong, or an earlier run's model or checkpoints are in the way.
    """
    if config.dry_run:
        return dry_run(config, config.title, partial(build_distillation, process=build_sampler(config)))
    stages = config.stages()
    for stage in stages:
        if config.resume_from_checkpoint == "latest" and len(stages) > 1 and is_complete(stage):
            if os.environ.get("RANK", "0") == "0":  # accelerate knows its processes later
                print(f"{stage.output_dir} is complete.", flush=True)
            continue
        run_stage(stage)
        if stage is not stages[-1]:
            gc.collect()  # before the next is built
    if is_initialized():
        PartialState().destroy_process_group()


def run_stage(config: DistillConfig) -> None:
    """Runs a distillation to a number of steps."""
    with training(config, build_distillation) as trainer:
        warn_untrained(trainer)
        trainer.run()


def warn_untrained(trainer: Trainer) -> None:
    """Says so where the parent knows no more of its data than a guess does.

    Self-distillation makes an untrained model worse ("Diffusion Model is Effectively Its Own Teacher",
    Figure 5).
    """
    if trainer.accelerator.is_main_process and not (share := unexplained(trainer)) < 1:
        print(
            f"Warning: {trainer.config.model} looks untrained: its error is {share:.0%} of that of a guess "
            "that knows mean and variance of the data alone. Self-distillation makes such a model worse; "
            "train it first.", file=sys.stderr, flush=True,
        )  # fmt: skip


@torch.no_grad()
def unexplained(trainer: Trainer) -> float:
    """The parent's error of the denoised data at the sampler's times, as a share of that of the best linear
    guess, E[x0 | x] of Gaussian data of the pictures' mean and one variance."""
    objective, config, device = trainer.objective, trainer.config, trainer.accelerator.device
    process, count = objective.scheduler, min(64, len(trainer.dataset))
    sampler = BatchSampler(len(trainer.dataset), count, 1, 0, 1, config.seed, max_steps=1)
    with closing(trainer.dataset.batches(sampler)) as batches:
        read = next(batches)
    channels, size = objective.transformer.config.in_channels, objective.transformer.config.sample_size
    shape, generator = (count, channels, size, size), generator_for(config.seed, 3, device=device)
    x0, labels, _ = trainer.dataset.batch(read, trainer.dataset.draw(shape, generator, device), device)
    draws = objective.draw(shape, generator, device)
    x = process.noised(x0, draws.noise, draws.t)
    network = config.parent.network.to(device)  # those of the objective may be in shards
    denoised, _ = process.solve(objective.output(network, x, draws.t, labels), x, draws.t)
    network.cpu()
    mean, variance = x0.mean(0), (x0 - x0.mean(0)).square().mean()
    alpha, sigma = (process.noised(*pair, draws.t) for pair in ((1.0, 0.0), (0.0, 1.0)))
    guess = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
    errors, of_guesses = ((found - x0).square().flatten(1).sum(1) for found in (denoised, guess))
    # The median of the pictures: next to no signal, a prediction of noise tells little of the data.
    return (errors / of_guesses).median().item()
