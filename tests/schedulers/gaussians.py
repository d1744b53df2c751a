"""A mixture of Gaussians, whose denoiser is known in closed form."""

import torch

MEANS = torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.3, -1.2]], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.3, 0.45, 0.25], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

MEAN = WEIGHTS @ MEANS
COVARIANCE = sum(
    weight * (torch.outer(mean - MEAN, mean - MEAN) + deviation**2 * torch.eye(2, dtype=torch.float64))
    for weight, mean, deviation in zip(WEIGHTS, MEANS, DEVIATIONS, strict=True)
)


def denoised(x, alpha, sigma):
    """E[x0 | alpha x0 + sigma eps = x] of points `[n, 2]`."""
    offset = x[:, None] - alpha * MEANS  # [n, 3, 2]
    variance = alpha**2 * DEVIATIONS**2 + sigma**2
    shares = (WEIGHTS.log() - variance.log() - offset.square().sum(-1) / (2 * variance)).softmax(1)
    means = MEANS + (alpha * DEVIATIONS**2 / variance)[:, None] * offset
    return (shares[..., None] * means).sum(1)


def output(scheduler, x, t):
    """What a perfect network gives for samples `[n, 2, 1, 1]` at a time."""
    alpha, sigma, d_alpha, d_sigma = scheduler.path.at(t)
    x0 = denoised(x[..., 0, 0], alpha, sigma)[..., None, None]
    noise = (x - alpha * x0) / sigma
    return {
        "flow_prediction": d_alpha * x0 + d_sigma * noise,
        "score": -noise / sigma,
        "epsilon": noise,
        "sample": x0,
    }[scheduler.config.prediction_type]


def draw(scheduler, count, steps, seed=0):
    """Samples `[count, 2]` of a scheduler with the perfect network."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    x = torch.randn(count, 2, 1, 1, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    for t, timestep in zip(scheduler.times, scheduler.timesteps, strict=True):
        x = scheduler.step(output(scheduler, x, t), timestep, x, generator=generator).prev_sample
    return x[..., 0, 0]
