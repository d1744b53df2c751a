"""The figures of a study's tables: means over the seeds, and their spread from the lowest to the highest."""

import statistics
from pathlib import Path

import matplotlib

from ..files import written_aside
from .studies import FIGURES, Study, Table
from .tables import Results, gains_of, rows_of, with_seeds

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402


def draw(table: Table, study: Study, results: Results, folder: Path) -> None:
    """The table's figure, as PNG and SVG."""
    panels = {"evaluations": 2, "time": 2, "judges": len(table.columns) - 1}.get(table.kind, 1)
    height = 1.5 + 0.3 * len(table.runs) if table.kind == "ranking" else 4.5
    figure, axes = plt.subplots(
        1, panels, figsize=(2 + 5 * panels, height), layout="constrained", sharey=True, squeeze=False
    )
    axes[0, 0].set_ylabel(_text(study.metric))
    DRAWINGS[table.kind](*axes[0], table, study, results)
    figure.suptitle(_text(table.title), wrap=True)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if len(labels) > 8:  # they would cover the lines
        figure.legend(handles, labels, fontsize=8, loc="outside right center")
    elif labels:
        axes[0, 0].legend(fontsize=8)
    for ending in FIGURES:
        about = {"Date": None} if ending == "svg" else None
        with written_aside(folder / f"{table.name}.{ending}") as file:
            figure.savefig(file, format=ending, dpi=120, metadata=about)
    plt.close(figure)


def _text(name: str) -> str:
    """A name as it is: matplotlib reads formulas between dollars, and has no legend of what begins with _."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def _style(i: int) -> dict[str, str]:
    """Of the i-th line: ten colours, and dashes once they are used up."""
    return {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}


def _draw_steps(axis, table: Table, study: Study, results: Results) -> None:
    for i, run in enumerate(table.runs):
        steps = results.steps([run])
        scores = [results.of(run, ("score", step)) for step in steps]
        _draw_line(axis, steps, scores, _text(run), **_style(i))
    axis.set_xlabel("step")
    _scale_scores(axis)


def _draw_speed(axis, table: Table, study: Study, results: Results) -> None:
    for run in table.runs:
        speed, scores = results.of(run, ("speed",)), results.of(run, ("last",))
        if speed and scores:
            low, mean, high = _spread(scores)
            axis.errorbar(speed, [mean], [[mean - low], [high - mean]], fmt="o", capsize=3)
            axis.annotate(_text(run), (speed[0], mean), (6, 6), textcoords="offset points")
    axis.set_xlabel("training steps a second")
    axis.margins(0.2)


def _draw_time(axis, seconds, table: Table, study: Study, results: Results) -> None:
    _draw_steps(axis, table, study, results)
    for i, run in enumerate(table.runs):
        if speed := results.of(run, ("speed",)):
            steps = results.steps([run])
            xs, scores = (
                [step / speed[0] for step in steps],
                [results.of(run, ("score", step)) for step in steps],
            )
            _draw_line(seconds, xs, scores, _text(run), **_style(i))
    seconds.set_xlabel("seconds of training")
    if target := results.of(table.reference, ("last",)):
        for panel in (axis, seconds):
            panel.axhline(statistics.fmean(target), linestyle="--", color="grey", linewidth=1)


def _draw_ranking(axis, table: Table, study: Study, results: Results) -> None:
    """Bars of the share of the reference's time; those that do not come to its score have none."""
    _, rows = rows_of(table, study, results)
    for i, (run, *_, shares) in enumerate(rows):
        found = [share for share in shares if share is not None]
        color = "tab:orange" if run == table.reference else "tab:blue"
        if found and len(found) == len(shares):
            low, mean, high = _spread(found)
            axis.barh(i, mean, xerr=[[mean - low], [high - mean]], capsize=3, color=color)
        else:
            told = f"{len(found)} of {len(shares)} come there" if shares else "no time yet"
            told = told if results.of(run, ("last",)) else "not run"
            axis.text(0.02, i, told, va="center", fontsize=8)
    names = [with_seeds(run, table, study, results) for run, *_ in rows]
    axis.set_yticks(range(len(rows)), [*map(_text, names)])
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first on top
    axis.set_axisbelow(True)
    axis.axvline(1, linestyle="--", color="grey", linewidth=1)
    axis.set_xlabel(f"time to the last score of {_text(table.reference)}, of its time")
    axis.set_ylabel("")


def _draw_gains(axis, table: Table, study: Study, results: Results) -> None:
    for i, (name, pair) in enumerate(table.pairs.items()):
        gains = gains_of(pair, study, results)
        found = {step: shares for step, shares in gains.items() if shares and None not in shares}
        _draw_line(axis, [*found], [*found.values()], _text(name), **_style(i))
    axis.axhline(1, linestyle="--", color="grey", linewidth=1)
    axis.set_xlabel("step")
    axis.set_ylabel(f"{_text(study.metric)} with, of that without")


