"""What is trained and how: the networks by name, the settings of Table A1, and how a run is configured.

A setting comes from, in rising order: Table A1 (the defaults of [`TrainingConfig`]), the preset's recipe, the
method's, the JSON file of `--config`, the command line.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from ..cli import Limits, Parser, check_options, json_object, option, shortened, unknown_option
from ..evaluation.catalogue import EXTRACTORS
from ..files import read_json, written_aside
from ..models.presets import PRESETS

# fmt: on

# What a preset changes in TrainingConfig.
RECIPES = {
    "SD-DiT-S/2": dict(max_train_steps=400_000, logging_steps=50),
    "SD-DiT-B/2": dict(max_train_steps=400_000, logging_steps=50),
    "SD-DiT-L/2": dict(max_train_steps=400_000, logging_steps=50),
    "SD-DiT-XL/2": dict(max_train_steps=2_400_000, logging_steps=50),
    "digits": dict(
        dataset_name="digits",
        train_batch_size=128,
        max_train_steps=1500,
        # A small network bears a large rate: of 1e-3, 2e-3 and 3e-3 the last came closest to the real digits.
        learning_rate=3e-3,
        lr_warmup_steps=100,
        adam_beta2=0.99,
        num_prototypes=256,
        head_hidden_dim=256,
        head_bottleneck_dim=64,
        # The paper's temperatures are for hundreds of thousands of steps: after 500 of these they leave the
        # teacher at 96 % of the entropy of no preference at all, these at 65 % (and at 58 % after 1,500).
        teacher_temperature_start=0.04,
        teacher_temperature_end=0.07,
        teacher_temperature_warmup_epochs=30,
        evaluation_steps=300,
        evaluation_samples=500,
        evaluation_extractor="pixels",
    ),
    "cifar10": dict(
        dataset_name="uoft-cs/cifar10",
        image_column="img",
        train_batch_size=128,
        max_train_steps=200_000,
        logging_steps=10,
        # The paper's head would take half of the step's time beside so small a network.
        num_prototypes=2048,
        head_hidden_dim=512,
        head_bottleneck_dim=128,
    ),
    "cifar10-latent": dict(
        train_batch_size=128,
        max_train_steps=100_000,
        learning_rate=1e-3,
        lr_warmup_steps=200,
        adam_beta2=0.99,
        logging_steps=10,
        num_prototypes=512,
        head_hidden_dim=512,
        head_bottleneck_dim=64,
        # Between what leaves the teacher at 94 % of the entropy of no preference after 1,700 steps, the
        # paper's, and the 0.04 that the digits begin with, which leaves it at 4 % after 1,200.
        teacher_temperature_start=0.07,
        teacher_temperature_end=0.07,
    ),
}

# What a method changes in TrainingConfig.
METHODS = {
    "sddit": {},
    "dit": dict(mask_ratio=0.0),
    "maskdit": dict(mask_ratio=0.5),
    "mdt": dict(mask_ratio=0.3),
}

# Options that one method has, or all but one; the others leave them at the preset's value.
_OF_ONE_METHOD = {
    "maskdit": ("mae_weight",),
    "sddit": (
        "discriminative_weight", "num_prototypes", "head_hidden_dim", "head_bottleneck_dim",
        "student_temperature", "teacher_temperature_start", "teacher_temperature_end",
        "teacher_temperature_warmup_epochs", "teacher_momentum_start", "teacher_momentum_end",
        "teacher_sigma", "center_momentum",
    ),
}  # fmt: skip
_BELOW_1 = 1 - 2**-53  # the largest number
_WIDEST = 2**16  # of a layer, of a picture

SCHEDULES = ("constant", "cosine")
CHECKPOINTING = ("none", "selective", "full")
TRIAL_STEPS = 18  # of the sampler, while a run is not at its end


@dataclass
class TrainingConfig:
    """The settings of a run; the defaults are the paper's (Table A1 and Sec. 4.1)."""

    method: str = option(
        "sddit", "'sddit', or what it is compared with: 'dit', 'maskdit', 'mdt'", choices=tuple(METHODS)
    )
    preset: str = option("digits", "network and recipe: " + ", ".join(PRESETS), choices=tuple(PRESETS))
    transformer: str = option("{}", "JSON of network settings that differ from the preset's")
    dataset_name: str = option(
        "", "'digits', or a folder, a URL or a dataset on the Hub, of latents or of images with labels"
    )
    image_column: str = option("image", "column of the images, if they are no latents")
    label_column: str = option("label", "column of their labels; '' trains without classes")
    vae: str = option("", "decodes latents; the one that made them if not given, 'none' goes without samples")
    output_dir: str = option(
        "", "where the pipeline goes; sddit-PRESET if not given, METHOD-PRESET of others"
    )
    pretrained_model_name_or_path: str = option(
        "",
        "a pipeline (folder or Hub name), a single file or a checkpoint, with whose weights the run begins",
    )
    seed: int = option(0, "seed of weights, data order and noise", low=0, high=2**32 - 1)

    max_train_steps: int = option(400_000, "optimizer steps", low=1)
    train_batch_size: int = option(256, "images a process and micro-batch; the paper's total is 256", low=1)
    gradient_accumulation_steps: int = option(1, "micro-batches an optimizer step", low=1)
    learning_rate: float = option(1e-4, "of AdamW", low=0)
    lr_warmup_steps: int = option(
        0, "steps of linear warm-up to the learning rate, constant afterwards", low=0
    )
    adam_beta1: float = option(0.9, "of AdamW", low=0, high=_BELOW_1)
    adam_beta2: float = option(0.999, "of AdamW", low=0, high=_BELOW_1)
    adam_weight_decay: float = option(0.0, "of AdamW", low=0)
    max_grad_norm: float = option(0.0, "gradients are scaled down to this norm; 0: never", low=0)
    mixed_precision: str = option(
        "",
        "'no', 'bf16' or 'fp16'; as accelerate is configured if not given",
        choices=("", "no", "bf16", "fp16"),
    )
    gradient_checkpointing: str = option(
        "none",
        "save memory: backward computes again what is cheap ('selective') or all of a block ('full')",
        choices=CHECKPOINTING,
    )
    compile: bool = option(False, "compile the blocks with torch.compile")
    allow_tf32: bool = option(True, "let GPUs round the factors of float32 products to TF32, as DiT does")
    ema_decay: float = option(0.9999, "of the weights that sample", low=0, high=1)

    mask_ratio: float = option(
        0.2,
        "share of the patches hidden from the student's encoder; 0.5 for maskdit, 0.3 for mdt",
        low=0,
        high=_BELOW_1,
    )
    mask_ratio_schedule: str = option(
        "constant",
        "'cosine' lets the ratio fall to 0 with the cosine's fourth power, MaskDiT's unmask tuning",
        choices=SCHEDULES,
    )
    mae_weight: float = option(0.1, "factor of maskdit's L_MAE", low=0)
    label_dropout: float = option(
        0.1, "probability of training an image without its label, for guidance", low=0, high=1
    )
    discriminative_weight: float = option(1.0, "factor of L_D; 0 trains without teacher", low=0)
    num_prototypes: int = option(8192, "K", low=2, high=2**20)
    head_hidden_dim: int = option(2048, "hidden width of the projection head", low=1, high=_WIDEST)
    head_bottleneck_dim: int = option(
        256, "width of the projection head before the prototypes", low=1, high=_WIDEST
    )
    student_temperature: float = option(0.1, "tau_S", low=1e-3)
    teacher_temperature_start: float = option(0.09, "tau_T at the start", low=1e-3)
    teacher_temperature_end: float = option(0.099, "tau_T after its warm-up", low=1e-3)
    teacher_temperature_warmup_epochs: float = option(5, "epochs from the first to the second", low=0)
    teacher_momentum_start: float = option(0.996, "beta at the start", low=0, high=1)
    teacher_momentum_end: float = option(0.999, "beta at the end", low=0, high=1)
    teacher_sigma: str = option(
        "0.002", "noise of the teacher's view, or 'student' for the student's distribution"
    )
    center_momentum: float = option(0.9, "of the teacher's centers", low=0, high=1)

    evaluation_steps: int = option(0, "score the averaged weights every so many steps; 0: never", low=0)
    evaluation_samples: int = option(
        10_000, f"images that are made for it, in {TRIAL_STEPS} steps of the sampler", low=2
    )
    evaluation_reference: str = option(
        "",
        "a REFERENCE of sddit_diffusers.evaluate; the pictures trained on if not given",
    )
    evaluation_extractor: str = option(
        "inception", "'inception'; without downloads 'classifier', 'pixels'", choices=tuple(EXTRACTORS)
    )
    validation_steps: int = option(0, "sample a grid every so many steps; 0: at the end only", low=0)
    num_validation_images: int = option(100, "images of a grid, in rows of ten", low=0, high=10_000)
    checkpointing_steps: int = option(0, "save a checkpoint every so many steps; 0: none", low=0)
    checkpoints_total_limit: int = option(0, "checkpoints that are kept, the newest ones; 0: all", low=0)
    overwrite_output_dir: bool = option(
        False, "begin anew where a model or checkpoints are; it is replaced once the new one is complete"
    )
    dry_run: bool = option(False, "tell the memory that a step takes, and train nothing")
    resume_from_checkpoint: str = option(
        "", "a checkpoint folder, or 'latest', which begins where there is none"
    )
    logging_steps: int = option(1, "write the metrics every so many steps", low=1)
    report_to: str = option("", "'tensorboard', 'wandb' or 'all', beside metrics.jsonl")
    dataloader_num_workers: int = option(0, "processes that read images ahead", low=0, high=1024)
    push_to_hub: bool = option(False, "upload the pipeline with its card at the end, never a checkpoint")
    hub_model_id: str = option("", "where to, USER/NAME or NAME; the output folder's name if not given")

    def __post_init__(self):
        check_options(self)
        self.dataset_name = self.dataset_name or RECIPES[self.preset].get("dataset_name", "")
        self.output_dir = self.output_dir or f"{self.method}-{self.preset.replace('/', '-')}"
        if not self.dataset_name and not self.dry_run:
            raise ValueError(
                f"The preset {self.preset} needs --dataset_name, a folder or a dataset on the Hub."
            )
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError(
                "overwrite_output_dir begins anew, and resume_from_checkpoint goes on: choose one."
            )
        if self.method == "dit" and self.mask_ratio:
            raise ValueError(f"mask_ratio is {self.mask_ratio}; dit has no mask, so it must be 0.")
        self.network()
        self.teacher_noise()

    def check_method(self) -> None:
        """Holds what another method's options are against the preset's values.

        Raises:
            ValueError: one was changed, which would change nothing.
        """
        others = [name for method in _OF_ONE_METHOD.keys() - {self.method} for name in _OF_ONE_METHOD[method]]
        if self.method == "dit":
            others.append("mask_ratio_schedule")
        for name in sorted(others):
            value, left = getattr(self, name), RECIPES[self.preset].get(name, getattr(TrainingConfig, name))
            if value != left:
                raise ValueError(
                    f"{name} is {shortened(value)}; {self.method} has no such option: leave it at {left!r}."
                )

    def network(self) -> dict:
        """The arguments of the method's network, but for num_classes, which is the dataset's.

        Raises:
            ValueError: `transformer` is no change of them.
        """
        preset = PRESETS[self.preset]
        decoder = ("num_decoder_layers", "decoder_num_attention_heads", "decoder_attention_head_dim")
        if self.method in ("dit", "mdt"):
            preset = {name: value for name, value in preset.items() if name not in decoder}
        if self.method == "mdt":
            preset["num_decoder_layers"] = 2  # of num_layers, in all sizes (Gao et al. 2023)
        return preset | read_changes(self.transformer, preset)

    def teacher_noise(self) -> float | str:
        """`teacher_sigma` as the objective takes it."""
        try:
            sigma = self.teacher_sigma if self.teacher_sigma == "student" else float(self.teacher_sigma)
        except ValueError:
            sigma = 0.0
        if sigma != "student" and not 0 < sigma < math.inf:
            raise ValueError(
                f"teacher_sigma is {shortened(self.teacher_sigma)}; it must be a number above 0 or 'student'."
            )
        return sigma

    def save(self, path: Path) -> None:
        """Writes the resolved settings as a file that `--config` reads."""
        with written_aside(path, "w") as file:
            settings = dataclasses.asdict(self) | {"overwrite_output_dir": False}  # once is enough
            file.write(json.dumps(settings, indent=2) + "\n")


