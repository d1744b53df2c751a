import math

import pytest
import torch
from bad_input import refusal
from conftest import NETWORKS
from small_losses import (
    CASES,
    draw,
    goes_on_to_the_bit,
    inputs_of,
    losses_of,
    main,
    make,
    options,
    reached,
    tokens_after,
    trainer_of,
    up_to,
    visible_of,
)

from sddit_diffusers.training.contrastive import Contrastive
from sddit_diffusers.training.dispersive import Dispersive, dispersive_loss
from sddit_diffusers.training.methods import METHODS


def naive(vectors, temperature):
    """Eq. 6 pair by pair, an image with itself among them."""
    total = 0.0
    for a in vectors:
        for b in vectors:
            squared = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
            total += math.exp(-squared / len(a) / temperature)
    return math.log(total / len(vectors) ** 2)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(("method", "process", "mask_ratio"), CASES)
def test_loss_equals_a_loop_over_pairs(method, process, mask_ratio, layer):
    objective = make(
        Dispersive, method=method, process=process, mask_ratio=mask_ratio, layer=layer, temperature=0.3
    )
    draws, vectors = draw(objective), []
    for i in range(4):
        visible = visible_of(method, draws, i)
        tokens = tokens_after(objective.transformer, layer, method, inputs_of(process, draws, i), visible)
        vectors.append((tokens.flatten() if visible is None else tokens.mean(0)).tolist())
    losses = losses_of(objective, draws)
    assert losses["loss_dispersive"].item() == pytest.approx(naive(vectors, 0.3), rel=1e-4)
    assert -math.log(4) < losses["loss_dispersive"] < -0.01


@pytest.mark.parametrize("shape", [(2, 3), (5, 40), (16, 2)])
def test_loss_of_vectors_far_from_the_origin(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    z = 100 + torch.randn(shape, generator=generator)
    assert dispersive_loss(z, 0.5).item() == pytest.approx(naive(z.double().tolist(), 0.5), rel=1e-4)


def test_bounds():
    """Images that are all alike, and images without end apart; their gradients are finite."""
    for z, expected in ((torch.ones(5, 3), 0.0), (1e3 * torch.eye(5), -math.log(5))):
        z.requires_grad_()
        loss = dispersive_loss(z, 1.0)
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-6) and z.grad.isfinite().all()


def test_it_drives_images_apart():
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dispersive_loss(z, 1.0).backward()
    assert torch.pdist(z - 0.1 * z.grad).square().mean() > torch.pdist(z).square().mean()


@pytest.mark.parametrize(("method", "process", "mask_ratio"), CASES)
def test_it_reaches_the_blocks_up_to_its_own(method, process, mask_ratio):
    objective = make(Dispersive, method=method, process=process, mask_ratio=mask_ratio, layer=2)
    assert reached(objective, "dispersive") == up_to(objective, 2)


def test_it_is_added_with_its_weight():
    objective = make(Dispersive, weight=0.7)
    losses = losses_of(objective)
    assert losses["loss"] == losses["loss_generative"] + 0.7 * losses["loss_dispersive"]


def test_it_is_float32_under_autocast():
    objective = make(Dispersive, method="sddit", mask_ratio=0.5)
    expected = losses_of(objective)["loss_dispersive"]
    with torch.autocast("cpu", torch.bfloat16):
        actual = losses_of(objective)["loss_dispersive"]
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize(("depth", "layer"), [(1, 1), (3, 1), (4, 1), (8, 2), (12, 3), (28, 7)])
def test_a_quarter_of_the_depth(depth, layer):
    network = METHODS["dit"].transformer(**NETWORKS["dit"] | {"num_layers": depth})
    assert Dispersive(network).layers == (layer,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 4}, "dispersive_layer is 4; it must be a whole number, at least 1 and at most 3"),
        ({"layer": -1}, "dispersive_layer is -1"),
        ({"weight": -0.1}, "dispersive_weight is -0.1"),
        ({"temperature": 0.0}, "dispersive_temperature is 0.0; it must be a finite number, above 0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(Dispersive, **arguments)


@pytest.mark.parametrize("loss", [Dispersive, Contrastive])
def test_one_image_is_refused(loss):
    objective = make(loss)
    with pytest.raises(ValueError, match="compares images, and the batch has one"):
        objective(torch.randn(1, 3, 8, 8), torch.tensor([0]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--train_batch_size", 1], ["train_batch_size is 1; the dispersive loss", "at least 2"]),
        (["--dispersive_layer", 4], ["dispersive_layer is 4", "at most 3"]),
        (["--dispersive_temperature", 0], ["dispersive_temperature is 0.0", "at least 0.001"]),
        (["--dispersive_weight", "inf"], ["dispersive_weight is inf", "at least 0"]),
        (["--auxiliary", "none", "--dispersive_weight", 1], ["dit without dispersive has no such option"]),
        (["--auxiliary", "dispersive", "dispersive"], ["auxiliary names dispersive twice"]),
        (["--auxiliary", "dispersion"], ["auxiliary is 'dispersion'", "dispersive, contrastive, sra"]),
    ],
)
def test_bad_options_are_refused(changes, words, tmp_path, capsys):
    with refusal(capsys, *words):
        main(tmp_path / "run", *options("dispersive"), *changes)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_goes_on_to_the_bit(tmp_path):
    arguments = [*options("dispersive", method="sddit"), "--train_batch_size", 4]
    assert goes_on_to_the_bit(tmp_path, *arguments, "--gradient_accumulation_steps", 2)


def test_settings_may_change_at_resume(tmp_path):
    arguments = [*options("dispersive"), "--checkpointing_steps", 1, "--max_train_steps"]
    main(tmp_path, *arguments, 1)
    changes = ["--dispersive_weight", 0.5, "--dispersive_temperature", 2.0, "--dispersive_layer", 2]
    trainer = trainer_of(tmp_path, *arguments, 2, *changes, "--resume_from_checkpoint", "latest")
    loss = trainer.objective.auxiliaries["dispersive"]
    assert (loss.weight, loss.temperature, loss.layers) == (0.5, 2.0, (2,))
