import copy
import math

import pytest
import torch
from bad_input import refusal
from conftest import NETWORKS, randomize
from peft import LoraConfig
from small_losses import (
    CASES,
    SHARED,
    draw,
    goes_on_to_the_bit,
    inputs_of,
    losses_of,
    main,
    make,
    options,
    process_of,
    reached,
    same_base_draws,
    tokens_after,
    trainer_of,
    up_to,
    visible_of,
)

from sddit_diffusers import EDMHeunScheduler, InterpolantScheduler
from sddit_diffusers.training.contrastive import Contrastive
from sddit_diffusers.training.discrimination import Discrimination
from sddit_diffusers.training.dispersive import Dispersive
from sddit_diffusers.training.methods import METHODS
from sddit_diffusers.training.metrics import read_metrics
from sddit_diffusers.training.sra import SRA, lower_times
from sddit_diffusers.training.teacher import Teacher


def lower(process, t, interval):
    """The teacher's time of a number: lower in sigma / (1 + sigma), which the linear path's time is."""
    if process == "edm":
        linear = max(t / (1 + t) - interval, 0)
        return min(max(linear / (1 - linear), 0.002), t)
    return max(t - interval, 0)


def smooth_l1(a, b):
    return 0.5 * (a - b) ** 2 / 0.05 if abs(a - b) < 0.05 else abs(a - b) - 0.025


def head_of(head, token):
    """A Linear, SiLU, a Linear."""
    hidden = head[0].weight.double() @ token + head[0].bias.double()
    hidden = torch.tensor([x / (1 + math.exp(-x)) for x in hidden.tolist()], dtype=torch.float64)
    return head[2].weight.double() @ hidden + head[2].bias.double()


@pytest.mark.parametrize(("layer", "teacher_layer"), [(1, 2), (2, 3)])
@pytest.mark.parametrize(("method", "process", "mask_ratio"), CASES)
def test_loss_equals_a_loop_over_images_and_tokens(method, process, mask_ratio, layer, teacher_layer):
    objective = make(
        SRA, method=method, process=process, mask_ratio=mask_ratio, layer=layer, teacher_layer=teacher_layer
    )
    loss, network = objective.auxiliaries["sra"], objective.transformer
    # A whole network with the teacher's weights.
    teacher = type(network).from_config(network.config)
    teacher.load_state_dict(network.state_dict() | loss.teacher.encoder.state_dict())
    draws, values = draw(objective), []
    with torch.no_grad():
        for i in range(4):
            visible = visible_of(method, draws, i)
            student = tokens_after(network, layer, method, inputs_of(process, draws, i), visible)
            t = lower(process, draws.t[i].item(), draws.auxiliaries["sra"].interval[i].item())
            target = tokens_after(teacher, teacher_layer, method, inputs_of(process, draws, i, t))
            places = range(16) if visible is None else visible[0].tolist()
            for token, place in zip(student, places, strict=True):
                pairs = zip(head_of(loss.head, token).tolist(), target[place].tolist(), strict=True)
                values += [smooth_l1(a, b) for a, b in pairs]
    losses = losses_of(objective, draws)
    assert losses["loss_sra"].item() == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert losses["loss"].item() == pytest.approx(
        (losses_of(make(method=method, process=process, mask_ratio=mask_ratio), draws)["loss"]).item()
        + 0.2 * losses["loss_sra"].item()
    )


