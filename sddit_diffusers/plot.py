"""Draws samples, how they come about, and the curves of trainings.

    sddit plot grid digits            # samples, a row a class
    sddit plot path digits            # how images come about: D at falling noise, a row a class
    sddit plot scores RUN OTHER_RUN   # a metric of runs' metrics.jsonl over steps, in one figure

The picture is `--output`, or named after what it is of. A path that ends in .gif or .webp is a film: a row
a class, and at each noise level a frame.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from .cli import Parser, check_options, one_line_errors, option, options
from .files import written_aside
from .pipelines.loading import load_pipeline
from .pipelines.pipeline_sddit import check_range
from .pipelines.sampling import path_frames, path_grid, sample_grid
from .training.metrics import draw_scores, read_metrics

_FILMS = (".gif", ".webp")
_FRAME, _LAST_FRAME = 80, 2000  # milliseconds


@dataclass
class PlotConfig:
    """The settings of a plot."""

    output: str = option(
        "", "the picture's file; grid.png, path.png or scores.png if not given", metavar="FILE"
    )
    metric: str = option(
        "fid", "what is drawn: a name in metrics.jsonl, such as fid_classifier", group="scores"
    )
    class_labels: list[str] = options(
        [], "numbers or names of classes; ten of all if not given", metavar="CLASS", group="grid and path"
    )
    columns: int = option(10, "pictures in a row", low=1, high=1000)
    num_inference_steps: int | None = option(
        None, "steps of the sampler; the pipeline's own if not given", low=1
    )
    guidance_scale: float = option(1.0, "of classifier-free guidance; 1 is off")
    guidance_interval: list[float] = options(
        [0.0, math.inf], "the lowest and highest noise level that are guided", metavar="SIGMA", low=0,
        infinite=True,
    )  # fmt: skip

    def __post_init__(self):
        check_options(self)
        check_range("guidance_interval", self.guidance_interval)


def plot_samples(kind: str, config: PlotConfig, name: str, path: Path) -> None:
    """The plots `grid` and `path`.

    Raises:
        ValueError: there is no such pipeline or class, or no such kind of picture.
        OSError: the picture cannot be written.
    """
    kinds = {ending: kind for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if path.suffix.lower() not in kinds:
        raise ValueError(f"output is {path}; it must end as a picture does, such as .png.")
    pipe = load_pipeline(name)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    labels = [int(label) if label.isdecimal() else label for label in config.class_labels]
    labels = pipe.get_label_ids(labels) or None
    arguments = {
        "columns": config.columns,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "guidance_interval": tuple(config.guidance_interval),
    }
    draw = sample_grid if kind == "grid" else path_grid
    film = {}
    if kind == "path" and path.suffix.lower() in _FILMS:
        picture, *more = path_frames(pipe, labels=labels, **arguments)
        durations = [_FRAME] * len(more) + [_LAST_FRAME]
        film = dict(save_all=True, append_images=more, duration=durations, loop=0)
    else:
        picture = draw(pipe, labels=labels, **arguments)
    with written_aside(path) as file:
        picture.save(file, format=kinds[path.suffix.lower()], **film)


def plot_scores(config: PlotConfig, names: Sequence[str], path: Path) -> None:
    """The plot `scores`.

    Raises:
        ValueError: a run without metrics, or without this one.
    """
    runs = {}
    for name in names:
        file = Path(name) / "metrics.jsonl"
        if not file.is_file():
            raise ValueError(f"There is no {file}: {name} is not a run's folder.")
        runs[name] = read_metrics(file)
    draw_scores(runs, config.metric, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(PlotConfig, prog="plot", doc=__doc__)
    parser.add_argument("kind", choices=("grid", "path", "scores"), help="what is drawn")
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="a pipeline, or with scores the folders of runs"
    )
    with one_line_errors("plot"):
        chosen = parser.parse_known_options(arguments)
        kind, names = chosen.pop("kind"), chosen.pop("names")
        config = PlotConfig(**chosen)
        path = Path(config.output or f"{kind}.png")
        if kind == "scores":
            plot_scores(config, names, path)
        elif len(names) > 1:
            raise ValueError(f"{kind} draws one pipeline, and {len(names)} were named.")
        else:
            plot_samples(kind, config, names[0], path)
        print(f"Drawn: {path}")


if __name__ == "__main__":
    main()
