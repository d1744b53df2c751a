"""A page to try a model: its images, how they come about, and the code that makes them.

    sddit app              # the digits that come with the package
    sddit app PIPELINE     # a folder or a name on the Hub

Image i has the seed `seed` + i, as in `generate`, and the lines of code on the page make the images again, to
the bit on the same machine. The page listens on this machine alone unless told otherwise, and its browser
asks nothing of another. A copy of this file is the app.py of a Space (pipelines/space), where the environment
variable SDDIT_MODEL names the pipeline: hence its absolute imports.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from sddit_diffusers.cli import Parser, check_options, one_line_errors, option
from sddit_diffusers.page.actions import Page
from sddit_diffusers.page.layout import check_address, launch
from sddit_diffusers.pipelines.loading import DTYPES, load_pipeline


@dataclass
class AppConfig:
    """The settings of the page."""

    max_images: int = option(16, "images that are made at once, at most", low=1)
    max_steps: int = option(100, "steps, at most", low=1)
    dtype: str = option(
        "float32", "of the transformer: 'float32', 'bfloat16' or 'float16'", choices=tuple(DTYPES)
    )
    server_name: str = option("", "the address to listen at; 127.0.0.1, this machine alone, if not given")
    server_port: int = option(
        0, "the port to listen at; the first free one from 7860 if not given", low=0, high=65535
    )

    def __post_init__(self):
        check_options(self)


def serve(model: str, config: AppConfig) -> None:
    """Loads a pipeline and serves its page until it is interrupted.

    Raises:
        ValueError: there is no such pipeline or address.
        OSError: the port is taken.
    """
    check_address(config.server_name, config.server_port)
    pipe = load_pipeline(model, DTYPES[config.dtype]).to(Accelerator().device)
    blocks, url = launch(Page(pipe, model, config), config.server_name, config.server_port)
    print(f"{model} is at {url}", flush=True)
    blocks.block_thread()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(AppConfig, prog="app", doc=__doc__)
    parser.add_argument(
        "model",
        nargs="?",
        help="a folder or a name on the Hub; if not given SDDIT_MODEL, or else the digits of the package",
    )
    with one_line_errors("app"):
        chosen = parser.parse_known_options(arguments)
        model = chosen.pop("model") or os.environ.get("SDDIT_MODEL") or "digits"
        serve(model, AppConfig(**chosen))


if __name__ == "__main__":
    main()
