"""What a study is.

A study is a JSON file of runs by name and of tables and figures made of them:
- `title`, `about`: what readers are told;
- `settings`: of `train_sddit.py`, for all runs; `seeds`: each run is trained with all of them;
- `metric`: the score of `metrics.jsonl` that the tables are about;
- `runs`: the settings of each run that differ. A run with `of`, the name of another, is a distillation of
  that run with the same seed, and its settings are those of `distill_sddit.py`; `distillation` has some for
  all of these. Data and evaluation are the other run's;
- `summary` and `notes`, if there are any: paragraphs above and below the tables, such as what came out, and
  how it was measured;
- `tables`: each with a `title`, a `kind` and, by name of the run, the `paper`'s figures or null. The kinds:
  - `steps`: the score over steps;
  - `speed`: steps a second against the score; the paper's are pairs;
  - `time`: the score over seconds of training, beside that over steps, and how long each run takes to the
    score that the `reference`, one of them, has at its end;
  - `ranking`: the same in the order of that time;
  - `judges`: what several metrics, the `columns`, say of the runs, and how they agree;
  - `gains`: what something is worth, by the ratio of the scores of two runs, one with it and one without,
    over steps and seed by seed, and at the end by other metrics, the `columns`; the rows are `pairs`;
  - `setting`: the score over the value of a `setting`;
  - `metrics`: the last values of `columns`;
  - `probe`: what the encoder knows, at `sigmas`;
  - `sampling`: the score of one `run` with each of the `samplings`, by name: arguments of the pipeline's
    call, those of `SAMPLING`, `scheduler_class`, one of diffusers' in place of its scheduler, and
    `scheduler`, settings of it;
  - `evaluations`: the score and the images a second over the evaluations of the network; the rows are
    `lines`, each a list of distillations, which sample as they were made for, or a sampling as above of a
    `run`, with a list as its `num_inference_steps`.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..cli import shortened
from ..files import read_json
from ..pipelines.pipeline_sddit import check_range
from ..schedulers.scheduling_edm_heun import EDMHeunScheduler
from ..schedulers.scheduling_interpolant import InterpolantScheduler
from .catalogue import JUDGED, METRICS, is_upward, metric_name

KINDS = (
    "steps", "speed", "time", "ranking", "judges", "gains", "setting", "metrics", "probe", "sampling",
    "evaluations",
)  # fmt: skip
FIGURES = ("png", "svg")
RESULTS = ("results.md", "results.json", "speeds.json", "sampling-speeds.json")  # of a study, in its folder
# What a sampling may change; see `files.parse_json` for such structures.
SAMPLING = {
    "num_inference_steps?": range(1, 2**31), "sigmas?": [float], "guidance_scale?": float,
    "guidance_interval?": [float], "s_churn?": float, "s_tmin?": float, "s_tmax?": float, "s_noise?": float,
    "scheduler_class?": str, "scheduler?": dict,
}  # fmt: skip
_LINE = {name: kind for name, kind in SAMPLING.items() if name not in ("num_inference_steps?", "sigmas?")}
_LINE |= {"run": str, "num_inference_steps": [SAMPLING["num_inference_steps?"]]}
_TABLE = {
    "title": str, "kind": str, "paper": {str: (None, [float], float)}, "setting?": str, "columns?": [str],
    "sigmas?": [float], "run?": str, "reference?": str, "samplings?": {str: SAMPLING},
    "lines?": {str: ([str], _LINE)}, "pairs?": {str: [str]},
}  # fmt: skip
_STUDY = {
    "title": str, "about": str, "settings": dict, "seeds": [range(2**32)], "metric": str,
    "runs": {str: {"of?": str}}, "tables": [_TABLE], "distillation?": dict, "summary?": [str],
    "notes?": [str],
}  # fmt: skip


@dataclass
class Table:
    """A table of a study, as its file has it."""

    title: str
    kind: str
    paper: dict[str, float | list | None]  # by row; the rows are runs, samplings, lines or pairs
    setting: str = ""
    columns: list[str] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    run: str = ""
    reference: str = ""
    samplings: dict[str, dict] = field(default_factory=dict)
    lines: dict[str, list[str] | dict] = field(default_factory=dict)
    pairs: dict[str, list[str]] = field(default_factory=dict)  # of runs: one with something, one without

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"its kind is {self.kind!r}; there are {', '.join(KINDS)}.")
        needed = {"setting": "setting", "metrics": "columns", "probe": "sigmas", "sampling": "samplings"}
        needed |= {"evaluations": "lines", "judges": "columns", "time": "reference", "ranking": "reference"}
        needed |= {"gains": "pairs"}
        if self.kind in needed and not getattr(self, needed[self.kind]):
            raise ValueError(f"a table of kind {self.kind} needs {needed[self.kind]}.")
        if any(sigma <= 0 for sigma in self.sigmas):
            raise ValueError(f"sigmas are {self.sigmas}; they must be above 0.")
        if self.kind == "judges" and len(self.columns) < 2:
            raise ValueError(f"columns are {self.columns}; a table of kind judges needs two or more.")
        if self.reference and self.reference not in self.paper:
            raise ValueError(f"its reference is {shortened(self.reference)}, which is none of its runs.")
        rows = needed.get(self.kind)
        for name, pair in self.pairs.items():
            if len(pair) != 2:
                raise ValueError(f"the pair {shortened(name)} has {len(pair)} runs; it is of two.")
        if rows in ("samplings", "lines", "pairs") and set(self.paper) != set(getattr(self, rows)):
            raise ValueError(f"paper must have the names of the {rows}, with null where there is no figure.")
        for (_, name), sampling in self.sampled.items():
            try:
                _check_sampling(sampling, _LINE if self.kind == "evaluations" else SAMPLING)
            except ValueError as error:
                raise ValueError(f"the sampling {shortened(name)}: {error}") from None

    @property
    def runs(self) -> list[str]:
        """The runs that it is made of."""
        if self.kind == "evaluations":
            return list(dict.fromkeys(run for run, _ in self.sampled))
        if self.kind == "gains":
            return list(dict.fromkeys(run for pair in self.pairs.values() for run in pair))
        return [self.run] if self.kind == "sampling" else list(self.paper)

    @property
    def points(self) -> dict[str, dict[tuple[str, str], dict]]:
        """The samplings of each line, by run and name, which is empty of a run as it samples by itself."""
        found = {}
        for line, what in self.lines.items():
            if isinstance(what, list):
                found[line] = {(run, ""): {} for run in what}
                continue
            way = {name: value for name, value in what.items() if name != "run"}
            found[line] = {
                (what["run"], f"{line}, N = {steps}"): way | {"num_inference_steps": steps}
                for steps in what["num_inference_steps"]
            }
        return found

    @property
    def sampled(self) -> dict[tuple[str, str], dict]:
        """All samplings, by run and name as those of `points`."""
        if self.kind == "evaluations":
            return {place: way for points in self.points.values() for place, way in points.items()}
        return {(self.run, name): way for name, way in self.samplings.items() if self.kind == "sampling"}

    @property
    def ways(self) -> list[list]:
        """The same as run, name and sampling, for JSON."""
        return [[*place, sampling] for place, sampling in self.sampled.items()]

    def samplings_of(self, run: str) -> dict[str, dict]:
        """The samplings of a run that its training does not score, by name."""
        return {name: way for (owner, name), way in self.sampled.items() if owner == run and name}

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
    distillation: dict = field(default_factory=dict)
    summary: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}; they must be different, and at least one.")
        for run in self.runs:
            self.line_of(run)
        for table in self.tables:
            for run in table.runs:
                self._check_run(table, run)
            if table.kind == "setting":
                self._check_places(table)
            if table.reference and is_upward(self.metric):
                raise ValueError(
                    f"{table.title}: of {self.metric} more is better; time is measured to a distance."
                )
        for kind in ("speed", "probe", "evaluations"):
            if sum(table.kind == kind for table in self.tables) > 1:
                raise ValueError(f"there are several tables of kind {kind}; there can be one.")
        self._check_files()

    def settings_of(self, run: str) -> dict:
        """Of its program."""
        usual = self.settings if self.parent_of(run) is None else self.distillation
        return {name: value for name, value in (usual | self.runs[run]).items() if name != "of"}

    def parent_of(self, run: str) -> str | None:
        """The run that is distilled, of a distillation."""
        return self.runs[run].get("of")

    @property
    def timed(self) -> list[str]:
        """The runs whose steps a second are told of."""
        tables = [table for table in self.tables if table.kind in ("speed", "time", "ranking")]
        return list(dict.fromkeys(run for table in tables for run in table.runs))

    def in_order(self, runs: Iterable[str]) -> list[str]:
        """Runs, parents before children."""
        return sorted(runs, key=lambda run: len(self.line_of(run)))

    def line_of(self, run: str) -> list[str]:
        """What a run is distilled from: its parent, the parent of that, and so on.

        Raises:
            ValueError: there is no such run, or it comes from itself.
        """
        line = []
        while (parent := self.parent_of(line[-1] if line else run)) is not None:
            if parent not in self.runs:
                raise ValueError(
                    f"{shortened(run)} is of {shortened(parent)}; there is no such run, there are "
                    f"{', '.join(self.runs)}."
                )
            if parent in line or parent == run:
                raise ValueError(f"{shortened(run)} comes from itself: {' of '.join([run, *line, parent])}.")
            line.append(parent)
        return line

    def check_scores(self, run: str, extractors: list[str]) -> None:
        """Raises a ValueError for a score that is asked of a run, and that none of its extractors gives."""
        given = [metric_name(score, by) for by in extractors for score in JUDGED]
        asked = [column for table in self.tables if run in table.runs for column in table.columns]
        for name in [self.metric, *(column for column in asked if column in METRICS)]:
            if name not in given:
                raise ValueError(
                    f"{run} has no {name!r}: its evaluation_extractor, {' '.join(extractors)}, gives "
                    f"{', '.join(given)}."
                )

    def _check_run(self, table: Table, run: str) -> None:
        """Of a table."""
        if run not in self.runs:
            raise ValueError(
                f"{table.title}: there is no run {shortened(run)}; there are {', '.join(self.runs)}."
            )
        settings = self.settings_of(run)
        if table.setting and table.setting not in settings:
            raise ValueError(f"{table.title}: {run} has no setting {table.setting!r}.")
        if (run, "") in table.sampled and self.parent_of(run) is None:
            raise ValueError(f"{table.title}: {shortened(run)} is no distillation; give its line samplings.")

    def _check_places(self, table: Table) -> None:
        """Of the runs of a table over a setting: each has one, and its own."""
        taken = {}
        for run in table.runs:
            value = self.settings_of(run)[table.setting]
            if not _is_place(value):
                raise ValueError(
                    f"{table.title}: {table.setting} is {shortened(value)}; an axis needs a number or "
                    "'student'."
                )
            place = value if value == "student" else float(value)
            if place in taken:
                raise ValueError(
                    f"{table.title}: {taken[place]} and {run} both have {table.setting} {shortened(value)}."
                )
            taken[place] = run

    def _check_files(self) -> None:
        """No two runs or tables share a file, nor two samplings of a run that differ."""
        taken = dict.fromkeys(RESULTS, "the study itself")
        files = [(slug(run), f"the run {shortened(run)}") for run in self.runs]
        for table in self.tables:
            files += [(f"{table.name}.{ending}", f"the table {table.title!r:.80}") for ending in FIGURES]
        for file, owner in files:
            if file in taken:
                raise ValueError(
                    f"{owner} would write {file}, which is of {taken[file]}; give it another name."
                )
            taken[file] = owner
        samplings: dict[tuple, tuple] = {}
        for table in self.tables:
            for (run, name), sampling in table.sampled.items():
                other, known = samplings.setdefault((run, name and slug(name)), (name, sampling))
                if known != sampling:
                    raise ValueError(
                        f"the sampling {shortened(name)} of {run} has other settings than "
                        f"{shortened(other)}, whose file it would write; give it another name."
                    )


def _is_place(value) -> bool:
    """Whether a setting's value has a place in a figure."""
    try:
        return value == "student" or (not isinstance(value, bool) and math.isfinite(float(value)))
    except (TypeError, ValueError, OverflowError):
        return False


