"""Every method with every process and auxiliary loss: trained, saved, loaded and sampled, or refused.

The losses that go with any network meet each process with one of the methods.
"""

import json
from itertools import product

import pytest
from bad_input import refusal
from small_runs import HEAD, NETWORK, SMALL, train

import distill_sddit
import train_sddit
from sddit_diffusers import SDDiTPipeline
from sddit_diffusers.training.auxiliaries import AUXILIARIES
from sddit_diffusers.training.distillation import OBJECTIVES
from sddit_diffusers.training.methods import METHODS
from sddit_diffusers.training.metrics import read_metrics
from sddit_diffusers.training.options import parse
from sddit_diffusers.training.processes import PREDICTIONS, PROCESSES

# L_D compares [CLS] and patches of SD-DiT's encoder.
REFUSED = {("discrimination", method) for method in METHODS if method != "sddit"}


def trios():
    for (i, method), (j, process), (k, auxiliary) in product(
        enumerate(METHODS), enumerate(PROCESSES), enumerate(["none", *AUXILIARIES])
    ):
        if k < 2 or (i + j + k) % len(PROCESSES) == 0:
            yield method, process, auxiliary


@pytest.mark.parametrize(("method", "process", "auxiliary"), trios())
def test_every_pair(method, process, auxiliary, tmp_path, capsys):
    network = METHODS[method].network(NETWORK | {"num_layers": 3})
    options = [*(SMALL if auxiliary == "discrimination" else SMALL[len(HEAD) :])]
    options += ["--method", method, "--process", process, "--auxiliary", auxiliary, "--max_train_steps", "2"]
    options += ["--transformer", json.dumps(network), "--output_dir", str(tmp_path)]
    if (auxiliary, method) in REFUSED:
        with refusal(capsys, auxiliary, method, untouched=tmp_path):
            train_sddit.main(options)
        return
    train_sddit.main(options)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    if auxiliary != "none":
        assert all(row["loss"] != row["loss_generative"] for row in metrics)
    pipe = SDDiTPipeline.from_pretrained(tmp_path)
    assert type(pipe.transformer) is METHODS[method].transformer
    assert pipe.scheduler.to_json_string() == PROCESSES[process].build(parse(options)).to_json_string()
    images = pipe([1, 2], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 1, 8, 8) and images.isfinite().all() and images.std() > 0


def distillations():
    for (i, method), (j, process), (k, objective) in product(
        enumerate(METHODS), enumerate(PROCESSES), enumerate(OBJECTIVES)
    ):
        if (i + j + k) % len(OBJECTIVES) == 0:  # a pair has one of them; each meets all values of both
            yield method, process, objective


@pytest.mark.parametrize(("method", "process", "objective"), distillations())
def test_every_pair_is_distilled(method, process, objective, tmp_path):
    network = METHODS[method].network(NETWORK | {"num_layers": 3})
    options = [*SMALL[len(HEAD) :], "--method", method, "--process", process, "--auxiliary", "none"]
    options += ["--max_train_steps", "1", "--output_dir", str(tmp_path / "parent")]
    train_sddit.main([*options, "--transformer", json.dumps(network)])
    child = tmp_path / objective
    options = ["--model", tmp_path / "parent", "--objective", objective, "--num_inference_steps", 3]
    options += ["--max_train_steps", 2, "--train_batch_size", 4, "--evaluation_steps", 0]
    distill_sddit.main([*map(str, [*options, "--output_dir", child])])
    pipe = SDDiTPipeline.from_pretrained(child)
    assert pipe.scheduler.config.num_inference_steps == 3
    images = pipe([1, 2], output_type="pt").images
    assert images.isfinite().all() and images.std() > 0


INTERPOLANTS = ["linear", "gvp", "vp"]


@pytest.mark.parametrize(("process", "prediction"), [*product(INTERPOLANTS, PREDICTIONS)])
def test_every_prediction(process, prediction, tmp_path):
    places = INTERPOLANTS.index(process) + [*PREDICTIONS].index(prediction)
    weighting = ["none", "velocity", "likelihood"][places % 3]  # each path has each of them
    options = [*SMALL[len(HEAD) :], "--method", "dit", "--process", process, "--prediction", prediction]
    options += ["--loss_weighting", weighting, "--max_train_steps", "2", "--output_dir", str(tmp_path)]
    network = METHODS["dit"].network(NETWORK)
    train_sddit.main([*options, "--transformer", json.dumps(network)])
    pipe = SDDiTPipeline.from_pretrained(tmp_path)
    assert pipe.scheduler.config.prediction_type == PREDICTIONS[prediction]
    images = pipe([1, 2], num_inference_steps=2, output_type="pt").images
    assert images.isfinite().all() and images.std() > 0


def test_a_run_goes_on_with_its_prediction_alone(tmp_path):
    options = ["--method", "maskdit", "--process", "linear", "--prediction"]
    train(tmp_path, *options, "noise", "--max_train_steps", 1, "--checkpointing_steps", 1)
    going_on = ["--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    with pytest.raises(SystemExit, match="prediction: noise there, velocity here"):
        train(tmp_path, *options, "velocity", *going_on)
    assert len(train(tmp_path, *options, "noise", *going_on)) == 2
