"""Runs of two processes, killed at random moments and resumed, against one that nobody disturbed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_latents

import train_sddit
from sddit_diffusers.training.metrics import read_metrics

# Launches one run after the other, by forking what has imported torch already, as a launcher would start it;
# and kills it as a machine that is taken away does: all processes, at once, whatever they are at.
DRIVER = """
import io, json, os, random, shutil, signal, socket, sys, time
from pathlib import Path
import torch
import train_sddit
from sddit_diffusers import checkpointing

torch.set_num_threads(1)

def stuck(state, file, flag, step):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    if f"checkpoint-{step}" in file.name:
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        flag.touch()
        time.sleep(60)
    file.write(buffer.getvalue())

def child(rank, processes, port, arguments, flag, writing):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_PORT=str(port),
                      LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1")
    if writing:
        checkpointing._save = lambda state, file: stuck(state, file, flag, writing)
    train_sddit.main(arguments)

def launch(processes, arguments, rows=0, writing=0):
    folder = Path(arguments[arguments.index("--output_dir") + 1])
    flag = folder.with_suffix(".writing")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(processes):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            try:
                child(rank, processes, port, arguments, flag, writing)
                code = 0
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
            finally:
                os._exit(code)
    deadline = time.monotonic() + 100
    while rows or writing:
        metrics = folder / "metrics.jsonl"
        if flag.exists() or rows and metrics.exists() and len(metrics.read_text().splitlines()) >= rows:
            time.sleep(random.uniform(0, 0.05))
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            break
        assert time.monotonic() < deadline and os.waitpid(pids[0], os.WNOHANG)[0] == 0, "it ended by itself"
        time.sleep(0.005)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert set(codes) == {-signal.SIGKILL if rows or writing else 0}, codes

for job in json.loads(sys.argv[1]):
    if "copy" in job:
        shutil.copytree(*job["copy"])
    else:
        launch(**job)
"""


@pytest.fixture(params=["digits", "latents"])
def data(request, tmp_path):
    """The options that choose the data."""
    network = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, num_decoder_layers=1,
                   decoder_num_attention_heads=2, decoder_attention_head_dim=8)  # fmt: skip
    options = ["--num_prototypes", "32", "--head_hidden_dim", "16", "--head_bottleneck_dim", "8"]
    if request.param == "latents":
        write_latents(tmp_path / "data", 300, shard_size=64)
        network |= {"in_channels": 2, "sample_size": 2, "patch_size": 1}
        options += ["--dataset_name", str(tmp_path / "data"), "--vae", "none", "--evaluation_steps", "0"]
    else:
        options += ["--evaluation_steps", "8", "--evaluation_samples", "20"]
    return [*options, "--transformer", json.dumps(network)]


def test_killed_twice_it_ends_as_an_undisturbed_run(tmp_path, data):
    def run(name, processes=2, batch=16, **kill):
        arguments = [*data, "--output_dir", str(tmp_path / name), "--train_batch_size", str(batch)]
        arguments += ["--max_train_steps", "24", "--checkpointing_steps", "4", "--learning_rate", "3e-4"]
        arguments += ["--num_validation_images", "1", "--resume_from_checkpoint", "latest"]
        return {"processes": processes, "arguments": arguments, **kill}

    jobs = [
        run("whole"),
        run("killed", rows=random.randint(1, 10)),
        run("killed", writing=16),
        {"copy": [str(tmp_path / "killed"), str(tmp_path / "alone")]},
        run("killed"),
        run("alone", processes=1, batch=32),
    ]
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(jobs)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        cwd=Path(train_sddit.__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"{jobs[1]['rows']} rows before the first kill\n{result.stderr}"
    assert (tmp_path / "killed.writing").exists()
    whole, killed, alone = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed", "alone")
    )
    assert killed == whole and len(whole) == 24
    evaluated = [row["step"] for row in whole if "fid_pixels" in row]
    assert evaluated == ([] if "--dataset_name" in data else [8, 16, 24])
    weights = [
        (tmp_path / name / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("whole", "killed")
    ]
    assert weights[0] == weights[1]
    for a, b in zip(whole, alone, strict=True):
        for name in ("loss", "loss_generative", "loss_discriminative"):
            assert b[name] == pytest.approx(a[name], rel=1e-6), f"{name} of step {a['step']}"
        if "fid_pixels" in a:  # a byte more or less in a few pixels
            assert b["fid_pixels"] == pytest.approx(a["fid_pixels"], rel=1e-3)
