"""Single files, and the weights of DiT and MaskDiT, beside restatements of the networks that they are of."""

import argparse
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Touch, randomize
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_baselines import CLASSES
from test_training import NETWORK, make_trainer

from sddit_diffusers import (
    EDMHeunScheduler,
    MaskDiTTransformer2DModel,
    PlainDiTTransformer2DModel,
    SDDiTPipeline,
    SDDiTTransformer2DModel,
    convert,
)

VISIBLE = torch.tensor([[5, 0, 11, 7, 2], [14, 15, 1, 3, 8]])
HEADS = '{"num_attention_heads": 2}'
BOTH_HEADS = '{"num_attention_heads": 2, "decoder_num_attention_heads": 2}'


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 3, 8, 8, generator=generator),
        torch.tensor([-1.2, 0.3]),
        torch.tensor([3, 4]),  # a class and the null class
    )


def run(*arguments):
    convert.main([str(argument) for argument in arguments])


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("convert: error: ") and len(message.splitlines()) == 1
    return message


# Single files


@pytest.fixture(params=["sddit", "dit", "maskdit", "mdt"])
def saved(request, tmp_path):
    """A pipeline in a folder, of each kind of transformer."""
    kind, _, network = CLASSES.get(request.param, (SDDiTTransformer2DModel, None, TINY))
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
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert str(tmp_path) not in str(file.metadata())

    run(tmp_path / "model.safetensors", tmp_path / "again")
    again = SDDiTPipeline.from_pretrained(tmp_path / "again").transformer
    assert all(weight.equal(loaded.state_dict()[name]) for name, weight in again.state_dict().items())


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


def test_from_single_file_takes_what_models_of_diffusers_take(transformer, inputs, tmp_path):
    path = tmp_path / "model.safetensors"
    convert.save_single_file(transformer, path)
    half = SDDiTTransformer2DModel.from_single_file(str(path), torch_dtype=torch.bfloat16, device="cpu")
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


# The originals, restated by the names of their authors


def originals(dim=16, layers=3, classes=4, out_channels=6, decoder=0, seed=0):
    """Weights of facebookresearch/DiT, or with a decoder's width those of Anima-Lab/MaskDiT, drawn anew."""
    end = decoder or dim
    shapes = {
        "x_embedder.proj.weight": (dim, 3, 2, 2), "x_embedder.proj.bias": (dim,),
        "y_embedder.embedding_table.weight": (dim, classes) if decoder else (classes + 1, dim),
    }  # fmt: skip
    linears = {"t_embedder.mlp.0": (dim, 256), "t_embedder.mlp.2": (dim, dim),
               "final_layer.linear": (4 * out_channels, end),
               "final_layer.adaLN_modulation.1": (2 * end, dim)}  # fmt: skip
    parts = [("blocks", layers, dim)] + [("decoder_blocks", 2, decoder)] * bool(decoder)
    for blocks, count, width in parts:
        for i in range(count):
            for name, shape in (
                ("attn.qkv", (3 * width, width)), ("attn.proj", (width, width)),
                ("mlp.fc1", (4 * width, width)), ("mlp.fc2", (width, 4 * width)),
                ("adaLN_modulation.1", (6 * width, dim)),
            ):  # fmt: skip
                linears[f"{blocks}.{i}.{name}"] = shape
    if decoder:
        linears["decoder_layer.linear"] = (decoder, dim)
        linears["decoder_layer.adaLN_modulation.1"] = (2 * dim, dim)
        shapes["mask_token"] = (1, 1, decoder)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(seed)
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights["pos_embed"] = positions(dim).unsqueeze(0)
    if decoder:
        weights["decoder_pos_embed"] = positions(decoder).unsqueeze(0)
    return weights


