import math

import pytest
import torch
from conftest import TINY, randomize
from peft import LoraConfig

from sddit_diffusers import EDMHeunScheduler, SDDiTObjective, SDDiTTransformer2DModel
from sddit_diffusers.training.auxiliary import part_of

SMALL_HEAD = dict(num_prototypes=11, head_hidden_dim=10, head_bottleneck_dim=4)


def make(transformer=None, **arguments):
    objective = SDDiTObjective(
        transformer or randomize(SDDiTTransformer2DModel(**TINY)),
        EDMHeunScheduler(),
        **SMALL_HEAD | arguments,
    )
    if objective.discrimination is not None:
        randomize(objective.discrimination.head, seed=2)
        randomize(objective.discrimination.teacher, seed=3)
    return objective


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(4)
    return 0.5 * torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([0, 3, 1])


def teachers(draws):
    return draws.auxiliaries["discrimination"]


def move_teacher(objective, momentum):
    if objective.discrimination is not None:
        objective.discrimination.teacher_momentum = momentum
    objective.after_step()


def draw(objective, seed=0, batch=3, size=8):
    return objective.draw((batch, 3, size, size), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("mask_ratio", "token_ratio"), [(0.5, 1.0), (0.5, 0.3), (0.0, 0.25)])
def test_loss_equals_algorithm_a1_image_by_image(batch, mask_ratio, token_ratio):
    """Both losses written from the paper, one image and one token at a time."""
    objective = make(mask_ratio=mask_ratio, discriminative_weight=0.7, discriminative_token_ratio=token_ratio)
    objective.discrimination.teacher_temperature = 0.07
    objective.discrimination.center_cls.value.copy_(torch.linspace(-0.2, 0.2, 11))
    objective.discrimination.center_patch.value.copy_(torch.linspace(0.3, -0.1, 11))
    x0, labels = batch
    draws = draw(objective)
    actual = objective(x0, labels, draws)
    visible = torch.arange(16).expand(3, -1) if draws.visible_ids is None else draws.visible_ids

    generative, cls, patch, entropy, chosen = [], [], [], [], set()
    with torch.no_grad():
        for i in range(3):
            x, sigma = x0[i].double(), draws.t[i].item()
            label = torch.tensor([4 if draws.label_dropped[i] else labels[i]])
            x_s, x_t = (
                x + sigma * draws.noise[i].double(),
                x + 0.002 * teachers(draws).noise[i].double(),
            )

            def inputs(y, s, label=label):
                scaled = (y / math.sqrt(s**2 + 0.25)).float().unsqueeze(0)
                return scaled, torch.tensor(math.log(s) / 4), label

            student = objective.transformer(*inputs(x_s, sigma), visible[i : i + 1])
            c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
            denoised = c_skip * x_s + c_out * student.sample[0].double()
            generative.append((sigma**2 + 0.25) / (sigma * 0.5) ** 2 * ((denoised - x) ** 2).mean().item())

            e_s = student.encoder_hidden_states[0]
            e_t = objective.discrimination.teacher.encoder(*inputs(x_t, 0.002)).encoder_hidden_states[0]
            ids = draws.patch_order[i].tolist()[: int(token_ratio * visible.shape[1])]
            places = [visible[i].tolist().index(n) for n in ids]  # among the student's tokens
            assert token_ratio < 1 or {*ids} == {*visible[i].tolist()}
            for j, n in enumerate([-1, *ids]):  # [CLS], then each patch
                center = (
                    objective.discrimination.center_patch.value
                    if j
                    else objective.discrimination.center_cls.value
                )
                e = e_s[1 + places[j - 1] if j else 0]
                s = (objective.discrimination.head(e).double() / 0.1).softmax(0)
                t = ((objective.discrimination.teacher.head(e_t[n + 1]) - center).double() / 0.07).softmax(0)
                (patch if j else cls).append(-(t * s.log()).sum().item())
                entropy.append((bool(j), -(t * t.log()).sum().item()))
                if j:
                    chosen.add(t.argmax().item())

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    h = (
        mean(e for is_patch, e in entropy if is_patch) + mean(e for is_patch, e in entropy if not is_patch)
    ) / 2
    expected = {
        "loss_generative": mean(generative),
        "loss_discriminative": mean(cls) + mean(patch),
        "loss": mean(generative) + 0.7 * (mean(cls) + mean(patch)),
        "teacher_entropy": h / math.log(11),
        "kl": (mean(cls) + mean(patch)) / 2 - h,
        "prototypes_used": len(chosen) / 11,
        "center_norm_cls": objective.discrimination.center_cls.value.norm().item(),
        "center_norm_patch": objective.discrimination.center_patch.value.norm().item(),
    }
    assert {name: value.item() for name, value in actual.items()} == pytest.approx(expected, rel=1e-4)


