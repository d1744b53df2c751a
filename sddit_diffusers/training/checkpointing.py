"""Checkpoints: all that a run needs to go on, in `checkpoint-STEP` folders that are complete or absent.

`state.pt` holds the tensors, `checkpoint.json` the step, what the run is, and the size and hash that tell
whether `state.pt` is whole. There is no state of random generators or of the data: both follow from the seed
and the step.
"""

import json
import os
import re
import shutil
import warnings
from itertools import count
from pathlib import Path

import torch

from ..files import read_json, remove, sha256_of, sync_folder, written_aside

_STATE, _ABOUT = "state.pt", "checkpoint.json"
_NAME, _ABANDONED = "checkpoint-[0-9]{1,18}", "abandoned-"
_OF_DISCRIMINATION = "head.", "teacher.", "center_cls.", "center_patch."
_STRUCTURE = {
    "step": range(2**63),
    _STATE: {"bytes": range(2**63), "sha256": str},
    "run?": dict,
    "settings?": dict,
}


class DamagedCheckpointError(ValueError):
    """A checkpoint that is not as it was written; the message names it."""


def save_checkpoint(output_dir: Path, step: int, state: dict, about: dict, total_limit: int = 0) -> Path:
    """Writes a checkpoint aside, renames it into place, and then removes all but the newest up to its step.

    Args:
        state: tensors and numbers, as `torch.save` takes them.
        about: what the run is, in JSON's types; see `cli.differences`.
        total_limit: checkpoints that are kept; 0: all.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    folder = output_dir / f"checkpoint-{step}"
    aside, replaced = output_dir / f".{folder.name}.tmp", output_dir / f".{folder.name}.old"
    for leftover in output_dir.glob(".checkpoint-*"):
        remove(leftover)
    aside.mkdir()
    try:
        with written_aside(aside / _STATE) as file:
            _save(state, file)
        with (aside / _STATE).open("rb") as file:
            whole = {"bytes": os.path.getsize(aside / _STATE), "sha256": sha256_of(file)}
        with written_aside(aside / _ABOUT, "w") as file:
            file.write(json.dumps({"step": step, _STATE: whole, **about}, indent=1) + "\n")
        if os.path.lexists(folder):
            os.rename(folder, replaced)
        os.rename(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(output_dir)
    remove(replaced)
    if total_limit:
        of_this_run = [path for path in find_checkpoints(output_dir) if step_of(path) <= step]
        for old in of_this_run[:-total_limit]:
            remove(old)
    return folder


def set_aside(output_dir: Path, step: int) -> list[Path]:
    """Renames the checkpoints of higher steps than the one that a run goes on from: it leaves them behind.

    Returns:
        What they are called now; nothing chooses or removes them.
    """
    renamed = []
    for folder in reversed(find_checkpoints(output_dir)):
        if step_of(folder) > step:
            names = (f"{_ABANDONED}{folder.name}{f'-{i}' * (i > 1)}" for i in count(1))
            free = next(path for path in map(output_dir.joinpath, names) if not os.path.lexists(path))
            renamed.append(folder.rename(free))
    return renamed


def _save(state: dict, file) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # what torch makes of a disk that is full
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, those of the lowest steps first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(_NAME, path.name)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.split("-")[1])


def choose_checkpoint(output_dir: Path, name: str) -> Path | None:
    """The folder of `name`, or for "latest" that of the highest step that is whole.

    Returns:
        None for "latest" where there is no checkpoint at all.

    Raises:
        ValueError: there is no such checkpoint, or none that is whole.
    """
    if name != "latest":
        _check(Path(name))
        return Path(name)
    checkpoints = find_checkpoints(output_dir)
    for folder in reversed(checkpoints):
        try:
            _check(folder)
            return folder
        except DamagedCheckpointError as error:
            warnings.warn(f"{error} It is left out.", stacklevel=2)
    if checkpoints:
        raise DamagedCheckpointError(f"None of the {len(checkpoints)} checkpoints in {output_dir} is whole.")
    return None


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"There is no checkpoint {folder} to resume from.")
    try:
        whole = read_about(folder)[_STATE]
        size = os.path.getsize(folder / _STATE)
        if size != whole["bytes"]:
            raise ValueError(f"{_STATE} has {size} bytes, but {whole['bytes']} were written")
        with (folder / _STATE).open("rb") as file:
            if sha256_of(file) != whole["sha256"]:
                raise ValueError(f"the content of {_STATE} is not what was written")
    except (OSError, ValueError) as error:
        problem = str(error).removesuffix(".")
        raise DamagedCheckpointError(f"The checkpoint {folder} is damaged: {problem}.") from error


def read_about(folder: Path) -> dict:
    """What `checkpoint.json` tells of a checkpoint.

    Raises:
        ValueError: it is no such file.
    """
    return read_json(folder / _ABOUT, _STRUCTURE, "description of a checkpoint")


def load_state(folder: Path, *parts: str) -> dict:
    """The state of a checkpoint, on the CPU.

    Args:
        parts: what it must have.

    Raises:
        DamagedCheckpointError: it is no state, it would run code, or it lacks a part.
    """
    path = folder / _STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch, zipfile and pickle raise many kinds
        raise DamagedCheckpointError(f"{path} cannot be read as a state: {error}") from error
    if not isinstance(state, dict) or (missing := [part for part in parts if part not in state]):
        lack = f"it has no {missing[0]!r}" if isinstance(state, dict) else f"it is a {type(state).__name__}"
        raise DamagedCheckpointError(f"{path} is no state of a training: {lack}.")
    return state


def by_names_of_today(state: dict) -> dict:
    """A state of version 0.1.0, whose L_D was no module of its own, by the names that weights have now."""

    def renamed(name: str) -> str:
        return f"auxiliaries.discrimination.{name}" if name.startswith(_OF_DISCRIMINATION) else name

    moments = state["optimizer"]
    groups = [group | {"params": [*map(renamed, group["params"])]} for group in moments["param_groups"]]
    return state | {
        "objective": {renamed(name): weight for name, weight in state["objective"].items()},
        "optimizer": {
            "state": {renamed(name): moment for name, moment in moments["state"].items()},
            "param_groups": groups,
        },
    }
