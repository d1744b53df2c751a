"""The teacher: an exponential moving average (EMA) of the student's encoder and head."""

import copy

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..models.transformer_sddit import SDDiTTransformer2DModel


class Teacher(nn.Module):
    """T and its head j': the EMA of the student's encoder and head, moved by a diffusers `EMAModel`.

    Its weights are the `EMAModel`'s shadow parameters themselves, so there is one copy of them; none takes a
    gradient. It has the student's adapters, such as LoRA's, and averages them as it does all else.

    Raises:
        ValueError: the student got adapters after the teacher was made.
    """

    def __init__(self, transformer: SDDiTTransformer2DModel, head: nn.Module):
        super().__init__()
        self.encoder = SDDiTTransformer2DModel.from_config(transformer.config, num_decoder_layers=0)
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

    def update(self, transformer: SDDiTTransformer2DModel, head: nn.Module, momentum: float) -> None:
        """theta' = beta theta' + (1 - beta) theta (Algorithm A1); beta 1 freezes, 0 copies to rounding."""
        self.ema.shadow_params, parameters = self._pair_with(transformer, head)
        self.ema.decay = self.ema.min_decay = momentum
        self.ema.step(parameters)

    def _pair_with(self, transformer: nn.Module, head: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's parameters, and the student's of the same names."""
        student = dict(transformer.named_parameters("encoder")) | dict(head.named_parameters("head"))
        shadows = dict(self.named_parameters())
        if missing := [name for name in shadows if name not in student]:
            raise ValueError(
                f"The student has no {missing[0]}, unlike its teacher; add adapters before it is made."
            )
        return list(shadows.values()), [student[name] for name in shadows]
