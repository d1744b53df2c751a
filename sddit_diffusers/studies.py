"""What a study is, and how its results are told: tables in Markdown and JSON, figures.

A study is a JSON file of runs by name and of tables and figures made of them:
- `title`, `about`: what readers are told;
- `settings`: of `train_sddit.py`, for all runs; `seeds`: each run is trained with all of them;
- `metric`: the score of `metrics.jsonl` that the tables are about;
- `runs`: the settings of each run that differ;
- `tables`: each with a `title`, a `kind` and, by name of the run, the `paper`'s figures or null. The kinds:
  `steps` (the score over steps), `speed` (steps a second against the score; the paper's are pairs), `setting`
  (the score over the value of a `setting`), `metrics` (the last values of `columns`), `probe` (what the
  encoder knows, at `sigmas`), and `sampling` (the score of one `run` with each of the `samplings`, by name:
  arguments of the pipeline's call, and `scheduler`, settings of its scheduler).
"""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

KINDS = ("steps", "speed", "setting", "metrics", "probe", "sampling")


@dataclass
class Table:
    """A table of a study, as its file has it."""

    title: str
    kind: str
    paper: dict[str, float | list | None]  # by row; the rows are runs, or samplings
    setting: str = ""
    columns: list[str] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    run: str = ""
    samplings: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"its kind is {self.kind!r}; there are {', '.join(KINDS)}.")
        needed = {"setting": "setting", "metrics": "columns", "probe": "sigmas", "sampling": "samplings"}
        if self.kind in needed and not getattr(self, needed[self.kind]):
            raise ValueError(f"a table of kind {self.kind} needs {needed[self.kind]}.")
        if self.kind == "sampling" and set(self.paper) != set(self.samplings):
            raise ValueError(
                "paper must have the names of the samplings, with null where there is no figure."
            )

    @property
    def runs(self) -> list[str]:
        """The runs that it is made of."""
        return [self.run] if self.kind == "sampling" else list(self.paper)

    @property
    def name(self) -> str:
        """For its figure's files."""
        return slug(self.title.split(":")[0])


@dataclass
class Study:
    """A study's file."""

    title: str
    about: str
    settings: dict
    seeds: list[int]
    metric: str
    runs: dict[str, dict]
    tables: list[Table]

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}; they must be different, and at least one.")
        for table in self.tables:
            for run in table.runs:
                if run not in self.runs:
                    raise ValueError(
                        f"{table.title}: there is no run {run!r}; there are {', '.join(self.runs)}."
                    )
                if table.setting and table.setting not in self.settings | self.runs[run]:
                    raise ValueError(f"{table.title}: {run} has no setting {table.setting!r}.")
        for kind in ("speed", "probe"):
            if sum(table.kind == kind for table in self.tables) > 1:
                raise ValueError(f"there are several tables of kind {kind}; there can be one.")
        for what, names in (
            ("runs", self.runs),
            ("tables", [table.name for table in self.tables]),
            *(("samplings", table.samplings) for table in self.tables),
        ):
            if len({slug(name) for name in names}) < len(names):
                raise ValueError(f"the {what} need names whose letters and digits differ.")


def slug(name: str) -> str:
    """Letters, digits, points and dashes, for files."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def read_study(path: Path) -> Study:
    """Reads a study's file.

    Raises:
        ValueError: it cannot be read, or is no study; the message says what is wrong.
    """
    where = ""
    try:
        content, tables = json.loads(path.read_text()), []
        for table in content.pop("tables"):
            where = f"{table.get('title')}: "
            tables.append(Table(**table))
        where = ""
        return Study(tables=tables, **content)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no study: {where}{problem}") from None


class Results:
    """What was found, as far as the study has been run: numbers by run, by what they tell, and by seed.

    They tell ("score", step), ("last",), which is the last score, ("metric", name), ("speed",),
    ("k-NN", features, sigma) and ("sampling", name).
    """

    def __init__(self):
        self._values: dict[tuple, dict[int, float]] = {}

    def add(self, run: str, seed: int, what: tuple, value: float) -> None:
        self._values.setdefault((run, *what), {})[seed] = value

    def of(self, run: str, what: tuple) -> list[float]:
        """The seeds' values."""
        return list(self._values.get((run, *what), {}).values())

    def steps(self, runs: Sequence[str]) -> list[int]:
        """At which any of the runs was scored."""
        return sorted({what[0] for run, kind, *what in self._values if kind == "score" and run in runs})


def columns_of(table: Table, study: Study, results: Results) -> dict[str, tuple]:
    """What a table tells of each run, by the headings of its columns."""
    if table.kind == "steps":
        return {f"{step:,}": ("score", step) for step in results.steps(table.runs)}
    if table.kind == "speed":
        return {"steps/s": ("speed",), study.metric: ("last",)}
    if table.kind == "metrics":
        return {name: ("metric", name) for name in table.columns}
    if table.kind == "probe":
        return {
            f"{features}, σ = {sigma:g}": ("k-NN", features, sigma)
            for features in ("[CLS]", "patches")
            for sigma in table.sigmas
        }
    return {study.metric: ("last",)}  # of a setting


def rows_of(table: Table, study: Study, results: Results) -> tuple[list[str], list[list]]:
    """Headings, and the rows: a name, what the paper says, and lists of the seeds' values."""
    if table.kind == "sampling":
        rows = [
            [name, paper, results.of(table.run, ("sampling", name))] for name, paper in table.paper.items()
        ]
        return ["sampling", "paper", study.metric], rows
    columns = columns_of(table, study, results)
    rows = [
        [run, paper, *(results.of(run, what) for what in columns.values())]
        for run, paper in table.paper.items()
    ]
    return ["run", "paper", *columns], rows