def _check_sampling(sampling: dict, structure: dict) -> None:
    known = [name.removesuffix("?") for name in structure]
    if unknown := [name for name in sampling if name not in known]:
        raise ValueError(f"there is no argument {shortened(unknown[0])}; there are {', '.join(known)}.")
    for name, value in sampling.items():
        if name.startswith("s_") and value < 0:
            raise ValueError(f"{name} is {value}; it must be at least 0.")
    if "guidance_interval" in sampling:
        check_range("guidance_interval", sampling["guidance_interval"])
    if "scheduler_class" not in sampling:  # those of diffusers' say themselves what is wrong
        _check_scheduler(sampling.get("scheduler", {}))


def _check_scheduler(changes: dict) -> None:
    """Raises a ValueError for settings of neither of the schedulers."""
    kinds = {
        kind: {name: each.default for name, each in inspect.signature(kind).parameters.items()}
        for kind in (EDMHeunScheduler, InterpolantScheduler)
    }
    kind, defaults = max(kinds.items(), key=lambda each: len(changes.keys() & each[1].keys()))
    for name, value in changes.items():
        if name not in defaults:
            raise ValueError(f"the scheduler has no {shortened(name)}; it has {', '.join(defaults)}.")
        usual = type(defaults[name])
        if isinstance(value, bool) or not isinstance(value, (int, float) if usual is float else usual):
            raise ValueError(f"{name} is {shortened(value)}; it must be as {defaults[name]!r}.")
    kind(**changes)


