"""How a distillation is configured.

A setting comes from, in rising order: the defaults, the parent's own training (its data and evaluation), the
papers' tables or what was measured on the parent's data, the JSON file of `--config`, the command line.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import get_origin

from ..cli import Parser, check_options, option, options
from .configuration import (
    DataOptions,
    EvaluationOptions,
    HubOptions,
    OptimizerOptions,
    OutputOptions,
    RunConfig,
    check_groups,
    check_places,
    is_lost,
    read_options,
)
from .distillation import OBJECTIVES
from .foreign import ForeignNetwork
from .parents import Parent, load_parent

# lambda by number of steps (supplement of "Diffusion Model is Effectively Its Own Teacher"): Table 10 of SSD,
# Table 9 of iSSD by the layers of the model; a chain's later stages have a row of their own.
SSD_WEIGHTS = {50: 0.30, 20: 0.30, 10: 0.30}
ISSD_WEIGHTS = {
    12: {50: 0.35, 20: 0.25, 10: 0.25},  # B/2
    24: {50: 0.25, 20: 0.25, 10: 0.25},  # L/2
    28: {50: 0.30, 20: 0.25, 10: 0.25},  # XL/2, at 256 and at 512
}
ISSD_OF_S2 = {50: 0.05, 20: 0.10, 10: 0.05}  # 12 layers of a width of 384, and what is smaller
ISSD_OF_CHILDREN = {32: 0.20, 10: 0.25, 5: 0.05, 4: 0.05}
# Learning rates and batches of the same supplement (A.1), by layers.
RATES = {12: (5e-6, 256), 24: (5e-6, 256), 28: (5e-6, 128)}
RATE_OF_S2 = 1e-5, 512
TEACHER_STEPS = 20  # of Heun's, at which the digits' parent samples as well as with more
# What a distillation takes over of its parent's training.
INHERITED = (
    "dataset_name", "image_column", "label_column", "vae", "evaluation_reference", "evaluation_extractor",
    "evaluation_samples", "max_train_samples", "num_validation_images", "label_dropout",
)  # fmt: skip
OF_A_CHILD = "max_train_steps", "train_batch_size", "learning_rate", "ema_decay", "evaluation_steps"
# Measured on the digits.
OF_DIGITS = dict(max_train_steps=300, train_batch_size=128, ema_decay=0.99, evaluation_steps=100)
RATES_OF_DIGITS = {"ssd": 1e-4, "issd": 1e-4, "progressive": 1e-3}


@dataclass
class DistillationOptions:
    """What is distilled, and how."""

    _argument_group_name = "distillation"

    model: str = option(
        "", "the trained pipeline, ours or diffusers' DiTPipeline or StableDiffusionPipeline: a folder or a "
        "name on the Hub; it is never changed; required"
    )  # fmt: skip
    objective: str = option(
        "ssd", "Algorithms 1 and 2 of the paper, or progressive distillation", choices=OBJECTIVES.keys()
    )
    num_inference_steps: list[int] = options(
        [10], "steps of the sampler that it is made for; several make a chain, each from the last", low=2,
        high=10**6,
    )  # fmt: skip
    solver: str = option("euler", "of the sampler; 'euler' is DDIM", choices=("euler", "heun"))
    fusion_weight: list[float] = options(
        [], "lambda, or one for each number of steps; that of the paper's tables if not given", low=0, high=1
    )
    teacher_steps: int = option(
        0,
        f"of 'progressive': Heun's in one of the sampler's; 0: as many as make {TEACHER_STEPS} in all",
        low=0,
        high=1000,
    )
    guidance_scale: list[float] = options(
        [1.0], "of the teacher's step from s to t: one, or the ends of a range to draw from; 1 is off", low=0
    )
    distil_guidance: bool = option(False, "learn the guided prediction itself: sample without guidance then")
    apart: bool = option(False, "learn the prediction without a label in each step too, dropping no label")
    teacher_momentum: float = option(
        1.0, "of a teacher that follows the student; 1 keeps it as it was", low=0, high=1
    )
    label_dropout: float = option(0.1, "probability of an image without its label", low=0, high=1)


GROUPS = [DistillationOptions, DataOptions, OptimizerOptions, EvaluationOptions, OutputOptions, HubOptions]


@dataclass
class DistillConfig(*GROUPS, RunConfig):
    """The settings of a distillation; of a chain, those of all its stages."""

    def __post_init__(self):
        check_options(self)
        if Path(self.output_dir or ".").resolve() == Path(self.model).resolve():
            raise ValueError(f"output_dir is {self.output_dir}, which is the model: it is never changed.")
        steps, weights, scales = self.num_inference_steps, self.fusion_weight, self.guidance_scale
        if not steps or any(a <= b for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"num_inference_steps is {steps}; it must be numbers that fall.")
        if self.objective == "progressive":
            if weights:
                raise ValueError(f"fusion_weight is {weights}; progressive distillation has none.")
            if self.teacher_steps * steps[0] > 10**6:
                raise ValueError(f"teacher_steps is {self.teacher_steps}; they may be a million in all.")
        elif self.teacher_steps:
            raise ValueError(
                f"teacher_steps is {self.teacher_steps}; {self.objective} takes one: leave it at 0."
            )
        elif len(weights) not in (1, len(steps)):
            raise ValueError(f"fusion_weight is {weights}; it must be one, or one for each of {steps} steps.")
        if len(scales) not in (1, 2) or scales[0] > scales[-1]:
            raise ValueError(f"guidance_scale is {scales}; it must be one, or two that rise.")
        if self.distil_guidance and scales == [1.0]:
            raise ValueError("distil_guidance needs a guidance_scale other than 1.")
        if self.apart:
            self.label_dropout = 0.0  # both are learnt of each image
        name = Path(self.model).resolve().name
        self.output_dir = self.output_dir or f"{name}-{self.objective}-{steps[-1]}"
        if not self.dataset_name:
            raise ValueError(
                f"--dataset_name is needed: what {self.model} was trained on is not told by a "
                "training_config.json in it."
            )
        check_groups(self, GROUPS)

    @property
    def parent(self) -> Parent:
        """What is distilled."""
        return load_parent(self.model)

    @property
    def title(self) -> str:
        return f"{self.objective} of {self.model} for {self.trial_steps} steps"

    @property
    def trial_steps(self) -> int:
        return self.num_inference_steps[-1]

    @property
    def scores_start(self) -> bool:
        return True

    def network(self) -> dict:
        return dict(self.parent.network.config)

    def identity(self) -> dict:
        return {
            "process": self.parent.scheduler.config.get("path", "edm"),
            "objective": self.objective,
            "parent": self.parent.sha256,
            "num_inference_steps": self.num_inference_steps,
            "solver": self.solver,
        }

    def facts(self) -> dict:
        return {"parent_sha256": self.parent.sha256}

    def own(self) -> list[str]:
        left_out = {"model", "teacher_steps"}
        if self.objective == "progressive":
            left_out = {"model", "teacher_steps", "fusion_weight"}
        names = [each.name for each in dataclasses.fields(DistillationOptions) if each.name not in left_out]
        return [*names, "teacher_steps_each"] if self.objective == "progressive" else names

    def card(self) -> dict:
        parent = self.model
        if (path := Path(self.model)).exists():
            path = path.resolve()
            parent = f"{path.parent.name}/{path.name}" if path.name.startswith("steps-") else path.name
        steps = f"it samples in {self.trial_steps} steps where it is not told how many"
        if isinstance(self.parent.network, ForeignNetwork):  # no config of diffusers tells it
            steps = f"sample it with num_inference_steps={self.trial_steps} and its own scheduler, DDIM"
        trained = self.parent.settings
        return {
            "method": self.parent.title,
            "tags": ["self-distillation", self.objective],
            "program": "distill_sddit.py",
            "rows": {},
            "guided": not self.distil_guidance,
            "distilled": f"It is {parent}, distilled by itself: {steps}. It was made with {self.way}.",
            "discriminates": trained.get("auxiliary") != ["none"]
            and trained.get("discriminative_weight") != 0,
            "start": str(trained.get("pretrained_model_name_or_path") or ""),
        }

    @property
    def way(self) -> str:
        """How it is made, for a model card."""
        if self.objective == "progressive":
            return (
                f"{self.teacher_steps_each} steps of the teacher in one of its own "
                '("Progressive Distillation for Fast Sampling of Diffusion Models")'
            )
        return (
            f"{self.objective.replace('ssd', 'SSD')}, lambda = {self.fusion_weight[-1]:g} and the solver "
            f'{self.solver} ("Diffusion Model is Effectively Its Own Teacher")'
        )

    @property
    def teacher_steps_each(self) -> int:
        """Steps of the teacher in each of the sampler's."""
        if self.objective != "progressive":
            return 1
        return self.teacher_steps or math.ceil(TEACHER_STEPS / self.trial_steps)

    def stages(self) -> list["DistillConfig"]:
        """The chain's stages, each with a folder of its own; of a single number of steps the whole."""
        steps = self.num_inference_steps
        if len(steps) == 1:
            return [self]
        weights = self.fusion_weight * (len(steps) if len(self.fusion_weight) == 1 else 1)
        stages, model, name = [], self.model, self.hub_model_id or Path(self.output_dir).resolve().name
        for i, number in enumerate(steps):
            folder = str(Path(self.output_dir) / f"steps-{number}")
            stages.append(
                dataclasses.replace(
                    self,
                    model=model,
                    num_inference_steps=[number],
                    output_dir=folder,
                    fusion_weight=weights[i : i + 1],
                    hub_model_id=f"{name}-{number}",
                )  # fmt: skip
            )
            model = folder
        return stages


