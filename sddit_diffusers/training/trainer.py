"""A run: what is built once, its loop, and what is kept of it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from diffusers.training_utils import EMAModel

from ..data.latents import LatentDataset
from ..data.order import Batch, BatchSampler, ahead
from ..data.pictures import ImageDataset
from ..data.shards import find_latents
from ..launching import bar, check_machine, main_first, on_main_process
from ..seeds import generator_for
from .building import build_objective
from .checkpointing import find_checkpoints
from .command import command_to_go_on
from .configuration import RunConfig
from .engines import check_engine, prepare
from .health import Health
from .metrics import MetricsLog
from .objective import Draws, Objective
from .output import Records, alone_in, prepare_folder
from .publishing import open_repo
from .results import Results, open_vae, told
from .signals import Signals
from .state import RunState, checkpoint_of, without_start
from .step import train_step
from .trackers import settings_of

T = TypeVar("T")
Builder = Callable[[RunConfig, dict, str], Objective]


class Trainer:
    """A run.

    Args:
        config: of the stage that is trained.
        build: makes the objective of the configuration, the network's arguments and the kind of device.

    Raises:
        ValueError: the settings are wrong, or an earlier run's model or checkpoints are in the way.
    """

    def __init__(
        self, config: RunConfig, accelerator: Accelerator | None = None, build: Builder | None = None
    ):
        self.config, self.builder = config, build or build_objective
        self.output_dir = Path(config.output_dir)
        self.accelerator = accelerator or open_accelerator(config)
        on_main_process(lambda: prepare_folder(self.output_dir, config), self.accelerator)
        self.repo = None
        if config.push_to_hub:  # now, since nobody may be logged in
            name = config.hub_model_id or self.output_dir.resolve().name
            self.repo = on_main_process(lambda: open_repo(name), self.accelerator)
        network, device = config.network(), self.accelerator.device
        self.dataset = main_first(lambda: open_dataset(config, network), self.accelerator)
        wanted = self.accelerator.is_main_process or config.evaluation_steps
        vae = main_first(lambda: open_vae(config, self.dataset, device) if wanted else None, self.accelerator)
        self.checkpoint = on_main_process(lambda: checkpoint_of(config), self.accelerator)
        self.build(network | {"num_classes": self.dataset.num_classes})
        self.sampler = BatchSampler(
            len(self.dataset), config.train_batch_size, config.gradient_accumulation_steps,
            self.accelerator.process_index, self.accelerator.num_processes, config.seed,
            max_steps=config.max_train_steps,
        )  # fmt: skip
        self.state = RunState(config, self.accelerator, self.engine, self.ema, self.dataset, self.sampler)
        if self.checkpoint is not None:
            self.state.resume(self.checkpoint)
        self.results = Results(config, self.accelerator, self.objective, self.ema, self.dataset, vae)
        self.signals = Signals(self.accelerator, command_to_go_on(config))
        self.records = Records(self.output_dir)

    def build(self, network: dict) -> None:
        """Makes the network of these arguments, what trains it, and the averages."""
        config, device = self.config, self.accelerator.device.type
        set_seed(config.seed)
        asked = config if self.checkpoint is None else without_start(config)
        self.objective = main_first(lambda: self.builder(asked, network, device), self.accelerator)
        if config.compile:
            self.objective.compile_blocks()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.objective.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            fused=True,
        )
        self.engine = prepare(
            self.accelerator, self.objective, optimizer,
            config.train_batch_size, config.gradient_accumulation_steps, config.max_grad_norm,
        )  # fmt: skip
        self.ema = EMAModel(self.objective.transformer.parameters(), decay=config.ema_decay, foreach=True)
        self.health = Health(self.engine, self.objective)

    def run(self) -> None:
        """Trains from the first step to the last, and saves the pipeline.

        Raises:
            SystemExit: a signal stopped the run, after a checkpoint.
            FloatingPointError: losses, weights or samples are not finite.
        """
        log = on_main_process(
            lambda: self.records.begin(self.config, self.sampler.start_step), self.accelerator
        )
        self.accelerator.init_trackers("sddit", config=settings_of(self.config))
        self.describe()
        try:
            with self.signals.caught():
                if not self.sampler.start_step:
                    self.results.score_start(log)
                self.train(log)
                self.finish()
        except FloatingPointError as error:
            last = find_checkpoints(self.output_dir)[-1:]
            kept = f"The last checkpoint is {last[0]}." if last else "There is no checkpoint."
            raise FloatingPointError(f"{error} {kept}") from error
        except KeyboardInterrupt:
            self.signals.leave_at_once(next(reversed(find_checkpoints(self.output_dir)), None))
            raise
        if self.signals.number:
            self.accelerator.print(f"{self.signals.name} came at the end: the run is complete.")

    def train(self, log: MetricsLog) -> None:
        """The loop over the steps.

        Args:
            log: the main process's.
        """
        config, main, device = self.config, self.accelerator.is_main_process, self.accelerator.device
        progress = bar(
            initial=self.sampler.start_step, total=config.max_train_steps, unit="step", smoothing=0.05,
            disable=not self.accelerator.is_local_main_process,
        )  # fmt: skip
        with (
            closing(progress),
            closing(self.dataset.batches(self.sampler)) as read,
            closing(ahead(read, device)) as data,
        ):
            for step in range(self.sampler.start_step, config.max_train_steps):
                done = step + 1
                last = done == config.max_train_steps
                evaluated = due(config.evaluation_steps, done, last)
                logged = due(config.logging_steps, done, last) or evaluated
                metrics = self.train_step(step, data, logged)
                if logged:
                    losses = {name: f"{metrics[name]:.3f}" for name in metrics if name.startswith("loss")}
                    progress.set_postfix(losses, refresh=False)
                progress.update()
                if evaluated:
                    scores = self.sampled(done, self.results.evaluate)
                    metrics |= scores
                    if main:
                        progress.write(told(done, scores), file=sys.stderr)
                if logged:
                    self.accelerator.log(metrics, step=done)
                    if main:
                        judges = {"judges": self.results.judge.identities} if evaluated else {}
                        log.write({"step": done, **metrics, **judges})
                stopped = self.signals.came()
                if stopped or due(config.checkpointing_steps, done, last):
                    self.save(done)
                if stopped and not last:
                    progress.close()
                    self.signals.leave(done)
                if config.validation_steps and done % config.validation_steps == 0 and not last:
                    self.sampled(done, partial(self.results.validate, done, self.records))

    def save(self, step: int) -> None:
        """Writes a checkpoint, unless a step has failed.

        Raises:
            FloatingPointError: one has.
        """
        self.health.check()
        self.state.save(step)

    def sampled(self, step: int, action: Callable[[], T]) -> T:
        """What `action` makes of samples; where they are not finite, the training is saved first."""
        self.health.check()
        try:
            return action()
        except FloatingPointError:
            self.state.save(step)
            raise

    def train_step(self, number: int, data: Iterator, read: bool = True) -> dict[str, float]:
        """One optimizer step and the updates that follow.

        Args:
            read: whether to wait for the device, and look at what was made.

        Returns:
            The means over the global batch, and what has been set for this step; nothing where not `read`.

        Raises:
            FloatingPointError: this step or an earlier one that was not looked at is not finite.
        """
        schedule = self.follow_schedules(number)
        self.objective.tell(read)
        step = train_step(
            self.engine, self.ema, self.micro_batches(number, data), self.config.max_grad_norm,
            partial(self.health.judge, number, at_once=read),
        )  # fmt: skip
        if not read:
            return {}
        norm = {"grad_norm": step.norm.item()} if step.moved else {}
        return dict(zip(step.names, step.losses.tolist(), strict=True)) | norm | schedule

    def micro_batches(self, number: int, data: Iterator) -> Iterator[tuple[Batch, Draws]]:
        """This process's part of a step: its rows of the global batch, and of what is drawn for all of it."""
        config, network, device = self.config, self.objective.transformer.config, self.accelerator.device
        shape = self.sampler.global_batch, network.in_channels, network.sample_size, network.sample_size
        draws = self.objective.draw(shape, generator_for(config.seed, 1, number, device=device), device)
        noise = self.dataset.draw(shape, generator_for(config.seed, 2, number, device=device), device)
        for micro in range(config.gradient_accumulation_steps):
            rows = self.sampler.rows(micro)
            part = None if noise is None else noise[rows]
            yield self.dataset.batch(next(data), part, device), draws.rows(rows)

    def follow_schedules(self, number: int) -> dict[str, float]:
        """Sets what changes from step to step; returns it."""
        config = self.config
        learning_rate = config.learning_rate_at(number)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        steps, steps_per_epoch = config.max_train_steps, self.sampler.steps_per_epoch
        return {"learning_rate": learning_rate} | self.objective.follow(number, steps, steps_per_epoch)

    def describe(self) -> None:
        """Says what is about to be trained."""
        count = sum(parameter.numel() for parameter in self.objective.parameters() if parameter.requires_grad)
        self.accelerator.print(
            f"{self.config.title}: {count / 1e6:.1f}M trained parameters, "
            f"{len(self.dataset)} {self.dataset.kind} "
            f"of {self.dataset.num_classes} classes, "
            f"global batch {self.sampler.global_batch}, "
            f"{self.accelerator.num_processes} process(es) on {self.accelerator.device.type}, "
            f"mixed precision {self.accelerator.mixed_precision}, into {self.output_dir}/"
        )

    def finish(self) -> None:
        """Saves the pipeline with the averaged weights, and draws samples and curves.

        Raises:
            FloatingPointError: weights or samples are not finite; weights that are finite are saved.
        """
        self.state.check_weights(self.config.max_train_steps)
        pipe = self.results.averaged_pipeline()
        on_main_process(lambda: self.results.save(pipe, self.records, self.repo), self.accelerator)
        for tracker in self.accelerator.trackers:
            tracker.finish()


