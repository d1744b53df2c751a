"""Interpolants: paths, what a network gives, losses, times of training."""

import math
from itertools import product

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.autograd.functional import jvp

from sddit_diffusers import EDMHeunScheduler, InterpolantScheduler
from sddit_diffusers.schedulers.scheduling_interpolant import (
    PATHS,
    PREDICTIONS,
    WEIGHTINGS,
)

NOISE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
X0 = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
EPS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def times_of(path, count=41):
    """Times of a path's interval, with its ends."""
    low, high = PATHS[path].interval
    return torch.linspace(low, high, count, dtype=torch.float64)


# The paths


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_the_papers(path):
    """SiT, Sec. 2, and its code, whose time is 1 - t here; the derivatives by automatic differentiation."""
    t, here = times_of(path), PATHS[path]
    alpha, sigma = {
        "linear": lambda t: (1 - t, t),
        "gvp": lambda t: (torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)),
        "vp": lambda t: (
            mean := torch.exp(-0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1),
            (1 - mean**2).sqrt(),
        ),
    }[path](t)
    torch.testing.assert_close(here.alpha(t), alpha, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(here.sigma(t), sigma, rtol=1e-10, atol=1e-15)
    for function, derivative in ((here.alpha, here.d_alpha), (here.sigma, here.d_sigma)):
        torch.testing.assert_close(
            jvp(function, t, torch.ones_like(t))[1], derivative(t), rtol=1e-10, atol=1e-12
        )
    assert (here.sigma(t) / here.alpha(t)).diff().min() > 0
    back = here.time_of(here.sigma(t) / here.alpha(t))
    torch.testing.assert_close(back, t, rtol=1e-10, atol=1e-12)


def test_the_one_ruler():
    """A noise-to-signal ratio is the same everywhere, and its ends are the interval's."""
    for path in PATHS:
        scheduler = InterpolantScheduler(path=path)
        for ratio in (0.002, 0.3, 1.0, 80.0):
            t = torch.tensor(scheduler.time_of(ratio), dtype=torch.float64)
            assert scheduler.path.sigma(t) / scheduler.path.alpha(t) == pytest.approx(ratio, rel=1e-9)
        assert (scheduler.time_of(0.0), scheduler.time_of(math.inf)) == scheduler.interval
    assert EDMHeunScheduler().time_of(0.3) == 0.3


@pytest.mark.parametrize("process", ["edm", *PATHS])
def test_the_ruler_takes_tensors(process):
    process = EDMHeunScheduler() if process == "edm" else InterpolantScheduler(path=process)
    ratios = torch.tensor([[0.002, 0.3], [1.0, 80.0]], dtype=torch.float64)
    times = process.time_of(ratios)
    expected = [process.time_of(ratio) for ratio in ratios.flatten().tolist()]
    torch.testing.assert_close(times, torch.tensor(expected, dtype=torch.float64).view(2, 2))
    torch.testing.assert_close(process.ratio_of(times), ratios)
    if not isinstance(process, EDMHeunScheduler):
        ends = torch.tensor([0.0, math.inf])
        assert process.time_of(ends).tolist() == pytest.approx(process.interval)


# Conversions


@pytest.mark.parametrize(("path", "prediction"), [*product(PATHS, PREDICTIONS)])
def test_every_prediction_stands_for_data_noise_and_velocity(path, prediction):
    scheduler = InterpolantScheduler(path=path, prediction_type=prediction)
    low, high = scheduler.interval
    for t in torch.linspace(low, high, 21, dtype=torch.float64):
        alpha, sigma, d_alpha, d_sigma = scheduler.path.at(t)
        x, velocity = scheduler.noised(X0, EPS, t), d_alpha * X0 + d_sigma * EPS
        given = {"flow_prediction": velocity, "score": -EPS / sigma, "epsilon": EPS, "sample": X0}[prediction]
        x0, noise = scheduler.solve(given, x, t)
        # Where alpha or sigma is small, x says little of the other part: relative to what x says of it.
        assert (alpha * (x0 - X0)).abs().max() < 1e-10 and (sigma * (noise - EPS)).abs().max() < 1e-10
        scale = max(1.0, float(d_sigma), -float(d_alpha))
        assert (scheduler.velocity(given, x, t) - velocity).abs().max() < 1e-10 * scale / min(
            float(sigma) or 1, 1
        )
        if prediction == "flow_prediction":
            torch.testing.assert_close(x0, X0, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(noise, EPS, rtol=1e-10, atol=1e-8 if path == "vp" else 1e-10)
        torch.testing.assert_close(scheduler.precondition_outputs(x, given, t), x0, rtol=0, atol=0)


def test_the_velocity_is_diffusers():
    """v = eps - x0 on the linear path, and the network's timestep is 1000 t."""
    scheduler, t = InterpolantScheduler(), torch.tensor(0.3, dtype=torch.float64)
    velocity = scheduler.velocity(EPS - X0, scheduler.noised(X0, EPS, t), t)
    torch.testing.assert_close(velocity, EPS - X0)
    assert scheduler.precondition_noise(t) == 300
    theirs = FlowMatchEulerDiscreteScheduler()
    noised = theirs.scale_noise(NOISE, theirs.timesteps[[200]], NOISE.flip(0))
    torch.testing.assert_close(noised, scheduler.scale_noise(NOISE, theirs.timesteps[[200]], NOISE.flip(0)))


# Training


@pytest.mark.parametrize(("path", "prediction"), [*product(PATHS, PREDICTIONS)])
def test_the_velocity_weight_makes_any_loss_the_velocitys(path, prediction):
    plain = InterpolantScheduler(path=path)
    weighted = InterpolantScheduler(path=path, prediction_type=prediction, loss_weighting="velocity")
    t = torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64).view(4, 1, 1, 1)
    x, given = weighted.noised(X0, EPS, t), X0.flip(0) + 0.3 * EPS
    velocity = weighted.velocity(given, x, t)
    ours = InterpolantScheduler.error(weighted, given.float(), x, X0, EPS, t)
    expected = plain.error(velocity, x, X0, EPS, t)
    torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-4)


