"""Checkpoints: all that a run needs to go on, in `checkpoint-STEP` folders that are complete or absent."""

import os
import re
import shutil
from pathlib import Path

import torch


def save_checkpoint(output_dir: Path, step: int, state: dict) -> Path:
    """Writes `state` aside, then renames it into place."""
    folder = output_dir / f"checkpoint-{step}"
    aside = output_dir / f".{folder.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    torch.save({"step": step, **state}, aside / "state.pt")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(aside, folder)
    return folder


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def load_checkpoint(output_dir: Path, name: str) -> dict:
    """The state of `name`, "latest" or a folder.

    Raises:
        ValueError: there is no such checkpoint.
    """
    checkpoints = find_checkpoints(output_dir)
    folder = (
        (checkpoints[-1] if checkpoints else output_dir / "checkpoint-*") if name == "latest" else Path(name)
    )
    if not (folder / "state.pt").is_file():
        raise ValueError(f"There is no checkpoint {folder} to resume from.")
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
