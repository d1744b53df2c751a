"""Steps that are judged on the device, and looked at later."""

import threading
from functools import partialmethod

import pytest
import torch
from small_runs import SMALL, batches_of, make_trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train_sddit
from sddit_diffusers.data.order import ahead
from sddit_diffusers.training.trainer import Trainer

_LOOKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Looks(TorchDispatchMode):
    """Counts the values of tensors that a thread looks at."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, thread = 0, threading.get_ident()
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy"):

            def counted(tensor, *args, asked):
                self.count += threading.get_ident() == thread
                return asked(tensor, *args)

            monkeypatch.setattr(Tensor, name, partialmethod(counted, asked=getattr(Tensor, name)))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in _LOOKS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["sddit", "dit", "maskdit", "mdt", "tread"])
def test_nobody_looks_at_a_value_between_logging_steps(tmp_path, monkeypatch, method):
    options = ["--method", method, "--max_grad_norm", "1"]
    if method == "sddit":
        options += ["--auxiliary", "discrimination", "sra", "dispersive", "contrastive"]
    else:
        options += ["--transformer", '{"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8}']
    trainer = make_trainer(tmp_path, *options)
    data = batches_of(trainer)
    trainer.train_step(0, data)  # makes the optimizer's state
    looks = Looks(monkeypatch)
    with looks:
        for step in (1, 2, 3):
            assert trainer.train_step(step, data, read=False) == {}
            assert not trainer.signals.came()
    assert looks.count == 0
    with looks:
        assert trainer.train_step(4, data)["loss"] > 0
    assert looks.count > 0


def test_a_failed_step_is_told_at_the_next_logging_step_and_nothing_has_moved(tmp_path):
    """The third of five steps fails; those after it do not, and still move nothing."""
    trainer = make_trainer(tmp_path)
    data, weight, steps = batches_of(trainer), trainer.objective.transformer.decoder.proj_in.weight, []

    def fails(gradient):
        steps.append(len(steps))
        return gradient * float("inf") if len(steps) == 3 else gradient

    weight.register_hook(fails)
    for step in (0, 1):
        trainer.train_step(step, data, read=False)
    before = {name: tensor.clone() for name, tensor in trainer.objective.named_parameters()}
    moments = [value.clone() for value in trainer.engine.optimizer.state[weight].values()]
    trainer.train_step(2, data, read=False)
    trainer.train_step(3, data, read=False)
    named = (
        r"Step 3: not finite: grad_norm \((inf|nan)\), the gradient of transformer.decoder.proj_in.weight. No"
    )
    with pytest.raises(FloatingPointError, match=named):
        trainer.train_step(4, data)
    trained = dict(trainer.objective.named_parameters())
    student = [name for name in trained if trained[name].requires_grad]
    assert student and all(torch.equal(trained[name], before[name]) for name in student)
    after = trainer.engine.optimizer.state[weight].values()
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))


def test_weights_that_are_not_finite_are_named_later(tmp_path):
    trainer = make_trainer(tmp_path)
    data = batches_of(trainer)
    trainer.train_step(0, data, read=False)
    with torch.no_grad():
        trainer.objective.transformer.decoder.proj_out.bias[0] = float("nan")
    trainer.train_step(1, data, read=False)
    named = r"Step 2: not finite: loss \(nan\), .*, the weights transformer.decoder.proj_out.bias"
    with pytest.raises(FloatingPointError, match=named):
        trainer.health.check()


@pytest.mark.parametrize(
    "due", [{"checkpointing_steps": 3}, {"evaluation_steps": 3, "evaluation_samples": 20}]
)
def test_nothing_of_a_failed_step_is_kept(tmp_path, due):
    """A run that logs every hundred steps looks before it saves or samples."""
    options = [text for name, value in due.items() for text in (f"--{name}", str(value))]
    options += ["--logging_steps", "100", "--max_train_steps", "6", "--output_dir", str(tmp_path / "run")]
    trainer, steps = Trainer(train_sddit.parse([*SMALL, *options])), []

    def fails(gradient):
        steps.append(len(steps))
        return gradient * float("nan") if len(steps) == 2 else gradient

    trainer.objective.transformer.decoder.proj_in.weight.register_hook(fails)
    with pytest.raises(
        FloatingPointError, match=r"Step 2: not finite: grad_norm \(nan\).*There is no checkpoint"
    ):
        trainer.run()
    assert len(steps) == 3 and not list((tmp_path / "run").glob("checkpoint*"))


def test_what_is_read_comes_in_order_and_none_stays_none():
    items = [(torch.tensor([i]), None) for i in range(5)]
    assert [(part.item(), none) for part, none in ahead(items, torch.device("cpu"))] == [
        (i, None) for i in range(5)
    ]
    assert list(ahead([], torch.device("cpu"))) == []
