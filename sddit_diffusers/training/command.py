"""The command with which a run goes on."""

import os
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from .configuration import OutputOptions

_PROGRAMS = {"train_sddit": None, "distill_sddit": None, "sddit": ("train", "distill")}
_LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "torchrun",
    "torch.distributed.run",
    "accelerate.commands.launch",
}


def command_to_go_on(options: OutputOptions) -> str:
    """What to type after a run was stopped; a sentence where nobody knows how it was started.

    It is asked for while the launcher is there: Ctrl-C ends that of a single process at once.

    Args:
        options: of the run.
    """
    command = _command()
    if command is None:
        more = "" if options.resume_from_checkpoint == "latest" else " with --resume_from_checkpoint latest"
        return f"the same command{more}"
    rest, overwrites = [], False
    while command:
        word, *command = command
        name, given, _ = word.partition("=")
        if name.replace("-", "_") not in ("__resume_from_checkpoint", "__overwrite_output_dir"):
            rest.append(word)
            continue
        overwrites |= "overwrite" in name
        if not given and command and not command[0].startswith("--"):
            command = command[1:]  # its value
    if options.overwrite_output_dir and not overwrites:  # by a file of options
        rest += ["--overwrite_output_dir", "False"]
    return shlex.join([*rest, "--resume_from_checkpoint", "latest"])


def _command() -> list[str] | None:
    """The words that started this process, or its launcher; None where it is no program that trains."""
    program, own = Path(sys.argv[0]).stem, sys.argv[1:]
    if program not in _PROGRAMS or (_PROGRAMS[program] and (own or [""])[0] not in _PROGRAMS[program]):
        return None
    words = sys.orig_argv
    with suppress(psutil.Error):
        launcher = psutil.Process(os.getppid()).cmdline()
        if _LAUNCHERS.intersection(Path(word).name for word in launcher[:4]):
            words = launcher
    # Who calls a program's `main` may have given it other options than the process has.
    known = words[len(words) - len(own) :] == own and program in (Path(word).stem for word in words)
    return _short(words) if known else None


def _short(words: list[str]) -> list[str]:
    """A command line without the folder of an interpreter, or the interpreter of a script beside it."""
    interpreter, *rest = words
    if rest and Path(rest[0]).parent == Path(interpreter).parent != Path():
        return [Path(rest[0]).name, *rest[1:]]
    name = Path(interpreter).name
    return [name if shutil.which(name) == interpreter else interpreter, *rest]