def default_weight(objective: str, parent: Parent, num_inference_steps: int, is_child: bool) -> float:
    """Lambda of the paper's tables: of the nearest model, and of the nearest number of steps.

    Args:
        is_child: whether what is distilled was distilled itself.
    """
    if objective == "ssd":
        # Eq. 17: on the linear path the velocity of a later time is the target itself.
        table = SSD_WEIGHTS if parent.scheduler.config.get("path") != "linear" else {10: 1.0}
    elif is_child:
        table = ISSD_OF_CHILDREN
    else:
        table = ISSD_OF_S2 if is_small(parent) else ISSD_WEIGHTS[nearest(ISSD_WEIGHTS, layers_of(parent))]
    return table[nearest(table, num_inference_steps)]


def nearest(table: dict, value: float) -> int:
    """The key that is the fewest times larger or smaller."""
    return min(table, key=lambda key: abs(math.log(key / value)))


def layers_of(parent: Parent) -> int:
    """Layers of the network's encoder."""
    return parent.network.config.get("num_layers", 12)


def is_small(parent: Parent) -> bool:
    """Whether it is a transformer no wider than S/2."""
    config = parent.network.config
    heads, size = config.get("num_attention_heads"), config.get("attention_head_dim")
    return isinstance(heads, int) and isinstance(size, int) and heads * size <= 384


