"""What the page of the app sends, and its pictures as numbers."""

import numpy as np

# What the page sends untouched, but for fewer steps: classes, images, steps, guidance, low, high, seed.
VALUES = [[1, 3], 2, 4, 1.5, 0, 80.0, 7]


def changed(**changes):
    names = ("classes", "images", "steps", "guidance", "low", "high", "seed")
    return [changes.get(name, value) for name, value in zip(names, VALUES, strict=True)]


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)
