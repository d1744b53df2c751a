"""Random generators that follow from a seed and the number of a step, an epoch or an image alone."""

import numpy as np
import torch


def generator_for(seed: int, *counters: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator for one purpose at one step, unrelated to those of other counters.

    Zeros at the end of the counters do not count.
    """
    state = np.random.SeedSequence([seed, *counters]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state))
