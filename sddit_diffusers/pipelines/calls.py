"""A call of a pipeline by somebody at a page: what may be asked, the code that asks it, what is made."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from .loading import is_embedded
from .pipeline_sddit import SDDiTPipeline, noise_level
from .sampling import class_name, generators, keep_denoised

MAX_SEED, MAX_GUIDANCE_SCALE = 2**32 - 1, 20
MAX_LEVEL = 1000.0  # of noise, of a scheduler that begins with noise alone


class WrongValue(ValueError):
    """A value that the page does not offer.

    Attributes:
        fields: the names of the parameters of [`call_of`] that it is about.
    """

    def __init__(self, message: object, *fields: str):
        super().__init__(str(message))
        self.fields = fields


def call_of(
    pipe: SDDiTPipeline, limits, classes, images, steps, guidance, low, high, seed
) -> tuple[dict, range]:
    """The pipeline's arguments, but for the generators, and the seeds of the images.

    The values come from a browser, or from whoever speaks like one, so they may be of any type: classes are
    to be a list of numbers and names, empty for unconditional images; `low` and `high` are the guidance
    interval, which is left out where it is all of 0..[`highest_level`]. `limits` has `max_images` of a call
    and `max_steps`.

    Raises:
        WrongValue: a value that the page does not offer; the message has the value and what is allowed.
    """
    null, most = pipe.transformer.config.num_classes, highest_level(pipe)
    try:
        ids = pipe.get_label_ids(None if classes == [] else classes)
    except ValueError as error:
        raise WrongValue(error, "classes") from None
    images = int(_within("images", "Images per class", images, 1, limits.max_images, whole=True))
    if len(ids) * images > limits.max_images:
        raise WrongValue(
            f"{len(ids)} classes x {images} images are {len(ids) * images} images; "
            f"at most {limits.max_images} are made at once.", "classes", "images",
        )  # fmt: skip
    arguments = {
        "class_labels": [None if i == null else i for i in ids],
        "num_images_per_label": images,
        "num_inference_steps": int(_within("steps", "Steps", steps, 1, limits.max_steps, whole=True)),
        "guidance_scale": _within("guidance", "Guidance scale", guidance, 0, MAX_GUIDANCE_SCALE),
    }
    low = _within("low", "Lowest sigma", low, 0, most)
    high = _within("high", "Highest sigma", high, low, most)
    if (low, high) != (0, most):
        arguments["guidance_interval"] = (low, high if high < most else math.inf)
    seed = int(_within("seed", "Seed", seed, 0, MAX_SEED, whole=True))
    return arguments, range(seed, seed + len(ids) * images)


def highest_level(pipe: SDDiTPipeline) -> float:
    """The noise level at which sampling begins, or what stands for infinity."""
    return pipe.scheduler.config.get("sigma_max", MAX_LEVEL)


def _within(field: str, name: str, value, low: float, high: float, whole: bool = False) -> float:
    if type(value) not in (int, float) or not low <= value <= high or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise WrongValue(f"{name}: {value!r:.50} is not {kind} from {low:g} to {high:.10g}.", field)
    return value


_STOP = """\
def stop(pipe, i, t, tensors):
    pipe._interrupt = i == {evaluation}
    return {{"latents": {denoised}}} if pipe._interrupt else {{}}