def show(value: float | list[float] | None) -> str:
    """A cell: a number, or the mean of the seeds with their standard deviation."""
    if value is None or value == []:
        return "–"
    if isinstance(value, list):
        spread = f" ± {statistics.stdev(value):.2g}" if len(value) > 1 else ""
        return f"{statistics.fmean(value):.4g}{spread}"
    return f"{value:g}"


def markdown(study: Study, results: Results) -> str:
    """All tables; a mean over the seeds has their standard deviation after ±."""
    lines = [f"# {study.title}", "", study.about, ""]
    for table in study.tables:
        head, rows = rows_of(table, study, results)
        lines += [f"## {table.title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for name, paper, *values in rows:
            quoted = " / ".join(f"{number:g}" for number in paper) if isinstance(paper, list) else show(paper)
            lines.append(f"| {' | '.join([name, quoted, *map(show, values)])} |")
        lines += ["", f"![{table.title}]({table.name}.png)", ""]
    return "\n".join(lines)


def as_json(study: Study, results: Results) -> dict:
    """The same, with each seed's value."""
    tables = []
    for table in study.tables:
        head, rows = rows_of(table, study, results)
        tables.append({"title": table.title, "kind": table.kind, "columns": head, "rows": rows})
    return {"title": study.title, "seeds": study.seeds, "metric": study.metric, "tables": tables}


def draw(table: Table, study: Study, results: Results, folder: Path) -> None:
    """The table's figure, as PNG and SVG; seeds' means, and their spread from the lowest to the highest."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axis.set_ylabel(study.metric)
    DRAWINGS[table.kind](axis, table, study, results)
    axis.set_title(table.title, wrap=True)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=8)
    for ending in ("png", "svg"):
        figure.savefig(
            folder / f"{table.name}.{ending}", dpi=120, metadata={"Date": None} if ending == "svg" else None
        )
    plt.close(figure)


def _draw_steps(axis, table: Table, study: Study, results: Results) -> None:
    for run in table.runs:
        steps = results.steps([run])
        _draw_line(axis, steps, [results.of(run, ("score", step)) for step in steps], run)
    axis.set_xlabel("step")
    axis.set_yscale("log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks("{x:g}")


def _draw_speed(axis, table: Table, study: Study, results: Results) -> None:
    for run in table.runs:
        speed, scores = results.of(run, ("speed",)), results.of(run, ("last",))
        if speed and scores:
            low, mean, high = _spread(scores)
            axis.errorbar(speed, [mean], [[mean - low], [high - mean]], fmt="o", capsize=3)
            axis.annotate(run, (speed[0], mean), (6, 6), textcoords="offset points")
    axis.set_xlabel("training steps a second")
    axis.margins(0.2)


def _draw_setting(axis, table: Table, study: Study, results: Results) -> None:
    points = {}
    for run in table.runs:
        value = (study.settings | study.runs[run])[table.setting]
        scores = results.of(run, ("last",))
        if scores and value == "student":  # a distribution, which has no place on the axis
            axis.axhline(statistics.fmean(scores), linestyle="--", color="tab:orange", label=run)
        elif scores:
            points[float(value)] = scores
    xs = sorted(points)
    _draw_line(axis, xs, [points[x] for x in xs], study.metric)
    if xs and 0 < min(xs) < max(xs) / 50:
        axis.set_xscale("log")
    axis.set_xlabel(table.setting)


def _draw_metrics(axis, table: Table, study: Study, results: Results) -> None:
    width = 0.8 / len(table.columns)
    for i, run in enumerate(table.runs):
        for j, name in enumerate(table.columns):
            if values := results.of(run, ("metric", name)):
                low, mean, high = _spread(values)
                place, reach = i + (j + 0.5) * width - 0.4, [[mean - low], [high - mean]]
                axis.bar(place, mean, width, yerr=reach, capsize=2, color=f"C{j}", label=None if i else name)
    axis.set_xticks(range(len(table.runs)), table.runs, rotation=20)
    axis.set_ylabel("")


def _draw_probe(axis, table: Table, study: Study, results: Results) -> None:
    for i, run in enumerate(table.runs):
        for features, style in (("[CLS]", "--"), ("patches", "-")):
            values = [results.of(run, ("k-NN", features, sigma)) for sigma in table.sigmas]
            if all(values):
                _draw_line(axis, table.sigmas, values, f"{run}, {features}", color=f"C{i}", linestyle=style)
    axis.set_xscale("log")
    axis.set_xlabel("σ")
    axis.set_ylabel("k-NN accuracy")


def _draw_sampling(axis, table: Table, study: Study, results: Results) -> None:
    found = {name: results.of(table.run, ("sampling", name)) for name in table.samplings}
    found = {name: values for name, values in found.items() if values}
    _draw_line(axis, range(len(found)), list(found.values()), table.run)
    axis.set_xticks(range(len(found)), found, rotation=20)


def _draw_line(axis, xs, values: list[list[float]], label: str, **style) -> None:
    if not values:
        return
    low, mean, high = zip(*map(_spread, values), strict=True)
    (line,) = axis.plot(xs, mean, marker="o", markersize=4, label=label, **style)
    axis.fill_between(xs, low, high, color=line.get_color(), alpha=0.15)


def _spread(values: list[float]) -> tuple[float, float, float]:
    return min(values), statistics.fmean(values), max(values)


DRAWINGS = {
    "steps": _draw_steps,
    "speed": _draw_speed,
    "setting": _draw_setting,
    "metrics": _draw_metrics,
    "probe": _draw_probe,
    "sampling": _draw_sampling,
}
