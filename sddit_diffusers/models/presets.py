"""The networks by name: SD-DiT's and SiT's sizes, and those for a laptop."""

from ..cli import MOST_WIDTH, Limits, json_object, shortened


def _network(size, patch, channels, layers, heads, head_dim, decoder, classes, **others):
    """One row of PRESETS; `decoder` is (layers, heads, head dim)."""
    return dict(
        sample_size=size, patch_size=patch, in_channels=channels,
        num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim,
        num_decoder_layers=decoder[0], decoder_num_attention_heads=decoder[1],
        decoder_attention_head_dim=decoder[2], num_classes=classes, **others,
    )  # fmt: skip


# SiT's networks embed 1 - t of a flow's timestep 1000 t, unscaled (Ma et al. 2024, its code).
_SIT = dict(timestep_scale=-1e-3, timestep_shift=1.0)
# Arguments of SDDiTTransformer2DModel by name; other methods take those that they have.
# fmt: off
PRESETS = {
    #                        size patch ch.  layers heads dim  decoder      classes
    "SD-DiT-S/2":  _network(  32,   2,   4,    12,    6,  64, (8, 16, 32),   1000),
    "SD-DiT-B/2":  _network(  32,   2,   4,    12,   12,  64, (8, 16, 32),   1000),
    "SD-DiT-L/2":  _network(  32,   2,   4,    24,   16,  64, (8, 16, 32),   1000),
    "SD-DiT-XL/2": _network(  32,   2,   4,    28,   16,  72, (8, 16, 32),   1000),
    "SiT-S/2":     _network(  32,   2,   4,    12,    6,  64, (8, 16, 32),   1000, **_SIT),
    "SiT-B/2":     _network(  32,   2,   4,    12,   12,  64, (8, 16, 32),   1000, **_SIT),
    "SiT-L/2":     _network(  32,   2,   4,    24,   16,  64, (8, 16, 32),   1000, **_SIT),
    "SiT-XL/2":    _network(  32,   2,   4,    28,   16,  72, (8, 16, 32),   1000, **_SIT),
    "digits":      _network(   8,   2,   1,     4,    4,  24, (2,  4, 24),     10),
    "digits-flow": _network(   8,   2,   1,     4,    4,  24, (2,  4, 24),     10),
    "cifar10":     _network(  32,   2,   3,     8,    4,  64, (4,  6, 32),     10),
    "cifar10-latent": _network(8,   2,   4,     8,    4,  64, (2,  6, 32),     10),
    "cifar10-latent-tiny": _network(8, 1, 4,    4,    4,  24, (2,  4, 24),     10),
    "cifar10-latent-light": _network(8, 1, 4,   4,    4,  24, (2,  4, 24),     10),
}
# fmt: on

# Settings that are no whole numbers.
_FRACTIONS = {
    "mlp_ratio": Limits(low=0, high=64), "timestep_scale": Limits(), "timestep_shift": Limits()
}  # fmt: skip
# Whole numbers are from 1, all but one.
_LIMITS = _FRACTIONS | {"route_start": Limits(low=0, high=MOST_WIDTH)}


def read_changes(text: str, network: dict) -> dict:
    """The settings of `--transformer`.

    Args:
        text: JSON.
        network: what it changes; `num_classes` is the dataset's. What is None there may stay so.

    Raises:
        ValueError: another setting, or a value that is no number of its type and range.
    """
    changes = json_object("transformer", text)
    known = dict.fromkeys([name for name in network if name != "num_classes"] + [*_FRACTIONS])
    for name in changes:
        if name not in known:
            raise ValueError(f"transformer has no setting {shortened(name)}; there are {', '.join(known)}.")
    for name in filter(changes.__contains__, known):
        value, is_fraction = changes[name], name in _FRACTIONS
        if value is None and network.get(name, 0) is None:
            continue
        if type(value) is not int and not (is_fraction and type(value) is float):
            problem = "it must be a number" if is_fraction else "it must be a whole number"
        elif not (problem := _LIMITS.get(name, Limits(low=1, high=MOST_WIDTH)).problem(value)):
            empty = name == "mlp_ratio" and int(_narrowest(network | changes) * value) == 0
            problem = "it must leave the MLPs a width" * empty
        if problem:
            raise ValueError(f"transformer: {name} is {shortened(value)}; {problem}.")
    return changes


def _narrowest(network: dict) -> int:
    """The width of the encoder or of the decoder."""
    both = [(f"{of}num_attention_heads", f"{of}attention_head_dim") for of in ("", "decoder_")]
    return min(network[heads] * network[dim] for heads, dim in both if heads in network)
