"""Generates images, one a seed, to be looked at or scored.

    sddit generate --model digits --num_samples 100 --format png --output_dir samples
    accelerate launch -m sddit generate --model sddit-SD-DiT-XL-2 --output_dir samples

Image i has a seed of its own, `seed` + i, from which its noise and, where labels are random, its class
follow, as in EDM. So the images do not depend on the batch size or the number of processes, and the image of
a seed is `pipe(label, generator=torch.Generator().manual_seed(seed))`. On a CPU that is so to the byte, for
widths that are multiples of 16, as all presets'; on a GPU other kernels may round a few values to the next
byte. With `--solver dopri5` the images of a batch share their steps, so that the batch size decides too.
Every batch is kept as it is done; a run that was stopped goes on with those that are missing, and ends with
the files of one that was not.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from PIL import Image

from .cli import Parser, check_options, differences, json_object, one_line_errors, option, options, shortened
from .data.generated import ARRAYS, BATCHES, RECORD, Batches
from .files import LOCK, locked, read_json, remove, sha256_of, written_aside
from .launching import check_machine, on_main_process, progress_bar
from .pipelines.loading import DTYPES, load_pipeline, scheduler_of, settings_of, sha256_of_weights
from .pipelines.ode import ATOL, RTOL, Dopri5Sampler
from .pipelines.pipeline_sddit import SDDiTPipeline, check_range, default_steps
from .pipelines.sampling import UINT8_RULE, class_of, image_size, sample

_MOST_SEED = 2**63 - 1
_STEPS = "num_inference_steps"
_CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
_SOLVER = ("solver", "rtol", "atol", "batch_size")


@dataclass
class GenerateConfig:
    """The settings of a generation."""

    model: str = option("", "the pipeline: a folder or a name on the Hub; required", group="what is made")
    num_samples: int = option(50_000, "how many images", low=1)
    class_labels: list[str] = options(
        ["random"],
        "'random', 'balanced' (equally many of each class, shuffled), 'none' (unconditional), "
        "or numbers or names of classes, which are taken in turn",
        metavar="CLASS",
    )
    seed: int = option(0, "of the first image; the next ones have the next seeds", low=0, high=_MOST_SEED)
    num_inference_steps: int | None = option(
        None,
        "steps N, the pipeline's own if not given; Heun's sampler evaluates the network 2 N - 1 times",
        low=1,
        high=10_000,
        group="sampling",
    )
    guidance_scale: float = option(1.0, "of classifier-free guidance; 1 is off")
    guidance_interval: list[float] = options(
        [0.0, math.inf], "the lowest and highest noise level that are guided", metavar="SIGMA", low=0,
        infinite=True,
    )  # fmt: skip
    s_churn: float = option(0.0, "how much noise EDM's stochastic sampler adds; 0 is off", low=0)
    s_tmin: float = option(0.0, "the lowest sigma at which it adds noise", metavar="SIGMA", low=0)
    s_tmax: float = option(math.inf, "the highest", metavar="SIGMA", low=0, infinite=True)
    s_noise: float = option(1.0, "what the added noise is multiplied by", low=0)
    scheduler: str = option(
        "", "a scheduler of diffusers in place of the pipeline's: one of EDM or, for a flow, of flows",
        metavar="CLASS",
    )  # fmt: skip
    scheduler_options: str = option(
        "{}", "the scheduler's settings that differ from the pipeline's", metavar="JSON"
    )
    solver: str = option(
        "", "solves the ODE in steps of its own choice, in place of the scheduler", choices=("", "dopri5")
    )
    rtol: float = option(RTOL, "the solver's relative tolerance", low=1e-12, high=1)
    atol: float = option(ATOL, "its absolute tolerance", low=1e-12, high=1)
    output_dir: str = option("", "where the images go; required", metavar="FOLDER", group="output")
    format: list[str] = options(
        ["npz"], "'npz' (samples.npz, as ADM's), 'png' (images/), or both", choices=("npz", "png")
    )
    batch_size: int = option(64, "images that are made at once in a process", group="speed", low=1)
    dtype: str = option("float32", "precision of the transformer", choices=tuple(DTYPES))

    def __post_init__(self):
        check_options(self)
        for name in ("model", "output_dir", "class_labels", "format"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing.")
        if self.seed > _MOST_SEED - self.num_samples + 1:
            raise ValueError(f"seed is {self.seed}; that of the last image must be at most {_MOST_SEED}.")
        check_range("guidance_interval", self.guidance_interval)
        if self.s_tmin > self.s_tmax:
            raise ValueError(f"s_tmin is {self.s_tmin}; it must be at most s_tmax, {self.s_tmax}.")
        for name in () if self.solver else ("rtol", "atol"):
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise ValueError(
                    f"{name} is {value}; it is a tolerance of --solver dopri5, which is not chosen."
                )
        for name in (_STEPS, "s_churn", "scheduler", "scheduler_options") if self.solver else ():
            if (value := getattr(self, name)) != getattr(type(self), name):  # the default
                raise ValueError(
                    f"{name} is {shortened(value)}; {self.solver} takes no {name}, for it chooses its steps "
                    "itself, on the ODE of the pipeline's own scheduler."
                )

    @property
    def churn(self) -> dict[str, float]:
        """The arguments of the stochastic sampler; none where it is off."""
        return {name: getattr(self, name) for name in (_CHURN if self.s_churn else ())}

    def decisive(self) -> dict:
        """The settings that decide the images, except for the model's weights; of churn and of a solver, if
        there is any.
        """
        others = ("model", "output_dir", *_CHURN, *(() if self.solver else _SOLVER))
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name not in others}
        settings |= {name: str(value) for name, value in self.churn.items()}  # JSON has no inf
        settings["guidance_interval"] = [str(sigma) for sigma in self.guidance_interval]
        return settings | {"format": sorted(self.format)}


class Generation:
    """A run: make the batches that are missing, write what was asked for, say what made it."""

    def __init__(self, config: GenerateConfig):
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.batches_dir = self.output_dir / BATCHES
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
        check_machine(self.accelerator)
        self.pipe = pipe = self._load()
        self.sampling = {
            "guidance_scale": config.guidance_scale,
            "guidance_interval": tuple(config.guidance_interval),
        }
        if config.solver:
            self.sampler, self.num_inference_steps = Dopri5Sampler(pipe, config.rtol, config.atol), None
        else:
            self.sampler = pipe
            self.num_inference_steps = config.num_inference_steps or default_steps(pipe.scheduler)
            self.sampling |= {_STEPS: self.num_inference_steps} | config.churn
        labels = config.class_labels
        self.labels = [class_of(pipe, labels, config.seed, i) for i in range(config.num_samples)]
        side, vae = image_size(pipe), pipe.vae
        channels = pipe.transformer.config.in_channels if vae is None else vae.config.out_channels
        self.batches = Batches(self.batches_dir, config.num_samples, (side, side, channels))
        self.settings = json.loads(json.dumps(self._settings()))  # as they come back from a file

    def _load(self) -> SDDiTPipeline:
        config, pipe = self.config, load_pipeline(self.config.model, DTYPES[self.config.dtype])
        changes = json_object("scheduler_options", config.scheduler_options)
        pipe.scheduler = scheduler_of(pipe.scheduler, config.scheduler, changes, config.num_inference_steps)
        pipe.to(self.accelerator.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _settings(self) -> dict:
        """What decides the images; the number of steps once, as it is used."""
        pipe = self.pipe
        scheduler = {name: value for name, value in settings_of(pipe.scheduler).items() if name != _STEPS}
        return self.config.decisive() | {
            _STEPS: self.num_inference_steps,
            "transformer_sha256": sha256_of_weights(pipe.transformer),
            "vae_sha256": None if pipe.vae is None else sha256_of_weights(pipe.vae),
            "scheduler_config": {"class": type(pipe.scheduler).__name__} | scheduler,
        }

    def _begin(self, held: ExitStack) -> bool:
        """Begins a generation or finds one of the same settings; says whether it is complete.

        Args:
            held: gets the folder's lock.

        Raises:
            ValueError: the folder holds something else, is in use, or cannot be written.
        """
        try:
            held.enter_context(locked(self.output_dir))
            record, path = self.output_dir / RECORD, self.batches_dir / "settings.json"
            for file in (record, path):
                if file.exists():
                    self._compare(file)
                    if file == path:
                        self.batches.remove_damaged()
                    return file == record
            if any(entry.name not in (LOCK, BATCHES) for entry in self.output_dir.iterdir()):
                raise ValueError(
                    f"{self.output_dir} holds other files; choose an empty or a new --output_dir."
                )
            remove(self.batches_dir)  # nobody knows what it would be of
            self.batches_dir.mkdir()
            with written_aside(path, "w") as file:
                file.write(json.dumps({"settings": self.settings}, indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"{self.output_dir} cannot be written: {error.strerror}.") from None
        return False

    def _compare(self, file: Path) -> None:
        """Makes sure that what is there was made with the same settings."""
        earlier = read_json(file, {"settings": dict}, "record of a generation")["settings"]
        if changed := differences(earlier, self.settings):
            raise ValueError(
                f"{self.output_dir} holds other images ({'; '.join(changed)}); choose another --output_dir."
            )

    def run(self) -> None:
        """Does what is missing.

        Raises:
            ValueError: the folder holds something else, or another run writes in it.
            FloatingPointError: an image is not finite; what was made before it stays.
            OSError: the disk is full.
        """
        with ExitStack() as held:
            if not on_main_process(lambda: self._begin(held), self.accelerator):
                self.make()
                if "png" in self.config.format:
                    self._write_pictures()
                on_main_process(self._finish, self.accelerator)
            if self.accelerator.is_main_process:
                shutil.rmtree(self.batches_dir, ignore_errors=True)
        what = {"npz": ARRAYS, "png": "images/"}
        self.accelerator.print(
            f"{self.config.num_samples} images are in {self.output_dir}/ "
            f"({', '.join(what[name] for name in self.config.format)}); {RECORD} says what made them. "
            f"Score them: sddit evaluate {self.output_dir} REFERENCE"
        )
        self.accelerator.end_training()

    def make(self) -> None:
        """Makes this process's part of the images that are missing."""
        config, rank, processes = self.config, self.accelerator.process_index, self.accelerator.num_processes
        missing = list(self.batches.missing(config.batch_size))
        self.accelerator.wait_for_everyone()  # all have looked before one writes
        mine = missing[rank::processes]
        total = -(-config.num_samples // processes)
        done = total - sum(map(len, mine))
        with progress_bar(
            self.accelerator, "generating", unit="image", total=total, initial=max(0, done)
        ) as progress:
            for batch in mine:
                seeds, labels = [config.seed + i for i in batch], [self.labels[i] for i in batch]
                images = sample(self.sampler, seeds, labels, **self.sampling)
                if config.solver:
                    with written_aside(self.batches_dir / f"{batch.start}.evaluations", "w") as file:
                        file.write(str(self.sampler.evaluations))
                self.batches.save(batch, images)
                progress.update(len(batch))
        self.accelerator.wait_for_everyone()

    def _write_pictures(self) -> None:
        """This process's part of the PNG files, a folder each thousand, under a name for unfinished ones."""
        aside = self.batches_dir / "images"
        mine = self.batches.files()[self.accelerator.process_index :: self.accelerator.num_processes]
        with (
            ThreadPoolExecutor() as threads,
            progress_bar(self.accelerator, "writing images/", unit="batch", total=len(mine)) as progress,
        ):
            for numbers, path in mine:
                for folder in {f"{i // 1000:05d}" for i in numbers}:
                    (aside / folder).mkdir(parents=True, exist_ok=True)
                files = [aside / f"{i // 1000:05d}" / f"{i:08d}.png" for i in numbers]
                list(threads.map(_save_picture, np.load(path), files))
                progress.update()
        self.accelerator.wait_for_everyone()

    def _finish(self) -> None:
        """The main process's part of the end: the .npz, the folder of pictures, the record."""
        files = {}
        if "npz" in self.config.format:
            path = self.output_dir / ARRAYS
            self.batches.write_npz(path, self.labels)
            with path.open("rb") as file:
                files[path.name] = sha256_of(file)
        if "png" in self.config.format:
            aside, folder = self.batches_dir / "images", self.output_dir / "images"
            rows = [
                {"file_name": f"{i // 1000:05d}/{i:08d}.png", "label": label}
                for i, label in enumerate(self.labels)
            ]
            (aside / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed right here
            aside.rename(folder)
        record = {
            "model": self.config.model,
            "settings": self.settings,
            "seeds": [self.config.seed, self.config.seed + self.config.num_samples - 1],
            "uint8": UINT8_RULE,
            "files_sha256": files,
            **self._evaluations(),
            "made_with": {
                "device": self._device_name(),
                "processes": self.accelerator.num_processes,
                "batch_size": self.config.batch_size,
                **{name: version(name) for name in ("sddit-diffusers", "torch", "diffusers")},
            },
        }
        with written_aside(self.output_dir / RECORD, "w") as file:
            file.write(json.dumps(record, indent=1) + "\n")

    def _evaluations(self) -> dict[str, float]:
        """The mean number of evaluations of a batch, where the solver chose it."""
        found = [int(path.read_text()) for path in self.batches_dir.glob("*.evaluations")]
        return {"evaluations": sum(found) / len(found)} if found else {}

    def _device_name(self) -> str:
        device = self.accelerator.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _save_picture(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(GenerateConfig, prog="generate", doc=__doc__)
    with one_line_errors("generate", "What is done so far stays; the same command goes on with it."):
        try:
            config = GenerateConfig(**parser.parse_known_options(arguments))
        except ValueError as error:
            parser.error(str(error))
        Generation(config).run()


if __name__ == "__main__":
    main()
