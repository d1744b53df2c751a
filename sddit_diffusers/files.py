"""Files that are complete or absent, whatever stops the program that writes them."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def written_aside(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file that takes its name once all of it is on the disk; an error leaves what had the name before."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open(mode) as file:
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


def save_tensors(path: Path, tensors: dict[str, Tensor], **about: str) -> None:
    """Writes a safetensors file, complete or absent, in a folder that is made where it is missing.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, aside, metadata=about)
        os.replace(aside, path)
    except SafetensorError as error:  # what safetensors makes of a disk that is full
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


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
