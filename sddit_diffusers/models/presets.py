"""The networks by name: SD-DiT's sizes, and those for a laptop."""


def _network(size, patch, channels, layers, heads, head_dim, decoder, classes):
    """One row of PRESETS; `decoder` is (layers, heads, head dim)."""
    return dict(
        sample_size=size, patch_size=patch, in_channels=channels,
        num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim,
        num_decoder_layers=decoder[0], decoder_num_attention_heads=decoder[1],
        decoder_attention_head_dim=decoder[2], num_classes=classes,
    )  # fmt: skip


# Arguments of SDDiTTransformer2DModel by name; other methods take those that they have.
# fmt: off
PRESETS = {
    #                        size patch ch.  layers heads dim  decoder      classes
    "SD-DiT-S/2":  _network(  32,   2,   4,    12,    6,  64, (8, 16, 32),   1000),
    "SD-DiT-B/2":  _network(  32,   2,   4,    12,   12,  64, (8, 16, 32),   1000),
    "SD-DiT-L/2":  _network(  32,   2,   4,    24,   16,  64, (8, 16, 32),   1000),
    "SD-DiT-XL/2": _network(  32,   2,   4,    28,   16,  72, (8, 16, 32),   1000),
    "digits":      _network(   8,   2,   1,     4,    4,  24, (2,  4, 24),     10),
    "cifar10":     _network(  32,   2,   3,     8,    4,  64, (4,  6, 32),     10),
    "cifar10-latent": _network(8,   2,   4,     8,    4,  64, (2,  6, 32),     10),
}
