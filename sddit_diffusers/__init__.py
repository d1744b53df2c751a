"""SD-DiT (Zhu et al., CVPR 2024) for diffusers."""

from . import environment, hub  # noqa: F401, environment sets what torch reads when it is loaded
from .models.presets import PRESETS
from .models.transformer_baselines import (
    MaskDiTTransformer2DModel,
    MDTTransformer2DModel,
    PlainDiTTransformer2DModel,
    TREADTransformer2DModel,
)
from .models.transformer_sddit import SDDiTTransformer2DModel
from .pipelines.loading import DIGITS
from .pipelines.pipeline_sddit import SDDiTPipeline
from .schedulers.scheduling_edm_heun import EDMHeunScheduler
from .schedulers.scheduling_interpolant import InterpolantScheduler
from .training.objective import SDDiTObjective

hub.register(
    SDDiTPipeline,
    EDMHeunScheduler,
    InterpolantScheduler,
    SDDiTTransformer2DModel,
    PlainDiTTransformer2DModel,
    MaskDiTTransformer2DModel,
    MDTTransformer2DModel,
    TREADTransformer2DModel,
)

__version__ = "0.2.0.dev0"
__all__ = [
    "DIGITS",
    "PRESETS",
    "EDMHeunScheduler",
    "InterpolantScheduler",
    "MDTTransformer2DModel",
    "MaskDiTTransformer2DModel",
    "PlainDiTTransformer2DModel",
    "SDDiTObjective",
    "SDDiTPipeline",
    "SDDiTTransformer2DModel",
    "TREADTransformer2DModel",
]
