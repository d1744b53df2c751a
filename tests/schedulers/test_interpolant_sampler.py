"""Interpolants: ODE and SDE, beside the schedulers of others."""

import math
from itertools import product

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from gaussians import COVARIANCE, MEAN, draw

from sddit_diffusers import EDMHeunScheduler, InterpolantScheduler
from sddit_diffusers.schedulers.scheduling_interpolant import (
    DIFFUSIONS,
    LAST_STEPS,
    PATHS,
    PREDICTIONS,
    SOLVERS,
    Path,
)

NOISE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(x, timestep):
    """A velocity that depends on its input and its timestep."""
    t = timestep / 1000
    return torch.tanh(2 * x) * torch.cos(3 * t) + 0.3 * x.roll(1, -1) - 0.2 * t


def sample(scheduler, x, steps=None, generator=None, **schedule):
    scheduler.set_timesteps(steps, **schedule)
    x = x * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep), timestep, x, generator=generator).prev_sample
    return x


# Samples and evaluations, and how far from the data's moments they may be.
SIZES = [(4000, 50, 0.09), pytest.param(20_000, 250, 0.025, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("samples", "evaluations", "tolerance"), SIZES)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("path", "prediction"), [*product(PATHS, PREDICTIONS)])
def test_the_ode_reaches_the_data(path, prediction, solver, samples, evaluations, tolerance):
    scheduler = InterpolantScheduler(path=path, prediction_type=prediction, solver=solver)
    assert_moments(draw(scheduler, samples, evaluations // scheduler.order), tolerance)


@pytest.mark.parametrize(("samples", "evaluations", "tolerance"), SIZES)
@pytest.mark.parametrize("diffusion", [name for name in DIFFUSIONS if name != "none"])
@pytest.mark.parametrize("path", PATHS)
def test_every_sde_reaches_the_data(path, diffusion, samples, evaluations, tolerance):
    """By both solvers, with every last step."""
    for i, last_step in enumerate(LAST_STEPS):
        scheduler = InterpolantScheduler(
            path=path, solver=SOLVERS[i // 2], diffusion=diffusion, last_step=last_step
        )
        # The drift alone, as the last step from t = 0.04, is biased where w is large beside sigma there.
        bias = 0.04 if last_step == "mean" else 0.0
        assert_moments(draw(scheduler, samples, evaluations // scheduler.order), tolerance + bias)


def assert_moments(x, tolerance):
    assert (x.mean(0) - MEAN).abs().max() < tolerance
    assert (x.T.cov() - COVARIANCE).abs().max() < tolerance


@pytest.mark.parametrize(
    ("solver", "diffusion", "order"),
    [
        ("euler", "none", 1),
        ("heun", "none", 2),
        ("euler", "sigma", 1),
        ("euler", "kl", 1),
        ("heun", "sigma", 2),
    ],
)
def test_orders_of_convergence(solver, diffusion, order, monkeypatch):
    """Of the variance of a Gaussian, which a perfect network moves linearly: a x + b + sum of c_i z_i."""
    mean, deviation = 0.7, 0.4

    def variance(steps):
        scheduler = InterpolantScheduler(solver=solver, diffusion=diffusion, last_step="none")
        scheduler.set_timesteps(steps)
        calls = iter(range(2, steps + 2))
        x = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)  # for b, a and each c
        x[1] = 1

        def unit_noise(shape, **_):
            z = torch.zeros(shape, dtype=torch.float64)
            z[next(calls)] = 1
            return z

        monkeypatch.setattr("sddit_diffusers.schedulers.scheduling_interpolant.randn_tensor", unit_noise)
        for t, timestep in zip(scheduler.times, scheduler.timesteps, strict=True):
            alpha, sigma = scheduler.path.alpha(t), scheduler.path.sigma(t)
            share = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
            x0 = mean + share * (x - alpha * mean)
            x = scheduler.step((x - alpha * x0) / sigma - x0, timestep, x).prev_sample
        assert x[0].item() == pytest.approx(mean, abs=2 / steps)
        return (x[1:] - x[0]).square().sum().item()

    errors = [abs(variance(steps) - deviation**2) for steps in (64, 128, 256, 512)]
    orders = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    print(solver, diffusion, [f"{order:.2f}" for order in orders])
    assert orders[-1] == pytest.approx(order, abs=0.15)


def test_the_sde_is_the_papers(monkeypatch):
    """In small steps, with the same noise, it is Euler-Maruyama as the paper writes it, on x itself."""
    steps, end = 2000, 0.3
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(steps, 64, 1, 1, 1, generator=generator, dtype=torch.float64)
    scheduler = InterpolantScheduler(
        solver="euler", diffusion="sigma", diffusion_norm=1.5, last_step_size=end
    )
    scheduler.set_timesteps(steps)
    drawn = iter(z)
    monkeypatch.setattr(
        "sddit_diffusers.schedulers.scheduling_interpolant.randn_tensor", lambda *_, **__: next(drawn)
    )
    ours = theirs = torch.randn(64, 1, 1, 1, generator=generator, dtype=torch.float64)

    def velocity(x, t):
        """Of the data 0.7 + 0.4 N(0, 1)."""
        share = (1 - t) * 0.16 / ((1 - t) ** 2 * 0.16 + t**2)
        x0 = 0.7 + share * (x - (1 - t) * 0.7)
        return (x - x0) / t

    times = scheduler.times.tolist()
    for i, (t, following) in enumerate(zip(times, times[1:], strict=False)):
        ours = scheduler.step(velocity(ours, t), 0, ours).prev_sample
        v, h, w = velocity(theirs, t), t - following, 1.5 * t
        score = -(theirs + (1 - t) * v) / t
        theirs = theirs - h * (v - w * score / 2) + math.sqrt(w * h) * z[i]
    assert times[-1] == pytest.approx(end)
    assert (ours - theirs).square().mean().sqrt() < 3e-3 < 0.1 < theirs.std()


def test_the_last_steps_are_the_papers():
    """From t = 0.04, without noise: the drift, the denoised sample, the velocity (SiT, Sec. 3)."""
    x, output = NOISE.double(), NOISE.flip(0).double()
    for path in PATHS:
        kept = {}
        for name in ("mean", "tweedie", "euler"):
            scheduler = InterpolantScheduler(path=path, diffusion="sigma", last_step=name, solver="euler")
            scheduler.set_timesteps(7)
            assert scheduler.times[-1] == pytest.approx(0.04)
            scheduler.set_begin_index(6)
            kept[name] = scheduler.step(output, 0, x).prev_sample
        t = torch.tensor(0.04, dtype=torch.float64)
        x0, noise = scheduler.solve(output, x, t)
        torch.testing.assert_close(kept["tweedie"], x0)
        torch.testing.assert_close(kept["euler"], x - 0.04 * output)
        score = -noise / scheduler.path.sigma(t)
        w = scheduler.path.sigma(t)
        torch.testing.assert_close(kept["mean"], x - 0.04 * (output - w * score / 2))


def test_diffusion_coefficients_are_the_papers():
    """SiT, Sec. 2, and its code, whose w is half of the paper's and whose time is 1 - t."""
    t = torch.tensor([0.1, 0.35, 0.6, 0.9], dtype=torch.float64)

    def w(**settings):
        return InterpolantScheduler(**settings).diffusion(t)

    torch.testing.assert_close(w(diffusion="kl"), 2 * t / (1 - t))
    torch.testing.assert_close(w(diffusion="kl", path="gvp"), math.pi * torch.tan(t * math.pi / 2))
    torch.testing.assert_close(w(diffusion="kl", path="vp"), 0.1 + 19.9 * t)
    torch.testing.assert_close(w(diffusion="sbdm", diffusion_norm=0.5), t / (1 - t))
    damped = w(diffusion="kl-eta", diffusion_eta=0.5)
    torch.testing.assert_close(damped, 2 * t / (1 - t) / (1 + (2 * t / (1 - t)) ** 2).sqrt())
    assert (damped < 1).all()
    torch.testing.assert_close(w(diffusion="sigma", path="gvp"), torch.sin(t * math.pi / 2))
    torch.testing.assert_close(w(diffusion="linear", diffusion_norm=3.0), 3 * t)
    torch.testing.assert_close(w(diffusion="increasing-decreasing"), torch.sin(math.pi * (1 - t)) ** 2)
    torch.testing.assert_close(
        w(diffusion="decreasing", diffusion_norm=0.7), 0.25 * (0.7 * torch.cos(math.pi * (1 - t)) + 1) ** 2
    )
    torch.testing.assert_close(w(diffusion="constant", diffusion_norm=0.7), torch.full_like(t, 0.7))
    assert not w(diffusion="none").any()


@pytest.mark.parametrize("diffusion", ["none", "kl"])
def test_each_image_has_its_own_noise(diffusion):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    scheduler = InterpolantScheduler(diffusion=diffusion)
    together = sample(scheduler, NOISE[:3], 5, generators(1, 2, 3))
    alone = sample(scheduler, NOISE[1:2], 5, generators(2))
    torch.testing.assert_close(together[1:2], alone)
    other = sample(scheduler, NOISE[1:2], 5, generators(3))
    assert torch.equal(other, alone) == (diffusion == "none")


# Beside others


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_on_the_linear_path_is_diffusers_flow(shift):
    theirs = FlowMatchEulerDiscreteScheduler.from_config(InterpolantScheduler(shift=shift).config)
    expected = sample_theirs(theirs, NOISE, 12)
    ours = InterpolantScheduler(solver="euler")
    actual = sample(ours, NOISE, sigmas=theirs.sigmas[:-1])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    mine = InterpolantScheduler(solver="euler", shift=shift)
    mine.set_timesteps(12)
    grid = torch.linspace(1, 1 / 12, 12)
    torch.testing.assert_close(mine.sigmas[:-1].float(), shift * grid / (1 + (shift - 1) * grid))


def sample_theirs(scheduler, x, steps, **arguments):
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep), timestep, x, **arguments).prev_sample
    return x


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_multistep_solvers_swap_in(algorithm):
    ours = InterpolantScheduler()
    theirs = DPMSolverMultistepScheduler.from_config(ours.config, algorithm_type=algorithm)
    assert theirs.config.use_flow_sigmas and theirs.config.prediction_type == "flow_prediction"
    x = sample_theirs(theirs, NOISE, 100, generator=torch.Generator().manual_seed(0))
    if algorithm == "dpmsolver++":
        torch.testing.assert_close(x, sample(ours, NOISE, 200), rtol=2e-2, atol=2e-2)
    back = InterpolantScheduler.from_config(theirs.config)
    assert all(back.config[name] == ours.config[name] for name in ours.config if name[0] != "_")


@pytest.mark.parametrize("solver", SOLVERS)
def test_edms_path_written_as_an_interpolant_is_edm(monkeypatch, solver):
    """alpha = 1 and sigma = t: the D, the velocity, the loss and the samples of EDM's scheduler."""
    edms = Path(
        torch.ones_like, lambda t: t, torch.zeros_like, torch.ones_like, lambda ratio: ratio, (0, 80), (0, 80)
    )
    monkeypatch.setitem(PATHS, "edm", edms)
    edm = EDMHeunScheduler()
    ours = InterpolantScheduler(path="edm", prediction_type="sample", solver=solver, num_train_timesteps=1)
    edm.set_timesteps(12)
    begins = torch.cat([edm.sigmas[:1], edm.sigmas[1:-1:2]])
    ours.set_timesteps(timesteps=begins)
    x = y = NOISE.double() * 80
    if solver == "heun":
        torch.testing.assert_close(ours.sigmas, edm.sigmas)
        torch.testing.assert_close(ours.noise_levels, edm.sigmas[:-1])
    for i, sigma in enumerate(ours.times):
        level = edm.sigmas[i] if solver == "heun" else sigma
        f = torch.tanh(edm.precondition_inputs(x, level)) * edm.precondition_noise(level).cos()
        d = edm.precondition_outputs(x, f, level)
        torch.testing.assert_close(ours.velocity(d, x, sigma), edm.velocity(f, x, level))
        following = ours.step(d, 0, y)
        torch.testing.assert_close(following.pred_original_sample, d)
        y = following.prev_sample
        if solver == "heun":
            x = edm.step(f, 0, x).prev_sample
        else:
            x = x + (torch.cat([begins, begins.new_zeros(1)])[i + 1] - sigma) * edm.velocity(f, x, level)
        torch.testing.assert_close(y, x)


# The schedule


def test_evaluations():
    scheduler = InterpolantScheduler(num_inference_steps=5)
    assert len(scheduler.timesteps) == 9 and scheduler.order == 2 and scheduler.init_noise_sigma == 1
    torch.testing.assert_close(scheduler.timesteps[::2], torch.tensor([1000.0, 800, 600, 400, 200]))
    torch.testing.assert_close(scheduler.timesteps[1::2], scheduler.timesteps[2::2])
    assert scheduler.sigmas[-1] == 0 and scheduler.noise_levels[0] == math.inf
    torch.testing.assert_close(scheduler.noise_levels[1:3].tolist(), [4.0, 4.0])
    sde = InterpolantScheduler(diffusion="sigma", num_inference_steps=5)
    torch.testing.assert_close(sde.timesteps[::2], torch.tensor([1000.0, 760, 520, 280, 40]))
    assert (sde.timesteps[1::2] < sde.timesteps[2::2]).all()  # below it, from where noise is added
    shifted = InterpolantScheduler(diffusion="sigma", num_inference_steps=5, shift=3.0)
    assert shifted.times[-1] == pytest.approx(0.04) and shifted.times[0] == 1
    score = InterpolantScheduler(prediction_type="score", solver="euler", num_inference_steps=4)
    assert score.timesteps[0] == pytest.approx(999) and score.init_noise_sigma == pytest.approx(0.999)
    score.set_timesteps(timesteps=[900, 500.0])
    torch.testing.assert_close(score.timesteps, torch.tensor([900.0, 500]))


def test_begins_in_the_middle():
    whole, late = InterpolantScheduler(), InterpolantScheduler()
    for scheduler in (whole, late):
        scheduler.set_timesteps(6)
    late.set_begin_index(4)
    assert late.init_noise_sigma == whole.sigmas[4]
    x = y = NOISE
    for i, timestep in enumerate(whole.timesteps):
        if i == 4:
            y = x
        x = whole.step(network(x, timestep), timestep, x).prev_sample
        if i >= 4:
            y = late.step(network(y, timestep), timestep, y).prev_sample
    assert torch.equal(x, y)
    with pytest.raises(
        ValueError, match="begin_index is 3; steps begin at every index below 11 .* multiple of 2"
    ):
        late.set_begin_index(3)
    with pytest.raises(ValueError, match="All 11 evaluations are done"):
        late.step(NOISE, 0, NOISE)


def test_the_state_stays_wide_under_a_bfloat16_network():
    half = InterpolantScheduler().step(NOISE.bfloat16(), 0, NOISE.bfloat16())
    assert half.prev_sample.dtype == half.pred_original_sample.dtype == torch.float32


def test_saved_and_loaded(tmp_path):
    InterpolantScheduler(path="gvp", diffusion="kl-eta").save_pretrained(tmp_path)
    config = InterpolantScheduler.from_pretrained(tmp_path).config
    assert (config.path, config.diffusion, config.solver) == ("gvp", "kl-eta", "heun")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: InterpolantScheduler(path="straight"), "path is 'straight'; .* 'linear', 'gvp', 'vp'"),
        (
            lambda: InterpolantScheduler(prediction_type="velocity"),
            "prediction_type is 'velocity'; .*'sample'",
        ),
        (lambda: InterpolantScheduler(diffusion="inccreasing-decreasing"), "diffusion is 'inccreasing"),
        (lambda: InterpolantScheduler(diffusion_norm=-1.0), "diffusion_norm is -1.0; .* in 0..1000"),
        (lambda: InterpolantScheduler(diffusion_norm=math.nan), "diffusion_norm is nan"),
        (lambda: InterpolantScheduler(last_step="Mean"), "last_step is 'Mean'; .* 'tweedie'"),
        (lambda: InterpolantScheduler(last_step_size=0), "last_step_size is 0; .* in 1e-05..0.5"),
        (lambda: InterpolantScheduler(solver="dopri5"), "solver is 'dopri5'; .* 'euler', 'heun'"),
        (lambda: InterpolantScheduler(sigma_data=0.5), "sigma_data"),
        (lambda: InterpolantScheduler().set_timesteps(0), "num_inference_steps is 0"),
        (
            lambda: InterpolantScheduler(diffusion="kl").set_timesteps(1),
            "num_inference_steps is 1; .* at least 2",
        ),
        (
            lambda: InterpolantScheduler().set_timesteps(sigmas=[1.2, 0.5]),
            r"sigmas must decrease from at most 1",
        ),
        (lambda: InterpolantScheduler().set_timesteps(sigmas=[0.5, 0.0]), r"above 0; got \[0.5, 0.0\]"),
        (lambda: InterpolantScheduler().set_timesteps(timesteps=[1200]), "timesteps must .* at most 1000"),
        (lambda: InterpolantScheduler(path="gvp").set_timesteps(sigmas=[1.0]), "gvp path takes timesteps"),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()
