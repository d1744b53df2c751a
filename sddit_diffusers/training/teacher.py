"""The teacher: an exponential moving average (EMA) of the student's encoder, with or without a head."""

import copy

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..models.transformer_sddit import PatchTransformer2DModel, SDDiTTransformer2DModel

# The parts of a network up to its blocks.
_ENCODER = {
    "patch_embed", "pos_embed", "time_proj", "time_embed", "label_embed", "cls_token", "transformer_blocks"
}  # fmt: skip


class Teacher(nn.Module):
    """The EMA of the student's encoder, or of its first blocks, and of its head, by a diffusers `EMAModel`.

    Its weights are the `EMAModel`'s shadow parameters themselves, so there is one copy of them; none takes a
    gradient. It has the student's adapters, such as LoRA's, and averages them as it does all else.

    Args:
        transformer: the student.
        head: what is averaged beside it; None for nothing.
        layers: how many of the student's blocks it has, the first ones; None for all.

    Attributes:
        encoder: is run by `encode`, SD-DiT's with all blocks also by a call.

    Raises:
        ValueError: the student got adapters after the teacher was made.
    """

    def __init__(
        self, transformer: PatchTransformer2DModel, head: nn.Module | None = None, layers: int | None = None
    ):
        super().__init__()
        self.encoder = encoder_of(transformer, layers)
        if adapters := getattr(transformer, "peft_config", {}):
            for name, adapter in adapters.items():
                self.encoder.add_adapter(adapter, name)
            self.encoder.set_adapter(transformer.active_adapters())
        self.head = copy.deepcopy(head)
        self.requires_grad_(False)
        # An update_after_step of -1 leaves out EMAModel's warm-up, whose first step would copy the student.
        self.ema = EMAModel([], update_after_step=-1, foreach=True)
        for shadow, parameter in zip(*self._pair_with(transformer, head), strict=True):
            shadow.copy_(parameter.detach())  # theta' = theta, the first line of Algorithm A1

    def update(self, transformer: PatchTransformer2DModel, head: nn.Module | None, momentum: float) -> None:
        """theta' = beta theta' + (1 - beta) theta (Algorithm A1); beta 1 freezes, 0 copies to rounding."""
        self.ema.shadow_params, parameters = self._pair_with(transformer, head)
        self.ema.decay = self.ema.min_decay = momentum
        self.ema.step(parameters)

    def _pair_with(self, transformer: nn.Module, head: nn.Module | None) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's parameters, and the student's of the same names."""
        student = dict(transformer.named_parameters("encoder"))
        if head is not None:
            student |= dict(head.named_parameters("head"))
        shadows = dict(self.named_parameters())
        if missing := [name for name in shadows if name not in student]:
            raise ValueError(
                f"The student has no {missing[0]}, unlike its teacher; add adapters before it is made."
            )
        return list(shadows.values()), [student[name] for name in shadows]


def encoder_of(network: PatchTransformer2DModel, layers: int | None = None) -> PatchTransformer2DModel:
    """A network of the same kind up to its blocks, the first `layers` of them or all; its weights are new."""
    changes = {"num_decoder_layers": 0} if isinstance(network, SDDiTTransformer2DModel) else {}
    encoder = type(network).from_config(network.config, **changes)
    encoder.transformer_blocks = encoder.transformer_blocks[:layers]
    for name, _ in [*encoder.named_children(), *encoder.named_parameters(recurse=False)]:
        if name not in _ENCODER:
            delattr(encoder, name)
    return encoder
