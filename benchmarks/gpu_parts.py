"""X."""

import torch
from diffusers.training_utils import EMAModel
from train_step import optimizer_of

from sddit_diffusers.data.order import Batch
from sddit_diffusers.training.engines import Alone
from sddit_diffusers.training.step import train_step


def peak_above(step, device):
    """Bytes of tensors that a step has alive at once at most, above those that are there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        step()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measured_memory(build, batch_size, device, dtype):
    objective = build().to(device)
    network = objective.transformer.config
    ema = EMAModel(objective.transformer.parameters(), foreach=True)
    engine = Alone(objective, optimizer_of(objective), device.type, dtype)
    shape = (batch_size, network.in_channels, network.sample_size, network.sample_size)
    batch = Batch(torch.randn(shape, device=device), torch.zeros(batch_size, dtype=torch.long, device=device))

    def step():
        train_step(engine, ema, [(batch, None)])

    step()
    tensors = [
        *objective.parameters(),
        *ema.shadow_params,
        *(v for s in engine.optimizer.state.values() for v in s.values()),
    ]
    there = sum(t.nbytes for t in tensors)
    return there + peak_above(step, device)
