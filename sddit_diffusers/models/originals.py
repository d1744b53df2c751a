"""The weights of DiT, MaskDiT, SiT and REPA, as their authors and diffusers name them, by the names here.

MaskDiT is EDM's raw network F: renamed, it computes what it did. SiT and REPA are velocities on the linear
path, and sample with `InterpolantScheduler`. SiT's time is 1 - t, and so its velocity the negative; of its
outputs a half is not used. REPA (Yu et al. 2025) has time and velocity as here, and projectors for training.

DiT is neither. It predicts the noise, and a variance that has no place here, at steps 0 to 999 of another
diffusion. EDM's networks take c_noise = ln(sigma) / 4, from -1.6 to 1.1, all of which DiT's time embedding
takes for its first steps. Its weights are a start to be trained on, not a model to sample with. diffusers'
DiT besides divides the frequencies of that embedding by 127, not 128, and has an epsilon of 1e-5 in half of
its LayerNorms.

Shapes are those of `transformer_sddit.py`.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .presets import PRESETS
from .transformer_baselines import PlainDiTTransformer2DModel
from .transformer_sddit import SinCosPositions, differing_names

# What stands in names there, as a pattern, and here.
_NAMES = (
    # facebookresearch/DiT and Anima-Lab/MaskDiT
    (r"^x_embedder\.proj\.", "patch_embed."),
    (r"^t_embedder\.mlp\.0\.", "time_embed.linear_1."),
    (r"^t_embedder\.mlp\.2\.", "time_embed.linear_2."),
    (r"^y_embedder\.embedding_table\.", "label_embed."),
    (r"^blocks\.", "transformer_blocks."),
    (r"^cls_token_embedder\.", "decoder.cls_proj."),
    (r"^decoder_layer\.adaLN_modulation\.1\.", "decoder.norm_in.linear."),
    (r"^decoder_layer\.linear\.", "decoder.proj_in."),
    (r"^decoder_blocks\.", "decoder.blocks."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
    (r"^final_layer\.linear\.", "proj_out."),
    (r"\.adaLN_modulation\.1\.", ".modulation."),
    (r"\.attn\.proj\.", ".attn.to_out.0."),
    (r"\.mlp\.fc1\.", ".ff.0."),
    (r"\.mlp\.fc2\.", ".ff.2."),
    # diffusers' DiTTransformer2DModel, with an embedding in each block
    (r"^pos_embed\.proj\.", "patch_embed."),
    (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.", "time_embed."),
    (r"^transformer_blocks\.0\.norm1\.emb\.class_embedder\.embedding_table\.", "label_embed."),
    (r"\.norm1\.linear\.", ".modulation."),
    (r"\.attn1\.", ".attn."),
    (r"\.ff\.net\.0\.proj\.", ".ff.0."),
    (r"\.ff\.net\.2\.", ".ff.2."),
    (r"^proj_out_1\.", "norm_out.linear."),
    (r"^proj_out_2\.", "proj_out."),
)
ORIGINS = {"dit": "DiT", "maskdit": "MaskDiT", "sit": "SiT", "repa": "REPA"}
# What these networks make of a timestep 1000 t, and the sign of their velocity here.
FLOWS = {
    "sit": (dict(timestep_scale=-1e-3, timestep_shift=1.0), -1),
    "repa": (dict(timestep_scale=1e-3, timestep_shift=0.0), 1),
}
# Names that only one of them has.
_MARKS = {
    "maskdit": "decoder_layer.linear.weight", "repa": "projectors.0.0.weight", "dit": "pos_embed.proj.weight"
}  # fmt: skip
_POSITIONS = ("pos_embed", "decoder_pos_embed")
# Heads by width: of the paper's encoders, which are DiT's, and of its decoder, which is MaskDiT's.
_HEADS = {
    network[f"{part}num_attention_heads"] * network[f"{part}attention_head_dim"]: network[
        f"{part}num_attention_heads"
    ]
    for name, network in PRESETS.items()
    if name.startswith("SD-DiT")
    for part in ("", "decoder_")
}


def origin_of(theirs: Iterable[str], given: str = "") -> str:
    """Whose weights these are, a key of ORIGINS: as their names tell, else as is given, else DiT's.

    Raises:
        ValueError: the names tell otherwise than is given.
    """
    for origin, mark in _MARKS.items():
        if any(f".{name}".endswith(f".{mark}") for name in theirs):
            if given not in ("", origin):
                whose = f"{ORIGINS[origin]}'s: they have {mark}"
                raise ValueError(f"origin is {given!r}; the weights are {whose}.")
            return origin
    return given or "dit"


def translate(
    theirs: dict[str, Tensor], told: dict, origin: str = "dit"
) -> tuple[dict[str, Tensor], dict[str, str], dict]:
    """Others' weights for the networks here.

    Args:
        theirs: the state dict, whatever stands before all of its names.
        origin: whose they are, a key of ORIGINS.
        told: arguments of the network that shapes do not tell, as `num_attention_heads`.

    Returns:
        The weights, those that have no name here under their own; the name there of each; the arguments of
        their network.

    Raises:
        ValueError: they are of no DiT, of another network than SiT's or REPA's, or `told` lacks something.
    """
    prefixes = [re.match(r"(.*)(x_embedder|pos_embed)\.proj\.weight$", name) for name in theirs]
    prefix = next((match[1] for match in prefixes if match), None)
    if prefix is None:
        raise ValueError("These weights are of no DiT: x_embedder.proj.weight is missing.")
    theirs = {name.removeprefix(prefix): weight for name, weight in theirs.items() if name.startswith(prefix)}
    if origin == "repa":
        theirs = _in_one_row(theirs)
    weights, origins = {}, {}
    for name, weight in theirs.items():
        if not _is_repeated(name, theirs):
            for ours, part in _rename(name, weight, has_decoder="decoder_layer.linear.weight" in theirs):
                weights[ours], origins[ours] = part, name
    weights["label_embed.weight"] = _label_table(weights, told.get("num_classes"), origin)
    if "decoder.proj_in.weight" in weights and "mask_token" not in weights:
        # MaskDiT without L_MAE fills the masked places with zeros.
        weights["mask_token"] = torch.zeros(1, 1, len(weights["decoder.proj_in.weight"]))
    for name in [name for name in weights if "proj_out." in name]:
        _leave_out_variance(name, weights, origins)
    network = _sizes(weights, told)
    for name in _POSITIONS:
        if name in weights and _is_sincos(weights[name]):
            del weights[name]
    if origin in FLOWS:
        _check_flow(weights, origins, network, origin)
        times, sign = FLOWS[origin]
        network |= times
        for name in ("proj_out.weight", "proj_out.bias"):
            weights[name] = sign * weights[name]
    return weights, origins, network


def _in_one_row(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """REPA's earlier files number the blocks behind the projectors anew, as `decoder_blocks`."""
    first = _count(theirs, "blocks")
    return {
        re.sub(r"^decoder_blocks\.(\d+)", lambda match: f"blocks.{first + int(match[1])}", name): weight
        for name, weight in theirs.items()
    }


