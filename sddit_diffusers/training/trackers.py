"""What accelerate's trackers get of a run, beside its metrics: settings and pictures."""

import dataclasses

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from .configuration import RunConfig, without_places

# Those that take one picture under a name; the others take a list, and TensorBoard an array.
_OF_ONE = ("aim", "clearml")


def settings_of(config: RunConfig) -> dict[str, object]:
    """A run's settings as trackers take them, lists as text, and as others may read them."""
    settings = without_places(dataclasses.asdict(config))
    return {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in settings.items()
    }


def takers(accelerator: Accelerator) -> list[GeneralTracker]:
    """The run's trackers that take pictures."""
    return [tracker for tracker in accelerator.trackers if hasattr(tracker, "log_images")]


def log_images(accelerator: Accelerator, images: dict[str, Image.Image], step: int) -> None:
    """Gives pictures by name to the trackers that take them; of the main process.

    Args:
        step: how many are done.
    """
    images = {name: image.convert("RGB") for name, image in images.items()}
    for tracker in takers(accelerator):
        if tracker.name == "tensorboard":
            arrays = {name: np.asarray(image)[None] for name, image in images.items()}
            tracker.log_images(arrays, step=step, dataformats="NHWC")
        elif tracker.name in _OF_ONE:
            tracker.log_images(images, step=step)
        else:
            tracker.log_images({name: [image] for name, image in images.items()}, step=step)
