"""A run: what is built once, one step, and what is saved."""

import dataclasses
import errno
import json
import math
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    set_seed,
)
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from tqdm.auto import tqdm

from ..cli import differences
from ..data.latents import LatentDataset
from ..data.order import BatchSampler, generator_for
from ..data.pictures import ImageDataset
from ..data.shards import find_latents
from ..evaluation.judge import Judge
from ..files import folder_written_aside, locked, remove, written_aside
from ..launching import check_machine, main_first, on_main_process, together
from ..pipelines.loading import load_vae, sha256_of_weights
from ..pipelines.pipeline_sddit import SDDiTPipeline, scale_latents
from ..pipelines.sampling import sample_grid
from ..schedulers.scheduling_edm_heun import EDMHeunScheduler
from .checkpointing import (
    choose_checkpoint,
    find_checkpoints,
    load_state,
    read_about,
    save_checkpoint,
    set_aside,
)
from .denoising import Draws, mask_ratio_at
from .discrimination import teacher_momentum, teacher_temperature
from .engines import check_engine, prepare, whole, whole_weights
from .methods import build_objective
from .metrics import MetricsLog, draw_curves, read_metrics
from .options import TRIAL_STEPS, TrainingConfig
from .publishing import open_repo, python_text, upload, write_card

T = TypeVar("T")


UNFINISHED = "unfinished"  # the log of a run in a folder that has a model already


STATE = "objective", "optimizer", "ema", "scaler"  # what a checkpoint has


