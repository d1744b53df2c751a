"""What a study's trainings and measurements gave, apart from them, to be drawn again and added to.

`results.json` has it as `found`; a study that knows such a file need not run what is in it again.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..cli import shortened
from ..files import read_json
from .studies import Study
from .tables import Results

# What is kept of measurements; see `files.parse_json` for such structures.
PROBED = [{"probe": str, "features": str, "sigma": float, "accuracy": float}]
_SEED = {
    "metrics": [{"step": range(2**63), "judges?": {str: str}, str: float}],
    "probe": PROBED,
    "samplings": {str: {"of": dict, "score": float}},
}
_RUN = {"settings": dict, "of": (None, str), "seeds": {str: _SEED}}
_IMAGES = [{"run": str, "of": dict, "a_second": float}]
_FOUND = {"found": {"runs": {str: _RUN}, "speeds": {str: float}, "images": _IMAGES}}


@dataclass
class Found:
    """Of one training.

    Attributes:
        metrics: its rows of metrics.jsonl that have scores.
        probe: what its encoder knows.
        samplings: by name, other ways to sample (`of`) and their `score`.
    """

    metrics: list[dict]
    probe: list[dict] = field(default_factory=list)
    samplings: dict[str, dict] = field(default_factory=dict)


class Findings:
    """Of a study, by run and seed.

    Args:
        settings: of each run, by which it is known to be the same elsewhere.
        usual: of each run, what those of an earlier version were that it did not tell.

    Attributes:
        trainings: what was found of each.
        speeds: steps a second, by run, all measured in turn.
        images: a second, of samplings (`run`, and what it is `of`), all measured in turn.
    """

    def __init__(self, study: Study, settings: dict[str, dict], usual: dict[str, dict]):
        self.study, self.settings, self.usual = study, settings, usual
        self.trainings: dict[tuple[str, int], Found] = {}
        self.speeds: dict[str, float] = {}
        self.images: list[dict] = []

    def read(self, path: Path) -> None:
        """Adds those of a `results.json`, but for what the study has not.

        Raises:
            ValueError: it is none, or a run of the study had other settings there.
        """
        found = read_json(path, _FOUND, "results of a study")["found"]
        for run in [run for run in self.study.runs if run in found["runs"]]:
            there = found["runs"][run]
            self._compare(path, run, there)
            for seed in [seed for seed in self.study.seeds if str(seed) in there["seeds"]]:
                self.add(run, seed, self._known(path, run, there["seeds"][str(seed)]))
        self.take_speeds(found["speeds"])
        ways = [
            {"run": run, "of": way} for table in self.study.tables for (run, _), way in table.sampled.items()
        ]
        asked = [each for each in found["images"] if {"run": each["run"], "of": each["of"]} in ways]
        if len(asked) > len(self.images):
            self.images = asked

    def add(self, run: str, seed: int, found: Found) -> None:
        """Adds those of a training; what was measured of it earlier, and is not in them, stays."""
        earlier = self.trainings.get((run, seed), Found([]))
        samplings = earlier.samplings | found.samplings
        self.trainings[run, seed] = Found(found.metrics, found.probe or earlier.probe, samplings)

    def check_kept(self, path: Path, coming: Iterable[tuple[str, int]]) -> None:
        """Raises a ValueError where a `results.json` has trainings that the next one there would not have.

        Args:
            coming: those that will be added.
        """
        there = {}
        with suppress(ValueError):  # there is none, or it is of an earlier version
            there = read_json(path, _FOUND, "results of a study")["found"]["runs"]
        kept = {(run, seed) for run, found in there.items() for seed in found["seeds"]}
        coming = {*self.trainings, *coming}
        gone = [
            (run, seed)
            for run in self.study.runs
            for seed in self.study.seeds
            if (run, str(seed)) in kept and (run, seed) not in coming
        ]
        if gone:
            raise ValueError(
                f"{path} has {len(gone)} trainings that are not here, such as {gone[0][0]} of seed "
                f"{gone[0][1]}, and they would be lost: give it to --known, or choose another --output_dir."
            )

    def take_speeds(self, speeds: dict[str, float], is_whole: bool = False) -> None:
        """Takes the speeds of one measurement, as those of two cannot be compared.

        Args:
            speeds: by run; those that the study does not tell of are left out.
            is_whole: whether they are of all that can be timed here; of others the larger measurement counts.
        """
        speeds = {run: speed for run, speed in speeds.items() if run in self.study.timed}
        if is_whole or len(speeds) >= len(self.speeds):
            self.speeds = speeds

    def _compare(self, path: Path, run: str, there: dict) -> None:
        """Raises a ValueError where a run is another one there."""
        now = self.settings[run] | {"of": self.study.parent_of(run)}
        then = now | self.usual[run] | there["settings"] | {"of": there["of"]}
        for name, value in now.items():
            if value != then[name]:
                others = f"was {shortened(then[name])}, and is {shortened(value)} in the study"
                raise ValueError(f"{path}: {name} of {run} {others}.")

    def _known(self, path: Path, run: str, found: dict) -> Found:
        """What was found of a seed, as far as the study still asks for it."""
        metric = self.study.metric
        if not found["metrics"] or any(metric not in row for row in found["metrics"]):
            raise ValueError(f"{path}: {run} has no {metric!r}, which is the study's metric.")
        wanted = {}
        for table in self.study.tables:
            wanted |= table.samplings_of(run)
        samplings = {
            name: kept for name, kept in found["samplings"].items() if kept["of"] == wanted.get(name)
        }
        return Found(found["metrics"], found["probe"], samplings)

    def as_json(self) -> dict:
        """What `read` reads."""
        runs = {}
        for run in self.study.runs:
            seeds = {
                str(seed): vars(self.trainings[run, seed])
                for seed in self.study.seeds
                if (run, seed) in self.trainings
            }
            if seeds:
                runs[run] = {
                    "settings": self.settings[run], "of": self.study.parent_of(run), "seeds": seeds,
                }  # fmt: skip
        return {"runs": runs, "speeds": self.speeds, "images": self.images}

    def tell(self, results: Results) -> None:
        """Adds them to results."""
        for run, seed in self._in_order():
            found, add = self.trainings[run, seed], results.add
            add(run, seed, ("last",), found.metrics[-1][self.study.metric])
            for row in found.metrics:
                add(run, seed, ("score", row["step"]), row[self.study.metric])
            for name, value in found.metrics[-1].items():
                if name != "judges":
                    add(run, seed, ("metric", name), value)
            for row in found.probe:
                if row["probe"] == "k-NN":
                    add(run, seed, ("k-NN", row["features"], row["sigma"]), row["accuracy"])
            for name, kept in found.samplings.items():
                add(run, seed, ("sampling", name), kept["score"])
        for run, speed in self.speeds.items():
            results.add(run, 0, ("speed",), speed)
        for table in self.study.tables:
            for (run, name), sampling in table.sampled.items() if table.kind == "evaluations" else ():
                for each in self.images:
                    if (each["run"], each["of"]) == (run, sampling):
                        results.add(run, 0, ("images", name), each["a_second"])

    def doubts(self) -> list[str]:
        """Of each extractor whose scores are by several judges, what cannot be compared.

        Those of earlier versions do not tell their judge, and are in no doubt.
        """
        seen: dict[str, dict[str, dict[tuple[str, int], None]]] = {}
        for training in self._in_order():
            for row in self.trainings[training].metrics:
                for extractor, judge in row.get("judges", {}).items():
                    seen.setdefault(extractor, {}).setdefault(judge, {})[training] = None
        told = []
        for extractor, judges in seen.items():
            by = [
                f"{judge} scored {len(judged)}, such as {run} of seed {seed}"
                for judge, judged in judges.items()
                for run, seed in [next(iter(judged))]
            ]
            if len(by) > 1:
                told.append(
                    f"**Scores by {extractor} do not compare, as its judges differ:** {'; '.join(by)}."
                )
        return told

    def _in_order(self) -> Iterable[tuple[str, int]]:
        """The trainings as the study has them."""
        return [
            (run, seed)
            for run in self.study.runs
            for seed in self.study.seeds
            if (run, seed) in self.trainings
        ]
