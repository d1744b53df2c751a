"""ADM's evaluator restated in numpy and scipy from what it computes, for tests to compare with."""

import numpy as np
import scipy.linalg


def statistics(features):
    return features.astype(np.float64).mean(0), np.cov(features, rowvar=False)


def fid(a, b):
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)


def fid_of_features(a, b):
    """The same for few images: the trace of the root is the sum of the singular values of A^T B, of centred A
    and B whose products with themselves are the covariances."""
    means, centred = [x.astype(np.float64).mean(0) for x in (a, b)], []
    for x, mean in zip((a, b), means, strict=True):
        centred.append((x.astype(np.float64) - mean) / np.sqrt(len(x) - 1))
    trace = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    return ((means[0] - means[1]) ** 2).sum() + sum((x**2).sum() for x in centred) - 2 * trace


def inception_score(logits, split_size=5000):
    p = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    scores = []
    for start in range(0, len(p), split_size):
        part = p[start : start + split_size]
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(kl.sum(1).mean()))
    return np.mean(scores)


def distances(a, b):
    """Squared, in float32 as |a|^2 - 2 ab + |b|^2."""
    return np.maximum((a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1), 0)


def half_distances(a, b):
    """Squared, every result of every operation rounded to float16."""
    a, b = a.astype(np.float16), b.astype(np.float16)
    norms = [np.square(x).astype(np.float64).sum(1).astype(np.float16) for x in (a, b)]
    products = (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float16)
    return np.maximum((norms[0][:, None] - np.float16(2) * products) + norms[1], np.float16(0))


def in_batches(size):
    """Distances in float16 by batches of rows and columns; in float32 in those where one is not finite."""

    def compared(a, b):
        found = np.empty((len(a), len(b)), np.float32)
        for i in range(0, len(a), size):
            for j in range(0, len(b), size):
                batch = a[i : i + size], b[j : j + size]
                with np.errstate(over="ignore", invalid="ignore"):
                    half = half_distances(*batch)
                finite = np.isfinite(half).all()
                compared.precisions.add("half" if finite else "single")
                found[i : i + size, j : j + size] = half if finite else distances(*batch)
        return found

    compared.precisions = set()
    return compared


def precision_recall(samples, reference, distances=distances, k=3):
    """A loop over points; the point itself is the nearest of its own neighbours."""
    radii = []
    for points in (reference, samples):
        among = distances(points, points)
        radii.append([sorted(row)[k] for row in among])
    between = distances(reference, samples)
    precision = np.mean([any(between[:, j] <= radii[0]) for j in range(len(samples))])
    recall = np.mean([any(between[i] <= radii[1]) for i in range(len(reference))])
    return precision, recall
