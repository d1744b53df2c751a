"""Runs of two processes, killed at random moments and resumed, against one that nobody disturbed."""

import json
import random
import shutil

import pytest
from conftest import thorough, write_latents
from processes import Started
from small_runs import HEAD, NETWORK, weights_of

from sddit_diffusers.training.metrics import read_metrics

pytestmark = pytest.mark.process
# Trains; told of a checkpoint and a file, it writes half of that checkpoint, makes the file and waits.
TRAINING = """
import io, sys, time
from pathlib import Path
import torch
import train_sddit
from sddit_diffusers.training import checkpointing

def stuck(state, file):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    if checkpoint in file.name:
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        Path(flag).touch()
        time.sleep(60)
    file.write(buffer.getvalue())

checkpoint, flag, *arguments = sys.argv[1:]
if checkpoint:
    checkpointing._save = stuck
train_sddit.main(arguments)
"""


@pytest.fixture(params=[*thorough("digits"), "latents"])
def data(request, tmp_path):
    """The options that choose the data."""
    network, options = NETWORK, HEAD
    if request.param == "latents":
        write_latents(tmp_path / "data", 300, shard_size=64)
        network = network | {"in_channels": 2, "sample_size": 2, "patch_size": 1}
        options = [*options, "--dataset_name", tmp_path / "data", "--vae", "none", "--evaluation_steps", 0]
    else:
        options = [*options, "--evaluation_steps", 8, "--evaluation_samples", 20]
    return [*options, "--transformer", json.dumps(network)]


def test_killed_twice_it_ends_as_an_undisturbed_run(tmp_path, data):
    script = tmp_path / "training.py"
    script.write_text(TRAINING)

    def start(name, processes=2, batch=16, stuck_at="", flag=""):
        options = [*data, "--output_dir", tmp_path / name, "--train_batch_size", batch]
        options += ["--max_train_steps", 24, "--checkpointing_steps", 4, "--learning_rate", 3e-4]
        options += ["--num_validation_images", 1, "--resume_from_checkpoint", "latest"]
        return Started(processes, script, stuck_at, flag, *options)

    def finish(*arguments):
        result = start(*arguments).wait()
        assert result.returncode == 0, f"{rows} rows before the first kill\n{result.stderr}"

    rows, log, flag = random.randint(1, 10), tmp_path / "killed/metrics.jsonl", tmp_path / "writing"
    finish("whole")
    start("killed").kill_when(lambda: log.exists() and len(log.read_text().splitlines()) >= rows)
    start("killed", stuck_at="checkpoint-16", flag=flag).kill_when(flag.exists)
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    finish("killed")
    finish("alone", 1, 32)

    whole, killed, alone = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed", "alone")
    )
    assert killed == whole and len(whole) == 24
    evaluated = [row["step"] for row in whole if "fid_pixels" in row]
    assert evaluated == ([] if "--dataset_name" in data else [8, 16, 24])
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "killed")
    for a, b in zip(whole, alone, strict=True):
        for name in ("loss", "loss_generative", "loss_discriminative"):
            assert b[name] == pytest.approx(a[name], rel=1e-6), f"{name} of step {a['step']}"
        if "fid_pixels" in a:  # a byte more or less in a few pixels
            assert b["fid_pixels"] == pytest.approx(a["fid_pixels"], rel=1e-3)
