"""Runs a study: trains its runs, scores them, and draws its tables and figures.

    sddit reproduce studies/digits.json
    accelerate launch -m sddit reproduce studies/imagenet.json --seeds 0 --output_dir imagenet
    sddit reproduce studies/digits.json --runs SD-DiT --known elsewhere/results.json

`studies.py` says what a study is. Each run is one of `train_sddit.py`, or of `distill_sddit.py` once what it
distils is trained, in `OUTPUT_DIR/RUN/seed-SEED/`; stopped, the same command goes on where it was. Runs that
are done are not run again, nor those of a `results.json` that is `--known`, so the parts of a study
(`--runs`, `--seeds`) may be run at different times and places. `--report_only` tells what there is so far:
`results.md`, `results.json`, and a figure for each table.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from .cli import Parser, as_arguments, check_options, json_object, one_line_errors, option, options, shortened
from .evaluation.findings import PROBED, Findings, Found
from .evaluation.report import write
from .evaluation.studies import Study, Table, read_study, slug
from .evaluation.tables import Results
from .files import locked, read_json, remove, written_aside
from .launching import check_machine, on_main_process
from .training.auxiliary import Process
from .training.building import build_process
from .training.checkpointing import find_checkpoints
from .training.configuration import DataOptions, HubOptions, OutputOptions, RunConfig, usual
from .training.distill_options import DistillConfig, parse_planned
from .training.measuring import (
    builder,
    count_evaluations,
    images_a_second,
    probe_training,
    read_kept,
    score_training,
    steps_a_second,
)
from .training.metrics import read_metrics
from .training.options import parse
from .training.output import is_complete
from .training.parents import sampler_of
from .training.trainer import training

# What is kept of measurements; see `files.parse_json` for such structures.
_SPEEDS, _IMAGES = {str: float}, [float]
_SAMPLED = (None, float)
_NOTHING = object()
# What of a run's settings tells where its data are, what is kept of it, and which of its seeds it is.
_OF_A_PLACE = {each.name for group in (DataOptions, OutputOptions, HubOptions) for each in fields(group)}
_OF_A_PLACE |= {"evaluation_reference", "num_validation_images", "model", "seed"}
_OF_A_PLACE -= {"max_train_samples", "label_column"}


@dataclass
class ReproduceConfig:
    """The settings of a reproduction."""

    output_dir: str = option("", "where everything goes; study-NAME if not given", metavar="FOLDER")
    settings: str = option(
        "{}", "training's settings that differ from the study's, for all its runs but distillations",
        metavar="JSON",
    )  # fmt: skip
    runs: list[str] = options(
        [], "those of the study's that are trained now; all if not given", metavar="RUN"
    )
    seeds: list[int] = options(
        [], "those of the study's that are trained now; all if not given", low=0, high=2**32 - 1
    )
    known: list[str] = options(
        [], "results.json of the study, of other times and machines; what they have is not run again",
        metavar="FILE",
    )  # fmt: skip
    report_only: bool = option(False, "train and measure nothing: tables and figures of what there is")
    page: str = option("", "where the tables go; OUTPUT_DIR/results.md if not given", metavar="FILE")

    def __post_init__(self):
        check_options(self)
        if self.page and Path(self.page).is_dir():
            raise ValueError(f"page is {self.page!r}, which is a folder; it must be a file.")


class Reproduction:
    """A study that is being run.

    Args:
        path: the study's file.

    Raises:
        ValueError: the study, or what was chosen of it, is wrong.
    """

    def __init__(self, config: ReproduceConfig, path: Path):
        self.config, self.study = config, read_study(path)
        self.folder = Path(config.output_dir or f"study-{path.stem}")
        self.changes = json_object("settings", config.settings)
        for chosen, known, name in (
            (config.runs, list(self.study.runs), "run"), (config.seeds, self.study.seeds, "seed")
        ):  # fmt: skip
            if unknown := [one for one in chosen if one not in known]:
                raise ValueError(
                    f"There is no {name} {shortened(unknown[0])}; there are {', '.join(map(str, known))}."
                )
        self.runs = self.study.in_order(config.runs or self.study.runs)
        self.seeds = config.seeds or self.study.seeds
        self.configs: dict[tuple[str, int], RunConfig] = {}
        for run in self.study.in_order(self.study.runs):
            for seed in self.study.seeds:
                self.configs[run, seed] = self._configure(run, seed)
        self.evaluations = count_evaluations(self.study, self.process_of)
        precisions = {config.mixed_precision for config in self.configs.values()}
        if len(precisions) > 1:
            raise ValueError(f"mixed_precision is {sorted(precisions)}; it must be the same in all runs.")
        self.accelerator = Accelerator(
            mixed_precision=precisions.pop() or None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))],
        )
        check_machine(self.accelerator)
        settings = {run: comparable(asdict(config)) for run, config in self.first.items()}
        earlier = {
            run: comparable(usual(config) | {"label_column": config.label_column})  # which was not told
            for run, config in self.first.items()
        }
        self.results, self.findings = Results(), Findings(self.study, settings, earlier)
        self.problems: list[str] = []  # of measurements
        for known in config.known:
            self.findings.read(Path(known))
        self.known = set(self.findings.trainings)
        for run, config in self.first.items():
            self.study.check_scores(run, config.evaluation_extractor)

    def folder_of(self, run: str, seed: int) -> Path:
        """Of one training."""
        return self.folder / slug(run) / f"seed-{seed}"

    def _configure(self, run: str, seed: int) -> RunConfig:
        parent = self.configs.get((self.study.parent_of(run), seed))
        changes = {} if parent else self.changes
        own = {"seed": seed, "output_dir": str(self.folder_of(run, seed))}
        return configure(run, self.study.settings_of(run) | changes | own, parent)

    @property
    def first(self) -> dict[str, RunConfig]:
        """The runs of the first seed, with which speeds are measured."""
        return {run: self.configs[run, self.study.seeds[0]] for run in self.study.runs}

    def process_of(self, run: str) -> Process:
        """The scheduler that a run leaves."""
        config, parent = self.first[run], self.study.parent_of(run)
        if parent is None:
            return build_process(config)
        return sampler_of(self.process_of(parent), config.trial_steps, config.solver)

    def is_done(self, run: str, seed: int) -> bool:
        """Whether a training is complete, with the settings that are wanted, and has been cleared up.

        Raises:
            ValueError: it was begun with others.
        """
        return is_complete(self.configs[run, seed]) and not find_checkpoints(self.folder_of(run, seed))

    def done(self, trainings: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        """Those that are."""
        return [training for training in trainings if self.is_done(*training)]

    def run(self) -> None:
        """Trains what is missing, measures what the tables need, and reports."""
        missing = [] if self.config.report_only else on_main_process(self.missing, self.accelerator)
        path = self.folder / "results.json"
        on_main_process(
            lambda: self.findings.check_kept(path, [*self.done(self.configs), *missing]), self.accelerator
        )
        for i, (run, seed) in enumerate(missing):
            self.accelerator.print(f"[{i + 1} of {len(missing)}] {run}, seed {seed}", flush=True)
            self.train(run, seed)
        if not self.config.report_only:
            self.measure()
        on_main_process(self.report, self.accelerator)
        if self.problems:
            raise ValueError(f"Not all could be measured: {' '.join(self.problems)}")

    def missing(self) -> list[tuple[str, int]]:
        """The trainings that are still to be done, parents first.

        Raises:
            ValueError: what one of them distils is neither done nor among them.
        """
        trainings, needed = [(run, seed) for seed in self.seeds for run in self.runs], set()
        for run, seed in reversed(trainings):  # children first: what they distil is needed itself
            is_wanted = (run, seed) in needed or (run, seed) not in self.known
            if is_wanted and not self.is_done(run, seed):
                needed |= {(run, seed), (self.study.parent_of(run), seed)}
        missing = [training for training in trainings if training in needed and not self.is_done(*training)]
        for run, seed in missing:
            parent = self.study.parent_of(run)
            if parent and (parent, seed) not in missing and not self.is_done(parent, seed):
                raise ValueError(
                    f"{run} is a distillation of {parent}, which is not trained with seed {seed}: add it to "
                    "--runs."
                )
        return missing

    def train(self, run: str, seed: int) -> None:
        """One run, from its newest checkpoint on; these go once it is complete."""
        config = self.configs[run, seed]
        if not on_main_process(lambda: is_complete(config), self.accelerator):
            with training(config, builder(config)) as trainer:
                trainer.run()
        on_main_process(lambda: self.clear_up(run, seed), self.accelerator)

    def clear_up(self, run: str, seed: int) -> None:
        """Removes a complete training's checkpoints."""
        for checkpoint in find_checkpoints(self.folder_of(run, seed)):
            remove(checkpoint)

    def measure(self) -> None:
        """What tables need beside the trainings: speeds, probes, samplings; each is kept in a file."""
        with ExitStack() as stack:  # another process that measures here has done so afterwards
            on_main_process(lambda: stack.enter_context(locked(self.folder, patience=-1)), self.accelerator)
            timed = on_main_process(self.timed, self.accelerator)
            if not set(timed) <= self.findings.speeds.keys():
                measure = partial(steps_a_second, self.first, self.folder / ".speed", self.accelerator)
                self.keep(self.folder / "speeds.json", timed, _SPEEDS, measure)
        for table in self.study.tables:
            are_trained = partial(self.is_trained, table.runs)
            if table.kind == "evaluations" and on_main_process(are_trained, self.accelerator):
                measure = partial(images_a_second, self.first, self.accelerator)
                self.keep(self.folder / "sampling-speeds.json", table.ways, _IMAGES, measure)
            trainings = [(run, seed) for run in table.runs for seed in self.seeds]
            for run, seed in on_main_process(partial(self.done, trainings), self.accelerator):
                folder, given = self.folder_of(run, seed), (self.configs[run, seed], self.accelerator)
                if table.kind == "probe":
                    self.keep(folder / "probe.json", table.sigmas, PROBED, partial(probe_training, *given))
                for name, sampling in table.samplings_of(run).items():
                    path = folder / f"sampling-{slug(name)}.json"
                    measure = partial(score_training, *given, self.study.metric)
                    self.keep(path, sampling, _SAMPLED, measure)

    def keep(self, path: Path, of: list | dict, structure: Any, measure: Callable) -> None:
        """Writes what `measure` finds of something, unless that was done before; what fails is a problem."""
        is_kept = on_main_process(
            lambda: read_kept(path, of, structure, _NOTHING) is not _NOTHING, self.accelerator
        )
        if is_kept:
            return
        self.accelerator.print(path, flush=True)
        try:
            found = measure(of)
        except (ValueError, FloatingPointError) as error:
            self.problems.append(f"{path.relative_to(self.folder)}: {error}")
            return
        if self.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(path, "w") as file:
                file.write(json.dumps({"of": of, "found": found}, indent=1) + "\n")
        self.accelerator.wait_for_everyone()

    def timed(self) -> list[str]:
        """The runs that can be timed: there is a training of them, and here one of what they distil."""
        there = {run for run, _ in [*self.known, *self.done(self.configs)]}
        lines = {run: [parent for parent in [self.study.parent_of(run)] if parent] for run in there}
        return [run for run in self.study.timed if run in there and self.is_trained(lines[run])]

    def is_trained(self, runs: list[str]) -> bool:
        """Whether runs are done with the first seed."""
        return all(self.is_done(run, self.study.seeds[0]) for run in runs)

    def collect(self) -> None:
        """Reads what there is."""
        for run, seed in self.done(self.configs):
            self.findings.add(run, seed, found_in(self.folder_of(run, seed), run, self.study))
        path = self.folder / "speeds.json"
        if path.is_file():
            found = read_json(path, {"found": _SPEEDS}, "measurement of a study")["found"]
            timed, known = {*self.timed()}, self.findings.speeds.keys()
            self.findings.take_speeds(found, is_whole=not timed <= known and timed <= found.keys())
        for table in self.study.tables:
            if table.kind == "evaluations":
                self.collect_samplings(table)
        self.findings.tell(self.results)

    def collect_samplings(self, table: Table) -> None:
        """What the samplings of a table cost."""
        for run, name in table.sampled:
            self.results.add(run, 0, ("evaluations", name), self.evaluations[run, name])
        speeds = read_kept(self.folder / "sampling-speeds.json", table.ways, _IMAGES, [])
        images = [
            {"run": run, "of": sampling, "a_second": speed}
            for (run, _, sampling), speed in zip(table.ways, speeds, strict=False)
        ]
        self.findings.images = images or self.findings.images

    def report(self) -> None:
        """Writes tables and figures of what there is.

        Raises:
            ValueError: another process has written what would be lost.
        """
        with locked(self.folder, patience=-1):
            self.collect()
            self.findings.check_kept(self.folder / "results.json", ())
            write(self.study, self.results, self.findings, self.folder, self.config.page)


