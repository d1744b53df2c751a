"""What the backward pass keeps, and the memory of a step, against counts by hand."""

import json

import pytest
import torch
from conftest import TINY, randomize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import train_sddit
from sddit_diffusers import EDMHeunScheduler, SDDiTObjective, SDDiTTransformer2DModel
from sddit_diffusers.models.attention_cpu import use_cpu_attention
from sddit_diffusers.training.memory import _Alive, _Unfilled, keep_products, step_memory


class Products(TorchDispatchMode):
    """Counts matrix products and attention."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in ("aten.mm", "aten.addmm", "attention"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_checkpointing_computes_no_product_twice(dtype):
    inputs = torch.randn(4, 3, 8, 8), torch.randn(4), torch.tensor([0, 1, 2, 3])

    def run(function):
        model = randomize(SDDiTTransformer2DModel(**TINY))
        use_cpu_attention(model)
        if function != "none":
            model.enable_gradient_checkpointing(function)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model(*inputs).sample.float().square().mean()
        with Products() as products:
            loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return gradients, products.count

    (plain, fewest), (selective, few), (full, many) = run("none"), run(keep_products), run(None)
    for a, b, c in zip(plain, selective, full, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert few == fewest < many


def objective(checkpointing=None, **changes):
    def build():
        transformer = SDDiTTransformer2DModel(**TINY | changes)
        if checkpointing is not None:
            transformer.enable_gradient_checkpointing(checkpointing)
        return SDDiTObjective(transformer, scheduler, num_prototypes=64)

    scheduler = EDMHeunScheduler()
    return build


@pytest.mark.thorough
def test_the_parts_are_what_was_built():
    memory, real = step_memory(objective(), 8), objective()()
    trained = sum(4 * p.numel() for p in real.parameters() if p.requires_grad)
    assert memory.weights == memory.gradients == trained
    assert memory.optimizer == pytest.approx(2 * trained, rel=0.01)
    assert memory.teacher == sum(4 * p.numel() for p in real.discrimination.teacher.parameters())
    assert memory.averages == sum(4 * p.numel() for p in real.transformer.parameters())
    assert memory.total == memory.fixed + memory.activations


def keep_nothing(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


@pytest.mark.thorough
def test_activations_grow_by_the_image_and_shrink_by_checkpointing():
    wide = dict(num_attention_heads=4, attention_head_dim=32, num_layers=4)
    kinds = (objective(**wide), objective(keep_products, **wide), objective(keep_nothing, **wide))
    none, selective, full = ([step_memory(kind, b).activations for b in (256, 512, 768)] for kind in kinds)
    for one, two, three in (none, selective, full):
        assert three - two == pytest.approx(two - one, rel=0.02)
    assert full[2] < 0.7 * selective[2] and selective[2] < 0.8 * none[2]


def test_what_is_alive_is_counted_once_and_until_it_is_gone():
    with _Unfilled(), _Alive() as alive:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        assert alive.now == 4000
        c = a + 1
        del a
        assert alive.now == 8000
        del b
        assert alive.now == 4000 and alive.most == 8000
        del c
        assert alive.now == 0


@pytest.mark.thorough
def test_dry_run_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = json.dumps({"num_layers": 3, "num_decoder_layers": 1})
    options = ["--preset", "cifar10", "--transformer", network, "--dataset_name", ""]
    train_sddit.main([*options, "--train_batch_size", "64", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["none", "selective", "full"]
    rows = [[float(value) for value in line.split()[1:]] for line in lines[3:]]
    fixed = float(lines[1].split("= ")[1].split(",")[0])
    for image, activations, total, *fits in rows:
        assert total == pytest.approx(fixed + activations, abs=0.011)
        for size, batch in zip((24, 40, 80), fits, strict=True):
            assert total + (batch - 64) * image <= 0.9 * size + 0.02 * size
            assert total + (batch + 1 - 64) * image >= 0.9 * size - 0.02 * size
    assert rows[0][0] > rows[1][0] > rows[2][0]
    assert not list(tmp_path.iterdir())
