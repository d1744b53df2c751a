"""The program that converts: single files, and what it refuses."""

import json
import re

import pytest
import torch
from conftest import NETWORKS, TINY, Touch, randomize
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from their_networks import HEADS, originals, projectors, run

from sddit_diffusers import (
    EDMHeunScheduler,
    InterpolantScheduler,
    MaskDiTTransformer2DModel,
    PlainDiTTransformer2DModel,
    SDDiTPipeline,
    SDDiTTransformer2DModel,
    convert,
)
from sddit_diffusers.training.methods import METHODS


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    code, message = stopped.value.code, capsys.readouterr().err
    message = code if isinstance(code, str) else message
    assert message.startswith("convert: error: ") and len(message.splitlines()) == 1
    return message


# Single files


@pytest.fixture(params=["sddit", "dit", "maskdit", "mdt", "tread"])
def saved(request, tmp_path):
    """A pipeline in a folder, of each kind of transformer."""
    kind, network = METHODS[request.param].transformer, NETWORKS[request.param]
    pipe = SDDiTPipeline(randomize(kind(**network)), EDMHeunScheduler(sigma_max=70.0), id2label={1: "cat"})
    pipe.save_pretrained(tmp_path / "pipeline")
    return pipe


def test_a_single_file_is_the_pipeline_s_transformer_to_the_bit_and_back(saved, inputs, tmp_path, capsys):
    run(tmp_path / "pipeline", tmp_path / "model.safetensors")
    assert len(capsys.readouterr().out.splitlines()) == 1  # nothing is missing, or left over
    kind, loaded = type(saved.transformer), SDDiTPipeline.from_pretrained(tmp_path / "pipeline").transformer
    model = kind.from_single_file(tmp_path / "model.safetensors")
    assert type(model) is kind and not model.training
    with torch.no_grad():
        assert model(*inputs).sample.equal(loaded(*inputs).sample)
        other = torch.randn(2, 3, 4, 12)  # positions of another grid
        assert model(other, *inputs[1:]).sample.equal(loaded(other, *inputs[1:]).sample)
    convert.save_single_file(loaded, tmp_path / "shared.safetensors")
    with safe_open(tmp_path / "shared.safetensors", "pt") as file:
        assert str(tmp_path) not in str(file.metadata())

    run(tmp_path / "model.safetensors", tmp_path / "again")
    again = SDDiTPipeline.from_pretrained(tmp_path / "again")
    assert again.scheduler.config.sigma_max == 70 and again.id2label == {1: "cat"}
    again = again.transformer.state_dict()
    assert all(weight.equal(loaded.state_dict()[name]) for name, weight in again.items())


def test_a_single_file_knows_its_process(transformer, tmp_path, capsys):
    SDDiTPipeline(transformer, InterpolantScheduler(path="gvp", prediction_type="epsilon")).save_pretrained(
        tmp_path / "pipeline"
    )
    run(tmp_path / "pipeline", tmp_path / "model.safetensors")
    assert "InterpolantScheduler(path='gvp', prediction_type='epsilon')" in capsys.readouterr().out
    run(tmp_path / "model.safetensors", tmp_path / "again")
    scheduler = SDDiTPipeline.from_pretrained(tmp_path / "again").scheduler
    assert type(scheduler) is InterpolantScheduler and scheduler.config.prediction_type == "epsilon"
    for config in (
        '{"_class_name": "DDIMScheduler"}',
        '{"_class_name": "InterpolantScheduler", "path": 1}',
        "[",
    ):
        tensors = transformer.state_dict()
        about = {"config": json.dumps(convert.config_of(transformer)), "scheduler": config}
        save_file(tensors, tmp_path / "other.safetensors", metadata=about)
        said = refusal(capsys, tmp_path / "other.safetensors", tmp_path / "none")
        assert "has no scheduler of this package" in said


