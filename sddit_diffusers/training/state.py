"""What a checkpoint has of a run, and how a run goes on with it."""

import dataclasses
import json
from pathlib import Path

from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from ..cli import differences
from ..data.latents import LatentDataset
from ..data.order import BatchSampler
from ..data.pictures import ImageDataset
from ..launching import on_main_process, together
from .checkpointing import by_names_of_today, choose_checkpoint, load_state, read_about, save_checkpoint
from .configuration import RunConfig, as_lists, usual
from .engines import Engine, whole

START = "pretrained_model_name_or_path"  # the option of training's that names the weights to begin with
_PARTS = "objective", "optimizer", "ema", "scaler"


def checkpoint_of(config: RunConfig) -> Path | None:
    """The checkpoint that a run goes on with; None where it begins.

    Raises:
        ValueError: it is not there, or damaged.
    """
    name, folder = config.resume_from_checkpoint, None
    if name and (folder := choose_checkpoint(Path(config.output_dir), name)) is None:
        print(f"There is no checkpoint in {config.output_dir} yet: the run begins.")
    return folder


def without_start(config: RunConfig) -> RunConfig:
    """The configuration of a network whose weights a checkpoint has: those it began with may be gone."""
    given = {START} & {each.name for each in dataclasses.fields(config)}
    return dataclasses.replace(config, **dict.fromkeys(given, ""))


class RunState:
    """Weights, optimizer, averages and place of a run; all processes call its methods.

    Args:
        ema: averages of the network's weights.
        sampler: gives the steps that are left.
    """

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, engine: Engine, ema: EMAModel,
        dataset: ImageDataset | LatentDataset, sampler: BatchSampler,
    ):  # fmt: skip
        self.config, self.accelerator, self.output_dir = config, accelerator, Path(config.output_dir)
        self.engine, self.ema, self.objective = engine, ema, engine.model
        self.dataset, self.sampler = dataset, sampler

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
        identity = self.config.identity() | {
            "auxiliaries": [*self.objective.auxiliaries],
            "seed": self.config.seed,
            "dataset": self.dataset.identity(),
            "global batch": self.sampler.global_batch,
            "model": self.objective.identity(),
        }
        return json.loads(json.dumps(identity))  # as it comes back from a file

    def resume(self, folder: Path) -> None:
        """Loads a checkpoint, and sets the step that the run begins with.

        Raises:
            ValueError: it is damaged, or of another run.
        """
        steps = self.config.max_train_steps
        about = together(lambda: read_about(folder), self.accelerator)
        here = self.identity()
        # 0.1.0 had one process, and its auxiliary loss is known by its sizes; sigma_data was no option.
        earlier = {"process": "edm", "auxiliaries": here["auxiliaries"]} | about.get("run", {})
        if "sigma_data" in here:
            earlier.setdefault("sigma_data", 0.5)
        if isinstance(data := earlier.get("dataset"), dict):  # 0.1.0 knew no hash of the pictures
            here["dataset"] = {name: here["dataset"].get(name) for name in data}
        if others := differences(earlier, here):
            raise ValueError(f"{folder} is of another run; {'; '.join(others)}.")
        if about["step"] > steps:
            raise ValueError(f"max_train_steps is {steps}; {folder} is of step {about['step']} already.")
        self.compare(folder, about.get("settings", {}))
        state = together(lambda: load_state(folder, *_PARTS), self.accelerator)
        if "discrimination" in self.objective.auxiliaries:
            state = by_names_of_today(state)
        self.engine.scatter(state, self.ema)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.sampler.start_step = about["step"]
        self.accelerator.print(f"The run goes on after step {about['step']}, from {folder}.")

    def compare(self, folder: Path, saved: dict) -> None:
        """Says which settings have changed since a checkpoint was saved.

        Raises:
            ValueError: one that would change nothing now.
        """
        settings = dataclasses.asdict(self.config)
        of_a_start = ("resume_from_checkpoint", "overwrite_output_dir")
        saved = (
            settings | usual(self.config) | as_lists(saved) | {name: settings[name] for name in of_a_start}
        )
        for name in {START} & settings.keys():
            if saved[name] != settings[name]:
                raise ValueError(
                    f"{name} is {settings[name]!r}; the run of {folder} began with {saved[name]!r}."
                )
        if changed := differences(saved, settings):
            self.accelerator.print(f"Changed since {folder.name}: {'; '.join(changed)}.")
