"""What a caller's type checker says of the package's face; mypy looks at it, nobody runs it."""

from pathlib import Path

import torch
from typing_extensions import assert_type  # noqa: UP035 (of Python 3.11)

from sddit_diffusers import (
    DIGITS,
    PRESETS,
    EDMHeunScheduler,
    InterpolantScheduler,
    SDDiTObjective,
    SDDiTPipeline,
    SDDiTTransformer2DModel,
)

transformer = SDDiTTransformer2DModel(sample_size=8, in_channels=1, num_classes=10)
scheduler: EDMHeunScheduler = EDMHeunScheduler(sigma_data=0.75)
pipe: SDDiTPipeline = SDDiTPipeline(transformer, scheduler, id2label={7: "seven"})
assert_type(pipe.get_label_ids(["seven", 3, None]), list[int])
assert_type(pipe.guidance_scale, float)
pipe(["seven", 3], guidance_scale=1.5, generator=[torch.Generator(), torch.Generator()])
pipe(torch.tensor([1, 2]), num_inference_steps=20, output_type="np")

objective: SDDiTObjective = SDDiTObjective(transformer, scheduler, mask_ratio=0.2)
SDDiTObjective(transformer, InterpolantScheduler(), label_dropout=0.1)
assert_type(objective.mask_ratio, float)
assert_type(DIGITS, Path)
preset: dict = PRESETS["SD-DiT-XL/2"]
x0 = torch.zeros(2, 1, 8, 8)
assert_type(scheduler.noised(x0, torch.randn(2, 1, 8, 8), torch.ones(2, 1, 1, 1)), torch.Tensor)
