"""REPA: tokens of an inner block, projected, are to point where a frozen encoder's patch tokens do.

Yu et al., "Representation Alignment for Generation" (ICLR 2025), Eq. 8; with the convolution and the spatial
normalisation of iREPA (Singh et al., 2025) as switches, and HASTE's early stop (Wang et al., 2025).

Shapes: b batch, g patches down and across, m tokens of the layer, D width of the network, d of the encoder.
"""

from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cli import MOST_WIDTH, one_line, option
from ..data.order import Batch
from ..models.transformer_sddit import (
    PatchTransformer2DModel,
    check_number,
    gather_tokens,
    scatter_tokens,
)
from .auxiliary import AuxiliaryLoss, Process, View, check_layer
from .encoders import CLASSIFIER, Encoder, build_encoder, is_pipeline


@dataclass
class REPAOptions:
    """The options of REPA; the defaults are the paper's."""

    _argument_group_name = "auxiliary losses: REPA"

    repa_encoder: str = option(
        "facebook/dinov2-base",
        f"frozen encoder: a vision model of transformers or a pipeline (a folder or a name on the Hub), "
        f"'{CLASSIFIER}', a small one that is trained on the pictures first, or its .safetensors file",
    )
    repa_weight: float = option(0.5, "factor of REPA's loss", low=0)
    repa_layer: int = option(
        0, "block whose tokens are aligned; 0: at a third of the depth, at most the 8th", low=0
    )
    repa_projector_dim: int = option(2048, "hidden width of the projector", low=1, high=MOST_WIDTH)
    repa_convolution: bool = option(False, "project by a 3 x 3 convolution, as iREPA does")
    repa_spatial_norm: bool = option(
        False, "normalise the encoder's tokens over each picture's patches, as iREPA does"
    )
    repa_until_step: int = option(0, "the step from which REPA is left out, as HASTE does; 0: never", low=0)


class REPA(AuxiliaryLoss):
    """L_REPA: minus the mean cosine of projected tokens and the encoder's, over patches and images.

    With a mask it is of the visible patches; a convolution sees zeros in place of the others, as beyond the
    border. The encoder is no part of the module: no checkpoint has it, and no optimizer.

    Args:
        transformer: the network, which is trained.
        encoder: stays as it is.
        weight: factor of the loss.
        layer: block whose tokens are aligned, counted from 1; 0 for a third of the depth, at most 8: the
            paper's 4 of B's 12 blocks, 8 of XL's 28.
        projector_dim: hidden width of the projector, three layers with SiLU between them.
        convolution: whether one 3 x 3 convolution takes its place.
        spatial_norm: whether the target's features have mean 0 and deviation 1 over an image's patches.
        until_step: from this step on the loss is 0; 0 for never.

    Raises:
        ValueError: a number out of its range, a block that is not there, or an encoder with other patches
            than the network.
    """

    name = "repa"

    def __init__(
        self,
        transformer: PatchTransformer2DModel,
        encoder: Encoder,
        *,
        weight: float = 0.5,
        layer: int = 0,
        projector_dim: int = 2048,
        convolution: bool = False,
        spatial_norm: bool = False,
        until_step: int = 0,
    ):
        super().__init__(weight)
        config, depth = transformer.config, len(transformer.transformer_blocks)
        check_number("repa_until_step", until_step, low=0, kind=Integral)
        check_number("repa_projector_dim", projector_dim, low=1, kind=Integral)
        if layer == 0:
            layer = min(8, max(1, depth // 3))
        check_layer("repa_layer", layer, transformer)
        self.layers = (layer,)
        self.frozen = [encoder]  # in a list, which hides it from parameters and state
        self.side = config.sample_size // config.patch_size
        self.spatial_norm, self.until_step, self.is_over = spatial_norm, until_step, False
        width, dim = config.num_attention_heads * config.attention_head_dim, self._width_of(encoder, config)
        if convolution:
            self.projector = nn.Conv2d(width, dim, 3, padding=1)
        else:
            self.projector = nn.Sequential(
                nn.Linear(width, projector_dim), nn.SiLU(),
                nn.Linear(projector_dim, projector_dim), nn.SiLU(),
                nn.Linear(projector_dim, dim),
            )  # fmt: skip

    def _width_of(self, encoder: Encoder, config: dict) -> int:
        """Width of the encoder's tokens; it tries the encoder once."""
        size = config.sample_size
        x0, pictures = torch.zeros(1, config.in_channels, size, size), torch.zeros(1, 3, size, size)
        try:
            return encoder(Batch(x0, None, pictures.to(torch.uint8)), self.side).shape[-1]
        except RuntimeError as error:
            raise ValueError(
                f"repa_encoder cannot look at {self.side} x {self.side} patches; a vision transformer can, "
                f"such as facebook/dinov2-base: {one_line(error)}"
            ) from error

    @classmethod
    def from_options(cls, transformer: PatchTransformer2DModel, options: REPAOptions) -> "REPA":
        """As of `AuxiliaryLoss`, with the encoder that the options name."""
        return super().from_options(transformer, options, build_encoder(options))

    @staticmethod
    def looks_at_pictures(options: REPAOptions) -> bool:
        """Whether the encoder takes pictures, and not the samples themselves."""
        return not is_pipeline(options.repa_encoder)

    def forward(self, view: View, process: Process, draws: None) -> dict[str, Tensor]:
        """`loss_repa`, in -1..1."""
        tokens = view.layers[self.layers[0]]
        if self.is_over:
            unused = sum(parameter.sum() for parameter in self.projector.parameters())
            return {"loss_repa": 0 * unused}  # for DDP, which waits for all gradients
        target = self.frozen[0](view.batch, self.side)  # [b, g g, d]
        if self.spatial_norm:
            target = (target - target.mean(1, keepdim=True)) / (target.std(1, keepdim=True) + 1e-6)
        if tokens.ids is not None:
            target = gather_tokens(target, tokens.ids)
        projected = self.project(tokens.values, tokens.ids)  # [b, m, d]
        # In float32: half precision gives REPA's own code cosines that are not numbers.
        return {"loss_repa": -F.cosine_similarity(projected.float(), target, dim=-1).mean()}

    def project(self, tokens: Tensor, ids: Tensor | None) -> Tensor:
        """`[b, m, D]` at places `[b, m]` to `[b, m, d]`."""
        if not isinstance(self.projector, nn.Conv2d):
            return self.projector(tokens)
        if ids is not None:
            tokens = scatter_tokens(
                tokens.new_zeros(len(tokens), self.side**2, tokens.shape[-1]), tokens, ids
            )
        grid = tokens.transpose(1, 2).unflatten(2, (self.side, self.side))  # [b, D, g, g]
        projected = self.projector(grid).flatten(2).transpose(1, 2)
        return projected if ids is None else gather_tokens(projected, ids)

    def follow(self, step: int, steps: int, steps_per_epoch: int) -> dict[str, float]:
        """Ends the alignment at its step."""
        self.is_over = bool(self.until_step) and step >= self.until_step
        return {}

    def identity(self) -> dict:
        """The layer, the projector's shapes, and what the target is."""
        shapes = [[*parameter.shape] for parameter in self.projector.parameters()]
        about = {"repa_layer": self.layers[0], "repa_projector": shapes}
        about["repa_spatial_norm"] = self.spatial_norm
        return about | {"repa_encoder_sha256": self.frozen[0].sha256}