def found_in(folder: Path, run: str, study: Study) -> Found:
    """What a training that is done gave, and what was measured of it.

    Raises:
        ValueError: it has not the study's metric.
    """
    metric = study.metric
    rows = read_metrics(folder / "metrics.jsonl")
    if metric not in rows[-1]:
        raise ValueError(f"{folder} has no {metric!r}, which is the study's metric.")
    scored = [row for row in rows if metric in row]
    for row in scored:
        if not is_number(row[metric]):
            raise ValueError(f"{folder}: its {metric} is {shortened(row[metric])}, no number.")
    found = Found([
        {name: value for name, value in row.items() if name == "judges" or is_number(value)} for row in scored
    ])  # fmt: skip
    for table in study.tables:
        if table.kind == "probe":
            found.probe = read_kept(folder / "probe.json", table.sigmas, PROBED, [])
        for name, sampling in table.samplings_of(run).items():
            score = read_kept(folder / f"sampling-{slug(name)}.json", sampling, _SAMPLED, None)
            found.samplings |= {} if score is None else {name: {"of": sampling, "score": score}}
    return found


def configure(run: str, settings: dict, parent: RunConfig | None) -> RunConfig:
    """The configuration of a run.

    Args:
        parent: that of the run that it distils, if it does.

    Raises:
        ValueError: it is wrong; the message begins with the run.
    """
    arguments = as_arguments(settings)
    try:
        config = parse(arguments, raises=True) if parent is None else parse_planned(arguments, parent)
    except ValueError as error:
        raise ValueError(f"{run}: {error}") from None
    if isinstance(config, DistillConfig) and len(steps := config.num_inference_steps) > 1:
        raise ValueError(f"{run}: num_inference_steps is {steps}; a run is one stage of a chain.")
    if config.push_to_hub:
        raise ValueError(f"{run}: push_to_hub is on; all runs of a study would be one repository.")
    if not config.evaluation_steps:
        raise ValueError(f"{run} is not scored: evaluation_steps must be in the study's settings.")
    config.checkpointing_steps = config.checkpointing_steps or config.evaluation_steps
    config.checkpoints_total_limit = config.checkpoints_total_limit or 1
    config.resume_from_checkpoint = "latest"
    return config


def comparable(settings: dict) -> dict:
    """What of a run's settings is the same wherever it is trained, with whatever seed."""
    return json.loads(json.dumps({name: settings[name] for name in settings if name not in _OF_A_PLACE}))


def is_number(value) -> bool:
    """Whether a metric can stand in a table."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(ReproduceConfig, prog="reproduce", doc=__doc__)
    parser.add_argument("study", metavar="STUDY", help="a study's file, such as those in studies/")
    with one_line_errors("reproduce"):
        chosen = parser.parse_known_options(arguments)
        path = Path(chosen.pop("study"))
        reproduction = Reproduction(ReproduceConfig(**chosen), path)
        reproduction.run()
        reproduction.accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main()
