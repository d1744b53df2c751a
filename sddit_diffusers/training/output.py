"""The output folder of a run: one run a folder, and nothing in it is lost."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..cli import differences
from ..files import locked, read_json, remove
from .checkpointing import find_checkpoints, set_aside
from .configuration import OutputOptions, RunConfig, as_lists, is_place, usual
from .metrics import MetricsLog, read_metrics

# What a run leaves at its end, in the order in which it does.
_AT_THE_END = ("model_index.json", "curves.png", "README.md")
UNFINISHED = "unfinished"  # the log of a run in a folder that has a model already


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """As [`locked`], with a message of the output folder's where it cannot be written."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder))
        except OSError as error:
            raise ValueError(f"The output folder {folder} cannot be written: {error.strerror}.") from None
        yield


def prepare_folder(folder: Path, config: RunConfig) -> None:
    """Makes sure, before anything is trained, that there is a folder and that nothing in it is lost.

    Raises:
        ValueError: it holds what an earlier run has left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints, goes_on = find_checkpoints(folder), config.resume_from_checkpoint
    if config.overwrite_output_dir:
        return
    if checkpoints and not goes_on:
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run: go on with --resume_from_checkpoint latest, "
            "choose another --output_dir, or begin anew with --overwrite_output_dir."
        )
    begins = not goes_on or (goes_on == "latest" and not checkpoints)
    if begins and (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} holds the model of an earlier run: choose another --output_dir, or replace it with "
            "--overwrite_output_dir."
        )


def is_complete(config: RunConfig) -> bool:
    """Whether a run has written its last file, with the settings that are wanted.

    Raises:
        ValueError: it was begun with others.
    """
    folder = Path(config.output_dir)
    path = folder / "training_config.json"
    if not path.is_file():
        return False
    wanted = json.loads(json.dumps(vars(config) | config.facts()))
    begun = wanted | usual(config) | as_lists(read_json(path, dict, "training's settings"))
    for name, value in wanted.items():
        if is_place(value):  # of which the name is always told
            wanted[name], begun[name] = Path(value).name, Path(str(begun[name])).name
    if others := differences(_of_result(begun), _of_result(wanted)):
        raise ValueError(
            f"{folder} was begun with other settings: {'; '.join(others)}. Choose another --output_dir."
        )
    if not all((folder / name).is_file() for name in ("metrics.jsonl", *_AT_THE_END)):
        return False
    metrics = read_metrics(folder / "metrics.jsonl")
    return bool(metrics) and metrics[-1]["step"] == wanted["max_train_steps"]


def _of_result(settings: dict) -> dict:
    """Without those that change what is told and kept of a run, and not what is learnt."""
    others = {
        "dataloader_num_workers",
        "names_only",
        *(each.name for each in dataclasses.fields(OutputOptions)),
    }
    return {name: value for name, value in settings.items() if name not in others}


class Records:
    """Settings and metrics of a run, in the output folder.

    While the model of an earlier run is there, what is written of this one is kept beside.

    Attributes:
        folder: where they are.
    """

    def __init__(self, output_dir: Path):
        self.output_dir = output_dir
        beside, model = output_dir / UNFINISHED, output_dir / "model_index.json"
        self.folder = beside if beside.is_dir() or model.is_file() else output_dir

    def begin(self, config: RunConfig, start_step: int) -> MetricsLog:
        """Prepares the folder, once nothing stands against the run."""
        for folder in set_aside(self.output_dir, start_step):
            print(f"Left behind by this run, and set aside: {folder}", flush=True)
        earlier = self.folder / "metrics.jsonl"
        if not earlier.is_file():
            earlier = self.output_dir / "metrics.jsonl"
        if self.folder.is_symlink():
            remove(self.folder)
        self.folder.mkdir(exist_ok=True)
        config.save(self.folder / "training_config.json")
        return MetricsLog(self.folder / "metrics.jsonl", start_step, earlier)

    def clear(self) -> None:
        """Removes them where they were kept beside."""
        if self.folder != self.output_dir:
            remove(self.folder)