def _draw_judges(*arguments) -> None:
    *axes, table, study, results = arguments
    first, *others = table.columns
    axes[0].set_ylabel(_text(first))
    for axis, name in zip(axes, others, strict=True):
        for run in table.runs:
            ours, theirs = (results.of(run, ("metric", each)) for each in (first, name))
            if ours and theirs:
                place = statistics.fmean(theirs), statistics.fmean(ours)
                axis.plot(*place, "o", color="tab:blue", markersize=4)
                axis.annotate(_text(run), place, (4, 3), textcoords="offset points", fontsize=7)
        axis.set_xlabel(_text(name))
        axis.margins(0.15)
        if axis.lines:
            axis.set_xscale("log")
            _scale_scores(axes[0])


def _draw_setting(axis, table: Table, study: Study, results: Results) -> None:
    points = {}
    for run in table.runs:
        value = study.settings_of(run)[table.setting]
        scores = results.of(run, ("last",))
        if scores and value == "student":  # a distribution, which has no place on the axis
            axis.axhline(statistics.fmean(scores), linestyle="--", color="tab:orange", label=_text(run))
        elif scores:
            points[float(value)] = scores
    xs = sorted(points)
    _draw_line(axis, xs, [points[x] for x in xs], _text(study.metric))
    if xs and 0 < min(xs) < max(xs) / 50:
        axis.set_xscale("log")
    axis.set_xlabel(_text(table.setting))


def _draw_metrics(axis, table: Table, study: Study, results: Results) -> None:
    width, told = 0.8 / len(table.columns), set()
    for i, run in enumerate(table.runs):
        for j, name in enumerate(table.columns):
            if values := results.of(run, ("metric", name)):
                low, mean, high = _spread(values)
                place, reach = i + (j + 0.5) * width - 0.4, [[mean - low], [high - mean]]
                label = None if name in told else _text(name)
                axis.bar(place, mean, width, yerr=reach, capsize=2, color=f"C{j}", label=label)
                told.add(name)
    axis.set_xticks(range(len(table.runs)), [*map(_text, table.runs)], rotation=20)
    axis.set_ylabel("")


def _draw_probe(axis, table: Table, study: Study, results: Results) -> None:
    for i, run in enumerate(table.runs):
        for features, style in (("[CLS]", "--"), ("patches", "-")):
            values = [results.of(run, ("k-NN", features, sigma)) for sigma in table.sigmas]
            if all(values):
                _draw_line(
                    axis, table.sigmas, values, f"{_text(run)}, {features}", color=f"C{i}", linestyle=style
                )
    axis.set_xscale("log")
    axis.set_xlabel("σ")
    axis.set_ylabel("k-NN accuracy")


def _draw_sampling(axis, table: Table, study: Study, results: Results) -> None:
    found = {name: results.of(table.run, ("sampling", name)) for name in table.samplings}
    found = {name: values for name, values in found.items() if values}
    _draw_line(axis, range(len(found)), list(found.values()), _text(table.run))
    axis.set_xticks(range(len(found)), [*map(_text, found)], rotation=20)


def _draw_evaluations(axis, speeds, table: Table, study: Study, results: Results) -> None:
    for panel, what, label in (
        (axis, "evaluations", "evaluations of the network"),
        (speeds, "images", "images a second"),
    ):
        for i, (line, points) in enumerate(table.points.items()):
            found = [(results.of(run, (what, name)), results.score_of(run, name)) for run, name in points]
            found = sorted((cost[0], scores) for cost, scores in found if cost and scores)
            if found:
                _draw_line(panel, *zip(*found, strict=True), _text(line), **_style(i))
        panel.set_xlabel(label)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
    _scale_scores(axis)


def _scale_scores(axis) -> None:
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    labelled = range(1, 10) if high < 10 * low else (1, 2, 5)  # more would run into one another
    axis.yaxis.set_major_locator(LogLocator(subs=labelled, numticks=100))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


def _draw_line(axis, xs, values: list[list[float]], label: str, **style) -> None:
    if not values:
        return
    low, mean, high = zip(*map(_spread, values), strict=True)
    (line,) = axis.plot(xs, mean, marker="o", markersize=4, label=label, **style)
    axis.fill_between(xs, low, high, color=line.get_color(), alpha=0.15)


def _spread(values: list[float]) -> tuple[float, float, float]:
    low, high = min(values), max(values)
    return low, min(max(statistics.fmean(values), low), high), high  # a mean of equal values may be rounded


DRAWINGS = {
    "steps": _draw_steps,
    "speed": _draw_speed,
    "time": _draw_time,
    "ranking": _draw_ranking,
    "judges": _draw_judges,
    "gains": _draw_gains,
    "setting": _draw_setting,
    "metrics": _draw_metrics,
    "probe": _draw_probe,
    "sampling": _draw_sampling,
    "evaluations": _draw_evaluations,
}
