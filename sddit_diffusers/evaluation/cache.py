"""Files that are made once and found again: features, radii and classifiers, each with its hash."""

import hashlib
import os
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..cli import one_line
from ..files import save_tensors


def default_cache() -> Path:
    """Where features, radii and classifiers are kept where nobody says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sddit_diffusers"


def keep_tensors(path: Path, tensors: dict[str, Tensor], **about: str) -> None:
    """Writes a file of a cache, with the hash that [`kept_tensors`] asks of it.

    Raises:
        OSError: it cannot be written.
    """
    save_tensors(path, tensors, sha256=hash_of(path.name, tensors), **about)


def kept_tensors(path: Path) -> dict[str, Tensor] | None:
    """What a file of a cache holds; None, with a warning, where it is not what was written under its name."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError) as error:
        problem = one_line(error)
    else:
        if written == hash_of(path.name, tensors):
            return tensors
        problem = "its hash is another" if written else "it has no hash"
    print(f"{path} is damaged or of another version ({problem}); it is made again.", file=sys.stderr)
    return None


def hash_of(name: str, tensors: dict[str, Tensor]) -> str:
    """The SHA-256 of tensors by name, and of the name of their file."""
    digest = hashlib.sha256(name.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
