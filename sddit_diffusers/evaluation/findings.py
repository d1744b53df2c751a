"""What a study's trainings and measurements gave, apart from them, to be drawn again and added to.

`results.json` has it as `found`; a study that knows such a file need not run what is in it again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..cli import shortened
from ..files import read_json
from .studies import Study
from .tables import Results

# What is kept of measurements; see `files.parse_json` for such structures.
PROBED = [{"probe": str, "features": str, "sigma": float, "accuracy": float}]
_RUN = {
    "settings": dict,
    "seeds": {
        str: {"metrics": [{"step": range(1, 2**63), str: float}], "probe": PROBED, "samplings": {str: float}}
    },
}
_FILE = {"title": str, "found": {"runs": {str: _RUN}, "speeds": {str: float}}}


@dataclass
class Found:
    """Of one training.

    Attributes:
        metrics: its rows of metrics.jsonl that have scores.
        probe: what its encoder knows.
        samplings: the scores of other ways to sample, by name.
    """

    metrics: list[dict]
    probe: list[dict] = field(default_factory=list)
    samplings: dict[str, float] = field(default_factory=dict)


class Findings:
    """Of a study, by run and seed.

    Attributes:
        trainings: what was found of each.
        speeds: steps a second, by run, all measured in turn.
    """

    def __init__(self, study: Study):
        self.study = study
        self.trainings: dict[tuple[str, int], Found] = {}
        self.speeds: dict[str, float] = {}

    def read(self, path: Path) -> None:
        """Adds those of a `results.json`, but for what the study has not.

        Raises:
            ValueError: it is none, or a run of the study had other settings there.
        """
        found = read_json(path, _FILE, "results of a study")["found"]
        for run in found["runs"].keys() & self.study.runs.keys():
            settings, now = found["runs"][run]["settings"], self.study.settings_of(run)
            for name in sorted(settings.keys() | now.keys()):
                if settings.get(name) != now.get(name):
                    raise ValueError(
                        f"{path}: {name} of {run} was {shortened(settings.get(name))}, and is "
                        f"{shortened(now.get(name))} in the study."
                    )
            for seed, of in found["runs"][run]["seeds"].items():
                if seed in map(str, self.study.seeds):
                    self.trainings[run, int(seed)] = Found(**of)
        speeds = {run: speed for run, speed in found["speeds"].items() if run in self.study.runs}
        if len(speeds) > len(self.speeds):  # only those that were measured in turn can be compared
            self.speeds = speeds

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
                runs[run] = {"settings": self.study.settings_of(run), "seeds": seeds}
        return {"runs": runs, "speeds": self.speeds}

    def tell(self, results: Results) -> None:
        """Adds them to results."""
        for run, seed in self._in_order():
            found, add = self.trainings[run, seed], results.add
            add(run, seed, ("last",), found.metrics[-1][self.study.metric])
            for row in found.metrics:
                add(run, seed, ("score", row["step"]), row[self.study.metric])
            for name, value in found.metrics[-1].items():
                add(run, seed, ("metric", name), value)
            for row in found.probe:
                if row["probe"] == "k-NN":
                    add(run, seed, ("k-NN", row["features"], row["sigma"]), row["accuracy"])
            for name, value in found.samplings.items():
                add(run, seed, ("sampling", name), value)
        for run, speed in self.speeds.items():
            results.add(run, 0, ("speed",), speed)

    def _in_order(self) -> Iterable[tuple[str, int]]:
        """The trainings as the study has them."""
        return [
            (run, seed)
            for run in self.study.runs
            for seed in self.study.seeds
            if (run, seed) in self.trainings
        ]