def test_a_pipeline_s_other_parts_stay_with_it(pipe, tmp_path):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    SDDiTPipeline(pipe.transformer, EDMHeunScheduler(sigma_max=70.0), vae, pipe.id2label).save_pretrained(
        tmp_path / "pipeline"
    )
    run(tmp_path / "pipeline", tmp_path / "again", "--method", "dit")
    again = SDDiTPipeline.from_pretrained(tmp_path / "again")
    assert isinstance(again.transformer, PlainDiTTransformer2DModel)
    assert again.scheduler.config.sigma_max == 70 and again.id2label == pipe.id2label
    assert again.vae.encoder.conv_in.weight.equal(vae.encoder.conv_in.weight)
    run(tmp_path / "again/transformer", tmp_path / "third", "--vae", tmp_path / "pipeline")
    assert SDDiTPipeline.from_pretrained(tmp_path / "third").vae is not None


def test_a_tread_becomes_a_dit(inputs, tmp_path, capsys):
    tread = randomize(METHODS["tread"].transformer(**NETWORKS["tread"] | {"route_start": 0}))
    SDDiTPipeline(tread, EDMHeunScheduler()).save_pretrained(tmp_path / "tread")
    run(tmp_path / "tread", tmp_path / "dit", "--method", "dit")
    assert len(capsys.readouterr().out.splitlines()) == 1  # nothing is missing, or left over
    dit = SDDiTPipeline.from_pretrained(tmp_path / "dit").transformer
    assert type(dit) is PlainDiTTransformer2DModel and "route_end" not in dit.config
    assert dit(*inputs).sample.equal(tread(*inputs).sample)
    run(tmp_path / "tread", tmp_path / "tread.safetensors")
    assert type(tread).from_single_file(tmp_path / "tread.safetensors").config.route_start == 0


def test_from_single_file_takes_what_models_of_diffusers_take(transformer, inputs, tmp_path):
    path = tmp_path / "model.safetensors"
    convert.save_single_file(transformer, path)
    half = SDDiTTransformer2DModel.from_single_file(str(path), dtype=torch.bfloat16, device="cpu")
    assert half.dtype == torch.bfloat16
    assert half.pos_embed.table.equal(transformer.pos_embed.table)
    half.train()(inputs[0].bfloat16(), *inputs[1:]).sample.sum().backward()
    assert half.cls_token.grad is not None

    folder = tmp_path / "pipeline"
    transformer.save_pretrained(folder / "transformer")
    for config in ({"config": str(folder / "transformer")},
                   {"config": str(folder), "subfolder": "transformer"}):  # fmt: skip
        model = SDDiTTransformer2DModel.from_single_file(load_file(path), **config)
        assert model(*inputs).sample.equal(transformer(*inputs).sample)

    # A file of the Hub that was downloaded before.
    repo = tmp_path / "cache/models--someone--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("1" * 40)
    convert.save_single_file(transformer, repo / "snapshots" / ("1" * 40) / "weights/model.safetensors")
    model = SDDiTTransformer2DModel.from_single_file(
        "https://huggingface.co/someone/model/blob/main/weights/model.safetensors",
        cache_dir=tmp_path / "cache", local_files_only=True,
    )  # fmt: skip
    assert model(*inputs).sample.equal(transformer(*inputs).sample)


