"""The paper's numbers."""

import pytest
import torch

from sddit_diffusers import PRESETS, EDMHeunScheduler, SDDiTObjective, SDDiTTransformer2DModel
from sddit_diffusers.training.options import RECIPES, TrainingConfig


def count(modules, without=()):
    named = [item for module in modules for item in module.named_parameters()]
    return (
        sum(p.numel() for name, p in named if p.requires_grad and not any(part in name for part in without))
        / 1e6
    )


def test_parameters_of_the_xl_student():
    """Supplementary, "Network parameters": SD-DiT-XL/2 has 740.6M, MaskDiT-XL/2 730.1M."""
    with torch.device("meta"):
        transformer = SDDiTTransformer2DModel(**PRESETS["SD-DiT-XL/2"])
        objective = SDDiTObjective(transformer, EDMHeunScheduler())
    assert count([objective]) == pytest.approx(740.6, abs=0.05)
    assert count([transformer], without=["cls_"]) == pytest.approx(730.1, abs=0.05)


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads"),
    [("S/2", 12, 384, 6), ("B/2", 12, 768, 12), ("L/2", 24, 1024, 16), ("XL/2", 28, 1152, 16)],
)
def test_encoders_are_dits(name, layers, width, heads):
    preset = PRESETS[f"SD-DiT-{name}"]
    assert (preset["num_layers"], preset["num_attention_heads"]) == (layers, heads)
    assert preset["num_attention_heads"] * preset["attention_head_dim"] == width
    assert (preset["sample_size"], preset["patch_size"], preset["in_channels"], preset["num_classes"]) == (
        32,
        2,
        4,
        1000,
    )
    assert preset["num_decoder_layers"] == 8  # Sec. 4.1


@pytest.mark.parametrize(("preset", "steps"), [("S/2", 400_000), ("B/2", 400_000), ("XL/2", 2_400_000)])
def test_settings_of_table_a1(preset, steps):
    config = TrainingConfig(preset=f"SD-DiT-{preset}", dataset_name="latents", **RECIPES[f"SD-DiT-{preset}"])
    assert config.max_train_steps == steps
    assert config.train_batch_size == 256 and config.gradient_accumulation_steps == 1
    assert (config.learning_rate, config.lr_warmup_steps, config.adam_weight_decay) == (1e-4, 0, 0)
    assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.999)
    assert (config.teacher_momentum_start, config.teacher_momentum_end) == (0.996, 0.999)
    assert config.student_temperature == 0.1
    assert (config.teacher_temperature_start, config.teacher_temperature_end) == (0.09, 0.099)
    assert config.teacher_temperature_warmup_epochs == 5
    assert config.mask_ratio == 0.2 and config.num_prototypes == 8192 and config.teacher_noise() == 0.002


def test_sampler_of_the_supplement():
    """N = 40, rho = 7, sigma from 80 to 0.002; two evaluations a step but for the last."""
    scheduler = EDMHeunScheduler()
    assert (scheduler.config.rho, scheduler.config.sigma_min, scheduler.config.sigma_max) == (7, 0.002, 80)
    assert scheduler.num_inference_steps == 40 and len(scheduler.timesteps) == 79
