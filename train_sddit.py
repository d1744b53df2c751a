"""Trains SD-DiT: `accelerate launch train_sddit.py [--preset NAME] [--dataset_name NAME] [options]`.

Without options it trains on handwritten digits and leaves a pipeline, pictures and curves in `sddit-digits/`.
Everything random in a step, and every schedule, follows from the seed and the number of the step alone.
"""

import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from sddit_diffusers import EDMHeunScheduler, SDDiTObjective, SDDiTPipeline, SDDiTTransformer2DModel
from sddit_diffusers.checkpointing import find_checkpoints, load_checkpoint, save_checkpoint
from sddit_diffusers.configuration import TrainingConfig, parse
from sddit_diffusers.data import BatchSampler, ImageDataset, UnreadableImageError, batches, generator_for
from sddit_diffusers.discrimination import teacher_momentum, teacher_temperature
from sddit_diffusers.objective import Draws
from sddit_diffusers.reporting import MetricsLog, draw_curves, read_metrics, sample_grid


class Trainer:
    """A run: what is built once, one step, and what is saved."""

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.output_dir = Path(config.output_dir)
        prepare_folder(self.output_dir, config)
        trackers = [str(tracker) for tracker in get_available_trackers()]
        if config.report_to not in ("", "all", *trackers):
            raise ValueError(
                f"report_to is {config.report_to!r}; installed are {', '.join(trackers) or 'none'}."
            )
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision or None,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=config.report_to or None,
            project_dir=self.output_dir,
            # The centers are equal on all processes; broadcasting them before each forward is for nothing.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        check_machine(self.accelerator)
        network = config.network()
        self.dataset = ImageDataset(
            config.dataset_name,
            config.image_column,
            config.label_column,
            network["in_channels"],
            network["sample_size"],
        )
        set_seed(config.seed)
        self.objective = build_objective(config, network | {"num_classes": self.dataset.num_classes})
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.objective.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            fused=True,
        )
        self.prepared, self.optimizer = self.accelerator.prepare(self.objective, optimizer)
        self.ema = EMAModel(self.objective.transformer.parameters(), decay=config.ema_decay, foreach=True)
        self.start_step = self.resume() if config.resume_from_checkpoint else 0
        self.sampler = BatchSampler(
            len(self.dataset), config.train_batch_size, config.gradient_accumulation_steps,
            self.accelerator.process_index, self.accelerator.num_processes, config.seed,
            self.start_step, config.max_train_steps,
        )  # fmt: skip

    def run(self) -> None:
        """Trains from the first step to the last, and saves the pipeline."""
        config, main = self.config, self.accelerator.is_main_process
        if main:
            config.save(self.output_dir / "training_config.json")
            log = MetricsLog(self.output_dir / "metrics.jsonl", self.start_step)
        self.accelerator.init_trackers("sddit", config=dataclasses.asdict(config))
        self.describe()
        data = iter(batches(self.dataset, self.sampler, config.dataloader_num_workers))
        progress = tqdm(
            range(self.start_step, config.max_train_steps),
            initial=self.start_step,
            total=config.max_train_steps,
            disable=not self.accelerator.is_local_main_process,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs no animation
            smoothing=0.05,
            dynamic_ncols=True,
        )
        for step in progress:
            metrics = self.train_step(step, data)
            done = step + 1
            shown = {"L_G": metrics["loss_generative"], "L_D": metrics.get("loss_discriminative", 0.0)}
            progress.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
            if done % config.logging_steps == 0 or done == config.max_train_steps:
                self.accelerator.log(metrics, step=done)
                if main:
                    log.write({"step": done, **metrics})
            if config.checkpointing_steps and done % config.checkpointing_steps == 0:
                self.save(done)
            if (
                config.validation_steps
                and done % config.validation_steps == 0
                and done < config.max_train_steps
            ):
                self.validate(f"samples-{done}.png")
        self.finish()

    def train_step(self, step: int, data: Iterator) -> dict[str, float]:
        """One optimizer step and the updates that follow; returns the means over the global batch."""
        schedule = self.follow_schedules(step)
        draws = self.draw(step)
        device, total = self.accelerator.device, 0.0
        for micro in range(self.config.gradient_accumulation_steps):
            x0, labels = next(data)
            x0, labels = x0.to(device), None if labels is None else labels.to(device)
            with self.accelerator.accumulate(self.prepared):
                losses = self.prepared(x0, labels, draws.rows(self.sampler.rows(micro)))
                self.accelerator.backward(losses["loss"])
            total = total + torch.stack([loss.detach().float() for loss in losses.values()])
        means = self.accelerator.reduce(total / self.config.gradient_accumulation_steps, "mean")
        metrics = dict(zip(losses, means.tolist(), strict=True))
        self.check_finite(step, metrics)

        self.accelerator.unscale_gradients()
        trained = [parameter for parameter in self.objective.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
        metrics["grad_norm"] = norm.item()
        # fp16's loss scaler leaves out a step whose gradients overflow, and scales the next one less.
        skipped = self.accelerator.scaler is not None and not norm.isfinite()
        if not skipped:
            self.check_finite(step, metrics)
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, self.config.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if skipped:
            del metrics["grad_norm"]
        else:
            self.ema.step(self.objective.transformer.parameters())
        momentum = 1.0 if skipped else schedule["teacher_momentum"]
        self.objective.update_teacher(momentum, lambda tensor: self.accelerator.reduce(tensor, "mean"))
        if self.objective.teacher is None:
            schedule = {"learning_rate": schedule["learning_rate"]}
        return metrics | schedule

    def follow_schedules(self, step: int) -> dict[str, float]:
        """Sets learning rate and teacher temperature to those of a step; returns them and the momentum."""
        config = self.config
        learning_rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        warmup_steps = config.teacher_temperature_warmup_epochs * self.sampler.steps_per_epoch
        temperature = teacher_temperature(
            step, warmup_steps, config.teacher_temperature_start, config.teacher_temperature_end
        )
        self.objective.teacher_temperature = temperature
        momentum = teacher_momentum(
            step, config.max_train_steps, config.teacher_momentum_start, config.teacher_momentum_end
        )
        return {
            "learning_rate": learning_rate,
            "teacher_momentum": momentum,
            "teacher_temperature": temperature,
        }

    def draw(self, step: int) -> Draws:
        """The draws of a step's whole global batch, of which each process uses its rows."""
        device, network = self.accelerator.device, self.objective.transformer.config
        shape = (self.sampler.global_batch, network.in_channels, network.sample_size, network.sample_size)
        return self.objective.draw(shape, generator_for(self.config.seed, 1, step, device=device), device)

    def check_finite(self, step: int, values: dict[str, float]) -> None:
        """Stops all processes, for all see the same reduced values, before any weight has moved."""
        wrong = [f"{name} ({value})" for name, value in values.items() if not math.isfinite(value)]
        if not wrong:
            return
        for name, parameter in self.objective.named_parameters():
            if not parameter.isfinite().all():
                wrong.append(f"the weights {name}")
            elif "grad_norm" in values and parameter.grad is not None and not parameter.grad.isfinite().all():
                wrong.append(f"the gradient of {name}")
        shown = ", ".join(wrong[:12]) + (f" and {len(wrong) - 12} more" if len(wrong) > 12 else "")
        raise FloatingPointError(f"Step {step + 1}: not finite: {shown}. No weight was moved in this step.")

    def pipeline(self) -> SDDiTPipeline:
        """A pipeline around the student's weights as they are now."""
        scheduler = EDMHeunScheduler.from_config(self.objective.scheduler.config)
        return SDDiTPipeline(self.objective.transformer, scheduler, id2label=self.dataset.id2label)

    def validate(self, name: str) -> None:
        """Draws a grid of samples with the averaged weights, in fewer steps than the last one."""
        if self.accelerator.is_main_process:
            parameters = list(self.objective.transformer.parameters())
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
            pipe = self.pipeline()
            pipe.set_progress_bar_config(disable=True)
            sample_grid(pipe, num_inference_steps=18).save(self.output_dir / name)
            self.ema.restore(parameters)
        self.accelerator.wait_for_everyone()

    def save(self, step: int) -> None:
        """Writes a checkpoint."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            save_checkpoint(self.output_dir, step, state)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Loads a checkpoint; returns the steps that it has behind it."""
        state = load_checkpoint(self.output_dir, self.config.resume_from_checkpoint)
        try:
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"The checkpoint is not of such a run as this one: {error}") from error
        self.ema.to(self.accelerator.device)
        return state["step"]

    def describe(self) -> None:
        """Says what is about to be trained."""
        count = sum(parameter.numel() for parameter in self.objective.parameters() if parameter.requires_grad)
        self.accelerator.print(
            f"SD-DiT {self.config.preset}: {count / 1e6:.1f}M trained parameters, "
            f"{len(self.dataset)} pictures of {self.dataset.num_classes} classes, "
            f"global batch {self.sampler.global_batch}, "
            f"{self.accelerator.num_processes} process(es) on {self.accelerator.device.type}, "
            f"mixed precision {self.accelerator.mixed_precision}, into {self.output_dir}/"
        )

    def finish(self) -> None:
        """Saves the pipeline with the averaged weights, and draws samples and curves."""
        if self.accelerator.is_main_process:
            self.ema.copy_to(self.objective.transformer.parameters())
            pipe = self.pipeline()
            pipe.save_pretrained(self.output_dir)
            pipe.set_progress_bar_config(desc="samples.png", leave=False)
            sample_grid(pipe).save(self.output_dir / "samples.png")
            draw_curves(read_metrics(self.output_dir / "metrics.jsonl"), self.output_dir / "curves.png")
            label = self.dataset.num_classes - 3 if self.dataset.num_classes > 2 else None
            print(
                f"Done: samples.png, curves.png, metrics.jsonl and the pipeline are in {self.output_dir}/. "
                "Use it:\n\n"
                "    from sddit_diffusers import SDDiTPipeline\n"
                f'    pipe = SDDiTPipeline.from_pretrained("{self.output_dir}")\n'
                f'    pipe(class_labels=[{label}]).images[0].save("sample.png")'
            )
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def build_objective(config: TrainingConfig, network: dict) -> SDDiTObjective:
    """The student and what trains it, with fresh weights."""
    transformer = SDDiTTransformer2DModel(**network)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return SDDiTObjective(
        transformer,
        EDMHeunScheduler(),
        mask_ratio=config.mask_ratio,
        discriminative_weight=config.discriminative_weight,
        teacher_sigma=config.teacher_noise(),
        num_prototypes=config.num_prototypes,
        head_hidden_dim=config.head_hidden_dim,
        head_bottleneck_dim=config.head_bottleneck_dim,
        student_temperature=config.student_temperature,
        center_momentum=config.center_momentum,
        label_dropout=config.label_dropout,
    )


def prepare_folder(folder: Path, config: TrainingConfig) -> None:
    """Makes sure, before anything is trained, that results can be written and no checkpoint is lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"The output folder {folder} cannot be written: {error.strerror}.") from None
    if find_checkpoints(folder) and not config.resume_from_checkpoint:
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run: go on with --resume_from_checkpoint latest, "
            "or choose another --output_dir."
        )


def check_machine(accelerator: Accelerator) -> None:
    """Makes sure that the run is as it was asked for, and uses all cores."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision is 'fp16', which needs a GPU; the CPU has 'bf16' and 'no'.")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but accelerate joins {accelerator.num_processes}."
        )
    # accelerate launch sets OMP_NUM_THREADS=1 where nobody chose a number: share the machine's cores instead.
    if accelerator.device.type == "cpu" and torch.get_num_threads() == 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def main(arguments: list[str] | None = None) -> None:
    config = parse(arguments)
    try:
        trainer = Trainer(config)
    except ValueError as error:
        sys.exit(f"train_sddit.py: error: {error}")
    try:
        trainer.run()
    except (FloatingPointError, UnreadableImageError) as error:
        sys.exit(f"train_sddit.py: error: {error}")


if __name__ == "__main__":
    main()
