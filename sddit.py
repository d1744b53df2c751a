"""The programs under one name: `sddit PROGRAM [OPTIONS]`.

On several devices: `accelerate launch -m sddit train`. A program is imported when it is called, since torch
takes seconds; `sddit --help` needs none of them.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple


class Program(NamedTuple):
    """Where a program is, and what `sddit --help` says of it."""

    module: str
    about: str
    function: str = "main"  # takes the arguments after the program's name


PROGRAMS = {
    "train": Program("train_sddit", "trains a model; without options, on handwritten digits"),
    "distill": Program("distill_sddit", "makes a trained model better at few steps, by itself"),
    "prepare-latents": Program("sddit_diffusers.prepare_latents", "encodes pictures for training on latents"),
    "generate": Program("sddit_diffusers.generate", "makes images, one a seed, to be looked at or scored"),
    "evaluate": Program("sddit_diffusers.evaluate", "scores images: FID, precision, recall and others"),
    "probe": Program("sddit_diffusers.evaluate", "tells what an encoder knows of classes", "main_probe"),
    "plot": Program("sddit_diffusers.plot", "draws samples, denoising paths and training curves"),
    "convert": Program("sddit_diffusers.convert", "makes single files, and pipelines of others' weights"),
    "reproduce": Program("sddit_diffusers.reproduce", "runs a study: many trainings, tables and figures"),
    "app": Program("sddit_diffusers.app", "opens a page to try a model in a browser"),
}
EXAMPLES = {
    "sddit app": "a page to try the model that comes along",
    "sddit train": "handwritten digits, minutes on a CPU",
    "sddit plot grid digits": "its samples, a row a class, into grid.png",
    "accelerate launch -m sddit train --preset cifar10": "on the devices of `accelerate config`",
}


def help_text() -> str:
    """What `sddit --help` prints."""
    programs = "\n".join(f"  {name:<18}{program.about}" for name, program in PROGRAMS.items())
    examples = "\n".join(
        f"  {line:<52}{'# ' * bool(about)}{about}".rstrip() for line, about in EXAMPLES.items()
    )
    return (
        "usage: sddit PROGRAM [OPTIONS]\n\n"
        "Trains, samples and scores diffusion transformers: SD-DiT and what it is compared with.\n\n"
        f"programs:\n{programs}\n\nexamples:\n{examples}\n\n"
        "`sddit PROGRAM --help` lists a program's options, `sddit --version` tells the version."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a program; its arguments are `sys.argv`'s by default.

    Raises:
        SystemExit: there is no such program, or it ended with a message.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        return print(help_text())
    if name == "--version":
        from importlib.metadata import version

        return print(version("sddit-diffusers"))
    name = name.replace("_", "-")
    if name not in PROGRAMS:
        print(f"sddit: error: {_unknown(name)}", file=sys.stderr)
        sys.exit(2)
    program, called_as = PROGRAMS[name], sys.argv[0]
    sys.argv[0] = f"sddit {name}"  # argparse and the programs' messages begin with it
    try:
        getattr(import_module(program.module), program.function)(rest)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        sys.argv[0] = called_as


def _unknown(name: str) -> str:
    """A message, with the nearest program that there is."""
    from difflib import get_close_matches

    nearest = get_close_matches(name, PROGRAMS, n=1)
    about = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(PROGRAMS)}."
    return f"no program {name[:80]!r}; {about}"


if __name__ == "__main__":
    main()
