"""What a run leaves for people to look at: metrics.jsonl, curves.png and grids of samples."""

import io
import json
import os
from pathlib import Path
from typing import IO

import matplotlib
import numpy as np
from PIL import Image

from ..evaluation.catalogue import METRICS
from ..files import parse_json, written_aside

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

# A row of metrics.jsonl: numbers by name and, where there are scores, which judge gave them, by extractor.
_ROW = {"step": range(2**63), "judges?": {str: str}, str: float}


class MetricsLog:
    """One JSON object a line; a resumed run first cuts what lies beyond the step it resumes from.

    Args:
        path: of the log; a link of that name is replaced, not followed.
        earlier: the log that a resumed run goes on with, if there is one.
    """

    def __init__(self, path: Path, start_step: int, earlier: Path | None = None):
        self.path, earlier = path, earlier or path
        rows = read_metrics(earlier) if start_step and earlier.exists() else []
        with written_aside(path, "w") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= start_step))

    def write(self, row: dict) -> None:
        try:
            with open(self.path, "a", opener=_open_no_link) as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            error.filename = error.filename or str(self.path)  # for the message of a full disk
            raise


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)  # Windows has no such flag


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that was cut off is left out.

    Raises:
        ValueError: a line that is no row.
    """
    *lines, last = path.read_bytes().split(b"\n")
    rows = [parse_json(line, _ROW, "row of metrics", f"{path}, line {i}") for i, line in enumerate(lines, 1)]
    try:
        return [*rows, parse_json(last, _ROW, "row of metrics", str(path))]
    except ValueError:
        return rows


_PANELS = (
    ("generative loss", ("loss_generative",)),
    ("discriminative loss (nats)", ("loss_discriminative",)),
    ("teacher: entropy / ln K, share of prototypes used", ("teacher_entropy", "prototypes_used")),
    ("KL of student from teacher (nats)", ("kl",)),
    ("learning rate", ("learning_rate",)),
    ("teacher momentum", ("teacher_momentum",)),
)
# Parts of the generative loss, and what has a panel above; of other losses each has its own.
_NO_PANEL = {"loss", "loss_mae", "loss_masked"}.union(*(names for _, names in _PANELS))
# Only in runs that are evaluated; an extractor other than Inception is in the name.
_SCORE_PANELS = (("Fréchet distance", ("fid",)), ("precision and recall", ("precision", "recall")))


def draw_curves(metrics: list[dict], path: Path) -> None:
    """Draws the metrics over steps: the values pale, their mean over 2 % of the run around a step on top."""
    with written_aside(path) as file:
        _draw_curves(metrics, file)


def picture_of_curves(metrics: list[dict]) -> Image.Image:
    """What [`draw_curves`] draws."""
    file = io.BytesIO()
    _draw_curves(metrics, file)
    return Image.open(file)


def _draw_curves(metrics: list[dict], file: IO[bytes]) -> None:
    """Writes the curves as a PNG."""
    scores = {name for row in metrics for name in row if name in METRICS}
    there = {name for row in metrics for name in row}
    losses = sorted(name for name in there - _NO_PANEL if name.startswith("loss_"))
    losses = [(f"{name.removeprefix('loss_')} loss", (name,)) for name in losses]
    panels = [*_PANELS[:2], *losses, *_PANELS[2:]]
    for title, kinds in _SCORE_PANELS:
        panels.append((title, tuple(sorted(name for name in scores if METRICS[name][0] in kinds))))
    panels = [panel for panel in panels if there.intersection(panel[1])] or panels[:1]
    columns = -(-len(panels) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(5 * columns, 7), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, names) in zip(axes.flat, panels, strict=False):
        for color, name in ((f"C{i}", name) for i, name in enumerate(names)):
            points = [(row["step"], row[name]) for row in metrics if name in row]
            if not points:
                continue
            steps, values = np.array(points).T
            if name in scores:
                axis.plot(steps, values, "o-", color=color, markersize=4, label=name)
            else:
                axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                axis.plot(steps, smooth(values, len(values) // 100), color=color, label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        drawn = axis.get_legend_handles_labels()[1]
        if len(drawn) > 1 or scores.intersection(drawn):
            axis.legend()
    figure.savefig(file, format="png", dpi=100)
    plt.close(figure)


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value and its neighbours up to `reach` away, of equally many on both sides."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(reach, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def draw_scores(runs: dict[str, list[dict]], metric: str, path: Path) -> None:
    """Draws one metric over steps, a curve for each run, with its last value.

    Args:
        runs: rows as in a metrics.jsonl, by the names that the runs are to have.

    Raises:
        ValueError: a run without the metric; the message says which metrics it has.
    """
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, metrics in runs.items():
        points = [(row["step"], row[metric]) for row in metrics if metric in row]
        if not points:
            known = sorted({key for row in metrics for key in row} - {"step", "judges"})
            plt.close(figure)
            raise ValueError(f"The run {name} has no {metric!r}; it has {', '.join(known) or 'nothing'}.")
        steps, values = np.array(points).T
        marker = "o" if len(values) <= 50 else ""
        axis.plot(steps, values, marker=marker, markersize=4, label=f"{name} ({values[-1]:.4g})")
    axis.set_xlabel("step")
    axis.set_ylabel(metric)
    axis.grid(alpha=0.3)
    axis.legend()
    with written_aside(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png", dpi=120)
    plt.close(figure)
