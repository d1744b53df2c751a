"""What the runs of every stage have in common: their options, and what is asked of a configuration."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_origin

from ..cli import option, options, shortened, unknown_option
from ..evaluation.catalogue import EXTRACTORS
from ..files import read_json, written_aside

BELOW_1 = 1 - 2**-53  # the largest number
CHECKPOINTING = ("none", "selective", "full")
FACTS = ("parent_sha256", "names_only")  # in a training_config.json, and no options
# The factor of the learning rate, of the share of the steps after the warm-up that is done.
LR_SCHEDULERS = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}
TRIAL_STEPS = 18  # of the sampler, while a run is not at its end


@dataclass
class DataOptions:
    """What is trained on."""

    _argument_group_name = "data"

    dataset_name: str = option(
        "", "'digits', or a folder, a URL or a dataset on the Hub, of pictures with labels or of latents"
    )
    image_column: str = option("", "column of the images, if they are no latents; '' finds the only one")
    label_column: str = option("label", "column of their labels; '' trains without classes")
    vae: str = option("", "decodes latents; that which made them if not given, 'none' trains without samples")
    max_train_samples: int = option(
        0, "train on so many of them, always the same; 0: all, as scores and REPA's classifier see", low=0
    )
    dataloader_num_workers: int = option(0, "processes that read pictures ahead", low=0, high=1024)


@dataclass
class OptimizerOptions:
    """How its weights are moved."""

    _argument_group_name = "optimizer"

    seed: int = option(0, "seed of weights, data order and noise", low=0, high=2**32 - 1)
    max_train_steps: int = option(400_000, "optimizer steps", low=1)
    train_batch_size: int = option(256, "images of a process's micro-batch; the paper has 256 in all", low=1)
    gradient_accumulation_steps: int = option(1, "micro-batches of an optimizer step", low=1)
    learning_rate: float = option(1e-4, "of AdamW", low=0)
    lr_scheduler: str = option(
        "constant", "the learning rate after the warm-up; 'linear' and 'cosine' fall to 0 at the last step",
        choices=LR_SCHEDULERS.keys(),
    )  # fmt: skip
    lr_warmup_steps: int = option(0, "steps of linear warm-up to the learning rate", low=0)
    adam_beta1: float = option(0.9, "of AdamW", low=0, high=BELOW_1)
    adam_beta2: float = option(0.999, "of AdamW", low=0, high=BELOW_1)
    adam_weight_decay: float = option(0.0, "of AdamW", low=0)
    max_grad_norm: float = option(0.0, "gradients are scaled down to this norm; 0: never", low=0)
    ema_decay: float = option(0.9999, "of the averaged weights, which sample", low=0, high=1)
    mixed_precision: str = option(
        "", "as accelerate is configured if not given", choices=("", "no", "bf16", "fp16")
    )
    gradient_checkpointing: str = option(
        "none",
        "less memory: backward computes again what is cheap ('selective') or all of a block ('full')",
        choices=CHECKPOINTING,
    )
    compile: bool = option(False, "compile the blocks with torch.compile")
    allow_tf32: bool = option(True, "let GPUs round the factors of float32 products to TF32, as DiT does")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, which counts from 0; its fall is that of diffusers' schedulers."""
        warmup = max(1, self.lr_warmup_steps)
        if step < warmup:
            return self.learning_rate * ((step + 1) / warmup)
        done = (step - warmup) / max(1, self.max_train_steps - warmup)
        return self.learning_rate * LR_SCHEDULERS[self.lr_scheduler](done)