@pytest.mark.parametrize(("method", "process", "mask_ratio"), CASES)
def test_it_reaches_the_head_and_the_blocks_up_to_its_own(method, process, mask_ratio):
    objective = make(SRA, method=method, process=process, mask_ratio=mask_ratio, layer=2, teacher_layer=3)
    head = {f"auxiliaries.sra.head.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert reached(objective, "sra") == up_to(objective, 2) | head
    assert not any(parameter.requires_grad for parameter in objective.auxiliaries["sra"].teacher.parameters())


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("method", NETWORKS)
def test_teacher_is_the_first_blocks_of_any_network(method, layer):
    network = randomize(METHODS[method].transformer(**NETWORKS[method]))
    teacher = Teacher(network, layers=layer)
    student = dict(network.named_parameters("encoder"))
    assert len(teacher.encoder.transformer_blocks) == layer
    for name, weight in teacher.named_parameters():
        assert weight.equal(student[name]) and weight.data_ptr() != student[name].data_ptr()
    behind = ("decoder", "proj_out", "norm_out", "mask_token", "side_interpolater")
    behind += tuple(f"transformer_blocks.{i}." for i in range(layer, 3))
    names = {name.removeprefix("encoder.") for name in student if not name[8:].startswith(behind)}
    assert {name.removeprefix("encoder.") for name, _ in teacher.named_parameters()} == names
    draws = draw(make(method=method))
    inputs = inputs_of("edm", draws, 0)
    found = copy.deepcopy(teacher).double().encoder.encode(*inputs)[0]
    torch.testing.assert_close(found[method == "sddit" :], tokens_after(network, layer, method, inputs))


def test_teacher_follows_the_student():
    objective = make(SRA, layer=1, teacher_layer=2, momentum=0.75)
    teacher = objective.auxiliaries["sra"].teacher
    before = {name: weight.clone() for name, weight in teacher.named_parameters()}
    student = dict(objective.transformer.named_parameters("encoder"))
    objective.after_step(moved=False)
    assert all(weight.equal(before[name]) for name, weight in teacher.named_parameters())
    objective.after_step()
    for name, weight in teacher.named_parameters():
        torch.testing.assert_close(weight, 0.75 * before[name] + 0.25 * student[name])
        assert not weight.equal(before[name])


def test_teacher_has_the_student_s_adapters():
    network = randomize(METHODS["dit"].transformer(**NETWORKS["dit"]))
    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_out"]))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loss = SRA(network, momentum=0.5)
    objective = METHODS["dit"].objective(network, process_of("edm"), {"sra": loss})
    student = dict(network.named_parameters("encoder"))
    adapters = [name for name, _ in loss.teacher.named_parameters() if "lora_B" in name]
    assert len(adapters) == 2  # of two blocks
    losses_of(objective)["loss"].backward()
    torch.optim.SGD(
        [parameter for parameter in objective.parameters() if parameter.requires_grad], 0.5
    ).step()
    before = {name: weight.clone() for name, weight in loss.teacher.named_parameters()}
    objective.after_step()
    for name, weight in loss.teacher.named_parameters():
        torch.testing.assert_close(weight, 0.5 * before[name] + 0.5 * student[name])
        assert "to_q.lora" not in name or not weight.equal(before[name])


# The teacher's time


def test_on_the_linear_path_the_interval_is_subtracted():
    t = torch.tensor([0.0, 0.1, 0.3, 0.3, 0.999, 1.0, 1.0], dtype=torch.float64)
    interval = torch.tensor([0.1, 0.2, 0.0, 0.2, 0.1, 0.0, 0.2], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0, 0.3, 0.1, 0.899, 1.0, 0.8], dtype=torch.float64)
    torch.testing.assert_close(lower_times(InterpolantScheduler(), t, interval), expected)


@pytest.mark.parametrize("process", ["edm", "linear", "gvp", "vp"])
def test_processes_agree_on_the_teacher_s_noise(process):
    """By the ratio of noise to signal; where sampling ends nothing is lower."""
    process = process_of(process)
    ratios = torch.tensor([0.3, 1.0, 5.0, 80.0], dtype=torch.float64)
    t = process.time_of(ratios)
    torch.testing.assert_close(process.ratio_of(t), ratios)
    found = process.ratio_of(lower_times(process, t, torch.tensor(0.2, dtype=torch.float64)))
    linear = ratios / (1 + ratios) - 0.2
    torch.testing.assert_close(found, linear / (1 - linear))


@pytest.mark.parametrize("prediction", ["flow_prediction", "score"])
@pytest.mark.parametrize("process", ["edm", "linear", "gvp", "vp"])
def test_the_teacher_s_time_is_never_higher_and_within_the_interval(process, prediction):
    process = EDMHeunScheduler() if process == "edm" else InterpolantScheduler(process, prediction)
    t = process.training_times(torch.linspace(-6, 6, 1001))
    for interval in (0.0, 0.1, 1.0):
        found = lower_times(process, t, torch.tensor(interval))
        assert found.dtype == torch.float32 and found.isfinite().all()
        assert (found <= t).all() and (found >= t.clamp(max=process.interval[0])).all()
        if interval == 0:
            torch.testing.assert_close(
                found, t.clamp(min=process.interval[0]).minimum(t), rtol=1e-3, atol=1e-5
            )
        elif interval == 1:
            assert (found <= process.interval[0]).all()
    assert process.precondition_noise(found).isfinite().all()


def test_intervals_are_uniform():
    objective = make(SRA, interval=0.4)
    draws = objective.draw((20_000, 3, 8, 8), torch.Generator().manual_seed(0))
    interval = draws.auxiliaries["sra"].interval
    assert interval.shape == (20_000, 1, 1, 1) and 0 <= interval.min() and interval.max() <= 0.4
    torch.testing.assert_close(interval.histc(10, 0, 0.4) / 2e4, torch.full((10,), 0.1), atol=0.01, rtol=0)
    assert draws.rows(slice(3, 5)).auxiliaries["sra"].interval.equal(interval[3:5])


def test_draws_are_those_without_it():
    assert same_base_draws(make(), make(SRA), make(Dispersive), make(Contrastive), make(SRA, Dispersive))