def test_gradient_reaches_the_whole_student_and_nothing_of_the_teacher(batch):
    objective = make(mask_ratio=0.5, label_dropout=0.0)
    objective(*batch)["loss"].backward()
    for name, parameter in objective.named_parameters():
        if name.startswith("auxiliaries.discrimination.teacher."):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_discriminative_loss_trains_the_encoder_and_not_the_decoder(batch):
    """The decoupling of Sec. 3.2."""
    objective = make(mask_ratio=0.5)
    objective(*batch)["loss_discriminative"].backward()
    for name, parameter in objective.transformer.named_parameters():
        assert (parameter.grad is None) == name.startswith("decoder."), name


def test_teacher_and_centers_follow_a_step(batch):
    objective = make(center_momentum=0.8)
    with torch.no_grad():
        draws = draw(objective)
        objective(*batch, draws)
        x0, labels = batch
        labels = labels.masked_fill(draws.label_dropped, 4)
        x_t = x0 + 0.002 * teachers(draws).noise
        inputs = x_t / (0.002**2 + 0.25) ** 0.5, torch.tensor(0.002).log() / 4, labels
        logits = objective.discrimination.teacher.head(
            objective.discrimination.teacher.encoder(*inputs).encoder_hidden_states
        )
        visible = torch.stack([logits[i, 1:][draws.visible_ids[i]] for i in range(3)])
    move_teacher(objective, 0.9)
    torch.testing.assert_close(objective.discrimination.center_cls.value, 0.2 * logits[:, 0].mean(0))
    torch.testing.assert_close(objective.discrimination.center_patch.value, 0.2 * visible.mean((0, 1)))


def test_evaluation_leaves_the_centers_alone(batch):
    objective = make().eval()
    with torch.no_grad():
        objective(*batch)
    move_teacher(objective, 1.0)
    assert objective.discrimination.center_cls.value.abs().max() == 0


def test_generative_loss_is_float32_under_autocast(batch):
    """At sigma 0.002, the loss is the small difference of large numbers: bf16 would be off by far more."""
    objective = make(discriminative_weight=0.0, mask_ratio=0.0)
    sigma, kept = torch.full((3, 1, 1, 1), 0.002), torch.zeros(3, dtype=torch.bool)
    draws = draw(objective)._replace(t=sigma, label_dropped=kept)
    x0, labels = batch
    noise = 0.002 * draws.noise.double()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        actual = objective(x0, labels, draws)["loss_generative"]
        x_in = ((x0.double() + noise) / (0.002**2 + 0.25) ** 0.5).float()
        f = objective.transformer(x_in, torch.tensor(0.002).log() / 4, labels).sample.double()
    c_skip, c_out = 0.25 / (0.002**2 + 0.25), 0.002 * 0.5 / (0.002**2 + 0.25) ** 0.5
    target = ((1 - c_skip) * x0.double() - c_skip * noise) / c_out  # EDM's target of F, of unit variance
    assert actual.item() == pytest.approx(((f - target) ** 2).mean().item(), rel=1e-3)