def test_losses_are_sits():
    """The sums of squares of its code, in its own convention of time, for the score and the noise."""
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64).view(4, 1, 1, 1)
    given = X0.flip(0).float()
    # As there: s = 1 - t, alpha = s, sigma = 1 - s, with 'drift_var' = alpha_ratio sigma^2 - sigma d_sigma.
    s = 1 - t
    drift_var = (1 / s) * (1 - s) ** 2 - (1 - s) * -1
    weights = {"none": 1.0, "velocity": (drift_var / (1 - s)) ** 2, "likelihood": drift_var / (1 - s) ** 2}
    for weighting, weight in weights.items():
        for prediction, theirs in (
            ("epsilon", (given - EPS) ** 2),
            ("score", (given * (1 - s) + EPS) ** 2),
        ):
            scheduler = InterpolantScheduler(prediction_type=prediction, loss_weighting=weighting)
            x = scheduler.noised(X0, EPS, t)
            torch.testing.assert_close(
                scheduler.error(given, x, X0, EPS, t), weight * theirs, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("path", "prediction"), [*product(PATHS, PREDICTIONS)])
def test_losses_are_finite_to_the_interval_s_ends(path, prediction, weighting):
    scheduler = InterpolantScheduler(path=path, prediction_type=prediction, loss_weighting=weighting)
    t = torch.tensor(scheduler.interval).view(2, 1, 1, 1)
    error = scheduler.error(
        NOISE[:2], scheduler.noised(NOISE[2:], NOISE[:2].flip(0), t), NOISE[2:], NOISE[:2].flip(0), t
    )
    assert error.isfinite().all() and error.min() >= 0


def test_times_of_training():
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    uniform = InterpolantScheduler().training_times(normal)
    assert uniform.min() >= 0 and uniform.max() <= 1
    torch.testing.assert_close(uniform.histc(10, 0, 1) / 1e5, torch.full((10,), 0.1), atol=4e-3, rtol=0)
    score = InterpolantScheduler(prediction_type="score").training_times(100 * normal)
    assert score.min() == pytest.approx(1e-3) and score.max() == pytest.approx(1 - 1e-3)
    lognormal = InterpolantScheduler(time_distribution="lognormal", p_mean=-0.4, p_std=1.3)
    torch.testing.assert_close(lognormal.training_times(normal), torch.sigmoid(-0.4 + 1.3 * normal))
    for path in PATHS:
        scheduler = InterpolantScheduler(path=path, time_distribution="lognormal", p_mean=-1.2, p_std=1.2)
        t = scheduler.training_times(normal[:100].double())
        ratio = scheduler.path.sigma(t) / scheduler.path.alpha(t)
        torch.testing.assert_close(ratio, EDMHeunScheduler().training_times(normal[:100].double()))