def defaults_of(parent: Parent, objective: str) -> dict:
    """What a distillation of a pipeline changes in the defaults."""
    rate, batch = RATE_OF_S2 if is_small(parent) else RATES[nearest(RATES, layers_of(parent))]
    if layers_of(parent) == 28 and parent.network.config.sample_size >= 64:
        batch = 64  # XL/2 at 512
    found = {"learning_rate": rate, "train_batch_size": batch, "max_train_steps": 4000, "ema_decay": 0.999}
    found |= getattr(parent.network, "defaults", {})
    kinds = {each.name: get_origin(each.type) or each.type for each in dataclasses.fields(DistillConfig)}
    inherited = INHERITED + OF_A_CHILD * parent.is_child
    for name in inherited:
        if type(parent.settings.get(name)) is kinds[name] and not is_lost(name, parent.settings):
            found[name] = parent.settings[name]
    if parent.vae is not None:
        found["vae"] = parent.name
    if parent.settings.get("preset") in ("digits", "digits-flow"):
        found |= OF_DIGITS | {"learning_rate": RATES_OF_DIGITS.get(objective, 1e-4)}
    if not parent.is_child:  # the papers' batches are those of all processes
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        found["train_batch_size"] = max(1, found["train_batch_size"] // processes)
    return found


ABOUT = """Makes a trained pipeline better at a small number of steps, by itself.

    sddit distill --model sddit-digits --num_inference_steps 10 --objective progressive
    sddit distill --model sddit-digits --num_inference_steps 20 10 5
    accelerate launch -m sddit distill --model sddit-SD-DiT-XL-2 --dataset_name imagenet-latents
"""


def parse(arguments: list[str] | None = None) -> DistillConfig:
    """The configuration of a command line, `sys.argv` by default; leaves with a message where it is wrong."""
    parser = Parser(GROUPS, doc=ABOUT)
    parser.add_argument("--config", metavar="FILE", help="JSON of options, which the command line overrides")
    parser.tell_defaults({*INHERITED, *OF_A_CHILD}, "by the model")
    first = Parser([], add_help=False)
    for name in ("--config", "--model", "--objective"):
        first.add_argument(name)
    first.add_argument("-h", "--help", action="store_true")
    chosen, _ = first.parse_known_args(arguments)
    if chosen.help:
        parser.parse_args(["--help"])
    try:
        settings = read_options(chosen.config, DistillConfig) if chosen.config else {}
        name = chosen.model or settings.get("model")
        if not name:
            raise ValueError("--model is needed: the trained pipeline that is distilled.")
        if chosen.config:
            check_places(chosen.config, {"model": name})
        objective = chosen.objective or settings.get("objective")
        if objective != settings.get("objective"):  # what is left of another's settings
            settings = {name: settings[name] for name in settings.keys() - {"fusion_weight", "teacher_steps"}}
        if objective not in OBJECTIVES:
            objective = DistillConfig.objective  # another one is refused below
        parser.set_defaults(**defaults_of(load_parent(name), objective) | settings)
        chosen = parser.parse_known_options(arguments)
        if path := chosen.pop("config"):
            check_places(path, chosen)
        if not chosen["fusion_weight"] and chosen["objective"] != "progressive":
            parent = load_parent(name)
            chosen["fusion_weight"] = [
                default_weight(chosen["objective"], parent, steps, parent.is_child or place > 0)
                for place, steps in enumerate(chosen["num_inference_steps"])
            ]
        return DistillConfig(**chosen)
    except ValueError as error:
        parser.error(str(error))


def parse_planned(arguments: list[str], parent: RunConfig) -> DistillConfig:
    """The configuration of a distillation of what need not be trained yet.

    No default comes from its weights: lambda must be given.

    Args:
        parent: configuration of its training, of which data, evaluation and precision are taken over.

    Raises:
        ValueError: a setting is wrong.
    """
    parser = Parser(GROUPS, raises=True)
    inherited = {name: getattr(parent, name) for name in (*INHERITED, "mixed_precision")}
    parser.set_defaults(model=parent.output_dir, **inherited)
    return DistillConfig(**parser.parse_known_options(arguments))
