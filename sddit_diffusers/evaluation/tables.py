"""A study's results, and their tables in Markdown and JSON."""

import math
import statistics
from collections.abc import Sequence
from urllib.parse import quote

from scipy.stats import spearmanr

from .catalogue import is_upward
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
        return list(self.by_seed(run, what).values())

    def by_seed(self, run: str, what: tuple) -> dict[int, float]:
        """The values by seed."""
        return self._values.get((run, *what), {})

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
    if table.kind in ("metrics", "judges"):
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
    if table.kind in ("time", "ranking"):
        return rows_of_times(table, study, results)
    if table.kind == "gains":
        return rows_of_gains(table, study, results)
    columns = columns_of(table, study, results)
    rows = [
        [run, paper, *(results.of(run, what) for what in columns.values())]
        for run, paper in table.paper.items()
    ]
    return ["run", "paper", *columns], rows


def rows_of_times(table: Table, study: Study, results: Results) -> tuple[list[str], list[list]]:
    """As [`rows_of`]: what a step and the whole take, the score as a multiple of the reference's of the same
    seed, and the time to the reference's score at its end.

    The rows of a ranking are in the order of that time.
    """
    rows, name, usual = [], table.reference, seconds_to(table.reference, table.reference, results)
    for run, paper in table.paper.items():
        step, steps = [1 / speed for speed in results.of(run, ("speed",))], results.steps([run])
        total = [step[0] * steps[-1]] if step and steps else []
        multiples, reached = ratios(run, name, ("last",), results), seconds_to(run, name, results)
        shares = {
            seed: None if found is None or not usual[seed] else found / usual[seed]
            for seed, found in reached.items()
        }
        scores = results.by_seed(run, ("last",))
        against = [multiples.get(seed) for seed in scores] if multiples else []
        times = [*reached.values()], [*shares.values()]
        rows.append([run, paper, step, total, [*scores.values()], against, *times])
    if table.kind == "ranking":
        rows.sort(key=lambda row: (_missing(row[6]), _mean(row[6]), _mean(row[4])))
    of_reference = [f"× {name}'s", f"s to {name}'s", f"× {name}'s time"]
    return ["run", "paper", "s a step", "s in all", study.metric, *of_reference], rows


def rows_of_gains(table: Table, study: Study, results: Results) -> tuple[list[str], list[list]]:
    """As [`rows_of`], of the seeds that both of a pair have: last scores, their ratio, those of the table's
    columns, which are other metrics, and earlier ones.
    """
    rows, steps = [], results.steps(table.runs)[:-1]
    for name, pair in table.pairs.items():
        seeds, gains = common_seeds(pair, results), gains_of(pair, study, results)
        both = [[results.by_seed(run, ("last",))[seed] for seed in seeds] for run in pair]
        whats = [("last",), *(("metric", metric) for metric in table.columns)]
        last = [[*ratios(*pair, what, results).values()] for what in whats]
        rows.append([name, table.paper[name], *both, *last, *(gains.get(step, []) for step in steps)])
    multiples = ["", *table.columns, *(f"at {step:,}" for step in steps)]
    head = ["pair", "paper", f"{study.metric}, with", "without", *(f"× {what}".strip() for what in multiples)]
    return head, rows


def gains_of(pair: Sequence[str], study: Study, results: Results) -> dict[int, list[float | None]]:
    """The ratios of two runs' scores by step, which are none if one of them distils and the other does not.

    A distillation's steps come after all of its parent's.
    """
    if len({study.parent_of(run) is None for run in pair}) > 1:
        return {}
    return {step: [*ratios(*pair, ("score", step), results).values()] for step in results.steps(pair)}


def common_seeds(runs: Sequence[str], results: Results) -> list[int]:
    """The seeds that all of the runs have."""
    first, *others = (results.by_seed(run, ("last",)) for run in runs)
    return [seed for seed in first if all(seed in other for other in others)]


def ratios(run: str, reference: str, what: tuple, results: Results) -> dict[int, float | None]:
    """Of what a run and a reference were found to have, by the seeds that both have; None: by nothing.

    Runs of a seed saw the same images and noises, and are better and worse together.
    """
    ours, theirs = results.by_seed(run, what), results.by_seed(reference, what)
    return {seed: ours[seed] / theirs[seed] if theirs[seed] else None for seed in ours if seed in theirs}


