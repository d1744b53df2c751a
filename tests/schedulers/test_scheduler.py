import math

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from sddit_diffusers import EDMHeunScheduler

SD = 0.5


def network(x, c_noise):
    """A raw network F that depends on its input and its timestep, and not too smoothly."""
    return torch.tanh(3 * x) * torch.cos(c_noise) + 0.3 * x.roll(1, -1) - 0.1 * c_noise


def edm_algorithm_2(x, n, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0, noises=None, rho=7):
    """Karras et al. 2022, Algorithm 2 in float64; returns the sample and the number of evaluations."""
    evaluations = 0

    def denoise(x, sigma):
        nonlocal evaluations
        evaluations += 1
        root = math.sqrt(sigma**2 + SD**2)
        f = network(x / root, torch.tensor(0.25 * math.log(sigma), dtype=torch.float64))
        return SD**2 / (sigma**2 + SD**2) * x + sigma * SD / root * f

    t = [
        (80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(n)
    ] + [0.0]
    x = x.double() * t[0]
    for i in range(n):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_tmin <= t[i] <= s_tmax else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x
        if gamma > 0:
            x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * next(noises).double()
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x - denoise(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)
    return x, evaluations


def sample(scheduler, x, n=40, dtype=None, **step_arguments):
    scheduler.set_timesteps(n)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)
        output = network(model_input.to(dtype or x.dtype), t)
        x = scheduler.step(output, t, x, **step_arguments).prev_sample
    return x


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.fixture
def noise():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("n", "dtype", "tolerance"),
    [
        (40, torch.float32, 1e-6),
        (40, torch.float64, 1e-8),
        (5, torch.float64, 1e-7),
        (2, torch.float64, 1e-7),
    ],
)
def test_equals_algorithm_2(noise, n, dtype, tolerance):
    scheduler = EDMHeunScheduler()
    expected, evaluations = edm_algorithm_2(noise, n)
    actual = sample(scheduler, noise.to(dtype), n)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < tolerance
    assert evaluations == 2 * n - 1 == len(scheduler.timesteps)


@pytest.mark.parametrize(("s_tmin", "s_noise"), [(0.05, 1.0), (0.05, 1.007), (0.0, 1.0)])
def test_churn_equals_algorithm_2(noise, s_tmin, s_noise):
    settings = dict(s_churn=30.0, s_tmin=s_tmin, s_tmax=50.0, s_noise=s_noise)
    generator = torch.Generator().manual_seed(3)
    noises = (torch.randn(noise.shape, generator=generator) for _ in range(100))
    expected, _ = edm_algorithm_2(noise, 40, **settings, noises=noises)
    actual = sample(EDMHeunScheduler(), noise, **settings, generator=torch.Generator().manual_seed(3))
    assert relative_error(actual, expected) < 2e-6
    assert relative_error(actual, edm_algorithm_2(noise, 40)[0]) > 1e-2


def test_second_order_on_a_gaussian():
    """For data N(0, s^2) the best denoiser is known, and so is the ODE's solution."""
    s, x = 0.7, torch.tensor([[[[1.3]]]], dtype=torch.float64)

    def error(n):
        scheduler = EDMHeunScheduler(sigma_data=0.5)
        scheduler.set_timesteps(n)
        y = x * 80
        for i, t in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[i]
            denoised = s**2 / (s**2 + sigma**2) * y
            c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25) ** 0.5
            result = scheduler.step((denoised - c_skip * y) / c_out, t, y)
            torch.testing.assert_close(result.pred_original_sample, denoised)
            y = result.prev_sample
        return (y - x * 80 * s / math.sqrt(s**2 + 80**2)).abs().item()

    assert error(160) < 1e-3
    assert error(40) / error(80) == pytest.approx(4, rel=0.15)


def test_preconditioning_is_edms(noise):
    """EDM, Table 1: unit variance going in, and a target of unit variance, at every noise level."""
    ours, theirs = EDMHeunScheduler(sigma_data=0.6), EDMEulerScheduler(sigma_data=0.6)
    sigma = torch.tensor([0.002, 0.3, 1.0, 80.0]).view(4, 1, 1, 1)
    for name, arguments in (
        ("inputs", (noise, sigma)),
        ("noise", (sigma,)),
        ("outputs", (noise, noise.flip(0), sigma)),
    ):
        actual, expected = (
            getattr(scheduler, f"precondition_{name}")(*arguments) for scheduler in (ours, theirs)
        )
        torch.testing.assert_close(actual, expected)
    c_in, c_out = ours.precondition_inputs(1.0, sigma), ours.precondition_outputs(0.0, 1.0, sigma)
    c_skip = ours.precondition_outputs(1.0, 0.0, sigma)
    torch.testing.assert_close(c_in**2 * (sigma**2 + 0.36), torch.ones_like(sigma))
    torch.testing.assert_close(
        (1 - c_skip) ** 2 * 0.36 + c_skip**2 * sigma**2, c_out**2, atol=1e-7, rtol=1e-4
    )


def test_schedule_is_the_papers():
    scheduler = EDMHeunScheduler()
    assert scheduler.sigmas[0] == pytest.approx(80) and scheduler.sigmas[-2] == pytest.approx(0.002)
    assert scheduler.sigmas[-1] == 0 and len(scheduler.timesteps) == 79 and scheduler.order == 2
    assert scheduler.init_noise_sigma == pytest.approx(80)
    torch.testing.assert_close(scheduler.timesteps, scheduler.sigmas[:-1].log().float() / 4)
    levels = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2]])
    reference = EDMEulerScheduler()
    reference.set_timesteps(40)
    torch.testing.assert_close(levels.float(), reference.sigmas[:-1].float())


