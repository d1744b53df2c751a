"""Where the nodes' pipelines come from: ComfyUI's folders of models, this package, the Hub."""

import os
import re
from contextlib import suppress
from pathlib import Path

import folder_paths
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from sddit_diffusers import DIGITS
from sddit_diffusers.cli import one_line

EMBEDDED = "digits (embedded)"
FROM_HUB = "(from the Hub)"
HUB_SECONDS = 5.0  # that a connection to the Hub may take, and then its answer


def pipeline_folders() -> dict[str, Path]:
    """SD-DiT pipelines by name: those in ComfyUI's folders of `diffusers` models, then this package's own."""
    found = {}
    for root in folder_paths.get_folder_paths("diffusers"):
        for folder, subfolders, files in os.walk(root, followlinks=True):
            if leads_back(Path(folder), Path(root)):
                subfolders.clear()
                continue
            index = Path(folder, "model_index.json")
            if index.name in files:
                subfolders.clear()
                with suppress(OSError):  # a link to nothing, or nobody's to read
                    if b"SDDiTPipeline" in index.read_bytes():
                        found.setdefault(index.parent.relative_to(root).as_posix(), index.parent)
    return dict(sorted(found.items())) | {EMBEDDED: DIGITS}


def leads_back(folder: Path, root: Path) -> bool:
    """Whether a folder is, by a link, one of those above it up to `root`."""
    above = [parent for parent in folder.parents if parent.is_relative_to(root)]
    return os.path.realpath(folder) in map(os.path.realpath, above)


def source(folder: str, hub_name: str) -> str:
    """What `from_pretrained` takes: a folder of models that was found, or a name on the Hub.

    Raises:
        ValueError: there is no such pipeline, the name may be a path, or the Hub does not answer.
    """
    if folder == FROM_HUB:
        if not is_hub_name(hub_name) or os.path.exists(hub_name):
            raise ValueError(
                f"hub_name is {hub_name!r}; it must be a name on the Hub, as 'owner/name', and no path."
            )
        return on_hub(hub_name)
    if hub_name:
        raise ValueError(
            f"Both the folder {folder!r} and hub_name {hub_name!r} are given; "
            f"choose the folder {FROM_HUB!r}, or empty hub_name."
        )
    folders = pipeline_folders()
    if folder not in folders:
        raise ValueError(
            f"There is no SD-DiT pipeline {folder!r} in ComfyUI's folders of diffusers models; "
            f"there are: {', '.join(folders)}."
        )
    return str(folders[folder])


def is_hub_name(name: str) -> bool:
    """Whether a repository on the Hub may have it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name))


def on_hub(name: str) -> str:
    """A name on the Hub; or the folder of its copy on this machine, if the Hub is out of reach.

    The Hub is asked once, so that a wrong name or a missing network ends in one line, soon, and not in the
    retries and the traceback of a download.

    Raises:
        ValueError: there is no such pipeline, or neither an answer nor a copy.
    """
    try:
        files = HfApi().model_info(name, timeout=HUB_SECONDS).siblings or []
    except RepositoryNotFoundError:
        raise ValueError(
            f"There is no model {name!r} on the Hub, or it is private and no token here may read it."
        ) from None
    except Exception as error:  # whatever the network and its libraries raise
        try:
            return snapshot_download(name, local_files_only=True)
        except Exception:
            raise ValueError(
                f"The Hub does not answer for {name!r}, and this machine has no copy of it: {one_line(error)}"
            ) from None
    if "model_index.json" not in {file.rfilename for file in files}:
        raise ValueError(f"{name!r} on the Hub is no pipeline: it has no model_index.json.")
    return name