def due(every: int, done: int, last: bool) -> bool:
    """Whether what is done `every` so many steps, and after the last, is due now; 0: never."""
    return every > 0 and (done % every == 0 or last)


def open_dataset(config: RunConfig, network: dict) -> ImageDataset | LatentDataset:
    """Latents where the name is that of a folder of latents, pictures otherwise.

    Raises:
        ValueError: there is no such dataset, the network takes others, or pictures are missing.
    """
    channels, size = network["in_channels"], network["sample_size"]
    root = None if config.dataset_name == "digits" else find_latents(config.dataset_name)
    if root is None:
        return ImageDataset(
            config.dataset_name, config.image_column, config.label_column, channels, size,
            config.dataloader_num_workers, gives_pictures=config.looks_at_pictures,
            max_samples=config.max_train_samples,
        )  # fmt: skip
    dataset = LatentDataset(root, config.looks_at_pictures, config.max_train_samples)
    if dataset.shape != (channels, size, size):
        shape = " x ".join(map(str, dataset.shape))
        raise ValueError(
            f"The latents of {config.dataset_name} are {shape}; the network takes "
            f"{channels} x {size} x {size}. Choose another --preset, or change it with --transformer."
        )
    return dataset


def open_accelerator(config: RunConfig) -> Accelerator:
    """What joins the processes.

    Raises:
        ValueError: there is no such tracker, or the machine is not as it must be.
    """
    trackers = [str(tracker) for tracker in get_available_trackers()]
    if config.report_to not in ("", "all", *trackers):
        raise ValueError(f"report_to is {config.report_to!r}; installed are {', '.join(trackers) or 'none'}.")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision or None,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to or None,
        project_dir=config.output_dir,
        kwargs_handlers=[
            # The centers are equal on all processes: there is nothing to broadcast before a forward.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # The others wait while the main process saves and samples.
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),
        ],
    )
    check_machine(accelerator)
    check_engine(accelerator)
    return accelerator


@contextmanager
def training(config: RunConfig, build: Builder | None = None) -> Iterator[Trainer]:
    """A trainer, in whose output folder no other run may write; the arguments are the trainer's.

    Raises:
        ValueError: the settings are wrong, or another run has the folder.
        OSError: something cannot be read or written.
    """
    accelerator, folder = open_accelerator(config), Path(config.output_dir)
    with ExitStack() as held:
        on_main_process(lambda: held.enter_context(alone_in(folder)), accelerator)
        yield Trainer(config, accelerator, build)
