import math
from dataclasses import replace

import pytest
import torch
from bad_input import refusal
from small_losses import (
    CASES,
    SHARED,
    draw,
    goes_on_to_the_bit,
    losses_of,
    main,
    make,
    options,
    reached,
    trainer_of,
)

from sddit_diffusers import InterpolantScheduler
from sddit_diffusers.training.contrastive import Contrastive


def target_of(process, x0, noise, t):
    """What the raw network is to give, by the papers' formulas."""
    if process == "edm":  # (x0 - c_skip x) / c_out
        c_skip, c_out = 0.25 / (t**2 + 0.25), 0.5 * t / (t**2 + 0.25) ** 0.5
        return (x0 - c_skip * (x0 + t * noise)) / c_out
    return noise - x0


@pytest.mark.parametrize(("method", "process", "mask_ratio"), CASES)
def test_loss_equals_a_loop_over_images_and_patches(method, process, mask_ratio):
    """On EDM it is the distance of the raw network F from the target F*_j, without a weight."""
    objective = make(Contrastive, method=method, process=process, mask_ratio=mask_ratio)
    draws, outputs = draw(objective), []
    handle = objective.transformer.register_forward_hook(lambda *call: outputs.append(call[-1].sample))
    losses = losses_of(objective, draws)
    handle.remove()
    distances = []
    for i in range(4):
        j = (i - 1) % 4
        target = target_of(process, SHARED.x0[j].double(), draws.noise[j].double(), draws.t[i].item())
        error = (outputs[0][i].double() - target) ** 2  # [3, 8, 8]; MDT's first view is the whole one
        for patch in range(16):
            if method != "maskdit" or patch in draws.visible_ids[i]:
                rows, columns = (slice(2 * k, 2 * k + 2) for k in divmod(patch, 4))
                distances.append(error[:, rows, columns].mean().item())
    assert losses["loss_contrastive"].item() == pytest.approx(-sum(distances) / len(distances), rel=1e-4)


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "score"])
def test_other_predictions_have_their_own_targets(prediction):
    objective = make(Contrastive, process=InterpolantScheduler(path="gvp", prediction_type=prediction))
    draws = draw(objective)
    view, sums = objective.denoise(SHARED, draws)[1], []
    for i in range(4):
        j, sigma = (i - 1) % 4, math.sin(math.pi / 2 * draws.t[i].item())
        output, x0, noise = view.output[i].double(), SHARED.x0[j].double(), draws.noise[j].double()
        error = {"sample": output - x0, "epsilon": output - noise, "score": sigma * output + noise}
        sums.append((error[prediction] ** 2).mean().item())
    found = objective.auxiliaries["contrastive"](view, objective.scheduler, None)
    assert found["loss_contrastive"].item() == pytest.approx(-sum(sums) / 4, rel=1e-4)


@pytest.mark.parametrize(("method", "process", "mask_ratio"), CASES)
def test_it_reaches_what_makes_the_output(method, process, mask_ratio):
    objective = make(Contrastive, method=method, process=process, mask_ratio=mask_ratio)
    names = {name for name, _ in objective.named_parameters()}
    unused = {name for name in names if "side_interpolater" in name or name.endswith("mask_token")}
    assert reached(objective, "contrastive") == names - (unused if method == "mdt" else set())


def test_it_drives_the_output_from_the_other_image_s_target():
    objective = make(Contrastive, process="linear")
    draws = draw(objective)
    other = draws.noise.roll(1, 0) - SHARED.x0.roll(1, 0)
    output = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    view = objective.denoise(SHARED, draws)[1]._replace(output=output)
    objective.auxiliaries["contrastive"](view, objective.scheduler, None)["loss_contrastive"].backward()
    moved = output - 10 * output.grad
    assert (moved - other).square().mean() > (output - other).square().mean()


def test_masked_patches_of_maskdit_are_left_alone():
    """No velocity is learnt there, and nothing would hold what is driven off."""
    objective = make(Contrastive, method="maskdit", process="linear", mask_ratio=0.5)
    draws = draw(objective)
    view = objective.denoise(SHARED, draws)[1]
    output = view.output.detach().requires_grad_()
    found = objective.auxiliaries["contrastive"](view._replace(output=output), objective.scheduler, None)
    found["loss_contrastive"].backward()
    by_patch = output.grad.unflatten(3, (4, 2)).unflatten(2, (4, 2)).abs().amax((1, 3, 5)).flatten(1)
    for i in range(4):
        assert {k for k in range(16) if by_patch[i, k] > 0} == {*draws.visible_ids[i].tolist()}


def test_the_whole_loss_has_an_end_below_a_weight_of_1():
    """A network whose output grows without end has a loss that does."""
    objective = make(Contrastive, weight=0.9)
    sizes = []
    for size in (1.0, 1e2, 1e4):
        handle = objective.transformer.register_forward_hook(
            lambda *call, size=size: replace(call[-1], sample=size * call[-1].sample)
        )
        losses = losses_of(objective)
        handle.remove()
        assert losses["loss"] == losses["loss_generative"] + 0.9 * losses["loss_contrastive"]
        sizes.append(losses["loss"].item())
    assert sizes == sorted(sizes)


def test_images_without_label_have_part():
    objective = make(Contrastive)
    draws = draw(objective)
    with_labels = draws._replace(label_dropped=torch.zeros(4, dtype=torch.bool))
    without = draws._replace(label_dropped=torch.ones(4, dtype=torch.bool))
    a, b = (losses_of(objective, each)["loss_contrastive"] for each in (with_labels, without))
    assert a < 0 and b < 0 and a != b


def test_it_is_float32_under_autocast():
    objective = make(Contrastive)
    expected = losses_of(objective)["loss_contrastive"]
    with torch.autocast("cpu", torch.bfloat16):
        actual = losses_of(objective)["loss_contrastive"]
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("weight", [-0.1, 1, 1.0, float("nan")])
def test_a_weight_out_of_range_is_named(weight):
    with pytest.raises(ValueError, match=f"contrastive_weight is {weight}; it must be"):
        make(Contrastive, weight=weight)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--train_batch_size", 1], ["train_batch_size is 1; the contrastive loss", "at least 2"]),
        (["--contrastive_weight", 1], ["contrastive_weight is 1.0; it must be in 0..0.99"]),
        (["--contrastive_weight", -1], ["contrastive_weight is -1.0"]),
        (
            ["--auxiliary", "none", "--contrastive_weight", 0.1],
            ["dit without contrastive has no such option"],
        ),
    ],
)
def test_bad_options_are_refused(changes, words, tmp_path, capsys):
    with refusal(capsys, *words):
        main(tmp_path / "run", *options("contrastive"), *changes)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_to_the_bit(tmp_path):
    arguments = [*options("contrastive", method="maskdit"), "--process", "linear", "--train_batch_size", 4]
    assert goes_on_to_the_bit(tmp_path, *arguments)


def test_its_weight_may_change_at_resume(tmp_path):
    arguments = [*options("contrastive"), "--checkpointing_steps", 1, "--max_train_steps"]
    main(tmp_path, *arguments, 1)
    going_on = ["--contrastive_weight", 0.5, "--resume_from_checkpoint", "latest"]
    trainer = trainer_of(tmp_path, *arguments, 2, *going_on)
    assert trainer.objective.auxiliaries["contrastive"].weight == 0.5