def test_files_that_are_no_single_files_of_the_class_are_refused(transformer, tmp_path):
    path = tmp_path / "model.safetensors"

    def refused(error, kind=SDDiTTransformer2DModel, **arguments):
        with pytest.raises(ValueError, match=error) as caught:
            kind.from_single_file(path, **arguments)
        assert len(str(caught.value).splitlines()) == 1

    refused("There is no file .*model.safetensors")
    torch.save(Touch(tmp_path / "touched"), path)
    refused("cannot be read as safetensors: .* Pickles are not loaded; .*convert")
    assert not (tmp_path / "touched").exists()
    save_file(transformer.state_dict(), path)
    refused("model.safetensors has no config in its metadata; give config=")
    save_file(transformer.state_dict(), path, {"config": "[1]"})
    refused(r"its config is \[1\]")
    convert.save_single_file(transformer, path)
    refused("is a SDDiTTransformer2DModel, not a MaskDiT", MaskDiTTransformer2DModel)
    SDDiTTransformer2DModel(**TINY | {"num_layers": 4}).save_config(tmp_path / "longer")
    refused("differ in transformer_blocks.3", config=str(tmp_path / "longer"))
    SDDiTTransformer2DModel(**TINY | {"num_classes": 5}).save_config(tmp_path / "wider")
    refused("differ in label_embed.weight", config=str(tmp_path / "wider"))
    path.write_bytes(path.read_bytes()[:-1])
    refused("cannot be read as safetensors")
    with pytest.raises(TypeError):
        SDDiTTransformer2DModel.from_single_file(path, torch_dtpye=torch.float16)


# Mistakes


def damaged(path):
    torch.save(originals(), path)
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 2])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("code.pt", lambda path: torch.save({"ema": Touch(path.parent / "touched")}, path), r"calls \S*open"),
        ("cut.pt", damaged, "cut.pt cannot be read"),
        ("text.pt", lambda path: path.write_text("weights"), "text.pt cannot be read"),
        ("list.pt", lambda path: torch.save([1], path), "are of no DiT: x_embedder.proj.weight is missing"),
        ("other.pt", lambda path: torch.save({"conv.weight": torch.ones(1)}, path), "are of no DiT"),
        ("no-blocks.pt", lambda path: torch.save({"x_embedder.proj.weight": torch.ones(4, 3, 2, 2)}, path),
         r"blocks.0.mlp.fc1.weight is missing"),
        ("unknown.pt", lambda path: torch.save(originals(), path),
         "do not tell num_attention_heads; .* where N is a divisor of the width, 16"),
        ("model.onnx", lambda path: path.touch(), "model.onnx must end in .safetensors, .pt"),
        ("none.pt", lambda path: None, "There is no file .*none.pt"),
        ("none", lambda path: None, "none' cannot be loaded"),
        ("a.safetensors", lambda path: torch.save({}, path), "a.safetensors cannot be read as safetensors"),
        ("unet.safetensors", lambda path: save_file({}, path, {"config": '{"_class_name": "UNet"}'}),
         "holds a UNet; allowed are SDDiTTransformer2DModel"),
    ],
)  # fmt: skip
def test_sources_that_are_no_sources_have_one_line(name, write, message, tmp_path, capsys):
    write(tmp_path / name)
    assert re.search(message, refusal(capsys, tmp_path / name, tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} <= {name}


QK_NORM = {f"blocks.{i}.attn.{name}_norm.weight": torch.ones(8) for i in range(3) for name in "qk"}
LEARNED = {"pos_embed": torch.randn(1, 16, 16)}
MASKDIT = originals(decoder=12, out_channels=3)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (originals() | QK_NORM, ["sit"], "another network than SiT's: they differ in blocks.0.attn.k_norm"),
        (originals(out_channels=3) | projectors() | QK_NORM, [""], "another network than REPA's: .*k_norm"),
        (originals() | LEARNED, ["sit"], "another network than SiT's: they differ in pos_embed"),
        (originals() | projectors(), [""], "not REPA's: they give twice the channels"),
        (originals(out_channels=9), ["sit"], "differ in final_layer.linear.weight"),
        ({name: w for name, w in originals().items() if "blocks.1" not in name}, ["sit"],
         "differ in transformer_blocks.1"),
        (originals(out_channels=3) | projectors(), ["dit"],
         "origin is 'dit'; the weights are REPA's: they have projectors.0.0.weight"),
        (originals(out_channels=3) | projectors(), ["sit"], "origin is 'sit'; the weights are REPA's"),
        (MASKDIT, ["sit"], "origin is 'sit'; the weights are MaskDiT's: they have decoder_layer.linear"),
        (originals(), ["sit", "--method", "maskdit"], "method is 'maskdit'; SiT's weights are for 'dit' or"),
        (originals(), ["SiT"], "origin is 'SiT'; it must be 'dit', 'maskdit', 'sit' or 'repa'"),
        (originals() | {"y_embedder.embedding_table.weight": torch.ones(5, 7)}, ["sit"],
         r"labels' table is \(5, 7\); one side must be the width, 16"),
        ({"conv.weight": torch.ones(1)}, ["sit"], "are of no DiT: x_embedder.proj.weight is missing"),
    ],
)  # fmt: skip
def test_weights_that_are_not_of_their_origin_have_one_line(weights, options, message, tmp_path, capsys):
    torch.save({"ema": weights}, tmp_path / "source.pt")
    command = [tmp_path / "source.pt", tmp_path / "out", "--transformer", HEADS, "--origin", *options]
    assert re.search(message, refusal(capsys, *command))
    assert {path.name for path in tmp_path.iterdir()} == {"source.pt"}


