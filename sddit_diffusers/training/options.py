"""How a run is configured: options by axis, and the recipes of the presets.

A setting comes from, in rising order: Table A1 (the defaults), the process's settings, the preset's recipe,
the method's settings, the JSON file of `--config`, the command line.
"""

from dataclasses import dataclass

from ..cli import Parser, check_options, option, options, shortened
from ..models.presets import PRESETS, read_changes
from .auxiliaries import AUXILIARIES
from .configuration import (
    BELOW_1,
    DataOptions,
    EvaluationOptions,
    HubOptions,
    OptimizerOptions,
    OutputOptions,
    RunConfig,
    check_groups,
    check_places,
    read_options,
)
from .methods import METHODS, Method
from .objective import MASK_SCHEDULES
from .processes import PROCESSES, ProcessRow

_DIGITS = dict(
    dataset_name="digits",
    # At equal time batches of 64 come closer to the real digits than of 128; of 32 they come no closer.
    train_batch_size=64,
    max_train_steps=1650,
    # The deviation of these pixels, and noise of about their size: the paper's is most often far smaller, and
    # what was missing was variety of the large forms. Interpolants have these times as well.
    p_mean=0.0,
    p_std=1.0,
    sigma_data=0.75,
    time_distribution="lognormal",  # of interpolants: far better here than uniform times
    # A small network bears a large rate: of 2e-3, 4e-3, 6e-3 and 8e-3 the last two came closest.
    learning_rate=6e-3,
    lr_scheduler="cosine",
    lr_warmup_steps=100,
    adam_beta2=0.99,
    num_prototypes=256,
    head_hidden_dim=256,
    head_bottleneck_dim=64,
    repa_encoder="classifier",  # needs no download
    repa_projector_dim=256,
    # The paper's temperatures are for hundreds of thousands of steps: after 500 of these they leave the
    # teacher at 96 % of the entropy of no preference at all, these at 65 %.
    teacher_temperature_start=0.04,
    teacher_temperature_end=0.07,
    teacher_temperature_warmup_epochs=30,
    evaluation_steps=825,
    evaluation_samples=300,
    evaluation_extractor=["pixels"],
)
_CIFAR10_LATENT = dict(
    train_batch_size=128,
    max_train_steps=100_000,
    learning_rate=1e-3,
    lr_warmup_steps=200,
    adam_beta2=0.99,
    logging_steps=10,
    num_prototypes=512,
    head_hidden_dim=512,
    head_bottleneck_dim=64,
    repa_encoder="classifier",
    repa_projector_dim=512,
    # Between what leaves the teacher at 94 % of the entropy of no preference after 1,700 steps, the
    # paper's, and the 0.04 that the digits begin with, which leaves it at 4 % after 1,200.
    teacher_temperature_start=0.07,
    teacher_temperature_end=0.07,
)
# 64 tokens, and a network that is right for one or two epochs: some minutes on one core.
_CIFAR10_LATENT_TINY = _CIFAR10_LATENT | dict(train_batch_size=32, max_train_steps=2000)
# What a preset changes in TrainingConfig.
RECIPES = {
    "SD-DiT-S/2": dict(max_train_steps=400_000, logging_steps=50),
    "SD-DiT-B/2": dict(max_train_steps=400_000, logging_steps=50),
    "SD-DiT-L/2": dict(max_train_steps=400_000, logging_steps=50),
    "SD-DiT-XL/2": dict(max_train_steps=2_400_000, logging_steps=50),
    # SiT's figures are of 400,000 steps, XL/2's best of 7,000,000.
    "SiT-S/2": dict(method="dit", process="linear", max_train_steps=400_000, logging_steps=50),
    "SiT-B/2": dict(method="dit", process="linear", max_train_steps=400_000, logging_steps=50),
    "SiT-L/2": dict(method="dit", process="linear", max_train_steps=400_000, logging_steps=50),
    "SiT-XL/2": dict(method="dit", process="linear", max_train_steps=7_000_000, logging_steps=50),
    "digits": _DIGITS,
    # A network without decoder and teacher, with larger batches and a constant learning rate.
    "digits-flow": _DIGITS
    | dict(
        method="dit",
        process="linear",
        sigma_data=0.5,  # which is EDM's alone
        train_batch_size=128,
        max_train_steps=1000,
        learning_rate=3e-3,
        lr_scheduler="constant",
        evaluation_steps=300,
        evaluation_samples=500,
    ),
    "cifar10": dict(
        dataset_name="uoft-cs/cifar10",
        train_batch_size=128,
        max_train_steps=200_000,
        logging_steps=10,
        # The paper's head would take half of the step's time beside so small a network.
        num_prototypes=2048,
        head_hidden_dim=512,
        head_bottleneck_dim=128,
        repa_encoder="classifier",
        repa_projector_dim=512,
    ),
    "cifar10-latent": _CIFAR10_LATENT,
    "cifar10-latent-tiny": _CIFAR10_LATENT_TINY,
    # The cheapest SD-DiT that loses nothing there: a fifth less a step (docs/leaderboard.md).
    "cifar10-latent-light": _CIFAR10_LATENT_TINY | dict(mask_ratio=0.5),
}