def slug(name: str) -> str:
    """Letters, digits, points and dashes: the name of a file or folder, which stays where it is put.

    Raises:
        ValueError: the name has none to begin with, is very long, or is Windows' own.
    """
    made = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    if not re.match(r"[a-z0-9]", made) or made.endswith("."):
        raise ValueError(f"{shortened(name)} names a file, so it must begin and end with a letter or digit.")
    if len(made) > 100:
        raise ValueError(f"{shortened(name)} names a file; it may have at most 100 letters.")
    if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", made):
        raise ValueError(f"{shortened(name)} names a file, and Windows has no such files.")
    return made


def read_study(path: Path) -> Study:
    """Reads a study's file.

    Raises:
        ValueError: it cannot be read, or is no study; the message says what is wrong.
    """
    content, where, tables = read_json(path, _STUDY, "study"), "", []
    try:
        for table in content.pop("tables"):
            where = f"{shortened(table['title'])[1:-1]}: "
            tables.append(Table(**_known(table, Table)))
        where = ""
        return Study(tables=tables, **_known(content, Study))
    except ValueError as error:
        raise ValueError(f"{path} is no study: {where}{error}") from None


def _known(content: dict, kind: type) -> dict:
    """The content, once each of its names is a field's."""
    names = [each.name for each in dataclasses.fields(kind)]
    if unknown := [name for name in content if name not in names]:
        raise ValueError(f"there is nothing called {shortened(unknown[0])}; there are {', '.join(names)}.")
    return content
