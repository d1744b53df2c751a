"""Statistics of features, in the files that ADM, EDM and EDM2 keep them in."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cli import shortened
from ..files import written_aside
from .arrays import read_array, read_pickle
from .catalogue import SCORES
from .scores import Gaussian

_NAMES = {name: score.statistics for name, score in SCORES.items() if score.statistics}
_WIDEST = 16_384  # features that statistics may be of


def read_statistics(path: Path) -> dict[str, Gaussian]:
    """The Gaussians of a file of statistics, by the score that they serve: "fid", "sfid", "fd_dinov2".

    Reads ADM's and EDM's `.npz`, EDM2's `.pkl` (numbers alone, so that nothing in it can run) and what
    [`save_statistics`] writes; those that the file does not have are left out.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        found = _of_edm2(path) if path.suffix == ".pkl" else _of_archive(path)
    except Exception as error:  # whatever a damaged or foreign file makes of numpy and pickle
        raise ValueError(f"{path} cannot be read as statistics: {error}") from None
    statistics = {}
    for score, (mean, covariance) in _NAMES.items():
        if mean in found and covariance in found:
            statistics[score] = _gaussian(path, mean, found[mean], found[covariance])
    if path.suffix == ".pkl" and not statistics:
        raise ValueError(f"{path} holds no statistics that EDM2's have: fid or fd_dinov2.")
    return statistics


def _of_edm2(path: Path) -> dict[str, np.ndarray]:
    """The arrays of EDM2's `.pkl`, by their names in an `.npz`."""
    found = read_pickle(path.read_bytes())
    return {
        name: _checked(found[score][part], f"{part} of {score}")
        for score, names in _NAMES.items()
        if score in found
        for name, part in zip(names, ("mu", "sigma"), strict=True)
    }


def _checked(array: Any, name: str) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is {shortened(array)}; it must be an array")
    return array


def _of_archive(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        there = {name.removesuffix(".npy") for name in archive.namelist()}
        return {
            name: read_array(archive, name, _WIDEST)
            for names in _NAMES.values()
            for name in names
            if name in there
        }


def _gaussian(path: Path, name: str, mean: np.ndarray, covariance: np.ndarray) -> Gaussian:
    if np.ndim(mean) != 1 or np.shape(covariance) != 2 * np.shape(mean):
        raise ValueError(
            f"{name} and its covariance in {path} have shapes {np.shape(mean)} and {np.shape(covariance)}."
        )
    gaussian = Gaussian(*(torch.from_numpy(x.astype(np.float64)) for x in (mean, covariance)))
    if not gaussian.mean.isfinite().all() or not gaussian.covariance.isfinite().all():
        raise ValueError(f"{name} or its covariance in {path} is not finite.")
    return gaussian


def save_statistics(path: Path, statistics: dict[str, Gaussian]) -> None:
    """Writes what [`read_statistics`] reads, under ADM's names."""
    arrays = {}
    for score, gaussian in statistics.items():
        mean, covariance = _NAMES[score]
        arrays |= {mean: gaussian.mean.numpy(), covariance: gaussian.covariance.numpy()}
    with written_aside(path) as file:
        np.savez(file, **arrays)
