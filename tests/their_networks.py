"""Weights of DiT, MaskDiT, SiT and REPA by the names of their authors, and their networks restated."""

import math

import torch
import torch.nn.functional as F

from sddit_diffusers import (
    convert,
)

HEADS = '{"num_attention_heads": 2}'


def run(*arguments):
    convert.main([str(argument) for argument in arguments])


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


def projectors(dim=16):
    """Weights of REPA's projectors, an MLP of three layers for each frozen encoder."""
    shapes = {"weight": (dim, dim), "bias": (dim,)}
    layers = [f"projectors.{i}.{j}" for i in range(2) for j in (0, 2, 4)]
    return {f"{layer}.{name}": torch.ones(shape) for layer in layers for name, shape in shapes.items()}


def sit_velocity(w, x, t, label):
    """SiT's dx/dt at x = t data + (1 - t) noise; the network gives twice the channels."""
    return original_forward(w, x, t, label)[: len(x)]


def sit_euler(w, x, label, steps, guidance):
    """SiT's way from noise `[c, h, w]` to data, from time 0 to 1; the label 4 is the null class."""
    for i in range(steps):
        given, null = (sit_velocity(w, x, torch.tensor(i / steps), y) for y in (label, 4))
        x = x + (null + guidance * (given - null)) / steps
    return x


def repa_velocity(w, x, t, label):
    """REPA's dx/dt at x = (1 - t) data + t noise."""
    return original_forward(w, x, t, label)


def repa_euler(w, x, label, steps, guidance):
    """REPA's way from noise `[c, h, w]` to data, from time 1 to 0; the label 4 is the null class."""
    for i in range(steps, 0, -1):
        given, null = (repa_velocity(w, x, torch.tensor(i / steps), y) for y in (label, 4))
        x = x - (null + guidance * (given - null)) / steps
    return x
