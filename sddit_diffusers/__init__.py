"""SD-DiT (Zhu et al., CVPR 2024) for diffusers."""

from .configuration import PRESETS
from .objective import SDDiTObjective
from .pipeline_sddit import SDDiTPipeline
from .scheduling_edm_heun import EDMHeunScheduler
from .transformer_sddit import SDDiTTransformer2DModel

__version__ = "0.1.0"
__all__ = ["PRESETS", "EDMHeunScheduler", "SDDiTObjective", "SDDiTPipeline", "SDDiTTransformer2DModel"]
