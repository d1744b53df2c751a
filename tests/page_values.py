"""What the page of the app sends, and its pictures as numbers."""

import numpy as np

# Of the page, but for fewer steps: classes, images, steps, guidance, low, high, seed, and the sampler.
CALL = [[1, 3], 2, 4, 1.5, 0, 80.0, 7]
VALUES = [*CALL, "EDMHeunScheduler"]
NAMES = ("classes", "images", "steps", "guidance", "low", "high", "seed", "sampler")


def changed(**changes):
    """What the page sends, of which some is changed."""
    return [changes.get(name, value) for name, value in zip(NAMES, VALUES, strict=True)]


def changed_call(**changes):
    """The same without the sampler."""
    return changed(**changes)[:-1]


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)
