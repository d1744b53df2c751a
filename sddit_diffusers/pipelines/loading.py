"""Pipelines, VAEs, schedulers and dtypes by name, and the hash of weights."""

import hashlib
import inspect
import json
import math
import re
import shlex
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, AutoModel, ConfigMixin, SchedulerMixin

from ..cli import one_line, shortened
from .pipeline_sddit import SDDiTPipeline, check_scheduler, default_steps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = dict(zip(("fp32", "bf16", "fp16"), DTYPES.values(), strict=True))  # accelerate's, ComfyUI's

_PACKAGE = Path(__file__).parents[1]
# DIGITS: the folder of a trained pipeline of handwritten digits.
_IN_WHEEL, _IN_CHECKOUT = _PACKAGE / "digits", _PACKAGE.parent / "pipelines/digits"
DIGITS = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT


def is_embedded(name: str) -> bool:
    """Whether a name is of the pipeline that comes with the package, as no folder has it."""
    return name == "digits" and not Path(name).exists()


def place_of(name: str) -> str:
    """Where the pipeline of a name is."""
    return str(DIGITS) if is_embedded(name) else name


def load_vae(name: str, **arguments) -> AutoencoderKL | AutoencoderTiny:
    """A VAE by name or path, of its own or within a pipeline.

    Raises:
        ValueError: there is none.
    """
    problems = []
    for subfolder in (None, "vae"):
        try:
            vae = AutoModel.from_pretrained(name, subfolder=subfolder, **arguments)
            break
        except Exception as error:  # whatever the Hub, the network and the reader raise
            problems.append(str(error).strip().split("\n")[0])
    else:
        raise ValueError(f"The VAE {name!r} cannot be loaded: {problems[Path(name, 'vae').is_dir()]}")
    if not isinstance(vae, (AutoencoderKL, AutoencoderTiny)):
        raise ValueError(
            f"{name!r} is a {type(vae).__name__}; allowed are AutoencoderKL and AutoencoderTiny."
        )
    return vae.eval().requires_grad_(False)


def sha256_of_weights(model: torch.nn.Module) -> str:
    """A SHA-256 of a model's weights and their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_pipeline(name: str, dtype: torch.dtype = torch.float32) -> SDDiTPipeline:
    """A pipeline by folder or name on the Hub, its transformer of a dtype, all else in float32.

    Args:
        name: "digits" is [`DIGITS`], where no folder has that name.

    Raises:
        ValueError: there is none.
    """
    name = place_of(name)
    try:
        dtypes = {"transformer": dtype, "default": torch.float32}
        return SDDiTPipeline.from_pretrained(name, dtype=dtypes)
    except Exception as error:  # whatever the Hub, the network and the readers raise
        problem = str(error).strip().split("\n")[0]
        if not Path(name).exists():  # diffusers' own words are of caches and of a stack trace
            hub = f", and the Hub gave none ({one_line(error.__cause__ or error)})"
            problem = f"there is no such folder{'' if name.startswith(('/', '.', '~')) else hub}."
        problem = way_from_checkpoint(name) or problem
        raise ValueError(f"The pipeline {name!r} cannot be loaded: {problem}") from None


def way_from_checkpoint(name: str) -> str:
    """How a training's checkpoint becomes a pipeline, if a folder is one."""
    if not Path(name, "checkpoint.json").is_file():
        return ""
    found = re.search(r"checkpoint-(\d+)", Path(name).name)  # it may be renamed, or set aside
    steps = found[1] if found else "STEP"
    options = f"--resume_from_checkpoint {shlex.quote(name)} --max_train_steps {steps}"
    return f"it is a checkpoint; its training, with {options}, leaves a pipeline."


def scheduler_of(
    scheduler: SchedulerMixin, name: str, changes: dict, num_inference_steps: int | None = None
) -> SchedulerMixin:
    """A scheduler with another one's settings.

    Args:
        name: of one of diffusers' that takes its place; of the same kind if it is empty.
        changes: settings that differ.
        num_inference_steps: for which it is tried; those of a call that names none if None.

    Raises:
        ValueError: there is no such scheduler or setting, or its settings make no schedule.
    """
    kind, known = type(scheduler), settings_of(scheduler)
    if name:
        names = swappable(scheduler)
        if name not in names:
            family = "flow" if "path" in scheduler.config else "EDM"
            raise ValueError(
                f"There is no {family} scheduler {shortened(name)}; diffusers has {', '.join(names)}."
            )
        kind = getattr(diffusers, name)
        own = inspect.signature(kind).parameters.values()
        known = {each.name: each.default for each in own if each.default is not None} | known
    for setting, value in changes.items():
        if setting not in known:
            raise ValueError(f"The scheduler has no setting {shortened(setting)}; it has {', '.join(known)}.")
        if problem := _setting_problem(known[setting], value):
            raise ValueError(f"{setting} of scheduler_options is {shortened(value)}; {problem}.")
    # Told whose settings they are, diffusers does not warn of those that another scheduler has no use for.
    settings = scheduler.config | {"_class_name": type(scheduler).__name__}
    try:
        made = kind.from_config(settings, **changes)
        check_scheduler(made)
        made.set_timesteps(num_inference_steps or default_steps(made))
    except Exception as error:  # whatever the schedulers' arithmetic raises
        raise ValueError(f"The scheduler's settings cannot be used: {one_line(error)}") from None
    goes_up = hasattr(type(made), "diffusion")  # an SDE's steps add noise
    if not made.sigmas.isfinite().all() or not (goes_up or (made.sigmas.diff() <= 0).all()):
        raise ValueError("The scheduler's settings cannot be used: its noise levels do not fall.")
    return made


def swappable(scheduler: SchedulerMixin) -> list[str]:
    """Names of diffusers' schedulers that can take the place of one."""
    if "path" in scheduler.config:
        return ["DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"]
    names = [name for name in dir(diffusers) if name.startswith("EDM")]  # with this package's own there
    return [name for name in names if getattr(diffusers, name).__module__.startswith("diffusers.")]


def settings_of(part: ConfigMixin) -> dict:
    """The settings of a scheduler or a model, without those that diffusers adds."""
    return {name: value for name, value in part.config.items() if not name.startswith("_")}


def _setting_problem(usual, value) -> str:
    """What a setting of a scheduler must be and is not, going by its usual value."""
    if isinstance(usual, (bool, str)) or usual is None:
        return "" if isinstance(value, type(usual)) else f"it must be such as {json.dumps(usual)}"
    allowed = int if isinstance(usual, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < math.inf:
        return f"it must be a {'whole ' * (allowed is int)}number above 0"
    return ""
