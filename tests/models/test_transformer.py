import math
import re

import pytest
import torch
from accelerate import infer_auto_device_map
from conftest import NETWORKS, TINY, randomize
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_group_offloading,
)
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig

from sddit_diffusers import SDDiTTransformer2DModel
from sddit_diffusers.training.methods import METHODS

VISIBLE = torch.tensor([[5, 0, 11, 7, 2], [14, 15, 1, 3, 8]])


def naive_forward(model, image, t, label, visible):
    """One image through the network, written from the design in loops over tokens, patches and heads."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    p, dim, e = 2, 16, 12

    def linear(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def silu(x):
        return x / (1 + torch.exp(-x))

    def norm(x):
        return (x - x.mean()) / ((x - x.mean()).pow(2).mean() + 1e-6).sqrt()

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def position(row, column, d):
        values = []
        for coordinate in (column, row):  # the column's half comes first
            frequencies = [10000 ** (-4 * i / d) for i in range(d // 4)]
            values += [math.sin(coordinate * f) for f in frequencies] + [
                math.cos(coordinate * f) for f in frequencies
            ]
        return torch.tensor(values, dtype=torch.double)

    def block(name, tokens, temb, heads):
        d = len(tokens[0])
        m = linear(f"{name}.modulation", silu(temb)).split(d)
        normed = [norm(x) * (1 + m[1]) + m[0] for x in tokens]
        q, k, v = ([linear(f"{name}.attn.to_{c}", x) for x in normed] for c in "qkv")
        after = []
        for i in range(len(tokens)):
            heads_out = []
            for h in range(heads):
                s = slice(h * d // heads, (h + 1) * d // heads)
                scores = torch.stack([q[i][s] @ k[j][s] for j in range(len(tokens))]) / math.sqrt(d // heads)
                share = torch.exp(scores) / torch.exp(scores).sum()
                heads_out.append(sum(share[j] * v[j][s] for j in range(len(tokens))))
            attended = linear(f"{name}.attn.to_out.0", torch.cat(heads_out))
            x = tokens[i] + m[2] * attended
            hidden = gelu(linear(f"{name}.ff.0", norm(x) * (1 + m[4]) + m[3]))
            after.append(x + m[5] * linear(f"{name}.ff.2", hidden))
        return after

    frequencies = torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.double)
    sinusoid = torch.cat([torch.cos(t * frequencies), torch.sin(t * frequencies)])
    temb = linear("time_embed.linear_2", silu(linear("time_embed.linear_1", sinusoid)))
    temb = temb + w["label_embed.weight"][label]

    patches = []
    for n in range(16):
        row, column = divmod(n, 4)
        pixels = image.double()[:, row * p : row * p + p, column * p : column * p + p]
        x = (
            torch.stack([(w["patch_embed.weight"][d] * pixels).sum() for d in range(dim)])
            + w["patch_embed.bias"]
        )
        patches.append(x + position(row, column, dim))
    tokens = [w["cls_token"][0, 0]] + [patches[n] for n in visible]
    for i in range(3):
        tokens = block(f"transformer_blocks.{i}", tokens, temb, 2)

    complete = list(patches)
    for token, n in zip(tokens[1:], visible, strict=True):
        complete[n] = token
    cls = norm(tokens[0]) * w["decoder.cls_norm.weight"] + w["decoder.cls_norm.bias"]
    temb = temb + linear("decoder.cls_proj", cls)
    shift, scale = linear("decoder.norm_in.linear", silu(temb)).split(dim)
    decoded = [
        linear("decoder.proj_in", norm(x) * (1 + scale) + shift) + position(*divmod(n, 4), e)
        for n, x in enumerate(complete)
    ]
    for i in range(2):
        decoded = block(f"decoder.blocks.{i}", decoded, temb, 2)
    shift, scale = linear("decoder.norm_out.linear", silu(temb)).split(e)
    sample = torch.zeros(3, 8, 8, dtype=torch.double)
    for n, x in enumerate(decoded):
        row, column = divmod(n, 4)
        values = linear("decoder.proj_out", norm(x) * (1 + scale) + shift)
        for i in range(p):
            for j in range(p):
                for c in range(3):
                    sample[c, row * p + i, column * p + j] = values[(i * p + j) * 3 + c]
    return sample, torch.stack(tokens)


def test_equals_a_naive_loop_over_tokens(transformer, inputs):
    output = transformer(*inputs, VISIBLE)
    for i in range(2):
        sample, tokens = naive_forward(transformer, *(x[i] for x in inputs), VISIBLE[i].tolist())
        torch.testing.assert_close(output.sample[i].double(), sample, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.encoder_hidden_states[i].double(), tokens, rtol=1e-4, atol=1e-5)


def test_all_patches_visible_in_any_order_is_the_unmasked_forward(transformer, inputs):
    everything = torch.stack([torch.randperm(16), torch.randperm(16)])
    torch.testing.assert_close(transformer(*inputs, everything).sample, transformer(*inputs).sample)


def test_encoder_does_not_see_masked_patches_but_the_decoder_does(transformer, inputs):
    changed = inputs[0].clone()
    changed[0, :, :2, 2:4] += 1  # patch 1, masked in image 0
    before, after = transformer(*inputs, VISIBLE), transformer(changed, *inputs[1:], VISIBLE)
    assert torch.equal(before.encoder_hidden_states, after.encoder_hidden_states)
    assert not torch.equal(before.sample[0], after.sample[0])
    assert torch.equal(before.sample[1], after.sample[1])


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (16, 10)])
def test_other_sizes(transformer, inputs, size):
    output = transformer(torch.randn(2, 3, *size), *inputs[1:])
    assert output.sample.shape == (2, 3, *size)
    assert output.encoder_hidden_states.shape == (2, 1 + size[0] * size[1] // 4, 16)


def test_positions_of_another_grid_span_the_trained_coordinates(transformer):
    table = transformer.pos_embed(4, 4).unflatten(0, (4, 4))
    doubled = transformer.pos_embed(8, 4).unflatten(0, (8, 4))
    torch.testing.assert_close(doubled[::2], table)


def test_without_classes():
    model = randomize(SDDiTTransformer2DModel(**TINY | {"num_classes": 0}))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(
        model(x, 0.1).sample, model(x, torch.tensor([0.1, 0.1]), torch.zeros(2, dtype=torch.long)).sample
    )


def test_no_labels_are_null_labels(transformer, inputs):
    x, t, _ = inputs
    assert torch.equal(transformer(x, t).sample, transformer(x, t, torch.tensor([4, 4])).sample)


@pytest.mark.parametrize("method", NETWORKS)
def test_time_is_embedded_as_others_have_it(method, inputs):
    kind, network = METHODS[method].transformer, NETWORKS[method]
    settings = {"timestep_scale": -1e-3, "timestep_shift": 1.0}
    plain, scaled = (randomize(kind(**network | changes)) for changes in ({}, settings))
    x, _, labels = inputs
    t = torch.tensor([0.25, 1.0])
    expected = plain(x, 1 - t, labels).sample
    torch.testing.assert_close(scaled(x, 1000 * t, labels).sample, expected, rtol=0, atol=1e-5)


def test_starts_as_zero_with_every_block_an_identity():
    model = SDDiTTransformer2DModel(**TINY)
    output = model(torch.randn(2, 3, 8, 8), 0.1)
    assert torch.equal(output.sample, torch.zeros(2, 3, 8, 8))
    assert torch.equal(output.encoder_hidden_states[:, :1], model.cls_token.expand(2, 1, 16))


def test_return_dict(transformer, inputs):
    sample, tokens = transformer(*inputs, return_dict=False)
    assert torch.equal(sample, transformer(*inputs).sample) and tokens.shape == (2, 17, 16)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 8, 8), "has 4 channels; this model takes 3"),
        ((2, 3, 8, 9), "8 x 9; both must be multiples of patch_size 2"),
    ],
)
def test_wrong_input_is_named(transformer, inputs, shape, message):
    with pytest.raises(ValueError, match=message):
        transformer(torch.zeros(shape), *inputs[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"attention_head_dim": 7}, "width .* is 14"), ({"sample_size": 9}, "sample_size 9 is not a multiple")],
)
def test_wrong_configuration_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SDDiTTransformer2DModel(**TINY | changes)


# What diffusers offers to its models


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_saved_and_loaded_is_the_same_to_the_bit(transformer, inputs, tmp_path, max_shard_size):
    transformer.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    loaded = SDDiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(*inputs, VISIBLE).sample, transformer(*inputs, VISIBLE).sample)


def test_attention_backends_are_dispatched(transformer, inputs):
    expected = transformer(*inputs).sample
    with attention_backend("native"):  # a model's backend becomes that of all others, too, until here
        transformer.set_attention_backend("_native_math")
        assert {p._attention_backend.value for p in transformer.attn_processors.values()} == {"_native_math"}
        torch.testing.assert_close(transformer(*inputs).sample, expected)
        with pytest.raises(ValueError, match="no_such_backend"):
            transformer.set_attention_backend("no_such_backend")


def test_fused_qkv(transformer, inputs):
    expected = transformer(*inputs).sample
    transformer.fuse_qkv_projections()
    assert all(
        block.attn.fused_projections
        for block in [*transformer.transformer_blocks, *transformer.decoder.blocks]
    )
    torch.testing.assert_close(transformer(*inputs).sample, expected)
    transformer.unfuse_qkv_projections()
    assert torch.equal(transformer(*inputs).sample, expected)


def test_first_block_cache_skips_the_encoder_where_little_changed(transformer, inputs):
    ran = []
    norm = transformer.transformer_blocks[1].norm1
    norm.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        expected = transformer(*inputs).sample
        transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))
        with transformer.cache_context("conditional"):
            torch.testing.assert_close(transformer(*inputs).sample, expected)
            repeated = transformer(*inputs).sample
        torch.testing.assert_close(repeated, expected)
        assert len(ran) == 2  # once without the cache, and once with it
        with transformer.cache_context("conditional"):
            changed = transformer(inputs[0] + 0.1, *inputs[1:]).sample
        transformer.disable_cache()
        assert not torch.allclose(changed, transformer(inputs[0] + 0.1, *inputs[1:]).sample)


@pytest.mark.parametrize(
    "config",
    [
        MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4, retention_ratio=0.25),
        TaylorSeerCacheConfig(cache_interval=2),
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1000, 1000),
            current_timestep_callback=lambda: 1,
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_caches_begin_with_the_exact_result(transformer, inputs, config):
    ran = []
    transformer.transformer_blocks[1].attn.to_q.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        expected = transformer(*inputs).sample
        transformer.enable_cache(config)
        ran.clear()
        with transformer.cache_context("conditional"):
            torch.testing.assert_close(transformer(*inputs).sample, expected)
            for _ in range(3):
                assert transformer(inputs[0] + 0.01, *inputs[1:]).sample.isfinite().all()
        assert 1 <= len(ran) < 4  # of four forwards
        transformer.disable_cache()
        assert torch.equal(transformer(*inputs).sample, expected)


def test_compile_repeated_blocks(transformer, inputs):
    expected = transformer(*inputs).sample
    transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert all(
        block._compiled_call_impl for block in [*transformer.transformer_blocks, *transformer.decoder.blocks]
    )
    torch.testing.assert_close(transformer(*inputs).sample, expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(transformer, inputs, offload_type):
    expected = transformer(*inputs).sample
    options = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    apply_group_offloading(
        transformer,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        **options,
    )
    torch.testing.assert_close(transformer(*inputs).sample, expected)


def test_layerwise_casting_stores_small_and_computes_wide(transformer, inputs):
    expected = transformer(*inputs).sample
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    actual = transformer(*inputs).sample
    assert torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.98


def test_gradient_checkpointing_gives_the_same_gradients(transformer, inputs):
    def gradients():
        transformer.zero_grad()
        transformer(*inputs, VISIBLE).sample.square().sum().backward()
        return [parameter.grad.clone() for parameter in transformer.parameters()]

    expected = gradients()
    transformer.enable_gradient_checkpointing()
    assert transformer.is_gradient_checkpointing
    calls = []
    transformer.transformer_blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(gradients(), expected)
    assert len(calls) == 2  # once forward, once again in the backward pass


def test_lora(transformer, inputs, tmp_path):
    expected = transformer(*inputs).sample
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    changed = transformer(*inputs).sample
    assert not torch.allclose(changed, expected)
    transformer.save_lora_adapter(tmp_path)
    transformer.disable_adapters()
    torch.testing.assert_close(transformer(*inputs).sample, expected)
    other = randomize(SDDiTTransformer2DModel(**TINY))
    other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(other(*inputs).sample, changed)


def test_device_maps_keep_blocks_whole(transformer):
    size = sum(parameter.numel() * 4 for parameter in transformer.parameters())
    places = infer_auto_device_map(
        transformer, {0: size // 2, "cpu": size}, no_split_module_classes=transformer._no_split_modules
    )
    assert len(set(places.values())) == 2
    inside = re.compile(r"blocks\.\d+\.")
    assert not [name for name in places if inside.search(name)]


def test_device_map(transformer, inputs, tmp_path):
    transformer.save_pretrained(tmp_path)
    loaded = SDDiTTransformer2DModel.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(loaded(*inputs).sample, transformer(*inputs).sample)


def test_bfloat16_weights(transformer, inputs):
    expected = transformer(*inputs).sample
    actual = transformer.to(torch.bfloat16)(inputs[0].bfloat16(), *inputs[1:]).sample
    assert actual.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(actual.float().flatten(), expected.flatten(), dim=0) > 0.999