def read_changes(text: str, network: dict) -> dict:
    """The settings of `--transformer`.

    Args:
        text: JSON.
        network: what it changes; `num_classes` is the dataset's.

    Raises:
        ValueError: another setting, or a value that is no number of its type and range.
    """
    changes = json_object("transformer", text)
    known = [name for name in network if name != "num_classes"] + ["mlp_ratio"]
    for name in changes:
        if name not in known:
            raise ValueError(f"transformer has no setting {shortened(name)}; there are {', '.join(known)}.")
    for name in filter(changes.__contains__, known):
        value, ratio = changes[name], name == "mlp_ratio"
        if type(value) is not int and not (ratio and type(value) is float):
            problem = "it must be a number" if ratio else "it must be a whole number"
        elif not (problem := Limits(low=0 if ratio else 1, high=64 if ratio else _WIDEST).problem(value)):
            empty = ratio and int(_narrowest(network | changes) * value) == 0
            problem = "it must leave the MLPs a width" * empty
        if problem:
            raise ValueError(f"transformer: {name} is {shortened(value)}; {problem}.")
    return changes


def _narrowest(network: dict) -> int:
    """The width of the encoder or of the decoder."""
    both = [(f"{of}num_attention_heads", f"{of}attention_head_dim") for of in ("", "decoder_")]
    return min(network[heads] * network[dim] for heads, dim in both if heads in network)


