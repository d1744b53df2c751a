"""SD-DiT (Zhu et al., CVPR 2024) for diffusers."""

from . import hub
from .configuration import PRESETS
from .objective import SDDiTObjective
from .pipeline_sddit import SDDiTPipeline
from .scheduling_edm_heun import EDMHeunScheduler
from .transformer_baselines import (
    MaskDiTTransformer2DModel,
    MDTTransformer2DModel,
    PlainDiTTransformer2DModel,
)
from .transformer_sddit import SDDiTTransformer2DModel

hub.register(
    SDDiTPipeline,
    EDMHeunScheduler,
    SDDiTTransformer2DModel,
    PlainDiTTransformer2DModel,
    MaskDiTTransformer2DModel,
    MDTTransformer2DModel,
)

__version__ = "0.2.0.dev0"
__all__ = [
    "PRESETS",
    "EDMHeunScheduler",
    "MDTTransformer2DModel",
    "MaskDiTTransformer2DModel",
    "PlainDiTTransformer2DModel",
    "SDDiTObjective",
    "SDDiTPipeline",
    "SDDiTTransformer2DModel",
]