def positions(dim):
    """The column's sines and cosines, then the row's, patch by patch of a 4 x 4 grid."""
    frequencies = [10000 ** (-4 * i / dim) for i in range(dim // 4)]
    return torch.tensor([
        [wave(place * f) for place in (n % 4, n // 4) for wave in (math.sin, math.cos) for f in frequencies]
        for n in range(16)
    ])  # fmt: skip


def original_forward(w, image, t, label, heads=2, visible=None):
    """The forward of DiT and MaskDiT for one image, `[c, h, w]`; a label of None is MaskDiT's null class."""

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def adapted(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def block(name, x):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", F.silu(c)).split(
            x.shape[-1]
        )
        # The outputs of qkv are numbered by (q k v, head, channel), as timm's attention has them.
        qkv = linear(f"{name}.attn.qkv", adapted(x, shift1, scale1)).view(len(x), 3, heads, -1)
        mixed = []
        for h in range(heads):
            q, k, v = qkv[:, :, h].unbind(1)
            mixed.append((q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v)
        x = x + gate1 * linear(f"{name}.attn.proj", torch.cat(mixed, -1))
        hidden = F.gelu(linear(f"{name}.mlp.fc1", adapted(x, shift2, scale2)), approximate="tanh")
        return x + gate2 * linear(f"{name}.mlp.fc2", hidden)

    angles = t * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    sinusoid = torch.cat([angles.cos(), angles.sin()])
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", sinusoid)))
    table, decodes = w["y_embedder.embedding_table.weight"], "decoder_layer.linear.weight" in w
    if not decodes:
        c = c + table[label]
    elif label is not None:
        c = c + table[:, label]  # a matrix, of a one-hot label
    x = F.conv2d(image[None], w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2)[0]
    x = x.flatten(1).T + w["pos_embed"][0]
    if visible is not None:
        x = x[visible]
    for i in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")})):
        x = block(f"blocks.{i}", x)
    if decodes:
        x = adapted(x, *linear("decoder_layer.adaLN_modulation.1", F.silu(c)).chunk(2))
        x = linear("decoder_layer.linear", x)
        if visible is not None:
            filled = w["mask_token"][0].repeat(16, 1)
            filled[visible] = x
            x = filled
        x = x + w["decoder_pos_embed"][0]
        for i in range(2):
            x = block(f"decoder_blocks.{i}", x)
    x = adapted(x, *linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2))
    patches = linear("final_layer.linear", x).view(4, 4, 2, 2, -1)  # rows, columns, both in the patch, c
    return torch.einsum("hwpqc->chpwq", patches).reshape(-1, 8, 8)


def save_as_the_authors(weights, path, prefix=""):
    """A checkpoint of their training scripts; only the averaged weights are those that are given."""
    trained = {f"{prefix}{name}": weight + 1 for name, weight in weights.items()}
    averaged = {f"{prefix}{name}": weight for name, weight in weights.items()}
    settings = argparse.Namespace(config="a.yaml", seeds=[1, 2])
    torch.save({"model": trained, "ema": averaged, "opt": {"state": {}}, "args": settings}, path)


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.model.", ""])
def test_maskdit_computes_what_it_did(inputs, tmp_path, prefix):
    weights = originals(decoder=12, out_channels=3)
    save_as_the_authors(weights, tmp_path / "2000000.pt", prefix)
    run(tmp_path / "2000000.pt", tmp_path / "out", "--method", "maskdit", "--transformer", BOTH_HEADS)
    model = SDDiTPipeline.from_pretrained(tmp_path / "out").transformer
    assert isinstance(model, MaskDiTTransformer2DModel)
    assert {name: model.config[name] for name in TINY} == TINY
    with torch.no_grad():
        for visible in (None, VISIBLE):
            actual = model(*inputs, visible).sample
            for i, label in enumerate((3, None)):
                one = None if visible is None else visible[i]
                expected = original_forward(weights, inputs[0][i], inputs[1][i], label, visible=one)
                torch.testing.assert_close(actual[i], expected, rtol=0, atol=1e-5)


def told(capsys):
    """The names that a conversion tells as missing, and those that it tells as not used."""
    out = capsys.readouterr().out
    found = [re.search(rf"^{start} .*:\n((  .+\n)*)", out, re.MULTILINE) for start in ("Not in", "In")]
    return tuple([line.strip() for line in match[1].splitlines()] if match else [] for match in found)


def test_maskdit_is_a_start_for_sddit(tmp_path, capsys):
    weights = originals(decoder=12, out_channels=3) | {"feat_embedder.weight": torch.zeros(16, 5)}
    save_as_the_authors(weights, tmp_path / "2000000.pt", "model.")
    run(tmp_path / "2000000.pt", tmp_path / "out", "--transformer", BOTH_HEADS)
    missing, unused = told(capsys)
    cls = ["cls_norm.weight", "cls_norm.bias", "cls_proj.weight", "cls_proj.bias"]
    assert missing == ["cls_token", *(f"decoder.{name}" for name in cls)]
    assert sorted(unused) == ["feat_embedder.weight", "mask_token"]
    model = SDDiTPipeline.from_pretrained(tmp_path / "out").transformer
    assert model.config.num_decoder_layers == 2
    assert model.decoder.proj_out.weight.equal(weights["final_layer.linear.weight"])
    assert model.decoder.blocks[1].attn.to_v.bias.equal(weights["decoder_blocks.1.attn.qkv.bias"][24:])


def test_maskdit_without_classes(inputs, tmp_path):
    weights = originals(decoder=12, out_channels=3)
    conditional = original_forward(weights, inputs[0][0], inputs[1][0], None)
    del weights["y_embedder.embedding_table.weight"]
    save_file(weights, tmp_path / "maskdit.safetensors")
    maskdit = ["--method", "maskdit", "--transformer", BOTH_HEADS]
    run(tmp_path / "maskdit.safetensors", tmp_path / "out.safetensors", *maskdit)
    model = MaskDiTTransformer2DModel.from_single_file(tmp_path / "out.safetensors")
    assert model.config.num_classes == 0
    with torch.no_grad():
        actual = model(inputs[0][:1], inputs[1][:1]).sample[0]
    torch.testing.assert_close(actual, conditional, rtol=0, atol=1e-5)


def test_dit_computes_its_noise_but_not_its_variance(inputs, tmp_path, capsys):
    weights = originals()
    torch.save(weights, tmp_path / "DiT.pt")
    run(tmp_path / "DiT.pt", tmp_path / "out", "--method", "dit", "--transformer", HEADS)
    linear = "final_layer.linear"
    assert told(capsys) == ([], [f"{linear}.weight (variance)", f"{linear}.bias (variance)"])
    model = SDDiTPipeline.from_pretrained(tmp_path / "out").transformer
    assert isinstance(model, PlainDiTTransformer2DModel) and model.config.num_classes == 4
    t = torch.tensor([3.0, 20.0])
    with torch.no_grad():
        actual = model(inputs[0], t, inputs[2]).sample
        for i in range(2):
            expected = original_forward(weights, inputs[0][i], t[i], inputs[2][i])[:3]
            torch.testing.assert_close(actual[i], expected, rtol=0, atol=1e-5)


def test_dit_is_a_start_for_sddit_and_training_begins_with_it(tmp_path, capsys):
    weights = originals(layers=2, classes=10) | {"x_embedder.proj.weight": torch.rand(16, 1, 2, 2)}
    weights |= {
        f"final_layer.linear.{name}": torch.rand(8, *rest) for name, *rest in (("weight", 16), ("bias",))
    }
    torch.save(weights, tmp_path / "DiT.pt")
    network = json.dumps(NETWORK)
    for output in ("out", "out.safetensors"):
        run(tmp_path / "DiT.pt", tmp_path / output, "--transformer", network)
        missing, unused = told(capsys)
    assert {"cls_token", "decoder.proj_out.bias", "decoder.blocks.*.attn.to_out.0.weight"} < set(missing)
    assert not [name for name in missing if not name.startswith(("cls_token", "decoder."))]
    assert all(name.startswith("final_layer.") for name in unused)

    starts = []
    for output in ("out", "out.safetensors"):
        begin = ["--pretrained_model_name_or_path", tmp_path / output]
        starts.append(make_trainer(tmp_path / f"run-{len(starts)}", *begin).objective.transformer)
    for start in starts:
        assert start.transformer_blocks[1].ff[2].weight.equal(weights["blocks.1.mlp.fc2.weight"])
        assert start.label_embed.weight.equal(weights["y_embedder.embedding_table.weight"])
        # What is new is drawn from a fixed seed.
        assert start.decoder.proj_in.weight.equal(starts[0].decoder.proj_in.weight)


def test_positions_that_are_not_fixed_here_are_told(tmp_path, capsys):
    weights = originals()
    weights["pos_embed"] = weights["pos_embed"] + 0.02 * torch.randn(1, 16, 16)
    torch.save(weights, tmp_path / "learned.pt")
    run(tmp_path / "learned.pt", tmp_path / "out", "--method", "dit", "--transformer", HEADS)
    assert "pos_embed" in told(capsys)[1]


def test_heads_are_those_of_the_published_sizes(tmp_path, capsys):
    torch.save(originals(dim=384, layers=1), tmp_path / "S.pt")
    run(tmp_path / "S.pt", tmp_path / "S.safetensors", "--method", "dit")
    model = PlainDiTTransformer2DModel.from_single_file(tmp_path / "S.safetensors")
    assert (model.config.num_attention_heads, model.config.attention_head_dim) == (6, 64)


@pytest.fixture
def theirs(tmp_path):
    """The transformer of a DiTPipeline of diffusers that lies in the folder DiT."""
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=3,
        sample_size=8, num_embeds_ada_norm=4, norm_eps=1e-6,
    ).eval()  # fmt: skip
    randomize(model)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    pipe = DiTPipeline(model, vae, DDIMScheduler())
    pipe.save_pretrained(tmp_path / "DiT")
    index = tmp_path / "DiT/model_index.json"  # where the published one has the names of its classes
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": {"2": "goldfish"}}))
    return model


def test_blocks_of_diffusers_dit_compute_what_they_did(theirs, inputs, tmp_path, capsys):
    for block in theirs.transformer_blocks[1:]:  # as in the published model
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path / "DiT/transformer")
    run(tmp_path / "DiT", tmp_path / "out")
    missing, unused = told(capsys)
    assert not [name for name in missing if not name.startswith(("cls_token", "decoder."))]
    assert unused[:2] == ["proj_out_1.weight", "proj_out_1.bias"] and not [n for n in unused if ".emb." in n]
    pipe = SDDiTPipeline.from_pretrained(tmp_path / "out")
    assert pipe.id2label == {2: "goldfish"} and pipe.vae.config.latent_channels == 3

    ours, compared = pipe.transformer, []
    for block, other in zip(ours.transformer_blocks, theirs.transformer_blocks, strict=True):

        def compare(_, arguments, keywords, output, block=block, other=other):
            temb = other.norm1.emb(keywords["timestep"], keywords["class_labels"], hidden_dtype=torch.float32)
            torch.testing.assert_close(block(arguments[0], temb), output, rtol=0, atol=1e-5)
            compared.append(block)

        other.register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        theirs(inputs[0], torch.tensor([3, 700]), inputs[2])
    assert len(compared) == 3


def test_embeddings_that_differ_from_block_to_block_are_told(theirs, tmp_path, capsys):
    run(tmp_path / "DiT/transformer", tmp_path / "out.safetensors", "--method", "dit")
    unused = told(capsys)[1]
    assert "transformer_blocks.*.norm1.emb.class_embedder.embedding_table.weight (2)" in unused
    model = PlainDiTTransformer2DModel.from_single_file(tmp_path / "out.safetensors")
    first = theirs.transformer_blocks[0].norm1.emb
    assert model.label_embed.weight.equal(first.class_embedder.embedding_table.weight)


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


def test_positions_that_are_missing_must_be_told(tmp_path, capsys):
    weights = originals()
    del weights["pos_embed"]
    torch.save(weights, tmp_path / "DiT.pt")
    assert "do not tell sample_size" in refusal(
        capsys, tmp_path / "DiT.pt", tmp_path / "out", "--transformer", HEADS
    )
    run(
        tmp_path / "DiT.pt",
        tmp_path / "out",
        "--transformer",
        '{"num_attention_heads": 2, "sample_size": 16}',
    )
    assert SDDiTPipeline.from_pretrained(tmp_path / "out").transformer.config.sample_size == 16


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("DiT.pt", [], "output is .*DiT.pt; it must end in .safetensors, or be a folder"),
        ("there", [], "there exists; choose another output"),
        ("out", ["--method", "mdt"], "method is 'mdt'; it must be 'sddit', 'dit' or 'maskdit'"),
        ("out", ["--transformer", '{"num_layers": 2}'], "num_layers is 2; the weights are of 3"),
        ("out", ["--transformer", '{"layers": 2}'], "has no setting 'layers'"),
        (
            "out",
            ["--transformer", '{"num_attention_heads": 3}'],
            "heads is 3; it must be a divisor of the width, 16",
        ),
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
    with pytest.raises(SystemExit, match="convert: error: .*No space left"):
        run(tmp_path / "pipeline", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