def parse(arguments: list[str] | None = None) -> TrainingConfig:
    """The configuration of a command line, `sys.argv` by default; leaves with a message where it is wrong."""
    parser = Parser(
        TrainingConfig,
        description="Trains SD-DiT, or a method that it is compared with. Without options: on handwritten "
        "digits, in minutes.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="JSON file of options, which the command line overrides")
    first = Parser([], add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--preset")
    first.add_argument("--method")
    chosen, _ = first.parse_known_args(arguments)
    try:
        options = _read_options(chosen.config) if chosen.config else {}
        preset = chosen.preset or options.get("preset", TrainingConfig.preset)
        method = chosen.method or options.get("method", TrainingConfig.method)
        parser.set_defaults(**RECIPES.get(preset, {}) | METHODS.get(method, {}) | options)
        chosen = parser.parse_known_options(arguments)
        del chosen["config"]
        return TrainingConfig(**chosen)
    except ValueError as error:
        parser.error(str(error))


def _read_options(path: str) -> dict:
    """The options of a JSON file, each of its field's type."""
    options = read_json(Path(path), dict, "file of options")
    types = {f.name: f.type for f in dataclasses.fields(TrainingConfig)}
    for name, value in options.items():
        if name not in types:
            raise ValueError(f"config {path}: {unknown_option(name, list(types))}")
        if name == "transformer" and isinstance(value, dict):
            options[name] = json.dumps(value)
        elif type(value) is not types[name] and not (types[name] is float and type(value) is int):
            raise ValueError(
                f"config {path}: {name} is {shortened(value)}; it must be of type {types[name].__name__}."
            )
    return options
