"""The networks that SD-DiT is compared with, made of its blocks: DiT, MaskDiT, MDT and TREAD as EDM's F.

Shapes are those of `transformer_sddit.py`. None has a [CLS] token. Unlike a copy of that file, one of this
needs the package: its absolute import makes diffusers say so.
"""

from numbers import Integral

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (where diffusers looks for it)
from torch import Tensor, nn

from sddit_diffusers.models.transformer_sddit import (
    AdaLayerNorm,
    PatchTransformer2DModel,
    SDDiTBlock,
    SDDiTDecoder,
    SDDiTTransformer2DOutput,
    check_number,
    gather_tokens,
    run_block,
    scatter_tokens,
    unpatchify,
)


class PlainDiTTransformer2DModel(PatchTransformer2DModel):
    """DiT (Peebles & Xie 2023): SD-DiT's encoder over all patches, and DiT's last layer.

    Args:
        sample_size, patch_size, in_channels, out_channels, num_layers, num_attention_heads,
            attention_head_dim, mlp_ratio, num_classes, timestep_scale, timestep_shift: as of
            `SDDiTTransformer2DModel`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        timestep_scale: float = 1.0,
        timestep_shift: float = 0.0,
    ):
        super().__init__()
        dim = self._build_encoder(
            sample_size, patch_size, in_channels, num_layers, num_attention_heads, attention_head_dim,
            mlp_ratio, num_classes,
        )  # fmt: skip
        self.norm_out = AdaLayerNorm(dim, dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * (out_channels or in_channels))
        self._initialize_weights()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> SDDiTTransformer2DOutput | tuple:
        """As `SDDiTTransformer2DModel.forward`, without a mask."""
        tokens, grid = self._embed(hidden_states)  # [b, n, D]
        temb = self._condition(timestep, class_labels, hidden_states)  # [b, D]
        for block in self.transformer_blocks:
            tokens = run_block(self, block, tokens, temb)
        sample = unpatchify(self.proj_out(self.norm_out(tokens, temb)), self.config.patch_size, *grid)
        return SDDiTTransformer2DOutput(sample, tokens) if return_dict else (sample, tokens)


class MaskDiTTransformer2DModel(PatchTransformer2DModel):
    """MaskDiT (Zheng et al. 2024): the decoder gets a learned mask token in place of each masked patch.

    Args:
        sample_size, patch_size, in_channels, out_channels, num_layers, num_attention_heads,
            attention_head_dim, mlp_ratio, num_decoder_layers, decoder_num_attention_heads,
            decoder_attention_head_dim, num_classes, timestep_scale, timestep_shift: as of
            `SDDiTTransformer2DModel`.
    """

    only_with_mask = ("mask_token",)  # of its weights

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_decoder_layers: int = 8,
        decoder_num_attention_heads: int = 16,
        decoder_attention_head_dim: int = 32,
        num_classes: int = 1000,
        timestep_scale: float = 1.0,
        timestep_shift: float = 0.0,
    ):
        super().__init__()
        dim = self._build_encoder(
            sample_size, patch_size, in_channels, num_layers, num_attention_heads, attention_head_dim,
            mlp_ratio, num_classes,
        )  # fmt: skip
        self.decoder = SDDiTDecoder(
            dim, num_decoder_layers, decoder_num_attention_heads, decoder_attention_head_dim, mlp_ratio,
            sample_size // patch_size, patch_size, out_channels or in_channels, has_cls=False,
        )  # fmt: skip
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.decoder.proj_in.out_features))
        self._initialize_weights()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        visible_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> SDDiTTransformer2DOutput | tuple:
        """As `SDDiTTransformer2DModel.forward`."""
        tokens, grid = self._embed(hidden_states)
        temb = self._condition(timestep, class_labels, hidden_states)  # [b, D]
        if visible_ids is not None:
            tokens = gather_tokens(tokens, visible_ids)
        for block in self.transformer_blocks:
            tokens = run_block(self, block, tokens, temb)  # [b, k, D]
        complete = self.decoder.narrow(tokens, temb)  # [b, k, E]
        if visible_ids is not None:
            complete = fill_with(self.mask_token, complete, visible_ids, grid[0] * grid[1])  # [b, n, E]
        sample = self.decoder.denoise(complete, temb, *grid)
        return SDDiTTransformer2DOutput(sample, tokens) if return_dict else (sample, tokens)


class MDTTransformer2DModel(PatchTransformer2DModel):
    """MDT (Gao et al. 2023): encoder, in training with a mask the side-interpolater, and a decoder as wide.

    Of SD-DiT's blocks, so without MDT's relative positions in attention, and with fixed positions.

    Args:
        sample_size, patch_size, in_channels, out_channels, num_attention_heads, attention_head_dim,
            mlp_ratio, num_classes, timestep_scale, timestep_shift: as of `SDDiTTransformer2DModel`.
        num_layers: blocks of encoder and decoder together.
        num_decoder_layers: those of them that are the decoder.

    Raises:
        ValueError: no block would be left for the encoder.
    """

    only_with_mask = ("mask_token", "side_interpolater")  # of its weights

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_decoder_layers: int = 2,
        num_classes: int = 1000,
        timestep_scale: float = 1.0,
        timestep_shift: float = 0.0,
    ):
        super().__init__()
        dim = self._build_encoder(
            sample_size, patch_size, in_channels, num_layers, num_attention_heads, attention_head_dim,
            mlp_ratio, num_classes,
        )  # fmt: skip
        if not 0 < num_decoder_layers < num_layers:
            raise ValueError(
                f"num_decoder_layers is {num_decoder_layers}; of {num_layers} blocks it must be 1 to "
                f"{num_layers - 1}."
            )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.side_interpolater = SDDiTBlock(dim, num_attention_heads, mlp_ratio, dim)
        self.norm_out = AdaLayerNorm(dim, dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * (out_channels or in_channels))
        self._initialize_weights()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        visible_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> SDDiTTransformer2DOutput | tuple:
        """As `SDDiTTransformer2DModel.forward`; with a mask, through the side-interpolater."""
        tokens, grid = self._embed(hidden_states)
        temb = self._condition(timestep, class_labels, hidden_states)  # [b, D]
        positions = self.pos_embed(*grid).to(tokens.dtype)  # [n, D]
        if visible_ids is not None:
            tokens = gather_tokens(tokens, visible_ids)
        for block in self.transformer_blocks[: -self.config.num_decoder_layers]:
            tokens = run_block(self, block, tokens, temb)  # [b, k, D]
        if visible_ids is None:
            complete = tokens + positions
        else:
            complete = self.interpolate(tokens, visible_ids, temb, positions)
        for block in self.transformer_blocks[-self.config.num_decoder_layers :]:
            complete = run_block(self, block, complete, temb)  # [b, n, D]
        sample = unpatchify(self.proj_out(self.norm_out(complete, temb)), self.config.patch_size, *grid)
        return SDDiTTransformer2DOutput(sample, tokens) if return_dict else (sample, tokens)

    def encode(
        self, hidden_states: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None
    ) -> Tensor:
        """As of `PatchTransformer2DModel`; the decoder's blocks get the positions once more."""
        tokens, grid = self._embed(hidden_states)
        temb = self._condition(timestep, class_labels, hidden_states)
        for layer, block in enumerate(self.transformer_blocks):
            if layer == self.config.num_layers - self.config.num_decoder_layers:
                tokens = tokens + self.pos_embed(*grid).to(tokens.dtype)
            tokens = run_block(self, block, tokens, temb)
        return tokens

    def sees_part(self, layer: int) -> bool:
        """As of `PatchTransformer2DModel`: those before the side-interpolater."""
        return layer <= self.config.num_layers - self.config.num_decoder_layers

    def interpolate(self, tokens: Tensor, visible_ids: Tensor, temb: Tensor, positions: Tensor) -> Tensor:
        """Visible tokens `[b, k, D]` at their positions, and what a block makes of mask tokens elsewhere."""
        complete = (
            fill_with(self.mask_token, tokens, visible_ids, positions.shape[0]) + positions
        )  # [b, n, D]
        filled = run_block(self, self.side_interpolater, complete, temb)
        return scatter_tokens(filled, gather_tokens(complete, visible_ids), visible_ids)