def test_other_schedules(noise):
    scheduler = EDMHeunScheduler(sigma_schedule="exponential", final_sigmas_type="sigma_min")
    scheduler.set_timesteps(5)
    ratios = scheduler.sigmas[2:-1:2] / scheduler.sigmas[[0, 2, 4, 6]]
    torch.testing.assert_close(ratios, torch.full_like(ratios, (0.002 / 80) ** (1 / 4)))
    assert scheduler.sigmas[-1] == scheduler.sigmas[-2]
    scheduler.set_timesteps(sigmas=[10.0, 3.0, 0.5])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([10, 3, 3, 0.5, 0.5, 0.5], dtype=torch.float64))
    assert scheduler.init_noise_sigma == 10
    custom, default = EDMHeunScheduler(), EDMHeunScheduler()
    default.set_timesteps(3)
    custom.set_timesteps(sigmas=torch.cat([default.sigmas[:1], default.sigmas[1:-1:2]]))
    torch.testing.assert_close(custom.sigmas, default.sigmas)


def test_negated_prediction(noise):
    flipped = EDMHeunScheduler(prediction_type="v_prediction")
    torch.testing.assert_close(
        flipped.precondition_outputs(noise, -noise, 0.7),
        EDMHeunScheduler().precondition_outputs(noise, noise, 0.7),
    )


def test_state_stays_wide_under_a_bfloat16_network(noise):
    """Rounding the network's inputs and outputs costs little; rounding the state would cost far more."""
    expected, _ = edm_algorithm_2(noise, 40)
    actual = sample(EDMHeunScheduler(), noise, dtype=torch.bfloat16)
    assert actual.dtype == torch.float32
    assert EDMHeunScheduler().step(noise.bfloat16(), 0, noise.bfloat16()).prev_sample.dtype == torch.float32
    assert relative_error(actual, expected) < 0.05


def test_a_rounded_timestep_does_no_harm(noise):
    scheduler, exact = EDMHeunScheduler(), EDMHeunScheduler()
    for t in exact.timesteps[:7]:
        rounded = scheduler.step(noise, t.bfloat16(), noise).prev_sample
        assert torch.equal(rounded, exact.step(noise, t, noise).prev_sample)


def test_begins_in_the_middle(noise):
    whole, late = EDMHeunScheduler(), EDMHeunScheduler()
    whole.set_timesteps(6)
    late.set_timesteps(6)
    late.set_begin_index(4)
    assert late.init_noise_sigma == whole.sigmas[4]
    x = noise
    for i, t in enumerate(whole.timesteps):
        if i == 4:
            y = x
        x = whole.step(network(whole.scale_model_input(x, t), t), t, x).prev_sample
    for t in late.timesteps[4:]:
        y = late.step(network(late.scale_model_input(y, t), t), t, y).prev_sample
    assert torch.equal(x, y)
    with pytest.raises(ValueError, match="begin_index is 3; a Heun step begins at the even indices"):
        late.set_begin_index(3)
    with pytest.raises(ValueError, match="All 11 evaluations are done"):
        late.step(noise, 0, noise)


def test_beginning_anew_forgets_half_a_step(noise):
    used, fresh = EDMHeunScheduler(), EDMHeunScheduler()
    used.step(noise, used.timesteps[0], noise)
    used.set_begin_index(0)
    assert torch.equal(used.step(noise, 0, noise).prev_sample, fresh.step(noise, 0, noise).prev_sample)


@pytest.mark.parametrize("other", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_diffusers_edm_schedulers_swap_in_and_out(noise, other):
    ours = EDMHeunScheduler(sigma_min=0.01, sigma_max=40.0, sigma_data=0.7, rho=5.0)
    theirs = other.from_config(ours.config)
    for key in ("sigma_min", "sigma_max", "sigma_data", "rho"):
        assert theirs.config[key] == ours.config[key]
    back = EDMHeunScheduler.from_config(theirs.config)
    assert {k: back.config[k] for k in ours.config if k[0] != "_"} == {
        k: v for k, v in ours.config.items() if k[0] != "_"
    }
    fine = sample(EDMHeunScheduler.from_config(theirs.config), noise.double(), 400)
    theirs.set_begin_index(0)
    assert relative_error(sample(theirs, noise, 400), fine) < 0.05


def test_saved_and_loaded(tmp_path):
    EDMHeunScheduler(sigma_data=0.8).save_pretrained(tmp_path)
    assert EDMHeunScheduler.from_pretrained(tmp_path).config.sigma_data == 0.8


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: EDMHeunScheduler(sigma_schedule="cosine"),
            "sigma_schedule is 'cosine'.*'karras', 'exponential'",
        ),
        (lambda: EDMHeunScheduler(prediction_type="sample"), "prediction_type is 'sample'"),
        (lambda: EDMHeunScheduler(final_sigmas_type="one"), "final_sigmas_type is 'one'"),
        (lambda: EDMHeunScheduler().set_timesteps(0), "num_inference_steps is 0"),
        (lambda: EDMHeunScheduler().set_timesteps(), "num_inference_steps is None"),
        (lambda: EDMHeunScheduler().set_timesteps(sigmas=[1.0, 2.0]), r"\[1.0, 2.0\]"),
        (lambda: EDMHeunScheduler().set_timesteps(sigmas=[1.0, 0.0]), r"\[1.0, 0.0\]"),
        (lambda: EDMHeunScheduler().set_timesteps(sigmas=[]), r"\[\]"),
        (lambda: EDMHeunScheduler().set_timesteps(sigmas=[math.inf, 1.0]), r"\[inf, 1.0\]"),
        (lambda: EDMHeunScheduler().set_timesteps(sigmas=[math.nan, 1.0]), r"\[nan, 1.0\]"),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
