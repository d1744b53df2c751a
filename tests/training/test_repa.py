"""REPA: its loss against loops over images and patches, its encoders against their own libraries."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bad_input import refusal
from conftest import write_latents
from PIL import Image
from small_runs import NETWORK, arguments, make_trainer, train, weights_of
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
)

import train_sddit
from sddit_diffusers import (
    EDMHeunScheduler,
    InterpolantScheduler,
    MDTTransformer2DModel,
    SDDiTPipeline,
    SDDiTTransformer2DModel,
    TREADTransformer2DModel,
)
from sddit_diffusers.data.order import Batch
from sddit_diffusers.evaluation.classifiers import SmallClassifier
from sddit_diffusers.training.building import build_objective
from sddit_diffusers.training.checkpointing import load_state
from sddit_diffusers.training.encoders import (
    ClassifierEncoder,
    PipelineEncoder,
    TransformersEncoder,
    build_encoder,
    load_transformers,
)
from sddit_diffusers.training.memory import step_memory
from sddit_diffusers.training.objective import MDTObjective, Objective
from sddit_diffusers.training.repa import REPA

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
OF_VIT = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, patch_size=3)
ROUTE = {"route_start": 1, "route_end": 3}
MODELS = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(image_size=12, **OF_VIT)),
    "registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(image_size=12, num_register_tokens=3, **OF_VIT)
    ),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(image_size=12, intermediate_size=16, **OF_VIT)),
}


def encoder_of(name="dinov2", dtype=torch.float64):
    torch.manual_seed(1)
    model = MODELS[name]()
    for parameter in model.parameters():  # the first ones would say next to nothing
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return TransformersEncoder(model, MEAN, STD, dtype=dtype)


def pictures_of(count, size=12):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(4)).byte()


def network_of(kind=SDDiTTransformer2DModel, **changes):
    torch.manual_seed(0)
    config = NETWORK | {"sample_size": 8, "in_channels": 2, "num_layers": 4, "num_classes": 3} | changes
    if kind is TREADTransformer2DModel:
        config = {name: value for name, value in config.items() if "decoder" not in name}
    network = kind(**config).double()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape).double()
    return network


def step_of(objective, mask_ratio=0.0, batch=3):
    """A step's losses, and its draws."""
    generator = torch.Generator().manual_seed(2)
    x0 = torch.randn(batch, 2, 8, 8, generator=generator).double()
    draws = objective.draw(x0.shape, generator)
    double = {"t": draws.t.double(), "noise": draws.noise.double()}
    if draws.second_noise is not None:
        double["second_noise"] = draws.second_noise.double()
    draws = draws._replace(**double)
    return objective(x0, torch.arange(batch) % 3, draws, pictures_of(batch)), draws, x0