@dataclass
class EvaluationOptions:
    """What is looked at on the way."""

    _argument_group_name = "evaluation"

    evaluation_steps: int = option(0, "score the averaged weights every so many steps; 0: never", low=0)
    evaluation_samples: int = option(
        10_000,
        f"images that are made for it, in {TRIAL_STEPS} steps of the sampler, of a distillation in its own",
        low=2,
    )
    evaluation_reference: str = option(
        "", "a REFERENCE of `sddit evaluate`; all pictures of the dataset if not given"
    )
    evaluation_extractor: list[str] = options(
        ["inception"], "whose features are compared, one or several; all but 'inception' need no download",
        choices=tuple(EXTRACTORS),
    )  # fmt: skip
    validation_steps: int = option(0, "sample a grid every so many steps; 0: at the end only", low=0)
    num_validation_images: int = option(100, "images of a grid, in rows of ten", low=0, high=10_000)

    def check(self) -> None:
        """Raises a ValueError for no extractor, or one that is named twice."""
        names = self.evaluation_extractor
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"evaluation_extractor is {names}; it must be some of {', '.join(EXTRACTORS)}, each once."
            )


@dataclass
class OutputOptions:
    """What is left, and where."""

    _argument_group_name = "output"

    output_dir: str = option(
        "", "where the pipeline goes; named after what is trained if not given", metavar="FOLDER"
    )
    overwrite_output_dir: bool = option(
        False, "begin anew where a model or checkpoints are; it is replaced once the new one is complete"
    )
    checkpointing_steps: int = option(0, "save a checkpoint every so many steps; 0: none", low=0)
    checkpoints_total_limit: int = option(0, "checkpoints that are kept, the newest ones; 0: all", low=0)
    resume_from_checkpoint: str = option(
        "", "a checkpoint's folder, or 'latest', which begins where there is none", metavar="FOLDER"
    )
    logging_steps: int = option(1, "write the metrics every so many steps", low=1)
    report_to: str = option("", "'tensorboard', 'wandb' or 'all', beside metrics.jsonl")
    dry_run: bool = option(False, "tell the memory that a step takes, and train nothing")

    def check(self) -> None:
        """Raises a ValueError for a run that would both begin anew and go on."""
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError(
                "overwrite_output_dir begins anew, and resume_from_checkpoint goes on: choose one."
            )


@dataclass
class HubOptions:
    """Where the result is shared."""

    _argument_group_name = "Hub"

    push_to_hub: bool = option(False, "upload the pipeline with its card at the end, never a checkpoint")
    hub_model_id: str = option("", "where to, USER/NAME or NAME; the output folder's name if not given")


class RunConfig:
    """What a stage's configuration tells a run, beside the options below; a mixin of dataclasses of them."""

    @property
    def title(self) -> str:
        """What is trained, for people."""
        raise NotImplementedError

    @property
    def trial_steps(self) -> int:
        """Steps of the sampler, while a run is not at its end."""
        return TRIAL_STEPS

    @property
    def scores_start(self) -> bool:
        """Whether what the run begins with is scored too."""
        return False

    @property
    def looks_at_pictures(self) -> bool:
        """Whether batches must have the pictures that latents are of."""
        return False

    def network(self) -> dict:
        """The arguments of the network, but for num_classes, which is the dataset's."""
        raise NotImplementedError

    def identity(self) -> dict:
        """What a resumed run must have in common with the one that it goes on with, of these settings."""
        raise NotImplementedError

    def own(self) -> list[str]:
        """Names of the settings that a model card tells, beside the optimizer's."""
        raise NotImplementedError

    def card(self) -> dict:
        """What a model card tells of the stage.

        Returns:
            The `method`, `tags`, the `program`, its own `rows` of the table of settings, whether it is
            `guided` when it samples, a sentence on how it was `distilled`, if it was, whether L_D was a part
            of the loss (`discriminates`), and the weights that its training began with (`start`), if any.
        """
        raise NotImplementedError

    def facts(self) -> dict:
        """What a run is of, beside its settings: of `FACTS`."""
        return {}

    def save(self, path: Path) -> None:
        """Writes the resolved settings, as others may read them, as a file that `--config` reads."""
        settings = dataclasses.asdict(self) | {"overwrite_output_dir": False}  # once, as is the next
        if self.resume_from_checkpoint != "latest":
            settings["resume_from_checkpoint"] = ""
        with written_aside(path, "w") as file:
            file.write(json.dumps(without_places(settings) | self.facts(), indent=2) + "\n")


