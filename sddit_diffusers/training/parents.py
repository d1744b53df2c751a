"""The trained pipelines that a second stage begins with."""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub import hf_hub_download
from torch import nn

from ..cli import one_line
from ..files import read_json
from ..pipelines.loading import load_pipeline, load_vae, place_of, sha256_of_weights
from ..pipelines.pipeline_sddit import SDDiTPipeline
from ..schedulers.scheduling_edm_heun import EDMHeunScheduler
from ..schedulers.scheduling_interpolant import InterpolantScheduler
from .auxiliary import Process
from .configuration import as_lists
from .foreign import FOREIGN, load_foreign, pipeline_class
from .methods import METHODS


@dataclass
class Parent:
    """A trained pipeline.

    Args:
        name: its folder, or its name on the Hub.
        network: what was trained; never changed.
        scheduler: its process.
        title: of its method, for people.
        id2label: names of the classes by number.
        settings: of its training, as far as they are told.
    """

    name: str
    network: nn.Module
    scheduler: Process
    vae: AutoencoderKL | AutoencoderTiny | None
    title: str
    id2label: dict[int, str] | None = None
    settings: dict = field(default_factory=dict)

    @property
    def is_child(self) -> bool:
        """Whether it was distilled itself."""
        return "objective" in self.settings

    @cached_property
    def sha256(self) -> str:
        """Of the weights."""
        return sha256_of_weights(self.network)

    def sampler(self, num_inference_steps: int, solver: str) -> Process:
        """The process, with the sampler of so many steps.

        Raises:
            ValueError: it cannot take the steps.
        """
        try:
            return sampler_of(self.scheduler, num_inference_steps, solver)
        except ValueError as error:
            raise ValueError(
                f"The scheduler of {self.name} cannot take the steps: {one_line(error)}"
            ) from None


def sampler_of(process: Process, num_inference_steps: int, solver: str) -> Process:
    """A process with the sampler of so many steps of an ODE solver.

    Raises:
        ValueError: it cannot take the steps.
    """
    changes = {"diffusion": "none"} if "diffusion" in process.config else {}
    return type(process).from_config(
        process.config, num_inference_steps=num_inference_steps, solver=solver, **changes
    )


@lru_cache(maxsize=1)
def load_parent(name: str) -> Parent:
    """The trained pipeline of a folder or of the Hub.

    Raises:
        ValueError: there is none, or it is of a class or has a scheduler that is not known.
    """
    place = place_of(name)
    kind = pipeline_class(place)
    if kind in FOREIGN:
        network, scheduler = load_foreign(name, kind)
        return Parent(name, network, scheduler, load_vae(name), network.title, settings=read_settings(name))
    if kind not in ("", SDDiTPipeline.__name__):
        raise ValueError(
            f"{name} is a {kind}; those that can be distilled are {', '.join(FOREIGN)} and SDDiTPipeline."
        )
    pipe = load_pipeline(name)
    if not isinstance(pipe.scheduler, (EDMHeunScheduler, InterpolantScheduler)):
        raise ValueError(
            f"The scheduler of {name} is {type(pipe.scheduler).__name__}; those that can be distilled are "
            "EDMHeunScheduler and InterpolantScheduler."
        )
    rows = [row for row in METHODS.values() if row.transformer is type(pipe.transformer)]
    title = rows[0].title if rows else type(pipe.transformer).__name__
    return Parent(
        name, pipe.transformer, pipe.scheduler, pipe.vae, title, pipe.id2label, read_settings(place)
    )


def read_settings(name: str) -> dict:
    """The training_config.json of a pipeline; empty where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = Path(name) / "training_config.json"
    if not path.parent.is_dir():
        try:
            path = Path(hf_hub_download(name, path.name))
        except Exception:  # whatever the Hub and its client raise: it is not needed
            return {}
    return as_lists(read_json(path, dict, "training's settings")) if path.is_file() else {}