def test_transformers_of_this_package_have_no_other_origin(saved, tmp_path, capsys):
    command = [tmp_path / "pipeline", tmp_path / "out", "--origin", "sit"]
    assert "origin is 'sit'; the source is a transformer of this package" in refusal(capsys, *command)


def test_positions_that_are_missing_must_be_told(tmp_path, capsys):
    weights = originals()
    del weights["pos_embed"]
    torch.save(weights, tmp_path / "DiT.pt")
    command = [tmp_path / "DiT.pt", tmp_path / "out", "--transformer"]
    assert "do not tell sample_size" in refusal(capsys, *command, HEADS)
    run(*command, '{"num_attention_heads": 2, "sample_size": 16}')
    assert SDDiTPipeline.from_pretrained(tmp_path / "out").transformer.config.sample_size == 16


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("DiT.pt", [], "output is .*DiT.pt; it must end in .safetensors, or be a folder"),
        ("there", [], "there exists; choose another output"),
        ("out", ["--method", "mdt"], "method is 'mdt'; it must be 'sddit', 'dit' or 'maskdit'"),
        ("out", ["--transformer", '{"num_layers": 2}'], "num_layers is 2; the weights are of 3"),
        ("out", ["--transformer", '{"layers": 2}'], "has no setting 'layers'"),
        ("out", ["--transformer", '{"num_attention_heads": 3}'], "heads is 3; it must be a divisor"),
        ("out", ["--transformer", "x"], "which is no JSON"),
        ("out.safetensors", ["--vae", "x"], "holds the transformer alone"),
        ("out", ["--vae", "/none"], "The VAE '/none' cannot be loaded"),
        ("out", ["--vea", "x"], "unknown option --vea; nearest are --vae"),
    ],
)
def test_mistakes_have_one_line(output, options, message, tmp_path, capsys):
    torch.save(originals(), tmp_path / "source.pt")
    (tmp_path / "there").mkdir()
    if "--transformer" not in options:
        options = [*options, "--transformer", HEADS]
    elif "heads" not in options[-1]:
        options = [*options[:-1], options[-1].replace("{", '{"num_attention_heads": 2, ')]
    assert re.search(message, refusal(capsys, tmp_path / "source.pt", tmp_path / output, *options))
    assert {path.name for path in tmp_path.iterdir()} == {"source.pt", "there"}


def test_a_pipeline_that_cannot_be_written_leaves_nothing(pipe, tmp_path, monkeypatch, capsys):
    pipe.save_pretrained(tmp_path / "pipeline")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EDMHeunScheduler, "save_pretrained", full)
    with pytest.raises(SystemExit, match="convert: error: .*No space left.*out"):
        run(tmp_path / "pipeline", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