@dataclass
class NetworkOptions:
    """What is trained: the network and its masking, and what else has a say in its loss."""

    _argument_group_name = "network"

    method: str = option("sddit", "SD-DiT, or what it is compared with", choices=METHODS.keys())
    preset: str = option("digits", "network and recipe: " + ", ".join(PRESETS), choices=PRESETS.keys())
    transformer: str = option("{}", "the network's settings that differ from the preset's", metavar="JSON")
    pretrained_model_name_or_path: str = option(
        "",
        "begin with the weights of a pipeline (a folder or a name on the Hub), a single file or a checkpoint",
    )
    mask_ratio: float = option(
        0.2,
        "share of the patches hidden from the student's encoder, with tread of those that skip the routed "
        "blocks",
        low=0,
        high=BELOW_1,
    )
    mask_ratio_schedule: str = option(
        "constant",
        "'cosine' lets the ratio fall to 0 with the cosine's fourth power: MaskDiT's unmask tuning",
        choices=MASK_SCHEDULES,
    )
    mae_weight: float = option(0.1, "of maskdit: factor of L_MAE", low=0)
    label_dropout: float = option(
        0.1, "probability of training an image without its label, for guidance", low=0, high=1
    )
    process: str = option(
        "edm", "diffusion process: EDM, or one of the interpolants, which are flows", group="process",
        choices=PROCESSES.keys(),
    )  # fmt: skip
    auxiliary: list[str] = options(
        ["discrimination"], f"'none', or one or several of {', '.join(AUXILIARIES)}", group="auxiliary losses"
    )

    @property
    def auxiliaries(self) -> list[str]:
        """Names of the auxiliary losses."""
        return [] if self.auxiliary == ["none"] else self.auxiliary

    @property
    def looks_at_pictures(self) -> bool:
        return any(AUXILIARIES[name].looks_at_pictures(self) for name in self.auxiliaries)

    def network(self) -> dict:
        """The arguments of the method's network, but for num_classes, which is the dataset's.

        Raises:
            ValueError: `transformer` is no change of them.
        """
        network = METHODS[self.method].network(PRESETS[self.preset])
        return network | read_changes(self.transformer, network)

    def check(self) -> None:
        """Raises a ValueError for choices that do not go together."""
        if self.mask_ratio and not METHODS[self.method].has_mask:
            raise ValueError(f"mask_ratio is {self.mask_ratio}; {self.method} has no mask, so it must be 0.")
        for name in self.auxiliaries:
            if name not in AUXILIARIES:
                raise ValueError(
                    f"auxiliary is {shortened(name)}; it must be 'none' alone, or some of "
                    f"{', '.join(AUXILIARIES)}."
                )
            if self.auxiliary.count(name) > 1:
                raise ValueError(f"auxiliary names {name} twice.")
            networks = AUXILIARIES[name].networks
            methods = [each for each, row in METHODS.items() if issubclass(row.transformer, networks)]
            if self.method not in methods:
                raise ValueError(
                    f"auxiliary is {name}, which goes with {', '.join(methods)}, not with {self.method}."
                )
        self.network()


GROUPS = [
    DataOptions,
    NetworkOptions,
    *dict.fromkeys(options for row in PROCESSES.values() for options in row.options),
    *(row.options for row in AUXILIARIES.values() if row.options),
    OptimizerOptions,
    EvaluationOptions,
    OutputOptions,
    HubOptions,
]