def test_teacher_moves_once_an_optimizer_step(batch):
    objective = make()
    before = [parameter.clone() for parameter in objective.discrimination.teacher.parameters()]
    for _ in range(3):
        objective(*batch)
    assert all(
        torch.equal(a, b) for a, b in zip(before, objective.discrimination.teacher.parameters(), strict=True)
    )
    move_teacher(objective, 1.0)
    assert all(
        torch.equal(a, b) for a, b in zip(before, objective.discrimination.teacher.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("ratio", "visible"), [(0.0, 16), (0.2, 12), (0.5, 8), (0.75, 4), (0.9, 1), (0.99, 1)]
)
def test_number_of_visible_patches(ratio, visible):
    draws = draw(make(mask_ratio=ratio))
    if ratio == 0:
        assert draws.visible_ids is None
    else:
        assert draws.visible_ids.shape == (3, visible)
        assert all(len(set(row)) == visible for row in draws.visible_ids.tolist())


def test_rounding_does_not_lose_a_patch():
    """100 patches at ratio 0.9 are 10 visible ones, though 100 * (1 - 0.9) is a little less than 10."""
    objective = make(SDDiTTransformer2DModel(**TINY | {"sample_size": 20}), mask_ratio=0.9)
    assert draw(objective, size=20).visible_ids.shape == (3, 10)


def test_mask_ratio_zero_is_the_unmasked_forward(batch):
    objective = make(mask_ratio=0.0)
    draws = draw(objective)
    everything = torch.arange(16).expand(3, -1)
    with torch.no_grad():
        for name, value in objective(*batch, draws).items():
            torch.testing.assert_close(value, objective(*batch, draws._replace(visible_ids=everything))[name])


def test_draws_have_the_papers_distributions():
    objective = make(label_dropout=0.3)
    draws = draw(objective, batch=20_000)
    assert draws.t.log().mean().item() == pytest.approx(-1.2, abs=0.03)
    assert draws.t.log().std().item() == pytest.approx(1.2, abs=0.03)
    assert draws.label_dropped.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(teachers(draws).t, torch.full((20_000, 1, 1, 1), 0.002))
    counts = torch.bincount(draws.visible_ids.flatten(), minlength=16) / 20_000
    torch.testing.assert_close(counts, torch.full((16,), 12 / 16), atol=0.02, rtol=0)


def test_teacher_noise_may_be_drawn_as_the_students():
    fixed, drawn = draw(make()), draw(make(teacher_sigma="student"), batch=3)
    assert not torch.equal(teachers(drawn).t, drawn.t) and teachers(drawn).t.unique().numel() == 3
    assert torch.equal(fixed.t, drawn.t) and torch.equal(teachers(fixed).noise, teachers(drawn).noise)
    many = teachers(draw(make(teacher_sigma="student"), batch=20_000)).t.log()
    assert many.mean().item() == pytest.approx(-1.2, abs=0.03) and many.std().item() == pytest.approx(
        1.2, abs=0.03
    )


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_a_share_of_the_patches_is_of_any_of_them(mask_ratio):
    """Those of the student's tokens, all as likely, and at least one."""
    objective = make(mask_ratio=mask_ratio)
    draws = draw(objective, batch=20_000)
    counts = torch.bincount(draws.patch_order[:, :2].flatten(), minlength=16) / 20_000
    torch.testing.assert_close(counts, torch.full((16,), 2 / 16), atol=0.02, rtol=0)
    if mask_ratio:
        assert torch.equal(draws.patch_order[:, :8], draws.visible_ids)
    assert part_of(8, 1e-3) == 1 and part_of(8, 0.25) == 2 and part_of(100, 0.29) == 29


def test_settings_do_not_change_each_others_draws():
    a, b, c = (
        draw(make(mask_ratio=ratio, label_dropout=p, discriminative_token_ratio=share))
        for ratio, p, share in [(0.2, 0.1, 1.0), (0.5, 0.9, 0.5), (0, 0.1, 1.0)]
    )
    for other in (b, c):
        assert torch.equal(a.noise, other.noise) and torch.equal(teachers(a).noise, teachers(other).noise)
    assert torch.equal(a.visible_ids[:, :8], b.visible_ids)
    assert torch.equal(a.label_dropped, c.label_dropped)


def test_without_discriminative_loss_there_is_no_teacher(batch):
    objective = make(discriminative_weight=0.0)
    assert objective.discrimination is None
    assert {name.split(".")[0] for name, _ in objective.named_parameters()} == {"transformer"}
    with_teacher = make()
    losses = objective(*batch, draw(objective))
    assert losses["loss"] == losses["loss_generative"]
    torch.testing.assert_close(losses["loss"], with_teacher(*batch, draw(with_teacher))["loss_generative"])
    move_teacher(objective, 0.9)


def test_without_classes():
    objective = make(randomize(SDDiTTransformer2DModel(**TINY | {"num_classes": 0})))
    assert objective(torch.randn(3, 3, 8, 8))["loss"].isfinite()


def test_dropped_labels_become_the_null_class(batch):
    objective = make(label_dropout=1.0)
    draws = draw(objective)
    assert draws.label_dropped.all()
    a, b = (
        objective(*batch, draws),
        objective(
            batch[0], torch.full((3,), 4), draws._replace(label_dropped=torch.zeros(3, dtype=torch.bool))
        ),
    )
    assert a["loss"] == b["loss"]


def test_a_uniform_and_a_collapsed_teacher_show(batch):
    objective = make()
    objective.discrimination.teacher_temperature = 1e4
    assert objective(*batch)["teacher_entropy"].item() == pytest.approx(1, abs=1e-4)
    objective.discrimination.teacher_temperature = 1e-5
    objective.discrimination.center_patch.value[3] = objective.discrimination.center_cls.value[3] = -10
    losses = objective(*batch)
    assert losses["teacher_entropy"].item() == pytest.approx(0, abs=1e-4)
    assert losses["prototypes_used"].item() == pytest.approx(1 / 11)


def test_bfloat16_autocast_keeps_the_losses_in_float32(batch):
    objective = make(mask_ratio=0.5)
    draws = draw(objective)
    expected = objective(*batch, draws)
    with torch.autocast("cpu", torch.bfloat16):
        actual = objective(*batch, draws)
    for name, value in actual.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name].item(), rel=0.05, abs=0.02), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0; it must be at least 0 and below 1"),
        ({"mask_ratio": -0.1}, "mask_ratio is -0.1"),
        ({"teacher_sigma": "teacher"}, "teacher_sigma is 'teacher'"),
        ({"teacher_sigma": 0.0}, "teacher_sigma is 0.0"),
        ({"teacher_sigma": math.inf}, "teacher_sigma is inf"),
        ({"discriminative_token_ratio": 0.0}, "discriminative_token_ratio is 0.0; .*above 0 and at most 1"),
        ({"discriminative_token_ratio": 1.5}, "discriminative_token_ratio is 1.5"),
        ({"discriminative_token_ratio": math.nan}, "discriminative_token_ratio is nan"),
        ({"discriminative_weight": -1.0}, "discriminative_weight is -1.0"),
        ({"label_dropout": 2.0}, "label_dropout is 2.0"),
        ({"transformer": SDDiTTransformer2DModel(**TINY | {"num_decoder_layers": 0})}, "has no decoder"),
        (
            {"transformer": SDDiTTransformer2DModel(**TINY | {"out_channels": 6})},
            "takes 3 channels and returns 6",
        ),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_adapters_are_trained_with_a_teacher_that_has_them(batch):
    transformer = randomize(SDDiTTransformer2DModel(**TINY))
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v", "proj_in"]))
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    objective = SDDiTObjective(transformer, EDMHeunScheduler(), **SMALL_HEAD)
    before = {
        name: weight.clone() for name, weight in objective.discrimination.teacher.encoder.named_parameters()
    }
    teacher, student = objective.discrimination.teacher.encoder, dict(transformer.named_parameters())
    assert all(torch.equal(weight, student[name]) for name, weight in before.items())

    def effective(weights, layer):
        a, b = weights[f"{layer}.lora_A.default.weight"], weights[f"{layer}.lora_B.default.weight"]
        return weights[f"{layer}.base_layer.weight"] + 3 * b @ a

    objective(*batch)["loss"].backward()
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    torch.optim.SGD(trained, 0.5).step()
    move_teacher(objective, 0.75)
    moved = dict(teacher.named_parameters())
    for name in moved:
        torch.testing.assert_close(moved[name], 0.75 * before[name] + 0.25 * student[name])
    layer = "transformer_blocks.1.attn.to_v"
    tokens = torch.randn(3, 16)
    with torch.no_grad():
        expected = tokens @ effective(moved, layer).T + moved[f"{layer}.base_layer.bias"]
        torch.testing.assert_close(teacher.get_submodule(layer)(tokens), expected)
        for _ in range(60):
            move_teacher(objective, 0.75)
    torch.testing.assert_close(
        effective(dict(teacher.named_parameters()), layer), effective(student, layer), rtol=1e-4, atol=1e-6
    )


def test_adapters_that_come_after_the_teacher_are_refused(batch):
    transformer = randomize(SDDiTTransformer2DModel(**TINY))
    objective = make(transformer)
    transformer.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"to_q.weight, unlike its teacher; add adapters before it"):
        move_teacher(objective, 0.9)