def seconds_to(run: str, reference: str, results: Results) -> dict[int, float | None]:
    """By seed, the time to the score that the reference has at its end.

    Each seed is held against the same seed of the reference, which saw the same images and noises, and which
    may come to that score before its end too; None is where it is not come to.
    """
    speed, targets = results.of(run, ("speed",)), results.by_seed(reference, ("last",))
    if not speed or not results.of(reference, ("speed",)):
        return {}
    found = {}
    for seed in [seed for seed in results.by_seed(run, ("last",)) if seed in targets]:
        scored = {step: results.by_seed(run, ("score", step)).get(seed) for step in results.steps([run])}
        curve = {step: score for step, score in scored.items() if score is not None}
        step = first_below([*curve], [*curve.values()], targets[seed])
        found[seed] = None if step is None else step / speed[0]
    return found


def first_below(steps: Sequence[int], scores: Sequence[float], target: float) -> float | None:
    """The step at which scores first are at most the target, between two by their logarithms; None: never.

    What comes before the first score is not known: a score that is there at once is there at its step.
    """
    for i, score in enumerate(scores):
        if score <= target:
            if i == 0:
                return float(steps[0])
            high, wanted, low = (math.log(max(each, 1e-9)) for each in (scores[i - 1], target, score))
            return steps[i - 1] + (steps[i] - steps[i - 1]) * ((high - wanted) / (high - low or 1))
    return None


def _missing(shares: list[float | None]) -> float:
    """The share of the seeds that do not come there; more than all, where there are none."""
    return shares.count(None) / len(shares) if shares else 2.0


def _mean(values: list[float | None]) -> float:
    """Of the numbers among them; infinite of none."""
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else math.inf


def agreements(table: Table, results: Results) -> dict[str, float | None]:
    """Spearman's rank correlation of the first column with each of the others, over the runs' means.

    It is 1 where both have the same order from the best run to the worst.
    """
    found = {}
    for name in table.columns[1:]:
        pairs = [
            [results.of(run, ("metric", each)) for each in (table.columns[0], name)] for run in table.runs
        ]
        means = [[_mean(one), _mean(other)] for one, other in pairs if one and other]
        has_order = len(means) > 2 and all(len(set(column)) > 1 for column in zip(*means, strict=True))
        sign = 1 if is_upward(name) == is_upward(table.columns[0]) else -1
        found[name] = sign * float(spearmanr(means).statistic) if has_order else None
    return found


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
        found = [each for each in value if each is not None]
        if not found:
            return "–"
        spread = f" ± {statistics.stdev(found):.2g}" if len(found) > 1 else ""
        some = f" ({len(found)} of {len(value)})" if len(found) < len(value) else ""
        return f"{statistics.fmean(found):.4g}{spread}{some}"
    return f"{value:g}"


def markdown(study: Study, results: Results, figures: str = ".", doubts: Sequence[str] = ()) -> str:
    """All tables; a mean over the seeds has their standard deviation after ±.

    Args:
        figures: the folder of the figures, from where the text will be.
        doubts: what is told above the tables of how little they can be trusted.
    """
    folder = "" if figures == "." else quote(f"{figures}/")
    lines = [f"# {study.title}", ""]
    for paragraph in [study.about, *study.summary, *doubts]:
        lines += [paragraph, ""]
    for table in study.tables:
        head, rows = rows_of(table, study, results)
        lines += [f"## {table.title}", "", _row(head), "|" + "---|" * len(head)]
        for name, paper, *values in rows:
            name = with_seeds(name, table, study, results)
            quoted = " / ".join(f"{number:g}" for number in paper) if isinstance(paper, list) else show(paper)
            lines.append(_row([name, quoted, *map(show, values)]))
        if table.kind == "judges":
            ranks = agreements(table, results)
            told = [f"{'–' if rank is None else f'{rank:.2f}'} with {name}" for name, rank in ranks.items()]
            what = f"Spearman's rank correlation of {table.columns[0]}, from the best run to the worst"
            lines += ["", f"{what}: {', '.join(told)}."]
        lines += ["", f"![{table.title}]({folder}{table.name}.png)", ""]
    for note in study.notes:
        lines += [note, ""]
    return "\n".join(lines)


def with_seeds(name: str, table: Table, study: Study, results: Results) -> str:
    """A row's name, with the number of its seeds where they are not all there."""
    seeds = len(common_seeds(table.pairs.get(name, [name]), results))
    return f"{name} ({seeds} of {len(study.seeds)} seeds)" if 0 < seeds < len(study.seeds) else name


def _row(cells: Sequence[str]) -> str:
    """A line of a table, whose cells may have its bars."""
    escaped = [cell.replace("|", r"\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def as_json(study: Study, results: Results) -> dict:
    """The same, with each seed's value."""
    tables = []
    for table in study.tables:
        head, rows = rows_of(table, study, results)
        tables.append({"title": table.title, "kind": table.kind, "columns": head, "rows": rows})
        if table.kind == "judges":
            tables[-1]["agreements"] = agreements(table, results)
    return {"title": study.title, "seeds": study.seeds, "metric": study.metric, "tables": tables}
