"""DiT, MaskDiT, MDT and TREAD: their networks, their losses, and the runs that train them."""

import json
import math
import warnings

import pytest
import torch
from bad_input import refusal
from conftest import NETWORKS, randomize
from diffusers import DiTTransformer2DModel
from small_runs import NETWORK, make_trainer, train
from torch.utils.flop_counter import FlopCounterMode

from sddit_diffusers import (
    PRESETS,
    EDMHeunScheduler,
    MaskDiTTransformer2DModel,
    MDTTransformer2DModel,
    PlainDiTTransformer2DModel,
    SDDiTPipeline,
    SDDiTTransformer2DModel,
    TREADTransformer2DModel,
)
from sddit_diffusers.models.originals import translate
from sddit_diffusers.training.methods import METHODS
from sddit_diffusers.training.objective import MaskDiTObjective, MDTObjective, Objective

CLASSES = {
    "dit": (PlainDiTTransformer2DModel, Objective, NETWORKS["dit"]),
    "maskdit": (MaskDiTTransformer2DModel, MaskDiTObjective, NETWORKS["maskdit"]),
    "mdt": (MDTTransformer2DModel, MDTObjective, NETWORKS["mdt"]),
    "tread": (TREADTransformer2DModel, Objective, NETWORKS["tread"]),
}
VISIBLE = torch.tensor([[5, 0, 11, 7, 2], [14, 15, 1, 3, 8]])


def make(method, **arguments):
    transformer, objective, network = CLASSES[method]
    return objective(randomize(transformer(**network)), EDMHeunScheduler(), **arguments)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(4)
    return 0.5 * torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([0, 3, 1])


def test_plain_dit_is_diffusers_dit(inputs):
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=3, sample_size=8,
        num_embeds_ada_norm=4, norm_eps=1e-6,
    ).eval()  # fmt: skip
    randomize(theirs)
    first = theirs.transformer_blocks[0].norm1.emb
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # DiT's; diffusers' embedding divides by 127
    ours = PlainDiTTransformer2DModel(**NETWORKS["dit"])
    ours.load_state_dict(translate(theirs.state_dict(), {"num_attention_heads": 2, "sample_size": 8})[0])
    embeddings = sum(parameter.numel() for parameter in first.parameters())
    assert ours.num_parameters() == theirs.num_parameters() - 2 * embeddings  # of the other two blocks
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs).sample, theirs(*inputs).sample, rtol=0, atol=1e-5)


def test_maskdit_has_its_paper_s_number_of_parameters():
    with torch.device("meta"):
        transformer = MaskDiTTransformer2DModel(**PRESETS["SD-DiT-XL/2"])
    assert round(transformer.num_parameters() / 1e6, 1) == 730.1


def test_maskdit_decodes_mask_tokens(inputs):
    """The decoder has the visible tokens in their places, and one learned token in all others."""
    model, seen = make("maskdit").transformer, []
    model.decoder.register_forward_pre_hook(lambda *_: pytest.fail("[CLS] has no way here"))
    model.decoder.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    with torch.no_grad():
        tokens = model(*inputs, VISIBLE).encoder_hidden_states
        narrow = model.decoder.narrow(tokens, model._condition(*inputs[1:], inputs[0]))
    positions = model.decoder.pos_embed(4, 4)
    for i in range(2):
        for n in range(16):
            places = VISIBLE[i].tolist()
            token = narrow[i, places.index(n)] if n in places else model.mask_token[0, 0]
            torch.testing.assert_close(seen[0][i, n], token + positions[n], rtol=0, atol=1e-6)


