"""The scores of ADM's evaluator (Dhariwal & Nichol 2021) from features: what FID, sFID, IS, P and R mean.

Nothing here knows images. Features are `[images, d]`, float32; statistics and distances between Gaussians are
float64. tests/evaluation/test_scores.py restates each score in plain numpy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_kid import kid_features_to_metric

_BLOCK = 2048  # rows and columns of the distances that are held at once
_ADMS_BATCH = 10_000  # rows and columns of those that ADM's evaluator computes in one precision


@dataclass
class Gaussian:
    """Mean `[d]` and covariance `[d, d]` of features, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Gaussian":
        """Of features `[images, d]`."""
        moments = Moments()
        for rows in features.split(_BLOCK):
            moments.add(rows)
        return moments.gaussian()


class Moments:
    """Sums, in float64, from which mean and covariance follow: features come in parts and are not kept.

    Attributes:
        sums: of (1, x)(1, x)^T over all features x, `[1 + d, 1 + d]`; of several processes' parts they add.
    """

    def __init__(self):
        self.sums = 0

    def add(self, features: Tensor) -> None:
        """Counts in some features, `[images, d]`."""
        ones = torch.nn.functional.pad(features.double(), (1, 0), value=1.0)
        self.sums = self.sums + ones.T @ ones

    def gaussian(self) -> Gaussian:
        """The Gaussian of all features, with the covariance's unbiased estimate.

        Raises:
            ValueError: of fewer than two images.
        """
        count, mean = self.sums[0, 0], self.sums[0, 1:] / self.sums[0, 0]
        if count < 2:
            raise ValueError(f"{int(count)} image has no covariance; at least 2 are needed.")
        scatter = self.sums[1:, 1:] - count * torch.outer(mean, mean)
        return Gaussian(mean.cpu(), (scatter / (count - 1)).cpu())


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Between two Gaussians: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) (Heusel et al. 2017, Eq. 6).

    The last trace is the sum of the singular values of C_a^1/2 C_b^1/2. Unlike eigenvalues of the product it
    is right to rounding where a covariance is singular, as it is for fewer images than features.

    Raises:
        ValueError: they are not of the same features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"The statistics are of {len(a.mean)} and of {len(b.mean)} features.")
    roots = []
    for gaussian in (a, b):
        values, vectors = torch.linalg.eigh(gaussian.covariance)
        roots.append((vectors * values.clamp(min=0).sqrt()) @ vectors.T)
    trace = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace
    return distance.item()


def inception_score(logits: Tensor, order: Tensor | None = None, split_size: int = 5000) -> float:
    """The mean over chunks, in the images' order, of exp E KL(p(y | x) || p(y)) (Salimans et al. 2016).

    Args:
        logits: `[images, classes]`, without the last layer's bias in ADM's Inception.
        order: another order of the images, `[images]`.
        split_size: images of a chunk; the last may have fewer.
    """
    order = torch.arange(len(logits)) if order is None else order
    scores = []
    for chunk in order.split(split_size):
        log_p = logits[chunk].double().log_softmax(1)
        p = log_p.exp()
        divergence = (p * log_p).sum(1) - p @ p.mean(0).clamp(min=1e-300).log()
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores))


class Manifold:
    """The balls around features that reach to their k-th nearest neighbours (Kynkäänniemi et al. 2019).

    Args:
        features: `[images, d]`; distances are computed on their device.
        k: neighbours, the point itself not counted.
        half: distances in float16, as ADM's evaluator computes them on a GPU.

    Raises:
        ValueError: there are no k neighbours.
    """

    def __init__(self, features: Tensor, k: int = 3, half: bool = False):
        if len(features) <= k:
            raise ValueError(
                f"{len(features)} images have no {k} neighbours each; "
                f"precision and recall need at least {k + 1}."
            )
        self.features, self.k, self.half = features, k, half

    @cached_property
    def radii(self) -> Tensor:
        """The squared distance of each point to its k-th nearest neighbour, `[images]`."""
        features, half = self.features, self.half
        nearest = features.new_full((len(features), self.k + 1), torch.inf)  # the point itself too
        for rows, columns, found in _blocks(features, features, half, upper=not half):
            nearest[rows] = _smallest(nearest[rows], found)
            # In float16 the distance of a to b is not rounded as that of b to a.
            if rows != columns and not half:
                nearest[columns] = _smallest(nearest[columns], found.T.contiguous())
        return nearest.amax(1)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances `[len(a), len(b)]` as ADM computes them, |a|^2 - 2 ab + |b|^2, at least 0."""
    products = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return products.add_(a.square().sum(1, keepdim=True)).clamp_(min=0)


def _blocks(a: Tensor, b: Tensor, half: bool, upper: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
    """All distances of a to b, some rows and columns at a time.

    With `half` they are rounded to float16, but for batches of ADM's in which one is not finite there: all
    of such a batch are as in float32. `upper` leaves out the blocks below the diagonal.
    """
    side = _ADMS_BATCH if half else _BLOCK
    for top in range(0, len(a), side):
        strips = [slice(i, min(i + _BLOCK, top + side)) for i in range(top, min(top + side, len(a)), _BLOCK)]
        for left in range(top if upper else 0, len(b), side):
            columns = slice(left, left + side)
            rounded = [_half_distances(a[rows].half(), b[columns].half()) for rows in strips if half]
            finite = half and all(strip.isfinite().all() for strip in rounded)
            for i, rows in enumerate(strips):
                yield rows, columns, rounded[i].float() if finite else distances(a[rows], b[columns])


def _half_distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances whose every result is rounded to float16; sums run in float32, as they do on GPUs."""
    squares = [x.square().float().sum(1).half() for x in (a, b)]
    products = (a.float() @ b.float().T).half()
    return (squares[0][:, None] - 2 * products + squares[1]).clamp_(min=0)


def _smallest(known: Tensor, more: Tensor) -> Tensor:
    """The smallest values of each row, as many as are known."""
    count = known.shape[1]
    found = more.topk(min(count, more.shape[1]), largest=False).values
    return torch.cat([known, found], dim=1).topk(count, largest=False).values


def precision_recall(samples: Manifold, reference: Manifold) -> tuple[float, float]:
    """The share of samples in the reference's balls, and of the reference in the samples' balls."""
    inside = torch.zeros(len(samples.features), dtype=torch.bool, device=samples.features.device)
    covered = torch.zeros(len(reference.features), dtype=torch.bool, device=samples.features.device)
    for rows, columns, found in _blocks(reference.features, samples.features, samples.half):
        inside[columns] |= (found <= reference.radii[rows, None]).any(0)
        covered[rows] |= (found <= samples.radii[columns]).any(1)
    return inside.double().mean().item(), covered.double().mean().item()


def kernel_distance(samples: Tensor, reference: Tensor) -> float:
    """KID (Bińkowski et al. 2018) as torch-fidelity estimates it: 100 subsets of 1,000 images, or of all.

    Raises:
        ValueError: a set of fewer than two images.
    """
    size = min(1000, len(samples), len(reference))
    if size < 2:
        raise ValueError("KID needs at least 2 images on either side.")
    result = kid_features_to_metric(samples, reference, kid_subset_size=size, verbose=False)
    return result["kernel_inception_distance_mean"]