def test_losses_draw_in_their_order():
    """Those that come later change nothing of what earlier ones draw."""
    network = METHODS["sddit"].transformer(**NETWORKS["sddit"])
    sizes = dict(num_prototypes=4, head_hidden_dim=4, head_bottleneck_dim=4)
    discrimination = Discrimination(network, teacher_sigma="student", **sizes)
    several = {"discrimination": discrimination, "dispersive": Dispersive(network), "sra": SRA(network)}
    drawn = []
    for names in (("discrimination",), ("discrimination", "sra"), ("dispersive", "discrimination", "sra")):
        losses = {name: several[name] for name in names}
        drawn.append(draw(METHODS["sddit"].objective(network, process_of("edm"), losses)).auxiliaries)
    first, *others = (draws["discrimination"] for draws in drawn)
    assert all(a.equal(b) for other in others for a, b in zip(first, other, strict=True))
    assert drawn[1]["sra"].interval.equal(drawn[2]["sra"].interval)


# Options


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, (1, 1)), (2, (1, 1)), (3, (1, 2)), (12, (4, 8)), (24, (7, 17)), (28, (8, 20))]
)
def test_blocks_are_the_paper_s_in_proportion(depth, layers):
    loss = SRA(METHODS["dit"].transformer(**NETWORKS["dit"] | {"num_layers": depth}))
    assert (loss.layers[0], loss.teacher_layer) == layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 4}, "sra_layer is 4; it must be a whole number, at least 1 and at most 3"),
        ({"teacher_layer": 4}, "sra_teacher_layer is 4; it must be a whole number, at least 1 and at most 3"),
        ({"weight": -0.1}, "sra_weight is -0.1"),
        ({"interval": 1.1}, "sra_interval is 1.1"),
        ({"momentum": 1.5}, "sra_momentum is 1.5"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(SRA, **arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--sra_layer", 4], ["sra_layer is 4", "at most 3"]),
        (["--sra_teacher_layer", 9], ["sra_teacher_layer is 9", "at most 3"]),
        (["--sra_interval", 2], ["sra_interval is 2.0; it must be in 0..1"]),
        (["--sra_momentum", -1], ["sra_momentum is -1.0; it must be in 0..1"]),
        (["--auxiliary", "none", "--sra_weight", 1], ["dit without sra has no such option"]),
    ],
)
def test_bad_options_are_refused(changes, words, tmp_path, capsys):
    with refusal(capsys, *words):
        main(tmp_path / "run", *options("sra"), *changes)
    assert not (tmp_path / "run/metrics.jsonl").exists()


# Runs


def test_a_run_goes_on_to_the_bit(tmp_path):
    arguments = [*options("sra", method="mdt"), "--process", "gvp", "--train_batch_size", 4]
    assert goes_on_to_the_bit(tmp_path, *arguments, "--sra_momentum", 0.5)


def test_blocks_may_not_change_at_resume_and_the_rest_may(tmp_path):
    arguments = [*options("sra"), "--checkpointing_steps", 1, "--max_train_steps"]
    main(tmp_path, *arguments, 1)
    going_on = [*arguments, 2, "--resume_from_checkpoint", "latest"]
    for name, message in (("sra_layer", "1 there, 3 here"), ("sra_teacher_layer", "2 there, 3 here")):
        with pytest.raises(ValueError, match=f"model {name}: {message}"):
            trainer_of(tmp_path, *going_on, f"--{name}", 3)
    changes = ["--sra_weight", 0.5, "--sra_interval", 0.3, "--sra_momentum", 0.9]
    loss = trainer_of(tmp_path, *going_on, *changes).objective.auxiliaries["sra"]
    assert (loss.weight, loss.interval, loss.momentum) == (0.5, 0.3, 0.9)


def test_several_losses_at_once(tmp_path, capsys):
    """Each has its metric, its options in the card and its group in --help; all train one network."""
    names = ["discrimination", "sra", "dispersive", "contrastive"]
    main(tmp_path, *options(*names, method="sddit"), "--max_train_steps", 2, "--num_validation_images", 0)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    for row in rows:
        parts = [1.0, 0.2, 0.25, 0.05]
        keys = ["loss_discriminative", "loss_sra", "loss_dispersive", "loss_contrastive"]
        total = sum(weight * row[key] for weight, key in zip(parts, keys, strict=True))
        assert row["loss"] == pytest.approx(row["loss_generative"] + total, rel=1e-5)
    card = (tmp_path / "README.md").read_text()
    titles = "self-representation alignment (SRA), dispersive loss, contrastive flow matching"
    for row in (f"| auxiliary losses | {titles} |", "| sra_momentum | 0.9999 |", "| dispersive_layer | 0 |"):
        assert row in card
    with pytest.raises(SystemExit):
        main(tmp_path, "--help")
    told = capsys.readouterr().out
    for group, option in (("SRA", "sra_interval"), ("dispersive", "dispersive_temperature"),
                          ("contrastive", "contrastive_weight")):  # fmt: skip
        assert option in told.split(f"\nauxiliary losses: {group}:\n")[1].split("\n\n")[0]


def test_the_card_of_a_run_without_such_losses_does_not_name_them(tmp_path):
    main(tmp_path, *options("none"), "--max_train_steps", 1)
    assert "auxiliary" not in (tmp_path / "README.md").read_text()


def test_labels_may_be_missing():
    objective = make(SRA)
    assert objective(SHARED.x0)["loss_sra"].isfinite()
