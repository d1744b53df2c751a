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
from pathlib import Path

import torch

from .files import sha256_of, sync_folder, written_aside

_STATE, _ABOUT = "state.pt", "checkpoint.json"


class DamagedCheckpointError(ValueError):
    """A checkpoint that is not as it was written; the message names it."""


def save_checkpoint(output_dir: Path, step: int, state: dict, about: dict, total_limit: int = 0) -> Path:
    """Writes a checkpoint aside, renames it into place, and then removes all but the newest ones.

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
        shutil.rmtree(leftover)
    aside.mkdir()
    try:
        with written_aside(aside / _STATE) as file:
            _save(state, file)
        with (aside / _STATE).open("rb") as file:
            whole = {"bytes": os.path.getsize(aside / _STATE), "sha256": sha256_of(file)}
        with written_aside(aside / _ABOUT, "w") as file:
            file.write(json.dumps({"step": step, _STATE: whole, **about}, indent=1) + "\n")
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(output_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    if total_limit:
        for old in find_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    return folder


def _save(state: dict, file) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # what torch makes of a disk that is full
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, those of the lowest steps first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


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
        whole = json.loads((folder / _ABOUT).read_text())[_STATE]
        size = os.path.getsize(folder / _STATE)
        if size != whole["bytes"]:
            raise ValueError(f"{_STATE} has {size} bytes, but {whole['bytes']} were written")
        with (folder / _STATE).open("rb") as file:
            if sha256_of(file) != whole["sha256"]:
                raise ValueError(f"the content of {_STATE} is not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"The checkpoint {folder} is damaged: {error}.") from error


def read_about(folder: Path) -> dict:
    """What `checkpoint.json` tells of a checkpoint."""
    return json.loads((folder / _ABOUT).read_text())


def load_state(folder: Path) -> dict:
    """The state of a checkpoint, on the CPU."""
    return torch.load(folder / _STATE, map_location="cpu", weights_only=True, mmap=True)