def _check_flow(weights: dict[str, Tensor], origins: dict[str, str], network: dict, origin: str) -> None:
    """Raises a ValueError for weights that are not those, or not only those, of SiT's or REPA's network."""
    if origin == "repa" and "proj_out.weight (variance)" in weights:
        raise ValueError("These weights are not REPA's: they give twice the channels that they take.")
    with torch.device("meta"):
        plain = PlainDiTTransformer2DModel(**network).state_dict()
    unused = [name for name in weights if name.startswith("projectors.") or name.endswith(" (variance)")]
    others = differing_names(plain, {name: weights[name] for name in weights if name not in unused})
    if others:
        shown = ", ".join(origins.get(name, name) for name in others[:4])
        whose = f"{ORIGINS[origin]}'s: they differ in {shown}"
        raise ValueError(f"These weights are of another network than {whose}.")


def _label_table(weights: dict[str, Tensor], classes: int | None, origin: str) -> Tensor:
    """The embedding of the labels, `[classes + 1, D]`, the null class last.

    MaskDiT's `[D, classes]` is a matrix for one-hot labels, and zeros are its null class. DiT has a row for
    the null class where it was trained with label dropout, which the table does not tell: `classes` does, and
    1,000 rows are ImageNet's. Where it was not, zeros are put there, which the network has never seen.

    Raises:
        ValueError: the table has another number of classes.
    """
    stem = weights["patch_embed.weight"]
    width, channels, patch_size, _ = stem.shape
    table = weights.get("label_embed.weight", stem.new_zeros(width, 0))
    last = weights.get("proj_out.weight")
    # MaskDiT has no variance, which tells its table from DiT's where both are square.
    plain = origin == "dit" and last is not None and len(last) == patch_size**2 * channels
    if width not in table.shape:
        raise ValueError(f"The labels' table is {tuple(table.shape)}; one side must be the width, {width}.")
    if origin == "maskdit" or table.shape[1] != width or (len(table) == width and plain):
        table = torch.cat([table.T, table.new_zeros(1, width)])
        rows = len(table)
    else:
        rows = len(table)
        if (classes or 1000) == rows:
            warnings.warn(
                f"The labels' table has {rows} rows, so none for the null class: zeros stand there. "
                "Train with label_dropout before guidance is used.",
                stacklevel=2,
            )
            table = torch.cat([table, table.new_zeros(1, width)])
            rows += 1
    if classes and classes != rows - 1:
        raise ValueError(
            f"num_classes is {classes}; the labels' table has {rows - 1} classes and a null one."
        )
    return table