class Trainer:
    """A run: what is built once, one step, and what is saved."""

    def __init__(self, config: TrainingConfig, accelerator: Accelerator | None = None):
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.accelerator = accelerator or open_accelerator(config)
        on_main_process(lambda: prepare_folder(self.output_dir, config), self.accelerator)
        self.repo = None
        if config.push_to_hub:  # now, since nobody may be logged in
            name = config.hub_model_id or self.output_dir.resolve().name
            self.repo = on_main_process(lambda: open_repo(name), self.accelerator)
        self.check_evaluation()
        network = config.network()
        self.dataset = main_first(lambda: open_dataset(config, network), self.accelerator)
        wanted = self.accelerator.is_main_process or config.evaluation_steps
        self.vae = main_first(lambda: self.open_vae() if wanted else None, self.accelerator)
        self.build(network | {"num_classes": self.dataset.num_classes})
        self.sampler = BatchSampler(
            len(self.dataset), config.train_batch_size, config.gradient_accumulation_steps,
            self.accelerator.process_index, self.accelerator.num_processes, config.seed,
            max_steps=config.max_train_steps,
        )  # fmt: skip
        if config.resume_from_checkpoint:
            self.resume()
        self.judge = self.open_judge() if config.evaluation_steps else None
        self.stop_signal, self.stop_time = None, 0.0
        # While the model of an earlier run is there, what is written of this one is kept beside.
        beside, model = self.output_dir / UNFINISHED, self.output_dir / "model_index.json"
        self.records = beside if beside.is_dir() or model.is_file() else self.output_dir

    def build(self, network: dict) -> None:
        """Makes the network of these arguments, what trains it, and the averages."""
        config, device = self.config, self.accelerator.device.type
        set_seed(config.seed)
        self.objective = main_first(
            lambda: build_objective(config, network, EDMHeunScheduler(), device), self.accelerator
        )
        if config.compile:
            self.objective.compile_blocks(dynamic=config.mask_ratio_schedule != "constant")
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

    def check_evaluation(self) -> None:
        """Makes sure that each process has a sample to make.

        Raises:
            ValueError: there are fewer samples than processes.
        """
        samples, processes = self.config.evaluation_samples, self.accelerator.num_processes
        if self.config.evaluation_steps and samples < processes:
            raise ValueError(
                f"evaluation_samples is {samples}; it must be at least {processes}, one a process."
            )

    def run(self) -> None:
        """Trains from the first step to the last, and saves the pipeline.

        Raises:
            SystemExit: a signal stopped the run, after a checkpoint.
            FloatingPointError: losses, weights or samples are not finite.
        """
        log = on_main_process(self.begin, self.accelerator)
        self.accelerator.init_trackers("sddit", config=dataclasses.asdict(self.config))
        self.describe()
        try:
            with self.catching_signals():
                self.train(log)
                self.finish()
        except FloatingPointError as error:
            last = find_checkpoints(self.output_dir)[-1:]
            kept = f"The last checkpoint is {last[0]}." if last else "There is no checkpoint."
            raise FloatingPointError(f"{error} {kept}") from error
        if self.stop_signal:
            name = signal.Signals(self.stop_signal).name
            self.accelerator.print(f"{name} came at the end: the run is complete.")

    def begin(self) -> MetricsLog:
        """The main process's preparation of the folder, once nothing stands against the run."""
        for folder in set_aside(self.output_dir, self.sampler.start_step):
            print(f"Left behind by this run, and set aside: {folder}", flush=True)
        earlier = self.records / "metrics.jsonl"
        if not earlier.is_file():
            earlier = self.output_dir / "metrics.jsonl"
        if self.records.is_symlink():
            remove(self.records)
        self.records.mkdir(exist_ok=True)
        self.config.save(self.records / "training_config.json")
        return MetricsLog(self.records / "metrics.jsonl", self.sampler.start_step, earlier)

    def train(self, log: MetricsLog) -> None:
        """The loop over the steps.

        Args:
            log: the main process's.
        """
        config, main = self.config, self.accelerator.is_main_process
        progress = tqdm(
            range(self.sampler.start_step, config.max_train_steps),
            initial=self.sampler.start_step,
            total=config.max_train_steps,
            disable=not self.accelerator.is_local_main_process,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs no animation
            smoothing=0.05,
            dynamic_ncols=True,
        )
        with closing(self.dataset.batches(self.sampler)) as data:
            for step in progress:
                metrics = self.train_step(step, data)
                done = step + 1
                last = done == config.max_train_steps
                shown = {"L_G": metrics["loss_generative"], "L_D": metrics.get("loss_discriminative", 0.0)}
                progress.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
                scores = {}
                if config.evaluation_steps and (done % config.evaluation_steps == 0 or last):
                    scores = self.sampled(done, self.evaluate)
                    metrics |= scores
                    if main:
                        shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
                        progress.write(f"Step {done}: {shown}", file=sys.stderr)
                if done % config.logging_steps == 0 or last or scores:
                    self.accelerator.log(metrics, step=done)
                    if main:
                        log.write({"step": done, **metrics})
                stopped = self.accelerator.check_trigger()
                due = config.checkpointing_steps and (done % config.checkpointing_steps == 0 or last)
                if due or stopped:
                    self.save(done)
                if stopped and not last:
                    progress.close()
                    self.leave(done)
                if config.validation_steps and done % config.validation_steps == 0 and not last:
                    self.sampled(done, partial(self.validate, f"samples-{done}.png"))

    def sampled(self, step: int, action: Callable[[], T]) -> T:
        """What `action` makes of samples; where they are not finite, the training is saved first."""
        try:
            return action()
        except FloatingPointError:
            self.save(step)
            raise

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Lets the step end before a signal stops the run, on all processes if one gets it.

        A second Ctrl-C leaves at once; one within a second is the first, which a launcher has passed on.
        """

        def note(number, frame) -> None:
            if number == signal.SIGINT and self.stop_signal and time.monotonic() > self.stop_time + 1:
                raise KeyboardInterrupt
            if not self.stop_signal:
                self.stop_signal, self.stop_time = number, time.monotonic()
            self.accelerator.set_trigger()

        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has no more than two
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        # nohup lets SIGHUP be ignored, and so it stays.
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        earlier = {number: signal.signal(number, note) for number in heard}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def leave(self, step: int) -> None:
        """Says how to go on, and leaves as a signal does."""
        number = signal.Signals(self.stop_signal or signal.SIGTERM)
        self.accelerator.print(
            f"Stopped by {number.name} after step {step}, with all of it saved. "
            "Go on: the same command with --resume_from_checkpoint latest"
        )
        self.accelerator.end_training()
        sys.exit(128 + number)

    def train_step(self, step: int, data: Iterator) -> dict[str, float]:
        """One optimizer step and the updates that follow; returns the means over the global batch."""
        schedule = self.follow_schedules(step)
        draws, posterior = self.draw(step), self.draw_posterior(step)
        device, total = self.accelerator.device, 0.0
        for micro in range(self.config.gradient_accumulation_steps):
            x0, labels = next(data)
            x0 = x0.to(device, non_blocking=True)
            labels = None if labels is None else labels.to(device, non_blocking=True)
            rows = self.sampler.rows(micro)
            if posterior is not None:
                latents = self.dataset.draw(x0, posterior[rows])
                x0 = scale_latents(latents, self.dataset.manifest.vae["config"])
            with self.accelerator.accumulate(self.engine.prepared):
                with self.accelerator.autocast():
                    losses = self.engine.prepared(x0, labels, draws.rows(rows))
                self.accelerator.backward(losses["loss"])
            total = total + torch.stack([loss.detach().float() for loss in losses.values()])
        means = self.accelerator.reduce(total / self.config.gradient_accumulation_steps, "mean")
        metrics = dict(zip(losses, means.tolist(), strict=True))
        self.check_finite(step, metrics)

        self.accelerator.unscale_gradients()
        norm = self.engine.gradient_norm()
        metrics["grad_norm"] = norm.item()
        # fp16's loss scaler leaves out a step whose gradients overflow, and scales the next one less.
        skipped = self.accelerator.scaler is not None and not norm.isfinite()
        if not skipped:
            self.check_finite(step, metrics)
        self.engine.step(norm, self.config.max_grad_norm)
        if skipped:
            del metrics["grad_norm"]
        else:
            self.ema.step(self.objective.transformer.parameters())
        momentum = 1.0 if skipped else schedule.get("teacher_momentum", 0.0)
        self.objective.update_teacher(momentum, lambda tensor: self.accelerator.reduce(tensor, "mean"))
        return metrics | schedule

    def follow_schedules(self, step: int) -> dict[str, float]:
        """Sets what changes from step to step; returns it, and the teacher's momentum."""
        config = self.config
        learning_rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        schedule = {"learning_rate": learning_rate}
        if config.mask_ratio_schedule != "constant":
            schedule["mask_ratio"] = mask_ratio_at(step, config.max_train_steps, config.mask_ratio)
            self.objective.mask_ratio = schedule["mask_ratio"]
        if self.objective.teacher is None:
            return schedule
        warmup_steps = config.teacher_temperature_warmup_epochs * self.sampler.steps_per_epoch
        temperature = teacher_temperature(
            step, warmup_steps, config.teacher_temperature_start, config.teacher_temperature_end
        )
        self.objective.teacher_temperature = temperature
        momentum = teacher_momentum(
            step, config.max_train_steps, config.teacher_momentum_start, config.teacher_momentum_end
        )
        return schedule | {"teacher_momentum": momentum, "teacher_temperature": temperature}

    def draw(self, step: int) -> Draws:
        """The draws of a step's whole global batch, of which each process uses its rows."""
        device = self.accelerator.device
        generator = generator_for(self.config.seed, 1, step, device=device)
        return self.objective.draw(self.global_shape(), generator, device)

    def draw_posterior(self, step: int) -> torch.Tensor | None:
        """The noise that draws a global batch of latents from their posteriors; None for pictures."""
        if isinstance(self.dataset, ImageDataset):
            return None
        device = self.accelerator.device
        generator = generator_for(self.config.seed, 2, step, device=device)
        return torch.randn(self.global_shape(), generator=generator, device=device)

    def global_shape(self) -> tuple[int, ...]:
        """`[b, c, h, w]` of a global batch."""
        network = self.objective.transformer.config
        return (self.sampler.global_batch, network.in_channels, network.sample_size, network.sample_size)

    def check_finite(self, step: int, values: dict[str, float]) -> None:
        """Stops all processes, for all see the same reduced values, before any weight has moved."""
        wrong = [f"{name} ({value})" for name, value in values.items() if not math.isfinite(value)]
        if not wrong:
            return
        for name, parameter in self.objective.named_parameters():
            if not whole(parameter).isfinite().all():
                wrong.append(f"the weights {name}")
            elif "grad_norm" in values:
                of_loss = self.engine.gradient(parameter)
                if of_loss is not None and not of_loss.isfinite().all():
                    wrong.append(f"the gradient of {name}")
        shown = ", ".join(wrong[:12]) + (f" and {len(wrong) - 12} more" if len(wrong) > 12 else "")
        raise FloatingPointError(f"Step {step + 1}: not finite: {shown}. No weight was moved in this step.")

    def check_weights(self, step: int) -> None:
        """Makes sure that what is about to be saved can be used.

        Raises:
            FloatingPointError: a weight or an average is not finite, on all processes.
        """
        averages = [("the averages", tensor) for tensor in self.ema.shadow_params]
        tensors = [*self.objective.named_parameters(), *averages]
        wrong = dict.fromkeys(name for name, tensor in tensors if not whole(tensor).isfinite().all())
        if wrong:
            raise FloatingPointError(
                f"Step {step} has made weights that are not finite, and they are not saved: "
                f"{', '.join([*wrong][:12])}."
            )

    def averaged_pipeline(self) -> SDDiTPipeline:
        """A pipeline with a copy of the averaged weights; all processes call it."""
        trained = self.objective.transformer
        transformer = type(trained).from_config(trained.config)
        transformer.load_state_dict(whole_weights(trained, self.ema.shadow_params))
        scheduler = EDMHeunScheduler.from_config(self.objective.scheduler.config)
        pipe = SDDiTPipeline(
            transformer.to(self.accelerator.device), scheduler, vae=self.vae, id2label=self.dataset.id2label
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def validate(self, name: str) -> None:
        """Draws a grid of samples with the averaged weights, in fewer steps than the last one."""
        pipe = self.averaged_pipeline()
        path = self.output_dir / name
        on_main_process(
            lambda: self.draw_samples(pipe, path, num_inference_steps=TRIAL_STEPS), self.accelerator
        )

    def evaluate(self) -> dict[str, float]:
        """The scores of the averaged weights, on all processes."""
        pipe = self.averaged_pipeline()
        scores = self.judge(pipe, self.config.train_batch_size, num_inference_steps=TRIAL_STEPS)
        return broadcast_object_list([scores])[0]

    def draw_samples(self, pipe: SDDiTPipeline, path: Path, **arguments) -> bool:
        """Saves a grid of samples, if one is wanted and can be decoded; returns whether."""
        images = self.config.num_validation_images
        if not images or (self.vae is None and isinstance(self.dataset, LatentDataset)):
            return False
        grid = sample_grid(pipe, classes=max(1, images // 10), columns=min(images, 10), **arguments)
        with written_aside(path) as file:
            grid.save(file, format="PNG")
        return True

    def save(self, step: int) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: it cannot be written.
            FloatingPointError: the weights are of no use.
        """
        self.check_weights(step)
        scaler, (epoch, batch) = self.accelerator.scaler, divmod(step, self.sampler.steps_per_epoch)
        about = {
            "run": self.identity(),
            "data": {"epoch": epoch, "batch": batch},
            "settings": dataclasses.asdict(self.config),
        }

        state = self.engine.gather(self.ema)
        state["scaler"] = None if scaler is None else scaler.state_dict()
        on_main_process(
            lambda: save_checkpoint(self.output_dir, step, state, about, self.config.checkpoints_total_limit),
            self.accelerator,
        )

    def identity(self) -> dict:
        """What a run must have in common with the one that it goes on with."""
        config, transformer = self.config, self.objective.transformer.config
        head = ("num_prototypes", "head_hidden_dim", "head_bottleneck_dim")
        model = {name: value for name, value in transformer.items() if not name.startswith("_")}
        model |= {name: getattr(config, name) if self.objective.teacher else None for name in head}
        identity = {
            "method": config.method,
            "seed": config.seed,
            "dataset": self.dataset.identity(),
            "global batch": self.sampler.global_batch,
            "model": model,
        }
        return json.loads(json.dumps(identity))  # as it comes back from a file

    def resume(self) -> None:
        """Loads a checkpoint, and sets the step that the run begins with.

        Raises:
            ValueError: there is none, it is damaged, or of another run.
        """
        name, steps = self.config.resume_from_checkpoint, self.config.max_train_steps
        folder = on_main_process(lambda: choose_checkpoint(self.output_dir, name), self.accelerator)
        if folder is None:
            self.accelerator.print(f"There is no checkpoint in {self.output_dir} yet: the run begins.")
            return
        about = together(lambda: read_about(folder), self.accelerator)
        earlier, here = about.get("run", {}), self.identity()
        if isinstance(data := earlier.get("dataset"), dict):  # 0.1.0 knew no hash of the pictures
            here["dataset"] = {name: here["dataset"].get(name) for name in data}
        if others := differences(earlier, here):
            raise ValueError(f"{folder} is of another run; {'; '.join(others)}.")
        if about["step"] > steps:
            raise ValueError(f"max_train_steps is {steps}; {folder} is of step {about['step']} already.")
        self.compare(folder, about.get("settings", {}))
        state = together(lambda: load_state(folder, *STATE), self.accelerator)
        self.engine.scatter(state, self.ema)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.sampler.start_step = about["step"]

    def compare(self, folder: Path, saved: dict) -> None:
        """Says which settings have changed since a checkpoint was saved.

        Raises:
            ValueError: one that would change nothing now.
        """
        settings = dataclasses.asdict(self.config)
        of_a_start = ("resume_from_checkpoint", "overwrite_output_dir")
        saved = settings | saved | {name: settings[name] for name in of_a_start}
        weights = "pretrained_model_name_or_path"
        if saved[weights] != settings[weights]:
            raise ValueError(
                f"{weights} is {settings[weights]!r}; the run of {folder} began with {saved[weights]!r}."
            )
        if changed := differences(saved, settings):
            self.accelerator.print(f"Changed since {folder.name}: {'; '.join(changed)}.")

    def describe(self) -> None:
        """Says what is about to be trained."""
        count = sum(parameter.numel() for parameter in self.objective.parameters() if parameter.requires_grad)
        self.accelerator.print(
            f"{self.config.method} {self.config.preset}: {count / 1e6:.1f}M trained parameters, "
            f"{len(self.dataset)} {'pictures' if isinstance(self.dataset, ImageDataset) else 'latents'} "
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
        self.check_weights(self.config.max_train_steps)
        pipe = self.averaged_pipeline()
        on_main_process(lambda: self.save_pipeline(pipe), self.accelerator)
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def save_pipeline(self, pipe: SDDiTPipeline) -> None:
        """The main process's part of `finish`.

        Raises:
            OSError: the disk is full, or the Hub did not take the pipeline.
            FloatingPointError: the samples are not finite.
        """
        problem = None
        with folder_written_aside(self.output_dir) as folder:
            save_weights(pipe, folder)
            for name in ("training_config.json", "metrics.jsonl"):
                shutil.copyfile(self.records / name, folder / name)
            if not (metrics := read_metrics(folder / "metrics.jsonl")):  # it was lost, and no step was left
                metrics = [{"step": self.config.max_train_steps}]
                MetricsLog(folder / "metrics.jsonl", 0).write(metrics[0])
            pipe.set_progress_bar_config(disable=False, desc="samples.png", leave=False)
            try:
                sampled = self.draw_samples(pipe, folder / "samples.png")
            except FloatingPointError as error:
                sampled, problem = False, error
            draw_curves(metrics, folder / "curves.png")
            write_card(folder, self.repo or str(self.output_dir), pipe, self.config, self.dataset)
            gone = [name for name in ("samples.png", "vae") if not (folder / name).exists()]
        for name in gone:  # an earlier model's
            remove(self.output_dir / name)
        if self.records != self.output_dir:
            remove(self.records)
        if problem:
            raise FloatingPointError(f"The pipeline is in {self.output_dir}, without samples.png: {problem}")
        self.tell(sampled)
        if self.repo:
            print(f"Uploaded: {upload(self.output_dir, self.repo)}")

    def tell(self, sampled: bool) -> None:
        """Says what there is, and how it is used."""
        label = self.dataset.num_classes - 3 if self.dataset.num_classes > 2 else None
        print(
            f"Done: the pipeline, metrics.jsonl, curves.png{', samples.png' * bool(sampled)} are in "
            f"{self.output_dir}/. Use it:\n\n"
            "    from sddit_diffusers import SDDiTPipeline\n"
            f"    pipe = SDDiTPipeline.from_pretrained({python_text(str(self.output_dir))})\n"
            f'    pipe(class_labels=[{label}]).images[0].save("sample.png")'
        )

    def open_vae(self) -> AutoencoderKL | AutoencoderTiny | None:
        """The VAE that decodes the latents; None for pictures, and where none is wanted.

        Raises:
            ValueError: it cannot be loaded, or decodes other latents.
        """
        if isinstance(self.dataset, ImageDataset) or self.config.vae == "none":
            return None
        made_by = self.dataset.manifest.vae
        try:
            vae = load_vae(self.config.vae or made_by["name"])
        except ValueError as error:
            raise ValueError(
                f"{error} Name another with --vae, or train without samples: --vae none"
            ) from None
        channels = self.dataset.shape[0]
        if vae.config.latent_channels != channels:
            raise ValueError(
                f"The VAE decodes latents of {vae.config.latent_channels} channels; "
                f"those of {self.dataset.name} have {channels}."
            )
        if sha256_of_weights(vae) != made_by["sha256"]:
            warnings.warn(
                f"The VAE {self.config.vae or made_by['name']} is not the one that made the latents.",
                stacklevel=2,
            )
        return vae.to(self.accelerator.device)

    def open_judge(self) -> Judge:
        """What scores the averaged weights.

        Raises:
            ValueError: there is nothing to score against, or no decoder of the latents.
        """
        config, pixels = self.config, isinstance(self.dataset, ImageDataset)
        if not config.evaluation_reference and not pixels:
            raise ValueError("--evaluation_steps needs --evaluation_reference: images, or their statistics.")
        if self.vae is None and not pixels:
            raise ValueError("--evaluation_steps needs a VAE, which decodes the samples.")
        size = self.objective.transformer.config.sample_size * self.averaged_pipeline().vae_scale_factor
        return Judge(
            config.evaluation_reference or config.dataset_name, config.evaluation_extractor, (size, size),
            config.evaluation_samples, config.image_column, config.label_column, self.accelerator,
        )  # fmt: skip


def open_dataset(config: TrainingConfig, network: dict) -> ImageDataset | LatentDataset:
    """Latents where the name is that of a folder of latents, pictures otherwise.

    Raises:
        ValueError: there is no such dataset, or the network takes others.
    """
    channels, size = network["in_channels"], network["sample_size"]
    root = None if config.dataset_name == "digits" else find_latents(config.dataset_name)
    if root is None:
        return ImageDataset(
            config.dataset_name, config.image_column, config.label_column, channels, size,
            config.dataloader_num_workers,
        )  # fmt: skip
    dataset = LatentDataset(root)
    if dataset.shape != (channels, size, size):
        shape = " x ".join(map(str, dataset.shape))
        raise ValueError(
            f"The latents of {config.dataset_name} are {shape}; the network takes "
            f"{channels} x {size} x {size}. Choose another --preset, or change it with --transformer."
        )
    return dataset


def save_weights(pipe: SDDiTPipeline, folder: Path) -> None:
    """Saves a pipeline.

    Raises:
        OSError: the disk is full.
    """
    try:
        pipe.save_pretrained(folder)
    except SafetensorError as error:  # what safetensors makes of a disk that is full
        message = f"The pipeline cannot be written: {error}"
        raise OSError(errno.EIO, message, str(folder.parent)) from error


def open_accelerator(config: TrainingConfig) -> Accelerator:
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
def training(config: TrainingConfig) -> Iterator[Trainer]:
    """A trainer, in whose output folder no other run may write.

    Raises:
        ValueError: the settings are wrong, or another run has the folder.
        OSError: something cannot be read or written.
    """
    accelerator, folder = open_accelerator(config), Path(config.output_dir)
    with ExitStack() as held:
        on_main_process(lambda: held.enter_context(alone_in(folder)), accelerator)
        yield Trainer(config, accelerator)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """As [`locked`], with a message of the output folder's where it cannot be written."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder))
        except OSError as error:
            raise ValueError(f"The output folder {folder} cannot be written: {error.strerror}.") from None
        yield


def prepare_folder(folder: Path, config: TrainingConfig) -> None:
    """Makes sure, before anything is trained, that there is a folder and that nothing in it is lost.

    Raises:
        ValueError: it holds what an earlier run has left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints, goes_on = find_checkpoints(folder), config.resume_from_checkpoint
    if config.overwrite_output_dir:
        return
    if checkpoints and not goes_on:
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run: go on with --resume_from_checkpoint latest, "
            "choose another --output_dir, or begin anew with --overwrite_output_dir."
        )
    begins = not goes_on or (goes_on == "latest" and not checkpoints)
    if begins and (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} holds the model of an earlier run: choose another --output_dir, or replace it with "
            "--overwrite_output_dir."
        )
