"""Weights of DiT and MaskDiT, beside restatements of their networks by the names of their authors."""

import argparse
import json
import re

import pytest
import torch
from conftest import TINY, randomize
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file
from small_runs import NETWORK, make_trainer
from their_networks import HEADS, original_forward, originals, run

from sddit_diffusers import (
    EDMHeunScheduler,
    MaskDiTTransformer2DModel,
    PlainDiTTransformer2DModel,
    SDDiTPipeline,
)

VISIBLE = torch.tensor([[5, 0, 11, 7, 2], [14, 15, 1, 3, 8]])
BOTH_HEADS = '{"num_attention_heads": 2, "decoder_num_attention_heads": 2}'


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


def test_tread_has_dit_s_names_and_computes_what_it_did(inputs, tmp_path, capsys):
    """Of EDM: without a variance, at ln(sigma) / 4."""
    weights = originals(out_channels=3)
    torch.save(weights, tmp_path / "tread.pt")
    run(tmp_path / "tread.pt", tmp_path / "out", "--method", "dit", "--transformer", HEADS)
    assert told(capsys) == ([], [])
    pipe = SDDiTPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.scheduler) is EDMHeunScheduler
    with torch.no_grad():
        actual = pipe.transformer(*inputs).sample
        for i in range(2):
            expected = original_forward(weights, inputs[0][i], inputs[1][i], inputs[2][i])
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


def test_dit_without_label_dropout_keeps_its_last_class(inputs, tmp_path):
    weights = originals()
    weights["y_embedder.embedding_table.weight"] = weights["y_embedder.embedding_table.weight"][:4]
    torch.save(weights, tmp_path / "DiT.pt")
    dit = ["--method", "dit", "--transformer", HEADS]
    with pytest.warns(UserWarning, match="has 4 rows, so none for the null class"):
        run(tmp_path / "DiT.pt", tmp_path / "out.safetensors", *dit, "--num_classes", 4)
    model = PlainDiTTransformer2DModel.from_single_file(tmp_path / "out.safetensors")
    table = model.label_embed.weight
    assert model.config.num_classes == 4 and table[4].eq(0).all()
    assert table[:4].equal(weights["y_embedder.embedding_table.weight"])
    run(tmp_path / "DiT.pt", tmp_path / "3.safetensors", *dit, "--num_classes", 3)
    model = PlainDiTTransformer2DModel.from_single_file(tmp_path / "3.safetensors")
    assert model.config.num_classes == 3 and model.label_embed.weight.equal(table[:4])
    with pytest.raises(SystemExit, match="num_classes is 9"):
        run(tmp_path / "DiT.pt", tmp_path / "9.safetensors", *dit, "--num_classes", 9)


def test_a_thousand_rows_are_imagenet_s_classes(tmp_path):
    torch.save(originals(classes=999), tmp_path / "DiT.pt")
    with pytest.warns(UserWarning, match="has 1000 rows"):
        run(tmp_path / "DiT.pt", tmp_path / "a.safetensors", "--method", "dit", "--transformer", HEADS)
    model = PlainDiTTransformer2DModel.from_single_file(tmp_path / "a.safetensors")
    assert model.config.num_classes == 1000


@pytest.mark.parametrize("maskdit", [True, False])
def test_a_square_table_is_maskdit_s_where_there_is_no_variance(maskdit, tmp_path):
    weights = originals(classes=15, out_channels=3 if maskdit else 6)
    table = weights["y_embedder.embedding_table.weight"]
    assert table.shape == (16, 16)
    torch.save(weights, tmp_path / "a.pt")
    run(tmp_path / "a.pt", tmp_path / "a.safetensors", "--method", "dit", "--transformer", HEADS)
    model = PlainDiTTransformer2DModel.from_single_file(tmp_path / "a.safetensors")
    assert model.config.num_classes == (16 if maskdit else 15)
    assert model.label_embed.weight[:16].equal(table.T if maskdit else table)


def test_maskdit_without_l_mae_fills_with_zeros(inputs, tmp_path, capsys):
    weights = originals(decoder=12, out_channels=3)
    weights["mask_token"].zero_()
    expected = original_forward(weights, inputs[0][0], inputs[1][0], 3, visible=VISIBLE[0])
    del weights["mask_token"]
    torch.save(weights, tmp_path / "m.pt")
    run(tmp_path / "m.pt", tmp_path / "m.safetensors", "--method", "maskdit", "--transformer", BOTH_HEADS)
    assert told(capsys) == ([], [])
    model = MaskDiTTransformer2DModel.from_single_file(tmp_path / "m.safetensors")
    with torch.no_grad():
        actual = model(inputs[0][:1], inputs[1][:1], inputs[2][:1], VISIBLE[:1]).sample[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    run(tmp_path / "m.pt", tmp_path / "s.safetensors", "--transformer", BOTH_HEADS)
    assert "mask_token" not in told(capsys)[1]


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
