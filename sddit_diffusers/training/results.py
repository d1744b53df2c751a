"""What the averaged weights of a run give: samples, scores, and the pipeline that is left."""

import errno
import json
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from textwrap import indent

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import SafetensorError

from ..data.latents import LatentDataset
from ..data.pictures import ImageDataset
from ..evaluation.judge import Judge
from ..files import folder_written_aside, remove, written_aside
from ..launching import bar, on_main_process
from ..pipelines.loading import load_vae, sha256_of_weights
from ..pipelines.pipeline_sddit import SDDiTPipeline
from ..pipelines.sampling import sample_grid
from .configuration import RunConfig, is_place, place_told
from .engines import whole_weights
from .foreign import ForeignNetwork
from .metrics import MetricsLog, draw_curves, picture_of_curves, read_metrics
from .objective import Objective
from .output import Records
from .publishing import example_call, python_text, upload, write_card
from .trackers import log_images, takers

# Under which configurations tell where they were loaded from.
_ORIGINS = ("_name_or_path", "name_or_path")


class Results:
    """Samples, scores and the pipeline of a run; all processes call its methods.

    Args:
        ema: averages of the network's weights.
        vae: decodes the samples; None for pictures, and where none is wanted.

    Raises:
        ValueError: there is nothing to score against, or no decoder of the latents.
    """

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, objective: Objective, ema: EMAModel,
        dataset: ImageDataset | LatentDataset, vae: AutoencoderKL | AutoencoderTiny | None,
    ):  # fmt: skip
        self.config, self.accelerator, self.objective, self.ema = config, accelerator, objective, ema
        self.dataset, self.vae = dataset, vae
        self.judge = self._open_judge() if config.evaluation_steps else None

    def _open_judge(self) -> Judge:
        """What scores the averaged weights."""
        config, pixels, processes = self.config, self.dataset.vae is None, self.accelerator.num_processes
        if config.evaluation_samples < processes:
            raise ValueError(
                f"evaluation_samples is {config.evaluation_samples}; it must be at least {processes}, one a "
                "process."
            )
        if not config.evaluation_reference and not pixels:
            raise ValueError("--evaluation_steps needs --evaluation_reference: images, or their statistics.")
        if self.vae is None and not pixels:
            raise ValueError("--evaluation_steps needs a VAE, which decodes the samples.")
        size = self.objective.transformer.config.sample_size * self.averaged_pipeline().vae_scale_factor
        return Judge(
            config.evaluation_reference or config.dataset_name, config.evaluation_extractor, (size, size),
            config.evaluation_samples, config.image_column, config.label_column, self.accelerator,
        )  # fmt: skip

    def averaged_pipeline(self) -> SDDiTPipeline:
        """A pipeline with a copy of the averaged weights; all processes call it."""
        weights = whole_weights(self.objective.transformer, self.ema.shadow_params)
        pipe = self.objective.pipeline(weights, self.vae, self.dataset.id2label)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.accelerator.device)

    def validate(self, step: int, records: Records) -> None:
        """Draws a grid of samples with the averaged weights, in fewer steps than the last one.

        Args:
            records: of the run, whose curves go to its trackers with the samples.
        """
        pipe = self.averaged_pipeline()
        path = records.output_dir / f"samples-{step}.png"

        def draw() -> None:
            sampled = self.draw_samples(pipe, path, num_inference_steps=self.config.trial_steps)
            metrics = read_metrics(records.folder / "metrics.jsonl") if takers(self.accelerator) else []
            if metrics:
                self.show(step, picture_of_curves(metrics), path if sampled else None)

        on_main_process(draw, self.accelerator)

    def show(self, step: int, curves: Image.Image, samples: Path | None) -> None:
        """Gives the run's trackers its curves, and its samples if there are any."""
        pictures = {"curves": curves}
        if samples is not None:
            with Image.open(samples) as grid:
                pictures["samples"] = grid.convert("RGB")
        log_images(self.accelerator, pictures, step)

    def evaluate(self) -> dict[str, float]:
        """The scores of the averaged weights, on all processes."""
        pipe = self.averaged_pipeline()
        scores = self.judge(pipe, self.config.train_batch_size, num_inference_steps=self.config.trial_steps)
        return broadcast_object_list([scores])[0]

    def score_start(self, log: MetricsLog | None) -> None:
        """Scores what the run begins with, where its own scores are held against that.

        Args:
            log: the main process's.
        """
        if not self.config.scores_start or self.judge is None:
            return
        scores = self.evaluate()
        self.accelerator.log(scores, step=0)
        if self.accelerator.is_main_process:
            log.write({"step": 0, **scores, "judges": self.judge.identities})
            print(told(0, scores), file=sys.stderr, flush=True)

    def draw_samples(self, pipe: SDDiTPipeline, path: Path, **arguments) -> bool:
        """Saves a grid of samples, if one is wanted and can be decoded; returns whether."""
        images = self.config.num_validation_images
        if not images or (self.vae is None and self.dataset.vae is not None):
            return False
        grid = sample_grid(pipe, classes=max(1, images // 10), columns=min(images, 10), **arguments)
        with written_aside(path) as file:
            grid.save(file, format="PNG")
        return True

    def save(self, pipe: SDDiTPipeline, records: Records, repo: str | None) -> None:
        """Saves what the run leaves, all or nothing; of the main process.

        Args:
            pipe: with the averaged weights.
            records: settings and metrics of the run.
            repo: where it is uploaded, if it is.

        Raises:
            OSError: the disk is full, or the Hub did not take the pipeline.
            FloatingPointError: the samples are not finite.
        """
        problem, output_dir = None, records.output_dir
        with folder_written_aside(output_dir) as folder:
            save_weights(pipe, folder)
            for name in ("training_config.json", "metrics.jsonl"):
                shutil.copyfile(records.folder / name, folder / name)
            if not (metrics := read_metrics(folder / "metrics.jsonl")):  # it was lost, and no step was left
                metrics = [{"step": self.config.max_train_steps}]
                MetricsLog(folder / "metrics.jsonl", 0).write(metrics[0])
            pipe.progress_bar = partial(bar, desc="samples.png", unit="step", leave=False)
            try:
                sampled = self.draw_samples(pipe, folder / "samples.png")
            except FloatingPointError as error:
                sampled, problem = False, error
            draw_curves(metrics, folder / "curves.png")
            name = repo or (place_told(str(output_dir))[2:] if output_dir.is_absolute() else str(output_dir))
            write_card(folder, name, pipe, self.config, self.dataset)
            gone = [name for name in ("samples.png", "vae") if not (folder / name).exists()]
        for name in gone:  # an earlier model's
            remove(output_dir / name)
        records.clear()
        if problem:
            raise FloatingPointError(f"The pipeline is in {output_dir}, without samples.png: {problem}")
        self.tell(pipe, output_dir, sampled)
        if takers(self.accelerator):
            with Image.open(output_dir / "curves.png") as curves:
                samples = output_dir / "samples.png" if sampled else None
                self.show(self.config.max_train_steps, curves, samples)
        if repo:
            print(f"Uploaded: {upload(output_dir, repo)}")

    def tell(self, pipe: SDDiTPipeline, output_dir: Path, sampled: bool) -> None:
        """Says what there is, and how it is used: as the model card does."""
        guided = self.config.card()["guided"]
        if isinstance(pipe.transformer, ForeignNetwork):
            snippet = pipe.transformer.snippet(str(output_dir), self.config.trial_steps, 0, guided)
        else:
            snippet = (
                "from sddit_diffusers import SDDiTPipeline\n"
                f"pipe = SDDiTPipeline.from_pretrained({python_text(str(output_dir))})\n"
                f"{example_call(pipe, guided)}"
            )
        print(
            f"Done: the pipeline, metrics.jsonl, curves.png{', samples.png' * bool(sampled)} are in "
            f"{output_dir}/. Use it:\n\n{indent(snippet, ' ' * 4)}"
        )


def told(step: int, scores: dict[str, float]) -> str:
    """Scores, for people."""
    return f"Step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def save_weights(pipe: SDDiTPipeline, folder: Path) -> None:
    """Saves a pipeline, that of another's network as what it was, without the paths that it is from.

    Raises:
        OSError: the disk is full.
    """
    try:
        if isinstance(pipe.transformer, ForeignNetwork):
            pipe.transformer.save_pipeline(folder, pipe.scheduler)
        else:
            pipe.save_pretrained(folder)
        for path in folder.rglob("*.json"):
            forget_origin(path)
    except SafetensorError as error:  # what safetensors makes of a disk that is full
        message = f"The pipeline cannot be written: {error}"
        raise OSError(errno.EIO, message, str(folder.parent)) from error


def forget_origin(path: Path) -> None:
    """Removes from a configuration of diffusers or transformers the absolute path that it was loaded from."""
    if b"name_or_path" not in (content := path.read_bytes()):
        return
    settings = json.loads(content)
    if not isinstance(settings, dict):
        return
    kept = {name: value for name, value in settings.items() if name not in _ORIGINS or not is_place(value)}
    if kept != settings:
        with written_aside(path, "w") as file:
            file.write(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def open_vae(
    config: RunConfig, dataset: ImageDataset | LatentDataset, device: torch.device
) -> AutoencoderKL | AutoencoderTiny | None:
    """The VAE that decodes the latents; None for pictures, and where none is wanted.

    Raises:
        ValueError: it cannot be loaded, or decodes other latents.
    """
    made_by = dataset.vae
    if made_by is None or config.vae == "none":
        return None
    try:
        vae = load_vae(config.vae or made_by["name"])
    except ValueError as error:
        raise ValueError(f"{error} Name another with --vae, or train without samples: --vae none") from None
    channels = dataset.shape[0]
    if vae.config.latent_channels != channels:
        raise ValueError(
            f"The VAE decodes latents of {vae.config.latent_channels} channels; "
            f"those of {dataset.name} have {channels}."
        )
    if sha256_of_weights(vae) != made_by["sha256"]:
        warnings.warn(
            f"The VAE {config.vae or made_by['name']} is not the one that made the latents.",
            stacklevel=2,
        )
    return vae.to(device)
