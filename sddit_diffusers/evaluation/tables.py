"""A study's results, and their tables in Markdown and JSON."""

import statistics
from collections.abc import Sequence

from .studies import Study, Table


class Results:
    """What was found, as far as the study has been run: numbers by run, by what they tell, and by seed.

    They tell ("score", step), ("last",), which is the last score, ("metric", name), ("speed",),
    ("k-NN", features, sigma), ("sampling", name), and of samplings, by names as those of `Table.points`,
    ("evaluations", name) of the network and ("images", name) a second.
    """

    def __init__(self):
        self._values: dict[tuple, dict[int, float]] = {}

    def add(self, run: str, seed: int, what: tuple, value: float) -> None:
        self._values.setdefault((run, *what), {})[seed] = value

    def of(self, run: str, what: tuple) -> list[float]:
        """The seeds' values."""
        return list(self._values.get((run, *what), {}).values())

    def score_of(self, run: str, sampling: str) -> list[float]:
        """The seeds' scores of a sampling, or of a run by itself."""
        return self.of(run, ("sampling", sampling) if sampling else ("last",))

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
    if table.kind == "evaluations":
        return rows_of_lines(table, results)
    columns = columns_of(table, study, results)
    rows = [
        [run, paper, *(results.of(run, what) for what in columns.values())]
        for run, paper in table.paper.items()
    ]
    return ["run", "paper", *columns], rows


def rows_of_lines(table: Table, results: Results) -> tuple[list[str], list[list]]:
    """As [`rows_of`]: the scores of each line by evaluations, and below them the images a second."""
    costs = {place: results.of(place[0], ("evaluations", place[1])) for place in table.sampled}
    columns = sorted({cost for found in costs.values() for cost in found})
    scores, speeds = [], []
    for line, points in table.points.items():
        places = {cost: place for place in points for cost in costs[place]}
        found = [places.get(cost) for cost in columns]
        scores.append([line, table.paper[line], *(place and results.score_of(*place) for place in found)])
        images = [place and results.of(place[0], ("images", place[1])) for place in found]
        speeds.append([f"{line}, images/s", None, *images])
    return ["evaluations", "paper", *map(str, columns)], scores + speeds


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
        lines += [f"## {table.title}", "", _row(head), "|" + "---|" * len(head)]
        for name, paper, *values in rows:
            quoted = " / ".join(f"{number:g}" for number in paper) if isinstance(paper, list) else show(paper)
            lines.append(_row([name, quoted, *map(show, values)]))
        lines += ["", f"![{table.title}]({table.name}.png)", ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    """A line of a table, whose cells may have its bars."""
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def as_json(study: Study, results: Results) -> dict:
    """The same, with each seed's value."""
    tables = []
    for table in study.tables:
        head, rows = rows_of(table, study, results)
        tables.append({"title": table.title, "kind": table.kind, "columns": head, "rows": rows})
    return {"title": study.title, "seeds": study.seeds, "metric": study.metric, "tables": tables}
