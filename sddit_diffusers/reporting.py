"""What a run leaves for people to look at: metrics.jsonl, curves.png and grids of samples."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw

from .files import written_aside
from .pipeline_sddit import SDDiTPipeline

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


class MetricsLog:
    """One JSON object a line; a resumed run first cuts what lies beyond the step it resumes from."""

    def __init__(self, path: Path, start_step: int):
        self.path = path
        kept = (
            [row for row in read_metrics(path) if row["step"] <= start_step]
            if start_step and path.exists()
            else []
        )
        with written_aside(path, "w") as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


_PANELS = (
    ("generative loss", ("loss_generative",)),
    ("discriminative loss (nats)", ("loss_discriminative",)),
    ("teacher: entropy / ln K, share of prototypes used", ("teacher_entropy", "prototypes_used")),
    ("KL of student from teacher (nats)", ("kl",)),
    ("learning rate", ("learning_rate",)),
    ("teacher momentum", ("teacher_momentum",)),
)


def draw_curves(metrics: list[dict], path: Path) -> None:
    """Draws the metrics over steps: the values pale, their mean over 2 % of the run around a step on top."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 7), layout="constrained")
    for axis, (title, names) in zip(axes.flat, _PANELS, strict=True):
        for color, name in zip(("tab:blue", "tab:orange"), names, strict=False):
            points = [(row["step"], row[name]) for row in metrics if name in row]
            if not points:
                continue
            steps, values = np.array(points).T
            axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axis.plot(steps, smooth(values, len(values) // 100), color=color, label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value and its neighbours up to `reach` away, of equally many on both sides."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(reach, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def sample_grid(pipe: SDDiTPipeline, classes: int = 10, columns: int = 10, **arguments) -> Image.Image:
    """A picture of samples: a row a class, evenly chosen, named at its left; image i has the seed i.

    `arguments` go to the pipeline's call.
    """
    num_classes = pipe.transformer.config.num_classes
    labels = np.linspace(0, num_classes - 1, min(classes, num_classes)).round().astype(int).tolist() or [None]
    seeds, images = list(range(len(labels) * columns)), []
    size = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    together = len(labels) if size <= 64 else 1  # rows made at once
    for i in range(0, len(labels), together):
        generators = [
            torch.Generator().manual_seed(seed) for seed in seeds[i * columns :][: together * columns]
        ]
        images += pipe(
            labels[i : i + together], num_images_per_label=columns, generator=generators, **arguments
        ).images
    names = ["" if label is None else pipe.id2label.get(label, str(label)) for label in labels]
    return draw_grid(images, names, columns)


def draw_grid(images: list[Image.Image], names: list[str], columns: int) -> Image.Image:
    """Rows of `columns` images with a name at the left of each; images below 64 pixels are enlarged."""
    zoom = -(-64 // images[0].height)
    width, height = images[0].width * zoom, images[0].height * zoom
    margin, gap = 14 + 7 * max(len(name) for name in names), 2
    grid = Image.new("RGB", (margin + columns * (width + gap), len(names) * (height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for row, name in enumerate(names):
        draw.text((6, row * (height + gap) + height // 2 - 6), name, fill="black")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        grid.paste(image, (margin + column * (width + gap), row * (height + gap)))
    return grid
