"""Files that are complete or absent, whatever stops the program that writes them; folders with one writer;
and JSON from elsewhere, which may be anything.
"""

import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

LOCK = ".lock"  # in a folder that a program writes
_PATIENCE = 8.0  # seconds; what a killed run has forked keeps its lock a little longer


@contextmanager
def locked(folder: Path, patience: float | None = None) -> Iterator[None]:
    """Lets no other run write in a folder, which is made where it is missing.

    The lock is the operating system's: it goes with the process, however that ends.

    Args:
        patience: seconds that are waited for a run that has it.

    Raises:
        ValueError: another run has it; the message names its process.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path, timeout=_PATIENCE if patience is None else patience)
    try:
        lock.acquire()
    except Timeout:
        with suppress(OSError):
            owner = path.read_text(errors="replace")[:200].strip()
        raise ValueError(
            f"{folder} is in use by {owner or 'another process'}. Wait for its end, or choose another folder."
        ) from None
    try:
        program = Path(sys.argv[0]).name if sys.argv else ""
        path.write_text(f"process {os.getpid()} ({program}) on {socket.gethostname()}")
        _remove_leftovers(folder)
        yield
    finally:
        # While it is held: who waits for this file sees that it is gone, and makes another.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()


def _aside(path: Path) -> Path:
    """Where this process writes what is to get a name: nothing is there, not even a link."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(aside)
    return aside


def _remove_leftovers(folder: Path) -> None:
    """Removes what processes that are no more have written aside."""
    for path in folder.glob(".*.tmp"):
        if match := re.fullmatch(r"\..+\.(\d+)\.tmp", path.name):
            try:
                os.kill(int(match[1]), 0)
            except ProcessLookupError:
                remove(path)
            except (OSError, OverflowError):
                pass  # it runs, as somebody else


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with all that is in it, or nothing; follows no link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def written_aside(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file that takes its name once all of it is on the disk; an error leaves what had the name before.

    A link of that name is replaced, and what it leads to stays as it is.
    """
    aside = _aside(path)
    try:
        with aside.open(mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # for the message of a full disk
        raise
    sync_folder(path.parent)


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """A new folder to write in, whose entries take the place of those in `folder` when all are written.

    Entries of other names stay. `model_index.json` goes first and comes last, so a pipeline is never half the
    old one and half the new; links are replaced, and what they lead to stays as it is.
    """
    aside = _aside(folder / "new")
    aside.mkdir()
    try:
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        index = "model_index.json"
        entries = sorted(aside.iterdir(), key=lambda path: path.name == index)
        if entries and entries[-1].name == index:
            remove(folder / index)
        for entry in entries:
            if entry.is_dir() or (folder / entry.name).is_dir():
                remove(folder / entry.name)
            os.replace(entry, folder / entry.name)
    except OSError as error:
        if error.filename is None:
            error.filename = str(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(folder)


def save_tensors(path: Path, tensors: dict[str, Tensor], **about: str) -> None:
    """Writes a safetensors file, complete or absent, in a folder that is made where it is missing.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        save_file(tensors, aside, metadata=about)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except SafetensorError as error:  # what safetensors makes of a disk that is full
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_json(path: Path, structure: Any, kind: str) -> Any:
    """What a JSON file of somebody's holds, once it is known to be what is expected.

    Args:
        structure: what it must be, see [`parse_json`].
        kind: what the file is called in messages, such as "manifest of latents".

    Raises:
        ValueError: it cannot be read, is no JSON, or of another structure; the message names the file.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {problem}.") from None
    return parse_json(content, structure, kind, str(path))


def parse_json(content: str | bytes, structure: Any, kind: str, name: str) -> Any:
    """What a JSON text holds, once it is known to be what is expected.

    Args:
        structure: `str`, `bool`, `int`, `float` (a finite number), `dict`, `list` or None (null) for a value
            of that type; a `range` for a whole number in it; `[x]` for a list of x; for an object
            `{"name": x, "other?": y}`, where other may be missing and it may have more, or, with any other
            names, `{str: x}`; a tuple for one of several, of which the last is told of.
        kind: what it is called in messages.
        name: where it is from.

    Raises:
        ValueError: it is no JSON, or of another structure; the message has the name.
    """

    def refuse_constant(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        value = json.loads(content, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no {kind}: it is no JSON ({error}).") from None
    if problem := _mismatch(value, structure, ""):
        raise ValueError(f"{name} is no {kind}: {problem}.")
    return value


_NAMES_OF_TYPES = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number"}
_NAMES_OF_TYPES |= {dict: "an object", list: "a list", type(None): "null"}


def _mismatch(value: Any, structure: Any, place: str) -> str:
    """Where a value is not of a structure; empty where it is."""
    if isinstance(structure, tuple):
        problems = [_mismatch(value, one, place) for one in structure]
        return "" if "" in problems else problems[-1]
    if isinstance(structure, list):
        problems = [] if not isinstance(value, list) else [
            _mismatch(one, structure[0], f"{place}[{i}]") for i, one in enumerate(value)
        ]  # fmt: skip
        return _wrong(value, list, place) or next(filter(None, problems), "")
    if isinstance(structure, dict):
        return _wrong(value, dict, place) or _object_mismatch(value, structure, place)
    if isinstance(structure, range):
        if type(value) is int and value in structure:
            return ""
        return (
            f"{place or 'it'} is {value!r:.60}; it must be a whole number in {structure[0]}..{structure[-1]}"
        )
    return _wrong(value, type(None) if structure is None else structure, place)


def _object_mismatch(value: dict, structure: dict, place: str) -> str:
    named = {key.removesuffix("?") for key in structure if key is not str}
    for key, inner in structure.items():
        if key is str:
            others = {name: one for name, one in value.items() if name not in named}
            found = (_mismatch(one, inner, f"{place}.{name:.60}".lstrip(".")) for name, one in others.items())
            if problem := next(filter(None, found), ""):
                return problem
            continue
        name, optional = key.removesuffix("?"), key.endswith("?")
        if name not in value:
            if optional:
                continue
            return f"{place or 'it'} has no {name!r}"
        if problem := _mismatch(value[name], inner, f"{place}.{name}".lstrip(".")):
            return problem
    return ""


def _wrong(value: Any, kind: type, place: str) -> str:
    right = isinstance(value, (int, float) if kind is float else kind)
    if isinstance(value, bool) and kind in (int, float):
        right = False
    if right and kind is float:
        try:
            right = math.isfinite(value)
        except OverflowError:
            right = False
    return "" if right else f"{place or 'it'} is {value!r:.60}; it must be {_NAMES_OF_TYPES[kind]}"


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, as fsync does for the content of a file."""
    if os.name == "nt":  # Windows opens no folders, and does it by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: IO) -> str:
    """The SHA-256 of what an open file holds, in hexadecimal."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