def test_maskdit_loss_patch_by_patch(batch):
    objective = make("maskdit", mask_ratio=0.5, mae_weight=0.3)
    x0, labels = batch
    draws = objective.draw(x0.shape, torch.Generator().manual_seed(0))
    actual = objective(x0, labels, draws)
    denoising, reconstruction = [], []
    with torch.no_grad():
        for i in range(3):
            x, sigma = x0[i].double(), draws.t[i].item()
            noised = x + sigma * draws.noise[i].double()
            label = torch.tensor([4 if draws.label_dropped[i] else labels[i]])
            scaled = (noised / math.sqrt(sigma**2 + 0.25)).float().unsqueeze(0)
            visible = draws.visible_ids[i : i + 1]
            output = objective.transformer(scaled, torch.tensor(math.log(sigma) / 4), label, visible)
            c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
            denoised = c_skip * noised + c_out * output.sample[0].double()
            for n in range(16):
                patch = (
                    slice(None),
                    slice(2 * (n // 4), 2 * (n // 4) + 2),
                    slice(2 * (n % 4), 2 * (n % 4) + 2),
                )
                if n in visible:
                    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
                    denoising.append(weight * (denoised[patch] - x[patch]).square().mean().item())
                else:
                    reconstruction.append((denoised[patch] - noised[patch]).square().mean().item())
    assert len(denoising) == len(reconstruction) == 24
    dsm, mae = sum(denoising) / 24, sum(reconstruction) / 24
    expected = {"loss": dsm + 0.3 * mae, "loss_generative": dsm, "loss_mae": mae}
    assert {name: value.item() for name, value in actual.items()} == pytest.approx(expected, rel=1e-4)


def test_mdt_leaves_visible_tokens_untouched(inputs):
    model, seen = make("mdt").transformer, {}
    for name, block in (("side", model.side_interpolater), ("decoder", model.transformer_blocks[1])):
        block.register_forward_hook(
            lambda block, args, output, name=name: seen.update({name: (args[0], output)})
        )
    with torch.no_grad():
        tokens = model(*inputs, VISIBLE).encoder_hidden_states
    positions = model.pos_embed(4, 4)
    (shown, filled), (decoded, _) = seen["side"], seen["decoder"]
    for i in range(2):
        for n in range(16):
            places = VISIBLE[i].tolist()
            if n in places:
                assert decoded[i, n].equal(tokens[i, places.index(n)] + positions[n])
                assert not decoded[i, n].equal(filled[i, n])
            else:
                assert shown[i, n].equal(model.mask_token[0, 0] + positions[n])
                assert decoded[i, n].equal(filled[i, n])


def test_mdt_sees_the_image_whole_and_masked(batch):
    objective, (x0, labels) = make("mdt", mask_ratio=0.3), batch
    draws = objective.draw(x0.shape, torch.Generator().manual_seed(0))
    actual = objective(x0, labels, draws)
    whole = Objective(objective.transformer, objective.scheduler)(
        x0, labels, draws._replace(visible_ids=None)
    )["loss"]
    torch.testing.assert_close(actual["loss_generative"], whole)
    torch.testing.assert_close(actual["loss"], whole + actual["loss_masked"])
    assert draws.visible_ids.shape == (3, 11)  # int(16 x 0.7)

    x_s = x0 + draws.t * draws.second_noise  # its own noise, the same level
    labels = labels.masked_fill(draws.label_dropped, 4)
    output = objective.evaluate(x_s, draws.t, labels, draws.visible_ids).output
    denoised = objective.scheduler.precondition_outputs(x_s, output, draws.t)
    weight = (draws.t**2 + 0.25) / (draws.t * 0.5) ** 2
    torch.testing.assert_close(actual["loss_masked"], (weight * (denoised - x0) ** 2).mean())


def test_mdt_has_the_operations_of_two_passes():
    """Of one with all patches, and one with 70 % of them in the encoder and a block more."""
    flops = {}
    for method, objective, ratio in (("dit", Objective, 0.0), ("mdt", MDTObjective, 0.3)):
        network = {name: value for name, value in PRESETS["SD-DiT-S/2"].items() if "decoder" not in name}
        with torch.device("meta"):
            trained = objective(METHODS[method].transformer(**network), EDMHeunScheduler(), mask_ratio=ratio)
            x0, labels = torch.zeros(2, 4, 32, 32), torch.zeros(2, dtype=torch.long)
            with FlopCounterMode(display=False) as counter:
                trained(x0, labels)["loss"].backward()
        flops[method] = counter.get_total_flops()
    # Of 12 blocks, 10 are the encoder's; attention alone shrinks with the square.
    assert 1 + (10 * 0.66 + 2 + 1) / 12 < flops["mdt"] / flops["dit"] < 1 + (10 * 0.7 + 2 + 1) / 12


@pytest.mark.parametrize("method", CLASSES)
@pytest.mark.parametrize("mask_ratio", [0.0, 0.3])
def test_every_weight_gets_a_gradient(method, mask_ratio, batch):
    """Under DDP, one without would stop the run."""
    objective = make(method, mask_ratio=mask_ratio if method != "dit" else 0.0)
    objective(*batch)["loss"].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


@pytest.mark.parametrize("method", CLASSES)
def test_the_masked_are_hidden(method, inputs):
    """No image shows through the mask: neither in the encoder nor in the decoder."""
    if method in ("dit", "tread"):
        pytest.skip("hides nothing")
    model = make(method).transformer
    changed = inputs[0].clone()
    changed[0, :, 0, 2:4] += 1  # patch 1, masked in the first image
    with torch.no_grad():
        torch.testing.assert_close(
            model(*inputs, VISIBLE).sample, model(changed, *inputs[1:], VISIBLE).sample
        )
        assert not model(*inputs).sample.allclose(model(changed, *inputs[1:]).sample)


SMALL_NETWORKS = {
    "dit": {name: value for name, value in NETWORK.items() if "decoder" not in name},
    "maskdit": NETWORK,
    "mdt": {name: value for name, value in NETWORK.items() if "decoder" not in name}
    | {"num_decoder_layers": 1},
    "tread": {name: value for name, value in NETWORK.items() if "decoder" not in name}
    | {"num_layers": 3, "route_start": 1, "route_end": 2},
}


def options(method, *more):
    return "--method", method, "--transformer", json.dumps(SMALL_NETWORKS[method]), *more


@pytest.mark.parametrize("method", CLASSES)
def test_is_trained_resumed_saved_and_loaded(method, tmp_path):
    through = train(tmp_path / "a", *options(method, "--max_train_steps", 4))
    assert through[-1]["loss_generative"] > 0 and "teacher_momentum" not in through[-1]
    saving = options(method, "--max_train_steps", 4, "--checkpointing_steps", 2)
    train(tmp_path / "b", *saving)
    (tmp_path / "b/checkpoint-4").rename(tmp_path / "gone")
    assert train(tmp_path / "b", *saving, "--resume_from_checkpoint", "latest") == through

    pipe = SDDiTPipeline.from_pretrained(tmp_path / "b")
    assert type(pipe.transformer) is CLASSES[method][0]
    again = SDDiTPipeline.from_pretrained(tmp_path / "a")
    images = [
        each([7], num_inference_steps=2, guidance_scale=2.0, generator=torch.Generator().manual_seed(0),
             output_type="pt").images for each in (pipe, again)
    ]  # fmt: skip
    assert images[0].equal(images[1]) and images[0].isfinite().all()


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    train(tmp_path / "a", *options("maskdit", "--max_train_steps", 1, "--checkpointing_steps", 1))
    network = json.dumps(SMALL_NETWORKS["maskdit"])
    with pytest.raises(ValueError, match="method: maskdit there, sddit here"):
        make_trainer(tmp_path / "a", "--transformer", network, "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("start", ["a", "a/checkpoint-2"])
def test_unmask_tuning_begins_with_trained_weights(start, tmp_path):
    train(tmp_path / "a", *options("maskdit", "--max_train_steps", 2, "--checkpointing_steps", 2))
    tuning = ["--pretrained_model_name_or_path", tmp_path / start, "--mask_ratio_schedule", "cosine",
              "--max_train_steps", 8]  # fmt: skip
    trainer = make_trainer(tmp_path / "b", *options("maskdit", *tuning))
    weights = trainer.objective.transformer.state_dict()
    if start == "a":
        trained = SDDiTPipeline.from_pretrained(tmp_path / "a").transformer.state_dict()
    else:
        state = torch.load(tmp_path / start / "state.pt", weights_only=True)["objective"]
        trained = {name: state[f"transformer.{name}"] for name in weights}
    assert all(weights[name].equal(trained[name]) for name in weights)

    metrics = train(tmp_path / "b", *options("maskdit", *tuning))
    ratios = [row["mask_ratio"] for row in metrics]
    assert ratios == pytest.approx([0.5 * math.cos(math.pi / 2 * step / 8) ** 4 for step in range(8)])
    assert all(row["loss_mae"] > 0 for row in metrics)
    at_zero = ["--mask_ratio", 0, "--max_train_steps", 1, *tuning[:2]]
    assert train(tmp_path / "c", *options("maskdit", *at_zero))[0]["loss_mae"] == 0


@pytest.mark.parametrize(("first", "then"), [("dit", "tread"), ("tread", "dit"), ("tread", "tread")])
def test_routing_may_begin_and_end_within_a_training(first, then, tmp_path):
    deep = {"dit": SMALL_NETWORKS["dit"] | {"num_layers": 3}, "tread": SMALL_NETWORKS["tread"]}
    of = {method: ["--method", method, "--transformer", json.dumps(deep[method])] for method in deep}
    train(tmp_path / "a", *of[first], "--max_train_steps", 2)
    begin = ["--pretrained_model_name_or_path", tmp_path / "a", "--max_train_steps", 1]
    begin += ["--mask_ratio", 0] if first == then else []
    transformer = make_trainer(tmp_path / "b", *of[then], *begin).objective.transformer
    assert type(transformer) is CLASSES[then][0]
    trained = SDDiTPipeline.from_pretrained(tmp_path / "a").transformer.state_dict()
    assert all(weight.equal(trained[name]) for name, weight in transformer.state_dict().items())


def test_tread_lets_go_of_its_route_with_the_schedule(tmp_path):
    tuning = ["--mask_ratio_schedule", "cosine", "--max_train_steps", 3]
    ratios = [row["mask_ratio"] for row in train(tmp_path, *options("tread", *tuning))]
    assert ratios == pytest.approx([0.5 * math.cos(math.pi / 2 * step / 3) ** 4 for step in range(3)])


def test_no_route_leaves_the_folder_alone(tmp_path, capsys):
    network = json.dumps(SMALL_NETWORKS["tread"] | {"route_end": 3})
    with refusal(capsys, "route_end is 3", "at least 1 and at most 2", untouched=tmp_path):
        train(tmp_path, "--method", "tread", "--transformer", network, "--max_train_steps", 1)


def test_weights_of_another_network_are_refused(tmp_path):
    train(tmp_path / "a", *options("maskdit", "--max_train_steps", 1))
    begin = ["--pretrained_model_name_or_path", tmp_path / "a"]
    with pytest.raises(ValueError, match="another network: it differs in .*decoder"):
        make_trainer(tmp_path / "b", *options("dit", *begin))
    with pytest.raises(ValueError, match="cannot be loaded"):
        make_trainer(tmp_path / "b", *options("dit", "--pretrained_model_name_or_path", tmp_path / "none"))


@pytest.mark.parametrize("of", ["", "checkpoint-1"])
def test_weights_that_embed_another_time_are_refused(tmp_path, of):
    network = SMALL_NETWORKS["dit"] | {"timestep_scale": 1e-3}
    train(tmp_path / "a", "--method", "dit", "--transformer", json.dumps(network), "--max_train_steps", 1,
          "--checkpointing_steps", 1)  # fmt: skip
    begin = ["--pretrained_model_name_or_path", tmp_path / "a" / of]
    asked = (
        r"embed another time: train with --transformer '{\"timestep_scale\": 0.001, \"timestep_shift\": 0.0}'"
    )
    with pytest.raises(ValueError, match=asked):
        make_trainer(tmp_path / "b", *options("dit", *begin))
    make_trainer(tmp_path / "b", "--method", "dit", "--transformer", json.dumps(network), *begin)


@pytest.mark.parametrize("of", ["", "checkpoint-1"])
def test_weights_of_another_sigma_data_are_told_of(tmp_path, of):
    train(tmp_path / "a", *options("dit", "--max_train_steps", 1, "--sigma_data", 0.3),
          "--checkpointing_steps", 1)  # fmt: skip
    begin = ["--pretrained_model_name_or_path", tmp_path / "a" / of]
    with pytest.warns(UserWarning, match="are of sigma_data 0.3, and sigma_data is 0.6 here"):
        make_trainer(tmp_path / "b", *options("dit", *begin, "--sigma_data", 0.6))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*sigma_data")
        make_trainer(tmp_path / "b", *options("dit", *begin, "--sigma_data", 0.3))


def test_weights_are_loaded_for_other_classes(tmp_path):
    train(tmp_path / "a", "--transformer", json.dumps(NETWORK), "--max_train_steps", 1)
    begin = ["--pretrained_model_name_or_path", tmp_path / "a", "--label_column", ""]
    trainer = make_trainer(tmp_path / "b", "--transformer", json.dumps(NETWORK), *begin)
    trained = SDDiTPipeline.from_pretrained(tmp_path / "a").transformer
    transformer = trainer.objective.transformer
    assert isinstance(transformer, SDDiTTransformer2DModel)
    assert transformer.label_embed.weight.shape != trained.label_embed.weight.shape
    assert transformer.cls_token.equal(trained.cls_token)
    assert trainer.objective.auxiliaries["discrimination"].teacher.encoder.cls_token.equal(trained.cls_token)
