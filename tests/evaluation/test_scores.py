"""The scores against numpy's and scipy's, closed forms and loops."""

import adm
import numpy as np
import pytest
import torch

from sddit_diffusers.evaluation import scores
from sddit_diffusers.evaluation.scores import (
    Gaussian,
    Manifold,
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def features_like_inceptions(rows, seed, dim=48):
    """Not negative, with directions of very different variance, a mean of about 0.4 and heavy tails."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(7).normal(size=(dim, dim)) * 0.7 ** np.arange(dim)[:, None]
    values = np.abs(rng.normal(size=(rows, dim)) @ directions + 0.3 + 0.02 * seed)
    return (0.4 * values).astype(np.float32)


SAMPLES, REFERENCE = features_like_inceptions(330, 1), features_like_inceptions(270, 2)


def test_moments_in_parts_are_numpys_covariance():
    moments = Moments()
    for part in torch.from_numpy(SAMPLES).split(17):
        moments.add(part)
    gaussian = moments.gaussian()
    np.testing.assert_allclose(gaussian.mean, SAMPLES.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(gaussian.covariance, np.cov(SAMPLES, rowvar=False), rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match="1 image has no covariance"):
        Gaussian.of(torch.zeros(1, 3))


def test_frechet_distance_equals_adms():
    ours = frechet_distance(*(Gaussian.of(torch.from_numpy(x)) for x in (SAMPLES, REFERENCE)))
    assert ours == pytest.approx(adm.fid(*(adm.statistics(x) for x in (SAMPLES, REFERENCE))), rel=1e-6)


def test_frechet_distance_has_its_closed_form():
    """Of Gaussians with the same axes: the means' distance and that of the standard deviations."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=generator)).Q
    a, b = torch.rand(2, 20, dtype=torch.float64, generator=generator)
    means = torch.randn(2, 20, dtype=torch.float64, generator=generator)
    gaussians = [Gaussian(mean, (axes * std**2) @ axes.T) for mean, std in zip(means, (a, b), strict=True)]
    expected = (means[0] - means[1]).square().sum() + (a - b).square().sum()
    assert frechet_distance(*gaussians) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("rows", [30, 400])
def test_frechet_distance_to_itself_is_nothing(rows):
    """Also with fewer images than features, where the covariance is singular."""
    gaussian = Gaussian.of(torch.from_numpy(100 * features_like_inceptions(rows, 0, dim=200)))
    assert abs(frechet_distance(gaussian, gaussian)) < 1e-6


def test_frechet_distance_needs_the_same_features():
    with pytest.raises(ValueError, match="of 48 and of 47 features"):
        frechet_distance(*(Gaussian.of(torch.from_numpy(x)) for x in (SAMPLES, REFERENCE[:, :47])))


def test_inception_score_equals_adms_and_depends_on_the_order():
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.nn.functional.one_hot(torch.arange(10).repeat_interleave(50), 10).float()
    logits += torch.randn(500, 10, generator=generator)  # sorted by class
    order = torch.randperm(500, generator=generator)
    by_class, mixed = (
        inception_score(logits, split_size=60),
        inception_score(logits, order, split_size=60),
    )
    assert by_class == pytest.approx(adm.inception_score(logits.numpy(), 60), rel=1e-6)
    assert mixed == pytest.approx(adm.inception_score(logits[order].numpy(), 60), rel=1e-6)
    assert by_class < 0.5 * mixed
    # Of classes that are certain and equally many, the score is their number.
    certain = 1e4 * torch.eye(10).repeat(5, 1)
    assert inception_score(certain) == pytest.approx(10)


@pytest.mark.parametrize("block", [2048, 50])
def test_precision_and_recall_equal_adms(block, monkeypatch):
    monkeypatch.setattr(scores, "_BLOCK", block)
    ours = precision_recall(*(Manifold(torch.from_numpy(x)) for x in (SAMPLES, REFERENCE)))
    assert ours == adm.precision_recall(SAMPLES, REFERENCE)
    assert 0.05 < ours[1] < ours[0] < 0.95  # neither all nor nothing, and not the same


@pytest.mark.parametrize("block", [2048, 50])
def test_half_distances_are_adms_on_a_gpu(block, monkeypatch):
    monkeypatch.setattr(scores, "_BLOCK", block)
    # Large norms, whose rounding shows; of sixteenths, so that sums in float32 are exact in any order.
    samples, reference = (np.round(64 * x + 32) / 16 for x in (SAMPLES, REFERENCE))
    ours = precision_recall(*(Manifold(torch.from_numpy(x), half=True) for x in (samples, reference)))
    assert ours == adm.precision_recall(samples, reference, adm.half_distances)
    assert ours != adm.precision_recall(samples, reference)


@pytest.mark.parametrize("block", [2048, 30])
def test_half_distances_that_overflow_are_in_float32_by_adms_batches(block, monkeypatch):
    """One distance that overflows makes its whole batch float32, and no other; here batches are of 90."""
    monkeypatch.setattr(scores, "_BLOCK", block)
    monkeypatch.setattr(scores, "_ADMS_BATCH", 90)
    samples, reference = (np.round(64 * x + 32) / 16 for x in (SAMPLES, REFERENCE))
    samples[95] *= 100  # in the second batch of four
    samples, reference = samples.astype(np.float32), reference.astype(np.float32)
    compared = adm.in_batches(90)
    ours = precision_recall(*(Manifold(torch.from_numpy(x), half=True) for x in (samples, reference)))
    assert ours == adm.precision_recall(samples, reference, compared)
    assert compared.precisions == {"half", "single"}
    assert ours != adm.precision_recall(samples, reference)


def test_a_set_covers_itself():
    manifold = Manifold(torch.from_numpy(SAMPLES))
    assert precision_recall(manifold, manifold) == (1.0, 1.0)


def test_too_few_images_for_neighbours():
    with pytest.raises(ValueError, match="3 images have no 3 neighbours each; .* at least 4"):
        Manifold(torch.zeros(3, 2))


def test_kernel_distance_is_the_unbiased_estimate_by_loops():
    """Of fewer than 1,000 images each subset has all of the smaller set."""
    a, b = SAMPLES[:40].astype(np.float64), REFERENCE[:40].astype(np.float64)

    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    within = sum(kernel(x[i], x[j]) for x in (a, b) for i, j in pairs) / (40 * 39)
    between = sum(kernel(x, y) for x in a for y in b) / 40**2
    ours = kernel_distance(*(torch.from_numpy(x) for x in (SAMPLES[:40], REFERENCE[:40])))
    assert ours == pytest.approx(within - 2 * between, rel=1e-3)
