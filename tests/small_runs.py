"""Trainings of a few thousand weights on the digits, as users start them."""

import json
from pathlib import Path

import train_sddit
from sddit_diffusers.training.metrics import read_metrics
from sddit_diffusers.training.trainer import Trainer

SCRIPT = Path(train_sddit.__file__)
NETWORK = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, num_decoder_layers=1,
               decoder_num_attention_heads=2, decoder_attention_head_dim=8)  # fmt: skip
HEAD = ["--num_prototypes", "32", "--head_hidden_dim", "16", "--head_bottleneck_dim", "8"]
SMALL = [*HEAD, "--transformer", json.dumps(NETWORK), "--train_batch_size", "16", "--evaluation_steps", "0",
         "--num_validation_images", "0"]  # fmt: skip


def arguments(folder, *options):
    """A small run's command line; the sizes of a head where there is one."""
    headless = {"dit", "maskdit", "mdt", "tread"}.intersection(options)
    headless = headless or ("--auxiliary" in options and "discrimination" not in options)
    return [*(SMALL[len(HEAD) :] if headless else SMALL), "--output_dir", str(folder), *map(str, options)]


def train(folder, *options):
    train_sddit.main(arguments(folder, *options))
    return read_metrics(folder / "metrics.jsonl")


def make_trainer(folder, *options):
    return Trainer(train_sddit.parse(arguments(folder, *options)))


def batches_of(trainer):
    return trainer.dataset.batches(trainer.sampler)


def weights_of(folder):
    """The file of the network's weights."""
    return (folder / "transformer/diffusion_pytorch_model.safetensors").read_bytes()


def names(folder, pattern):
    return sorted(path.name for path in folder.glob(pattern))