class TREADTransformer2DModel(PatchTransformer2DModel):
    """TREAD (Krause et al., ICCV 2025): DiT in whose training a share of the tokens skips the middle blocks.

    Its weights are `PlainDiTTransformer2DModel`'s. Without `visible_ids` it computes the same. The paper's
    route from i to j is `route_start` i and `route_end` j + 1, since its code counts blocks from 0 and has
    both within the route.

    Args:
        sample_size, patch_size, in_channels, out_channels, num_layers, num_attention_heads,
            attention_head_dim, mlp_ratio, num_classes, timestep_scale, timestep_shift: as of
            `SDDiTTransformer2DModel`.
        route_start: the blocks 1 to this one see all tokens, 0 to num_layers - 1.
        route_end: the blocks route_start + 1 to this one see the routed tokens alone, those after it all
            tokens, `route_start` (then nothing is skipped) to num_layers - 1. None for [`route_end_of`] the
            depth, which the config then holds.

    Raises:
        ValueError: a route that is not in these ranges, and as of `SDDiTTransformer2DModel`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        timestep_scale: float = 1.0,
        timestep_shift: float = 0.0,
        route_start: int = 2,
        route_end: int | None = None,
    ):
        super().__init__()
        dim = self._build_encoder(
            sample_size, patch_size, in_channels, num_layers, num_attention_heads, attention_head_dim,
            mlp_ratio, num_classes,
        )  # fmt: skip
        check_number("route_start", route_start, low=0, high=num_layers - 1, kind=Integral)
        if route_end is None:
            route_end = route_end_of(num_layers, route_start)
        check_number("route_end", route_end, low=route_start, high=num_layers - 1, kind=Integral)
        self.register_to_config(route_end=route_end)
        self.norm_out = AdaLayerNorm(dim, dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * (out_channels or in_channels))
        self._initialize_weights()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        visible_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> SDDiTTransformer2DOutput | tuple:
        """As `SDDiTTransformer2DModel.forward`; `encoder_hidden_states` are always all tokens, `[b, n, D]`.

        Args:
            visible_ids: indices of the patches that go through the routed blocks, `[b, k]`, without repeats;
                the others skip these. None, as in sampling: all go through.
        """
        tokens, grid = self._embed(hidden_states)  # [b, n, D]
        temb = self._condition(timestep, class_labels, hidden_states)  # [b, D]
        start, end = self.config.route_start, self.config.route_end
        for block in self.transformer_blocks[:start]:
            tokens = run_block(self, block, tokens, temb)
        routed = tokens if visible_ids is None else gather_tokens(tokens, visible_ids)
        for block in self.transformer_blocks[start:end]:
            routed = run_block(self, block, routed, temb)  # [b, k, D]
        # Those that skipped are as they left, at their own places.
        tokens = routed if visible_ids is None else scatter_tokens(tokens, routed, visible_ids)
        for block in self.transformer_blocks[end:]:
            tokens = run_block(self, block, tokens, temb)  # [b, n, D]
        sample = unpatchify(self.proj_out(self.norm_out(tokens, temb)), self.config.patch_size, *grid)
        return SDDiTTransformer2DOutput(sample, tokens) if return_dict else (sample, tokens)

    def sees_part(self, layer: int) -> bool:
        """As of `PatchTransformer2DModel`: the routed blocks."""
        return self.config.route_start < layer <= self.config.route_end


def route_end_of(num_layers: int, route_start: int) -> int:
    """Where TREAD's route ends: three blocks before the end, or at two thirds of the depth if that is later.

    That is block 9 of 12 and block 25 of 28, the paper's routes 2 to 8 and 2 to L - 4. At least one block is
    routed, if the start leaves one. The last block never is.
    """
    # Paper silent: networks of fewer than 12 blocks.
    return min(max(route_start + 1, num_layers - 3, 2 * num_layers // 3), num_layers - 1)


def fill_with(mask_token: Tensor, tokens: Tensor, visible_ids: Tensor, n: int) -> Tensor:
    """Visible tokens `[b, k, D]` at their places among n, and the mask token `[1, 1, D]` at all others."""
    filled = mask_token.to(tokens.dtype).expand(tokens.shape[0], n, -1)
    return scatter_tokens(filled, tokens, visible_ids)