def _is_repeated(name: str, theirs: dict[str, Tensor]) -> bool:
    """Whether it is of a later block's embedding that equals the first block's."""
    first = re.sub(r"^transformer_blocks\.\d+\.norm1\.emb\.", "transformer_blocks.0.norm1.emb.", name)
    return first != name and first in theirs and theirs[first].equal(theirs[name])


def _rename(name: str, weight: Tensor, has_decoder: bool) -> Iterator[tuple[str, Tensor]]:
    """The names here and the tensors; q, k and v are three of them."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    if has_decoder and name.startswith(("norm_out.", "proj_out.")):
        name = f"decoder.{name}"
    if ".attn.qkv." in name:
        for letter, part in zip("qkv", weight.chunk(3), strict=True):
            yield name.replace("qkv", f"to_{letter}"), part
    else:
        yield name, weight


def _leave_out_variance(name: str, weights: dict[str, Tensor], origins: dict[str, str]) -> None:
    """Puts the second half of the output's channels, `[p p 2c, ...]`, under a name of its own."""
    _, channels, patch_size, _ = weights["patch_embed.weight"].shape
    outputs = weights[name].unflatten(0, (patch_size**2, -1))
    if outputs.shape[1] == 2 * channels:
        noise, variance = outputs.chunk(2, dim=1)
        weights[name], weights[f"{name} (variance)"] = noise.flatten(0, 1), variance
        origins[f"{name} (variance)"] = f"{origins[name]} (variance)"


def _is_sincos(table: Tensor) -> bool:
    """Whether positions `[1, n, D]`, or one more with [CLS], are those that are fixed here."""
    size = math.isqrt(table.shape[1])
    fixed = SinCosPositions(table.shape[2], size).table
    # Averaged weights and half precision have rounded them.
    return torch.allclose(table[0, -size * size :].float(), fixed, rtol=0, atol=1e-2)


def _sizes(weights: dict[str, Tensor], told: dict) -> dict:
    """The arguments of the network that has these weights.

    Raises:
        ValueError: blocks are missing, or the heads or the sample's size are not told.
    """
    width, channels, patch_size, _ = weights["patch_embed.weight"].shape
    if "transformer_blocks.0.ff.0.weight" not in weights:
        raise ValueError("These weights are of no DiT: blocks.0.mlp.fc1.weight is missing.")
    network = {
        "patch_size": patch_size,
        "in_channels": channels,
        "num_layers": _count(weights, "transformer_blocks"),
        "mlp_ratio": len(weights["transformer_blocks.0.ff.0.weight"]) / width,
        "num_classes": len(weights["label_embed.weight"]) - 1,
        **_heads("", width, told),
    }
    if "decoder.proj_in.weight" in weights:
        network["num_decoder_layers"] = _count(weights, r"decoder\.blocks")
        network |= _heads("decoder_", len(weights["decoder.proj_in.weight"]), told)
    if "pos_embed" in weights:
        network["sample_size"] = math.isqrt(weights["pos_embed"].shape[1]) * patch_size
    elif "sample_size" in told:
        network["sample_size"] = told["sample_size"]
    else:
        raise ValueError(f"{_untold('sample_size')} 32 for latents of 256 x 256 pixels.")
    return network


def _count(weights: dict[str, Tensor], blocks: str) -> int:
    return len({match[1] for name in weights if (match := re.match(rf"{blocks}\.(\d+)\.", name))})


def _heads(part: str, width: int, told: dict) -> dict:
    heads = told.get(f"{part}num_attention_heads", _HEADS.get(width))
    if heads is None:
        raise ValueError(f"{_untold(f'{part}num_attention_heads')} a divisor of the width, {width}.")
    if width % heads:
        raise ValueError(f"{part}num_attention_heads is {heads}; it must be a divisor of the width, {width}.")
    return {f"{part}num_attention_heads": heads, f"{part}attention_head_dim": width // heads}


def _untold(name: str) -> str:
    return f"The weights do not tell {name}; give it as --transformer '{{\"{name}\": N}}', where N is"
