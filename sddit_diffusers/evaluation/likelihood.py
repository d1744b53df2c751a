"""Likelihoods in bits a dimension, by the probability-flow ODE (Song et al. 2021, App. D).

The ODE takes a picture at the lowest time to noise at the highest, and
ln p(x0) = ln N(x_T; 0, sigma_T^2) + the integral of the velocity's divergence over time. The divergence is
estimated by e^T J e (Skilling, Hutchinson) with signs e that are drawn once a picture, so that the integrand
is one smooth function (Grathwohl et al. 2019). Signs have the least variance of such e.

Pixels are discrete. A cell of the width of a level is filled uniformly around each, and the mean of the log
density in it is a lower bound on the log probability of the picture (Theis et al. 2016).
"""

import math

import torch
from torch import Tensor

from ..data.pictures import ImageDataset
from ..launching import bar
from ..pipelines.ode import ATOL, RTOL, VelocityField, check_ode, dopri5
from ..pipelines.pipeline_sddit import SDDiTPipeline
from ..seeds import generator_for


@torch.no_grad()
def log_density(
    field: VelocityField, x0: Tensor, signs: Tensor, rtol: float = RTOL, atol: float = ATOL
) -> Tensor:
    """ln p(x0) in nats, `[b]`.

    Args:
        field: the ODE.
        x0: samples at the ODE's lowest time, `[b, c, h, w]`.
        signs: -1 or 1, `[b, c, h, w]`, or any other noise of mean 0 and the identity as covariance.
        rtol, atol: of the solver, for the samples and for the integral.
    """
    low, high = field.interval

    def with_divergence(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            velocity = field(t, x)
        (product,) = torch.autograd.grad(velocity, x, signs)  # e^T J
        return velocity.detach(), (product * signs).flatten(1).sum(1)

    start = x0, x0.new_zeros(len(x0))
    noise, divergence = dopri5(with_divergence, start, low, high, rtol, atol)
    one = torch.ones((), dtype=torch.float64)
    sigma = field.scheduler.noised(0 * one, one, high * one).item()
    normal = -0.5 * (noise / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi))
    return normal.flatten(1).sum(1) + divergence


def spacing(levels: int) -> float:
    """Between the levels of a pixel in -1..1."""
    return 2 / (levels - 1)


def dequantized(pixels: Tensor, levels: int, uniform: Tensor) -> Tensor:
    """Each pixel of -1..1 anywhere in the cell of its level, by numbers in 0..1; both `[b, c, h, w]`."""
    level = ((pixels.double() + 1) / spacing(levels)).round()
    return (level + uniform - 0.5) * spacing(levels) - 1


def bits_per_dim(log_p: Tensor, dimensions: int, levels: int) -> Tensor:
    """-log2 of the probability of a picture's cell, divided by its pixels; `log_p` in nats."""
    return -(log_p / dimensions + math.log(spacing(levels))) / math.log(2)


def likelihoods(
    pipe: SDDiTPipeline, dataset: ImageDataset, num_samples: int, batch_size: int = 64,
    rtol: float = RTOL, atol: float = ATOL,
) -> tuple[Tensor, float]:  # fmt: skip
    """Bits a dimension of pictures, `[pictures]`, and the mean number of evaluations of the network.

    The noise of a picture follows from its row alone, so that other batches change only the solver's steps.

    Args:
        pipe: a pipeline of pixels, on its device.
        dataset: pictures of the size that it makes; with labels each is given its class, else the null class.
        num_samples: pictures that are used at most, drawn at random.
        batch_size: pictures that are solved at once.
        rtol, atol: of the solver.

    Raises:
        FloatingPointError: the network's output is not finite.
        ValueError: the pipeline has a VAE, its scheduler tells no velocity, or a label is not one of its.
    """
    if pipe.vae is not None:
        raise ValueError("The pipeline has a VAE; likelihoods are of pipelines that make pixels.")
    check_ode(pipe)
    rows = torch.randperm(len(dataset), generator=generator_for(0))[:num_samples]
    labels = [None] * len(dataset) if dataset.labels is None else dataset.labels.tolist()
    bits, evaluations = [], 0
    with bar(total=len(rows), desc="likelihood", unit="picture") as progress:
        for part in rows.split(batch_size):
            pixels, _ = dataset.__getitems__(part.tolist())
            generators = [generator_for(0, 2, row) for row in part.tolist()]
            uniform, signs = (
                torch.stack([torch.rand(pixels.shape[1:], generator=each) for each in generators]).double()
                for _ in range(2)
            )
            x0, signs = dequantized(pixels, dataset.levels, uniform), torch.where(signs < 0.5, -1.0, 1.0)
            field = VelocityField(pipe, pipe.get_label_ids([labels[row] for row in part.tolist()]))
            log_p = log_density(field, x0.to(pipe.device), signs.to(pipe.device, x0.dtype), rtol, atol)
            bits.append(bits_per_dim(log_p, x0[0].numel(), dataset.levels).cpu())
            evaluations += field.evaluations * len(part)
            progress.update(len(part))
    return torch.cat(bits), evaluations / len(rows)
