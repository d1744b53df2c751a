"""How a program is to refuse what it cannot use; for the tests of bad input."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def contents(folder: Path) -> dict[str, str]:
    """What a folder holds, by path: hashes of files, where links lead, and folders."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(root, name)
            if path.is_symlink():
                found[str(path)] = f"-> {os.readlink(path)}"
            else:
                found[str(path)] = (
                    hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
                )
    return found


@contextmanager
def refusal(capsys, *words: str, untouched: Path | None = None) -> Iterator[None]:
    """A program that ends in the block: with one line that has the words, another code than 0, and no trace.

    Args:
        untouched: a folder in which nothing is to change.
    """
    before = contents(untouched) if untouched else {}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        yield
    output = capsys.readouterr()
    lines = [exit.value.code] if isinstance(exit.value.code, str) else output.err.strip().splitlines()[-1:]
    assert exit.value.code not in (None, 0)
    assert "Traceback" not in output.err and "usage:" not in output.err
    (line,) = lines
    assert "\n" not in line and "error" in line and len(line) < 2100, line
    for word in words:
        assert word in line, f"{word!r} is not in: {line}"
    if untouched:
        assert contents(untouched) == before