@dataclass
class TrainingConfig(*GROUPS, RunConfig):
    """The settings of a run; the defaults are the paper's (Table A1 and Sec. 4.1)."""

    def __post_init__(self):
        check_options(self)
        self.dataset_name = self.dataset_name or RECIPES[self.preset].get("dataset_name", "")
        self.output_dir = self.output_dir or f"{self.method}-{self.preset.replace('/', '-')}"
        if not self.dataset_name and not self.dry_run:
            raise ValueError(
                f"The preset {self.preset} needs --dataset_name, a folder or a dataset on the Hub."
            )
        check_groups(self, GROUPS)

    def check_choices(self) -> None:
        """Holds options of what was not chosen against the preset's values.

        Raises:
            ValueError: one was changed, which would change nothing.
        """
        own, process = METHODS[self.method], PROCESSES[self.process]
        others = {name: self.method for row in METHODS.values() for name in row.options if row is not own}
        if not own.has_mask:
            others["mask_ratio_schedule"] = self.method
        for row in PROCESSES.values():
            others |= {
                name: f"the process {self.process}" for name in row.names() if name not in process.names()
            }
        for key in AUXILIARIES.keys() - set(self.auxiliaries):
            others |= dict.fromkeys(AUXILIARIES[key].names(), f"{self.method} without {key}")
        if "time_distribution" in process.names() and self.time_distribution == "uniform":
            others |= {"p_mean": "uniform time", "p_std": "uniform time"}
        usual = process.settings | RECIPES[self.preset]
        for name in sorted(others):
            value, left = getattr(self, name), usual.get(name, getattr(TrainingConfig, name))
            if value != left:
                raise ValueError(
                    f"{name} is {shortened(value)}; {others[name]} has no such option: leave it at {left!r}."
                )

    @property
    def title(self) -> str:
        return f"{self.method} {self.preset}"

    def identity(self) -> dict:
        names = PROCESSES[self.process].names()
        shared = {name: getattr(self, name) for name in ("prediction", "sigma_data") if name in names}
        return {"method": self.method, "process": self.process, **shared}

    def own(self) -> list[str]:
        names = ["mask_ratio", "mask_ratio_schedule", "label_dropout", *METHODS[self.method].options]
        for row in (PROCESSES[self.process], *(AUXILIARIES[name] for name in self.auxiliaries)):
            names += row.names()
        return names

    def card(self) -> dict:
        usual = METHODS[self.method].settings.get("auxiliary", [])
        added = [AUXILIARIES[name].title for name in self.auxiliaries if name not in usual]
        return {
            "method": METHODS[self.method].title,
            "tags": [self.method],
            "program": "train_sddit.py",
            "rows": {"preset": self.preset, "process": PROCESSES[self.process].title}
            | ({"auxiliary losses": ", ".join(added)} if added else {}),
            "guided": True,
            "distilled": "",
            "discriminates": "discrimination" in self.auxiliaries and self.discriminative_weight > 0,
            "start": self.pretrained_model_name_or_path,
        }


ABOUT = """Trains SD-DiT, or a method that it is compared with; without options, on handwritten digits.

    sddit train
    sddit train --preset cifar10 --dataset_name FOLDER --image_column image --output_dir mine
    sddit train --config configs/imagenet-sddit-xl-2.json --dataset_name imagenet-latents
    sddit train --preset SiT-XL/2 --help    # with the defaults of another preset
    accelerate launch --config_file configs/ddp.yaml -m sddit train --preset cifar10
"""


def parse(arguments: list[str] | None = None, raises: bool = False) -> TrainingConfig:
    """The configuration of a command line, `sys.argv` by default.

    Where it is wrong it leaves with a message, or `raises` a ValueError.
    """
    parser = Parser(GROUPS, doc=ABOUT, raises=raises)
    parser.add_argument("--config", metavar="FILE", help="JSON of options, which the command line overrides")
    first = Parser([], add_help=False)
    for name in ("config", "preset", "method", "process"):
        first.add_argument(f"--{name}")
    chosen, _ = first.parse_known_args(arguments)
    try:
        options = read_options(chosen.config, TrainingConfig) if chosen.config else {}
        recipe = RECIPES.get(chosen.preset or options.get("preset", TrainingConfig.preset), {})
        asked = recipe | options | {name: value for name, value in vars(chosen).items() if value}
        method = METHODS.get(asked.get("method", TrainingConfig.method))
        process = PROCESSES.get(asked.get("process", TrainingConfig.process))
        parser.set_defaults(**_settings_of(process) | recipe | _settings_of(method) | options)
        _tell_defaults(parser, options)
        chosen = parser.parse_known_options(arguments)
        if path := chosen.pop("config"):
            check_places(path, chosen)
        return TrainingConfig(**chosen)
    except ValueError as error:
        parser.error(str(error))


def _tell_defaults(parser: Parser, from_file: dict) -> None:
    """Says in `--help` on what a default depends: the presets, methods and processes, or a file's options."""
    owners = {
        "preset": RECIPES.values(),
        "method": map(_settings_of, METHODS.values()),
        "process": map(_settings_of, PROCESSES.values()),
    }
    found: dict[str, list[str]] = {}
    for owner, rows in owners.items():
        for name in {name for row in rows for name in row}:
            found.setdefault(name, []).append(owner)
    for name, of in found.items():
        parser.tell_defaults([name], f"by the {' and '.join(of)}, here {{}}")
    parser.tell_defaults(from_file, "by the file, here {}")


def _settings_of(row: Method | ProcessRow | None) -> dict:
    """What a method or a process changes; nothing, where it is not known yet."""
    no_auxiliaries = {"auxiliary": ["none"]} if isinstance(row, Method) else {}
    return no_auxiliaries | row.settings if row else {}
