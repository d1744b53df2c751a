"""Images of seeds, and pictures of them: grids of samples, denoising paths."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..seeds import generator_for
from .pipeline_sddit import SDDiTPipeline, noise_level

# Matrix products of a CPU round the rows of an odd remainder otherwise: batches are filled up there.
MULTIPLE = 16
# Of bytes; in 0..1, as the pipeline gives images, it is 255 x + 0.5.
UINT8_RULE = "127.5 x + 128, clamped and truncated, of x in -1..1"


def image_size(pipe: SDDiTPipeline) -> int:
    """The side of the images of a call that names none, in pixels."""
    return pipe.transformer.config.sample_size * pipe.vae_scale_factor


def class_of(pipe: SDDiTPipeline, labels: Sequence[str], seed: int, index: int) -> int:
    """The class of the image with a number and a seed, by the setting `class_labels`.

    Raises:
        ValueError: a label that the pipeline does not have.
    """
    count = pipe.transformer.config.num_classes
    if labels == ["none"] or (count == 0 and labels in (["random"], ["balanced"])):
        return count
    if labels == ["random"]:
        return int(torch.randint(count, (), generator=generator_for(seed + index, 1)))
    if labels == ["balanced"]:  # every so many images in a row have each class once
        block, place = divmod(index, count)
        return int(torch.randperm(count, generator=generator_for(seed, 2, block))[place])
    label = labels[index % len(labels)]
    is_number = re.fullmatch("-?[0-9]{1,18}", label)
    return pipe.get_label_ids([int(label) if is_number else label])[0]


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """What the images of seeds are drawn with, one each."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(pipe: SDDiTPipeline, seeds: Sequence[int], labels: Sequence[int], **arguments: Any) -> np.ndarray:
    """Images of seeds and classes, as bytes `[n, h, w, channels]`; `arguments` go to the pipeline.

    Raises:
        FloatingPointError: an image is not finite.
    """
    null = pipe.transformer.config.num_classes
    extra = -len(seeds) % MULTIPLE if pipe.device.type == "cpu" else 0
    seeds, classes = list(seeds), [None if label == null else label for label in labels]
    generator = generators(seeds + seeds[-1:] * extra)
    images = pipe(classes + classes[-1:] * extra, generator=generator, output_type="pt", **arguments).images
    pixels = (images[: len(seeds)] * 255 + 0.5).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def sample_grid(
    pipe: SDDiTPipeline, classes: int = 10, columns: int = 10, labels: list | None = None, **arguments: Any
) -> Image.Image:
    """A picture of samples: a row a class, named at its left; image i has the seed i.

    Args:
        classes: how many, evenly chosen where `labels` does not say which.
        labels: numbers of classes, or None for the null class.
        arguments: go to the pipeline's call.
    """
    labels = labels or _spread_classes(pipe, classes)
    seeds, images = range(len(labels) * columns), []
    together = len(labels) if image_size(pipe) <= 64 else 1  # rows made at once
    for i in range(0, len(labels), together):
        generator = generators(seeds[i * columns :][: together * columns])
        images += pipe(
            labels[i : i + together], num_images_per_label=columns, generator=generator, **arguments
        ).images
    return draw_grid(images, _names(pipe, labels), columns)


def _spread_classes(pipe: SDDiTPipeline, count: int) -> list[int | None]:
    """Evenly chosen classes; the null class of a model that has no other."""
    num_classes = pipe.transformer.config.num_classes
    chosen = np.linspace(0, num_classes - 1, min(count, num_classes)).round().astype(int)
    return chosen.tolist() or [None]


def _names(pipe: SDDiTPipeline, labels: list[int | None]) -> list[str]:
    return ["" if label is None else class_name(pipe, label) for label in labels]


def class_name(pipe: SDDiTPipeline, label: int) -> str:
    """A class's name, or its number where it has none."""
    return pipe.id2label.get(label, str(label))