@pytest.mark.parametrize("process", [EDMHeunScheduler, InterpolantScheduler])
@pytest.mark.parametrize(("kind", "mask_ratio"), [("sddit", 0.0), ("sddit", 0.5), ("tread", 0.5)])
@pytest.mark.parametrize(("convolution", "spatial_norm"), [(False, False), (True, True)])
def test_the_loss_is_that_of_a_loop_over_images_and_patches(
    process, kind, mask_ratio, convolution, spatial_norm
):
    network = network_of() if kind == "sddit" else network_of(TREADTransformer2DModel, **ROUTE)
    encoder = encoder_of()
    loss = REPA(
        network, encoder, layer=2, projector_dim=6, convolution=convolution, spatial_norm=spatial_norm
    ).double()
    objective = Objective(network, process(), {"repa": loss}, mask_ratio=mask_ratio, label_dropout=0.0)
    losses, draws, x0 = step_of(objective)

    # The tokens after block 2, by the network's own parts.
    x = objective.scheduler.noised(x0, draws.noise, draws.t)
    inputs = objective.scheduler.precondition_inputs(x, draws.t)
    time = objective.scheduler.precondition_noise(draws.t).flatten()
    found = []
    network.transformer_blocks[1].register_forward_hook(lambda *call: found.append(call[2]))
    network(inputs, time, torch.arange(3), draws.visible_ids)
    tokens = found[0][:, kind == "sddit" :]  # its [CLS] is first
    pixels = pictures_of(3).double() / 255
    cosines = []
    for image in range(3):
        picture = torch.stack([(pixels[image, i] - MEAN[i]) / STD[i] for i in range(3)])
        target = encoder.network(picture[None]).last_hidden_state[0, 1:]  # [16, 12]
        if spatial_norm:
            for feature in range(12):
                values = target[:, feature].clone()
                target[:, feature] = (values - values.mean()) / (values.std() + 1e-6)
        places = range(16) if draws.visible_ids is None else draws.visible_ids[image].tolist()
        grid = {place: tokens[image, i] for i, place in enumerate(places)}
        for place, token in grid.items():
            if convolution:
                row, column = divmod(place, 4)
                projected = loss.projector.bias.clone()
                for i, j in np.ndindex(3, 3):
                    r, c = row + i - 1, column + j - 1
                    if 0 <= r < 4 and 0 <= c < 4 and 4 * r + c in grid:
                        projected = projected + loss.projector.weight[:, :, i, j] @ grid[4 * r + c]
            else:
                first, _, second, _, third = loss.projector
                projected = third(F.silu(second(F.silu(first(token)))))
            norms = projected.norm() * target[place].norm()
            cosines.append((projected * target[place]).sum() / norms)
    assert len(cosines) == 3 * (8 if mask_ratio else 16)
    expected = -sum(cosines) / len(cosines)
    # The cosine itself is computed in float32.
    assert losses["loss_repa"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert losses["loss"].item() == pytest.approx(
        (losses["loss_generative"] + 0.5 * losses["loss_repa"]).item(), abs=1e-12
    )


def test_the_gradient_reaches_the_blocks_up_to_the_layer_and_the_projector_alone():
    network, encoder = network_of(), encoder_of()
    loss = REPA(network, encoder, layer=2, projector_dim=6).double()
    objective = Objective(network, EDMHeunScheduler(), {"repa": loss}, mask_ratio=0.5)
    step_of(objective)[0]["loss_repa"].backward()
    reached = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    assert {f"auxiliaries.repa.projector.{i}.weight" for i in (0, 2, 4)} < reached
    blocks = {int(found[1]) for name in reached if (found := re.search(r"transformer_blocks\.(\d+)", name))}
    assert blocks == {0, 1} and not any("decoder" in name for name in reached)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    # The encoder belongs to nothing that is trained or saved.
    assert not any("frozen" in name or "network.embeddings" in name for name in objective.state_dict())


def test_mdts_layers_behind_the_side_interpolater_see_all_patches():
    config = {"num_decoder_layers": 2}
    config |= {"decoder_num_attention_heads": None, "decoder_attention_head_dim": None}
    own = {name: value for name, value in (NETWORK | config).items() if value is not None}
    network = MDTTransformer2DModel(**own | {"sample_size": 8, "in_channels": 2, "num_layers": 4}).double()
    assert [network.sees_part(layer) for layer in (1, 2, 3, 4)] == [True, True, False, False]
    loss = REPA(network, encoder_of(), layer=4, projector_dim=6).double()
    objective = MDTObjective(network, EDMHeunScheduler(), {"repa": loss}, mask_ratio=0.5)
    assert -1 <= step_of(objective)[0]["loss_repa"].item() <= 1
    assert objective.evaluate(
        torch.zeros(1, 2, 8, 8).double(), torch.ones(1, 1, 1, 1).double(), None, torch.arange(8)[None]
    ).layers[4].ids is None  # fmt: skip


@pytest.mark.parametrize(("depth", "layer"), [(28, 8), (24, 8), (12, 4), (6, 2), (2, 1), (1, 1)])
def test_the_layer_is_that_of_the_paper_at_its_depths(depth, layer):
    network = network_of(num_layers=depth)
    assert REPA(network, encoder_of(dtype=torch.float32)).layers == (layer,)


@pytest.mark.parametrize("name", MODELS)
def test_patch_tokens_are_those_of_transformers(name, tmp_path):
    """On a picture that is as large as the model's own, and on one that its patches do not tile."""
    MODELS[name]().save_pretrained(tmp_path)
    BitImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    encoder = TransformersEncoder(*load_transformers(str(tmp_path)), dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    for size in (12, 32):
        pictures = pictures_of(2, size)
        found = encoder(Batch(torch.zeros(2, 2, 8, 8), None, pictures), 4)
        given = processor(
            [*pictures], do_resize=False, do_center_crop=False, return_tensors="pt", do_convert_rgb=False
        )["pixel_values"].float()  # fmt: skip
        if size != 12:  # not by the processor, whose bicubic filter is another
            given = F.interpolate(given, (12, 12), mode="bicubic")
        expected = encoder.network(given).last_hidden_state[:, -16:]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grid = encoder(Batch(torch.zeros(2, 2, 8, 8), None, pictures), 6)
    assert grid.shape == (2, 36, 12)  # positions are resampled


@pytest.mark.parametrize("side", [3, 6])
def test_learned_positions_are_resampled_with_a_filter(side):
    """As Pillow resizes a picture of each of their numbers."""
    encoder = encoder_of(dtype=torch.float32)
    learned = encoder.network.embeddings.position_embeddings.detach().clone()
    encoder.fit(side)
    found = encoder.network.embeddings.position_embeddings
    assert torch.equal(found[:, 0], learned[:, 0])
    for number in range(12):
        grid = Image.fromarray(learned[0, 1:, number].reshape(4, 4).numpy())
        expected = np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(found[0, 1:, number].reshape(side, side), expected, atol=1e-5)
    encoder.fit(4)
    assert torch.equal(encoder.network.embeddings.position_embeddings[:, 0], learned[:, 0])


def test_patches_are_in_the_order_of_the_network():
    """A picture with one bright patch changes the classifier's map there, and in no patch that is far."""
    torch.manual_seed(0)
    encoder = ClassifierEncoder(SmallClassifier(3))
    dark, x0 = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 2, 8, 8)
    bright = dark.clone()
    bright[..., 36:44, 4:12] = 255  # in patch (2, 0) of 4 x 4
    change = encoder(Batch(x0, None, bright), 4) - encoder(Batch(x0, None, dark), 4)
    assert change.shape == (1, 16, 128)
    assert change.abs().mean(2)[0].argmax() == 8


def test_a_pipelines_encoder_sees_the_samples_almost_without_noise():
    network = network_of().float()
    encoder = PipelineEncoder(network, EDMHeunScheduler(), dtype=torch.float32)
    x0 = torch.randn(2, 2, 8, 8)
    found = encoder(Batch(x0, torch.tensor([0, 1])), 4)
    scaled = x0 / (0.002**2 + 0.5**2) ** 0.5
    expected = network(scaled, np.log(0.002) / 4).encoder_hidden_states[:, 1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="16 patch tokens, and the network has 64 patches"):
        encoder(Batch(x0, None), 8)
    with pytest.raises(ValueError, match="samples of 2 channels, and these have 4"):
        encoder(Batch(torch.zeros(1, 4, 8, 8), None), 4)


def test_it_stops_at_its_step_and_changes_no_draw(tmp_path):
    rows = train(tmp_path / "with", "--auxiliary", "repa", "--repa_until_step", 2, "--max_train_steps", 4)
    plain = train(tmp_path / "without", "--auxiliary", "none", "--max_train_steps", 4)
    assert [row["loss_repa"] == 0 for row in rows] == [False, False, True, True]
    assert rows[0]["loss_generative"] == plain[0]["loss_generative"]
    assert rows[3]["loss_generative"] != plain[3]["loss_generative"]


def test_killed_and_resumed_it_is_equal_to_the_bit(vision_model, tmp_path):
    options = [
        "--auxiliary",
        "discrimination",
        "repa",
        "--repa_encoder",
        vision_model,
        "--repa_until_step",
        4,
    ]
    options += ["--repa_convolution", "true", "--checkpointing_steps", 3, "--max_train_steps", 6]
    whole = train(tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "parts" / "checkpoint-3")
    parts = train(tmp_path / "parts", *options, "--resume_from_checkpoint", "latest")
    assert parts == whole[3:]
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    folder = tmp_path / "whole" / "checkpoint-6"
    names = load_state(folder, "objective")["objective"]
    assert any(name.startswith("auxiliaries.repa.projector") for name in names)
    assert not any("embeddings" in name for name in names)
    about = json.loads((folder / "checkpoint.json").read_text())
    assert (
        about["run"]["model"]["repa_encoder_sha256"]
        == build_encoder(train_sddit.parse(["--repa_encoder", vision_model])).sha256
    )
    assert about["settings"]["repa_encoder"] == vision_model
    others = [*options, "--repa_encoder", "classifier"]
    with pytest.raises(SystemExit, match="repa_encoder_sha256"):
        train(tmp_path / "whole", *others, "--resume_from_checkpoint", "latest")


def test_the_kept_pictures_of_latents_are_what_it_sees(vision_model, tmp_path, monkeypatch):
    write_latents(tmp_path / "latents", 64, 16, "--keep_pictures")
    seen = []
    forward = TransformersEncoder.forward
    monkeypatch.setattr(
        TransformersEncoder,
        "forward",
        lambda self, batch, side: seen.append(batch) or forward(self, batch, side),
    )
    network = NETWORK | {"sample_size": 2, "in_channels": 2, "patch_size": 1}
    options = ["--transformer", json.dumps(network), "--dataset_name", tmp_path / "latents", "--vae", "none"]
    options += ["--auxiliary", "repa", "--repa_encoder", vision_model, "--max_train_steps", 2]
    train(tmp_path / "run", *options)
    pictures = seen[1].pictures  # the first was the trial
    assert pictures.shape == (16, 3, 4, 4) and pictures.dtype == torch.uint8
    rows = (2 * seen[1].x0[:, 1, 0, 0]).round()  # the latents say which row they are of, with noise
    assert (pictures[:, 1].float().mean((1, 2)) - rows).abs().max() < 6


def test_latents_without_pictures_are_refused_with_the_command_that_makes_them(tmp_path, capsys):
    write_latents(tmp_path / "latents", 64, 16)
    network = NETWORK | {"sample_size": 2, "in_channels": 2, "patch_size": 1}
    options = ["--transformer", json.dumps(network), "--dataset_name", tmp_path / "latents"]
    with refusal(capsys, "no pictures", "prepare_latents --keep_pictures", "--resolution 4"):
        train_sddit.main(arguments(tmp_path / "run", *options, "--auxiliary", "repa"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--repa_layer", "3"], ["repa_layer is 3", "at most 2"]),
        (["--repa_layer", "-1"], ["repa_layer is -1", "at least 0"]),
        (["--repa_weight", "-1"], ["repa_weight", "at least 0"]),
        (
            ["--repa_encoder", "./no-such-encoder"],
            ["./no-such-encoder", "'classifier', its file, a"],
        ),
        (["--auxiliary", "repa", "repa"], ["names repa twice"]),
        (["--auxiliary", "none", "--repa_weight", "1"], ["repa_weight is 1.0", "no such option"]),
        (["--auxiliary", "rapa"], ["'rapa'", "repa"]),
    ],
)
def test_what_is_refused(options, named, tmp_path, capsys):
    with refusal(capsys, *named):
        train_sddit.main(arguments(tmp_path / "run", "--auxiliary", "repa", *options))


def test_what_is_no_vision_transformer_is_refused(tmp_path):
    network = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    with pytest.raises(ValueError, match="ResNetModel, which gives no tokens of square patches"):
        TransformersEncoder(network, MEAN, STD)
    for stages, message in (2, "ConvNextModel, which gives no tokens"), (4, "cannot look at 4 x 4 patches"):
        config = ConvNextConfig(hidden_sizes=[8] * stages, depths=[1] * stages, num_stages=stages)
        with pytest.raises(ValueError, match=message):  # it has a patch size, too
            REPA(network_of(), TransformersEncoder(ConvNextModel(config), MEAN, STD))


def test_what_decides_the_target_is_what_a_resumed_run_must_share():
    encoder, other = encoder_of(), TransformersEncoder(encoder_of().network, MEAN, MEAN)
    assert encoder.sha256 == encoder_of().sha256 != other.sha256
    plain = REPA(network_of(), encoder_of(dtype=None)).identity()
    for change in ({"spatial_norm": True}, {"convolution": True}, {"projector_dim": 6}, {"layer": 2}):
        assert REPA(network_of(), encoder_of(dtype=None), **change).identity() != plain


def test_the_classifier_is_trained_on_the_kept_pictures_and_its_file_stands_for_it(tmp_path, cache):
    write_latents(tmp_path / "latents", 64, 16, "--keep_pictures")
    shutil.rmtree(tmp_path / "latents-source")  # nobody needs it any more
    network = NETWORK | {"sample_size": 2, "in_channels": 2, "patch_size": 1}
    options = ["--transformer", json.dumps(network), "--dataset_name", tmp_path / "latents", "--vae", "none"]
    options += ["--auxiliary", "repa", "--max_train_steps", 1, "--repa_encoder"]
    before = {*cache.glob("sddit_diffusers/classifier-*")}
    rows = train(tmp_path / "first", *options, "classifier")
    (file,) = {*cache.glob("sddit_diffusers/classifier-*")} - before
    assert train(tmp_path / "second", *options, file)[0]["loss_repa"] == rows[0]["loss_repa"]


@pytest.mark.thorough
def test_the_memory_model_counts_the_encoder(vision_model, tmp_path):
    def build(*auxiliaries):
        options = ["--auxiliary", *auxiliaries]
        if "repa" in auxiliaries:
            options += ["--repa_encoder", vision_model]
        config = train_sddit.parse(arguments(tmp_path, *options))
        return lambda: build_objective(config, config.network() | {"num_classes": 10}, "cpu", process)

    process = EDMHeunScheduler()  # beforehand, since its steps are numbers
    plain, more = step_memory(build("none"), 4), step_memory(build("repa"), 4)
    encoder = build_encoder(train_sddit.parse(["--repa_encoder", vision_model]))
    assert more.teacher - plain.teacher == sum(4 * weight.numel() for weight in encoder.parameters())
    assert more.activations > plain.activations and more.weights > plain.weights


def test_a_trained_pipeline_is_an_encoder_by_its_folder(tmp_path):
    train(tmp_path / "first", "--max_train_steps", 1, "--auxiliary", "none", "--transformer", "{}")
    assert SDDiTPipeline.from_pretrained(tmp_path / "first")
    options = ["--auxiliary", "repa", "--repa_encoder", tmp_path / "first", "--max_train_steps", 1]
    trainer = make_trainer(tmp_path / "second", *options)
    assert not trainer.dataset.gives_pictures
    assert isinstance(trainer.objective.auxiliaries["repa"].frozen[0], PipelineEncoder)
