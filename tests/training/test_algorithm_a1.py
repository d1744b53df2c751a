"""The listing of the documents is what training does."""

import copy
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY, randomize
from diffusers.training_utils import EMAModel

from sddit_diffusers import EDMHeunScheduler, SDDiTObjective, SDDiTTransformer2DModel
from sddit_diffusers.data.order import Batch
from sddit_diffusers.training.engines import Alone
from sddit_diffusers.training.step import train_step

PAGE = (Path(__file__).parents[2] / "docs/method.md").read_text()


def test_the_listing_makes_the_step_that_training_makes():
    (listing,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    variables = {}
    exec(listing, variables)

    ours = SDDiTObjective(randomize(SDDiTTransformer2DModel(**TINY)), EDMHeunScheduler(), num_prototypes=32)
    theirs = copy.deepcopy(ours)
    x0, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 3, 1])
    for step in range(2):
        draws = ours.draw(x0.shape, torch.Generator().manual_seed(step))
        losses = []
        for objective in (ours, theirs):
            trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
            optimizer = torch.optim.SGD(trained, 0.1)
            if objective is theirs:
                loss = variables["algorithm_a1"](objective, x0, labels, draws, optimizer, beta=0.9)
                losses.append(loss.item())
            else:
                objective.discrimination.teacher_momentum = 0.9
                ema = EMAModel(objective.transformer.parameters())
                engine = Alone(objective, optimizer, "cpu")
                losses.append(train_step(engine, ema, [(Batch(x0, labels), draws)]).losses[0].item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    # Products of a copy, elsewhere in memory, may be rounded otherwise.
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-5, atol=1e-6)
    assert ours.discrimination.center_patch.value.abs().max() > 0
