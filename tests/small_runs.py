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


def train(folder, *options):
    others = {"dit", "maskdit", "mdt", "tread"}.intersection(options)  # which have no head
    train_sddit.main(
        [*(SMALL[len(HEAD) :] if others else SMALL), "--output_dir", str(folder), *map(str, options)]
    )
    return read_metrics(folder / "metrics.jsonl")


def make_trainer(folder, *options):
    return Trainer(train_sddit.parse([*SMALL, "--output_dir", str(folder), *map(str, options)]))


def batches_of(trainer):
    return trainer.dataset.batches(trainer.sampler)


def weights_of(folder):
    """The file of the network's weights."""
    return (folder / "transformer/diffusion_pytorch_model.safetensors").read_bytes()


def names(folder, pattern):
    return sorted(path.name for path in folder.glob(pattern))