def is_place(value) -> bool:
    """Whether a setting is an absolute path, which is of this machine."""
    return isinstance(value, str) and (Path(value).is_absolute() or value.startswith("file://"))


def place_told(path: str) -> str:
    """An absolute path as others may read it: from the working folder, or its name where it is elsewhere.

    It begins with "./", so that it is no name of a dataset.
    """
    path, here = Path(path.removeprefix("file://")), Path.cwd()
    below = here != Path(here.anchor) and path.is_relative_to(here)
    return f"./{(path.relative_to(here) if below else Path(path.name)).as_posix()}"


def without_places(settings: dict) -> dict:
    """Settings as others may read them; `names_only` has the options of which a path's name alone is left."""
    told = settings | {name: place_told(value) for name, value in settings.items() if is_place(value)}
    away = [
        name
        for name, value in settings.items()
        if is_place(value) and name != "output_dir" and Path(told[name]).resolve() != Path(value).resolve()
    ]  # an output folder is made where it is missing
    return told | ({"names_only": away} if away else {})


def is_lost(name: str, saved: dict) -> bool:
    """Whether saved settings have of an option's path a name alone, and nothing of that name is here."""
    away = saved.get("names_only")
    return isinstance(away, list) and name in away and not Path(str(saved.get(name))).exists()


def check_places(path: str, settings: dict) -> None:
    """Holds settings against a JSON file of options that they may be of.

    Raises:
        ValueError: one is a path of which the file has the name alone, and nothing of that name is here.
    """
    saved = read_json(Path(path), dict, "file of options")
    for name, value in settings.items():
        if value == saved.get(name) and is_lost(name, saved):
            raise ValueError(
                f"config {path}: {name} is {shortened(value)}, the name of what was elsewhere; nothing of "
                f"that name is here: give --{name}."
            )


def check_groups(config: RunConfig, groups: list[type]) -> None:
    """Raises a ValueError for options of a group that do not go together."""
    for group in groups:
        if hasattr(group, "check"):
            group.check(config)


def read_options(path: str, kind: type) -> dict:
    """The options of a JSON file, each of its field's type in the dataclass `kind`.

    Raises:
        ValueError: it cannot be read, or has another option or a value of another type.
    """
    options = read_json(Path(path), dict, "file of options")
    options = as_lists({name: value for name, value in options.items() if name not in FACTS})
    types = {f.name: get_origin(f.type) or f.type for f in dataclasses.fields(kind)}
    items = {f.name: get_args(f.type) for f in dataclasses.fields(kind)}
    for name, value in options.items():
        if name not in types:
            raise ValueError(f"config {path}: {unknown_option(name, list(types))}")
        if name == "transformer" and isinstance(value, dict):
            options[name] = json.dumps(value)
        elif type(value) is not types[name] and not (types[name] is float and type(value) is int):
            raise ValueError(
                f"config {path}: {name} is {shortened(value)}; it must be of type {types[name].__name__}."
            )
        elif isinstance(value, list) and not all(_is_of(item, *items[name]) for item in value):
            what = {str: "texts", int: "whole numbers", float: "numbers"}[items[name][0]]
            raise ValueError(f"config {path}: {name} is {shortened(value)}; it must be a list of {what}.")
    return options


def usual(config: RunConfig) -> dict:
    """What was done of an option by an earlier version, which did not know it; of lists it is not told."""
    found = {each.name: each.default for each in dataclasses.fields(config)}
    return {name: value for name, value in found.items() if value is not dataclasses.MISSING}


def as_lists(saved: dict) -> dict:
    """Saved settings with a list where version 0.1.0 had one value."""
    one = saved.get("evaluation_extractor")
    return saved | ({"evaluation_extractor": [one]} if isinstance(one, str) else {})


def _is_of(value, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)