"""


def code_of(
    model: str, pipe: SDDiTPipeline, arguments: dict, seeds: range, evaluation: int | None = None
) -> str:
    """Python that makes the images of [`call_of`] again, as `images`.

    Args:
        model: the name by which `load_pipeline` found the pipeline.
        pipe: has the scheduler of the call, which is the pipeline's own or one of diffusers' in its place.
        evaluation: after which the denoised images are taken; None for the finished ones.
    """
    scheduler = type(pipe.scheduler)
    values = [f"{name}={_python(value)}" for name, value in arguments.items()]
    name, ours = ("DIGITS", "DIGITS, SDDiTPipeline") if is_embedded(model) else (repr(model), "SDDiTPipeline")
    options = f", dtype={{'transformer': {pipe.transformer.dtype}, 'default': torch.float32}}"
    options = "" if pipe.transformer.dtype == torch.float32 else options
    moved = "" if pipe.device.type == "cpu" else f".to({pipe.device.type!r})"
    imports, setting, stop = ["import torch", f"from sddit_diffusers import {ours}"], "", ""
    if is_swapped(pipe):
        imports.insert(1, f"from diffusers import {scheduler.__name__}")
        setting = f"pipe.scheduler = {scheduler.__name__}.from_config(pipe.scheduler.config)\n"
    values.append("generator=generators")
    if evaluation is not None:
        tells = not is_swapped(pipe) or _solver_outputs(pipe) is None
        denoised = 'tensors["pred_original_sample"]' if tells else "pipe.scheduler.model_outputs[-1]"
        stop = _STOP.format(evaluation=evaluation, denoised=denoised)
        values.append("callback_on_step_end=stop")
        values += ['callback_on_step_end_tensor_inputs=["pred_original_sample"]'] * tells
    return (
        "\n".join(imports) + "\n\n"
        f"pipe = SDDiTPipeline.from_pretrained({name}{options}){moved}\n{setting}"
        f"generators = [torch.Generator().manual_seed(seed) for seed in range({seeds.start}, {seeds.stop})]\n"
        f"{stop and chr(10) + stop}images = pipe({', '.join(values)}).images"
    )


def _python(value) -> str:
    """A value of a call as Python has it; infinity, which has no name, too."""
    return repr(value).replace("inf)", 'float("inf"))')


def is_swapped(pipe: SDDiTPipeline) -> bool:
    """Whether one of diffusers' schedulers has taken the place of the pipeline's own."""
    return type(pipe.scheduler).__module__.startswith("diffusers.")


def _solver_outputs(pipe: SDDiTPipeline) -> list[Tensor] | None:
    """The latest denoised samples of DPM-Solver++, whose steps do not tell them."""
    algorithm = str(pipe.scheduler.config.get("algorithm_type", ""))
    return getattr(pipe.scheduler, "model_outputs", None) if algorithm.endswith("dpmsolver++") else None


@dataclass
class Made:
    """The images of a call, and how they came about.

    Attributes:
        images: the finished ones, or the last denoised ones of a call that was stopped.
        captions: one an image.
        about: a sentence on them.
        stopped: whether the call was.
        denoised: D, `[images, c, h, w]` on the CPU, by falling noise level; empty where the scheduler does
            not tell it.
        evaluations: of the network, the number of each level's, from 0.
        sampler: the name of the scheduler's class.
        arguments, seeds: of [`call_of`].
    """

    images: list[Image.Image]
    captions: list[str]
    about: str
    stopped: bool
    denoised: dict[float, Tensor]
    evaluations: list[int]
    sampler: str
    arguments: dict
    seeds: range

    @property
    def positions(self) -> int:
        """Places on the path, from 1; at the last are the images themselves."""
        return max(1, len(self.denoised))

    def place(self, position) -> int:
        """A place on the path, of whatever type.

        Raises:
            WrongValue: there is no such place.
        """
        return int(_within("position", "Step", position, 1, self.positions, whole=True))

    def at(self, pipe: SDDiTPipeline, position) -> tuple[list[tuple[Image.Image, str]], str]:
        """The images at a place on the path with their captions, and a sentence on them.

        Raises:
            WrongValue: there is no such place.
        """
        position = self.place(position)
        images, about = self.images, self.about
        if position < self.positions:
            sigma = list(self.denoised)[position - 1]
            images = pipe.decode(self.denoised[sigma].to(pipe.device))
            about = f"The denoised D(x; σ) at σ = {sigma:.3g}, step {position} of {self.positions}"
        return list(zip(images, self.captions, strict=True)), about

    def places(self, most: int) -> list[int]:
        """At most so many places, evenly chosen with the first and the last."""
        count = min(most, self.positions)
        return [1 + round(i * (self.positions - 1) / max(1, count - 1)) for i in range(count)]

    def path(self, pipe: SDDiTPipeline, image: int, most: int) -> list[tuple[Image.Image, str]]:
        """How an image came about: it at [`places`], with captions; empty where the path is not known.

        Raises:
            WrongValue: there is no such image.
        """
        image = int(_within("image", "Image", image, 0, len(self.images) - 1, whole=True))
        if self.positions == 1:
            return []
        places, levels = self.places(most), list(self.denoised)
        latents = torch.stack([self.denoised[levels[place - 1]][image] for place in places[:-1]])
        pictures = [*pipe.decode(latents.to(pipe.device)), self.images[image]]
        captions = [f"σ {levels[place - 1]:.2g}" for place in places]
        return list(zip(pictures, captions, strict=True))

    def code(self, model: str, pipe: SDDiTPipeline, position) -> str:
        """Python that makes the images at a place on the path; empty where none can.

        Args:
            pipe: has the scheduler of the call.

        Raises:
            WrongValue: there is no such place.
        """
        position = self.place(position)
        if position == self.positions and not self.stopped:
            return code_of(model, pipe, self.arguments, self.seeds)
        if not self.denoised:
            return ""
        return code_of(model, pipe, self.arguments, self.seeds, self.evaluations[position - 1])


def make(
    pipe: SDDiTPipeline, arguments: dict, seeds: range, on_evaluation: Callable[[int, int], bool]
) -> Made:
    """Makes the images of [`call_of`].

    Args:
        on_evaluation: gets the evaluations of the network that are done and how many there are; True stops.
    """
    denoised, evaluations = {}, {}

    def keep(pipe: SDDiTPipeline, i: int, t: Tensor, tensors: dict) -> dict:
        if tensors["pred_original_sample"] is None and (outputs := _solver_outputs(pipe)):
            tensors = {"pred_original_sample": outputs[-1]}
        if tensors["pred_original_sample"] is not None:
            keep_denoised(denoised, pipe, i, tensors)
            evaluations[noise_level(pipe.scheduler, i)] = i
        keep.done = i + 1
        pipe._interrupt = on_evaluation(keep.done, pipe.num_timesteps)
        return {}

    start = time.perf_counter()
    images = pipe(**arguments, generator=generators(seeds), callback_on_step_end=keep,
                  callback_on_step_end_tensor_inputs=["pred_original_sample"]).images  # fmt: skip
    about = f"Made in {time.perf_counter() - start:.1f} s"
    stopped = keep.done < pipe.num_timesteps
    if stopped:
        about = f"Stopped after {keep.done} of {pipe.num_timesteps} evaluations"
        if denoised:
            images = pipe.decode(denoised[min(denoised)])  # an SDE's evaluations do not fall in their order
    labels = [label for label in arguments["class_labels"] for _ in range(arguments["num_images_per_label"])]
    names = ["" if label is None else f"{class_name(pipe, label)}, " for label in labels]
    captions = [f"{name}seed {seed}" for name, seed in zip(names, seeds, strict=True)]
    falling = sorted(denoised, reverse=True)
    return Made(
        images, captions, about, stopped, {level: denoised[level].cpu() for level in falling},
        [evaluations[level] for level in falling], type(pipe.scheduler).__name__, arguments, seeds,
    )  # fmt: skip
