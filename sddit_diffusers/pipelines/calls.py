"""A call of a pipeline by somebody at a page: what may be asked, the code that asks it, what is made."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from .pipeline_sddit import SDDiTPipeline
from .sampling import class_name, generators, keep_denoised

MAX_SEED, MAX_GUIDANCE_SCALE = 2**32 - 1, 20
MAX_LEVEL = 1000.0  # of noise, of a scheduler that begins with noise alone


def call_of(
    pipe: SDDiTPipeline, limits, classes, images, steps, guidance, low, high, seed
) -> tuple[dict, range]:
    """The pipeline's arguments, but for the generators, and the seeds of the images.

    The values come from a browser, or from whoever speaks like one, so they may be of any type: classes are
    to be a list of numbers and names, empty for unconditional images; `low` and `high` are the guidance
    interval, which is left out where it is all of 0..[`highest_level`]. `limits` has `max_images` of a call
    and `max_steps`.

    Raises:
        ValueError: a value that the page does not offer; the message has the value and what is allowed.
    """
    null, most = pipe.transformer.config.num_classes, highest_level(pipe)
    ids = pipe.get_label_ids(None if classes == [] else classes)
    images = int(_within("Images per class", images, 1, limits.max_images, whole=True))
    if len(ids) * images > limits.max_images:
        raise ValueError(
            f"{len(ids)} classes x {images} images are {len(ids) * images} images; "
            f"at most {limits.max_images} are made at once."
        )
    arguments = {
        "class_labels": [None if i == null else i for i in ids],
        "num_images_per_label": images,
        "num_inference_steps": int(_within("Steps", steps, 1, limits.max_steps, whole=True)),
        "guidance_scale": _within("Guidance scale", guidance, 0, MAX_GUIDANCE_SCALE),
    }
    low = _within("Lowest sigma", low, 0, most)
    high = _within("Highest sigma", high, low, most)
    if (low, high) != (0, most):
        arguments["guidance_interval"] = (low, high)
    seed = int(_within("Seed", seed, 0, MAX_SEED, whole=True))
    return arguments, range(seed, seed + len(ids) * images)


def highest_level(pipe: SDDiTPipeline) -> float:
    """The noise level at which sampling begins, or what stands for infinity."""
    return pipe.scheduler.config.get("sigma_max", MAX_LEVEL)


def _within(name: str, value, low: float, high: float, whole: bool = False) -> float:
    if type(value) not in (int, float) or not low <= value <= high or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name}: {value!r:.50} is not {kind} from {low:g} to {high:.10g}.")
    return value


def code_of(model: str, pipe: SDDiTPipeline, arguments: dict, seeds: range) -> str:
    """Python that makes the images of [`call_of`] again, as `images`."""
    dtype, device = pipe.transformer.dtype, pipe.device.type
    options = f", dtype={{'transformer': {dtype}, 'default': torch.float32}}"
    options = "" if dtype == torch.float32 else options
    moved = "" if device == "cpu" else f".to({device!r})"
    values = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return (
        "import torch\nfrom sddit_diffusers import SDDiTPipeline\n\n"
        f"pipe = SDDiTPipeline.from_pretrained({model!r}{options}){moved}\n"
        f"generators = [torch.Generator().manual_seed(seed) for seed in range({seeds.start}, {seeds.stop})]\n"
        f"images = pipe({values}, generator=generators).images"
    )


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
    """

    images: list[Image.Image]
    captions: list[str]
    about: str
    stopped: bool
    denoised: dict[float, Tensor]

    @property
    def positions(self) -> int:
        """Places on the path, from 1; at the last are the images themselves."""
        return max(1, len(self.denoised))

    def at(self, pipe: SDDiTPipeline, position) -> tuple[list[tuple[Image.Image, str]], str]:
        """The images at a place on the path with their captions, and a sentence on them.

        Raises:
            ValueError: there is no such place.
        """
        position = int(_within("Step", position, 1, self.positions, whole=True))
        images, about = self.images, self.about
        if position < self.positions:
            sigma = list(self.denoised)[position - 1]
            images = pipe.decode(self.denoised[sigma].to(pipe.device))
            about = f"The denoised D(x; σ) at σ = {sigma:.3g}, step {position} of {self.positions}"
        return list(zip(images, self.captions, strict=True)), about


def make(
    pipe: SDDiTPipeline, arguments: dict, seeds: range, on_evaluation: Callable[[int, int], bool]
) -> Made:
    """Makes the images of [`call_of`].

    Args:
        on_evaluation: gets the evaluations of the network that are done and how many there are; True stops.
    """
    denoised = {}

    def keep(pipe: SDDiTPipeline, i: int, t: Tensor, tensors: dict) -> dict:
        if tensors["pred_original_sample"] is not None:
            keep_denoised(denoised, pipe, i, tensors)
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
            images = pipe.decode(list(denoised.values())[-1])
    labels = [label for label in arguments["class_labels"] for _ in range(arguments["num_images_per_label"])]
    names = ["" if label is None else f"{class_name(pipe, label)}, " for label in labels]
    captions = [f"{name}seed {seed}" for name, seed in zip(names, seeds, strict=True)]
    falling = sorted(denoised, reverse=True)
    return Made(images, captions, about, stopped, {level: denoised[level].cpu() for level in falling})
