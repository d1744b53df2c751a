"""What one step does to weights, averages, teacher and centers, and what it does not."""

import math

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from small_runs import SMALL, batches_of, make_trainer, train

import train_sddit
from sddit_diffusers.training.trainer import Trainer


def test_no_weight_moves_in_a_step_that_is_not_finite(tmp_path, monkeypatch):
    trainer = Trainer(train_sddit.parse([*SMALL, "--output_dir", str(tmp_path), "--max_train_steps", "3"]))
    before = {name: tensor.clone() for name, tensor in trainer.objective.state_dict().items()}
    data = iter([(torch.full((16, 1, 8, 8), float("inf")), torch.zeros(16, dtype=torch.long))])
    with pytest.raises(FloatingPointError, match=r"Step 1: not finite: loss \(nan\), loss_generative"):
        trainer.train_step(0, data)
    for name, tensor in trainer.objective.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(
        torch.equal(a, b)
        for a, b in zip(trainer.ema.shadow_params, trainer.objective.transformer.parameters(), strict=True)
    )


def test_a_gradient_that_is_not_finite_is_named(tmp_path):
    trainer = make_trainer(tmp_path)
    weight = trainer.objective.transformer.decoder.proj_in.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weight.clone()
    message = (
        r"not finite: grad_norm \((inf|nan)\), the gradient of transformer.decoder.proj_in.weight. No weight"
    )
    with pytest.raises(FloatingPointError, match=message):
        trainer.train_step(0, batches_of(trainer))
    assert torch.equal(weight, before)


def test_float16_leaves_out_steps_whose_gradients_overflow(tmp_path):
    """A loss scale too large on purpose: what overflows moves neither weights nor averages."""
    trainer = make_trainer(tmp_path)
    # accelerate scales losses on GPUs only.
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.engine.optimizer = AcceleratedOptimizer(trainer.engine.optimizer.optimizer, scaler=scaler)
    before = [parameter.clone() for parameter in trainer.objective.parameters()]
    data = batches_of(trainer)
    trainer.train_step(0, data)
    assert trainer.ema.optimization_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.objective.parameters(), strict=True))
    scaler.update(2.0**8)
    metrics = trainer.train_step(1, data)
    assert trainer.ema.optimization_step == 1 and np.isfinite(metrics["loss"])
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.objective.parameters(), strict=True))


def test_gradient_norm_is_bounded(tmp_path):
    trainer = make_trainer(tmp_path, "--max_grad_norm", 0.01)
    norms, step = [], trainer.engine.optimizer.optimizer.step

    def watched(*arguments, **keywords):
        gradients = [p.grad.flatten() for p in trainer.objective.parameters() if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())
        return step(*arguments, **keywords)

    trainer.engine.optimizer.optimizer.step = watched
    metrics = trainer.train_step(0, batches_of(trainer))
    assert metrics["grad_norm"] > 0.1  # before
    assert norms == pytest.approx([0.01], rel=1e-3)


def test_teacher_and_centers_follow_the_schedule(tmp_path):
    """What the training loop does after each optimizer step, done again by hand."""
    trainer = make_trainer(tmp_path, "--max_train_steps", 4)
    transformer, data = trainer.objective.transformer, batches_of(trainer)
    discrimination = trainer.objective.auxiliaries["discrimination"]
    expected = {name: p.clone() for name, p in discrimination.teacher.named_parameters()}
    center, logits = torch.zeros(32), []
    unit, head = torch.nn.functional.normalize, discrimination.teacher.head

    def keep(module, inputs, features):
        logits.append(unit(features, dim=-1) @ unit(head.prototypes, dim=-1).T)

    head.mlp.register_forward_hook(keep)
    for step in range(4):
        trainer.train_step(step, data)
        beta = 0.999 - 0.003 * (1 + math.cos(math.pi * step / 4)) / 2
        student = dict(transformer.named_parameters("encoder"))
        student |= dict(discrimination.head.named_parameters("head"))
        expected = {name: beta * p + (1 - beta) * student[name].detach() for name, p in expected.items()}
        center = 0.9 * center + 0.1 * logits[-1][:, 1:].mean((0, 1))
    for name, parameter in discrimination.teacher.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(discrimination.center_patch.value, center)
    assert center.norm() > 0


def test_temperature_warms_up_over_the_epochs(tmp_path):
    trainer = make_trainer(tmp_path, "--train_batch_size", 400, "--teacher_temperature_warmup_epochs", 2)
    assert trainer.sampler.steps_per_epoch == 4
    values = [trainer.follow_schedules(step)["teacher_temperature"] for step in (0, 4, 8, 9)]
    assert values == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert trainer.objective.auxiliaries["discrimination"].teacher_temperature == 0.07


def test_warm_up_of_the_learning_rate(tmp_path):
    metrics = train(tmp_path, "--max_train_steps", 5, "--lr_warmup_steps", 4, "--learning_rate", 0.004)
    assert [row["learning_rate"] for row in metrics] == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.004])