def draw_grid(
    images: list[Image.Image], names: list[str], columns: int, titles: list[str] | None = None
) -> Image.Image:
    """Rows of `columns` images, named at the left and, with titles, at the top; small ones are enlarged."""
    zoom = -(-64 // images[0].height)
    width, height = images[0].width * zoom, images[0].height * zoom
    margin, gap, top = 14 + 7 * max(len(name) for name in names), 2, 18 if titles else 0
    grid = Image.new("RGB", (margin + columns * (width + gap), top + len(names) * (height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(titles or []):
        draw.text((margin + column * (width + gap) + 2, 3), title, fill="black")
    for row, name in enumerate(names):
        draw.text((6, top + row * (height + gap) + height // 2 - 6), name, fill="black")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        grid.paste(image, (margin + column * (width + gap), top + row * (height + gap)))
    return grid


def path_grid(
    pipe: SDDiTPipeline, columns: int = 10, labels: list | None = None, **arguments: Any
) -> Image.Image:
    """A picture of how images come about: a row a label, the denoised D from the most noise to the least.

    Args:
        columns: noise levels that are shown, of those of the sampler's steps.
        labels: as in [`sample_grid`]; image i has the seed i.
        arguments: go to the pipeline's call.

    Raises:
        ValueError: the pipeline's scheduler does not tell D.
    """
    labels = labels or _spread_classes(pipe, 10)
    denoised = _denoised_path(pipe, labels, len(labels), **arguments)
    shown = np.linspace(0, len(denoised) - 1, min(columns, len(denoised))).round().astype(int)
    levels = [[*denoised][i] for i in shown]
    by_level = [pipe.decode(denoised[sigma]) for sigma in levels]
    images = [by_level[column][row] for row in range(len(labels)) for column in range(len(levels))]
    return draw_grid(images, _names(pipe, labels), len(levels), [f"{sigma:.3g}" for sigma in levels])


def path_frames(
    pipe: SDDiTPipeline, columns: int = 10, labels: list | None = None, **arguments
) -> list[Image.Image]:
    """The same as the frames of a film: at each noise level a grid of `columns` images a label.

    Args:
        labels: as in [`sample_grid`], whose grid the last frame is, but for the last step's rounding.

    Raises:
        ValueError: the pipeline's scheduler does not tell D.
    """
    labels = labels or _spread_classes(pipe, 10)
    denoised = _denoised_path(pipe, labels, len(labels) * columns, num_images_per_label=columns, **arguments)
    return [draw_grid(pipe.decode(each), _names(pipe, labels), columns) for each in denoised.values()]


def _denoised_path(pipe: SDDiTPipeline, labels: list, count: int, **arguments) -> dict[float, torch.Tensor]:
    """The denoised D of `count` images, of seeds from 0 on, by falling noise level."""
    denoised: dict[float, torch.Tensor] = {}

    def keep(pipe: SDDiTPipeline, i: int, t: torch.Tensor, tensors: dict) -> dict:
        if tensors["pred_original_sample"] is None:
            raise ValueError(f"{type(pipe.scheduler).__name__} does not tell the denoised samples.")
        keep_denoised(denoised, pipe, i, tensors)
        return {}

    pipe(labels, generator=generators(range(count)), output_type="latent", callback_on_step_end=keep,
         callback_on_step_end_tensor_inputs=["pred_original_sample"], **arguments)  # fmt: skip
    return {sigma: denoised[sigma] for sigma in sorted(denoised, reverse=True)}


def keep_denoised(denoised: dict[float, torch.Tensor], pipe: SDDiTPipeline, i: int, tensors: dict) -> None:
    """Puts the denoised D of evaluation i, among the `tensors` of a callback, beside those of other levels.

    Of two evaluations at one level the second stays, which is of the corrected sample.
    """
    denoised[noise_level(pipe.scheduler, i)] = tensors["pred_original_sample"]
