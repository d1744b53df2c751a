"""The pipeline that is ready to try: what the README's command leaves, in half precision."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from sddit_diffusers import DIGITS, SDDiTPipeline
from sddit_diffusers.pipelines.loading import load_pipeline
from sddit_diffusers.pipelines.sampling import sample
from sddit_diffusers.training.options import parse


def test_its_digits_are_read_as_such():
    """98 of 100 by a classifier of the real ones, as of what was trained."""
    real = load_digits()
    pipe = load_pipeline("digits")
    pipe.set_progress_bar_config(disable=True)
    labels = [i % 10 for i in range(100)]
    made = sample(pipe, range(100), labels, num_inference_steps=18)[..., 0].reshape(100, -1)
    read = SVC().fit(real.data * (255 / 16), real.target).predict(made.astype(float))
    assert np.mean(read == labels) >= 0.95


def test_it_is_of_the_command_without_options(monkeypatch):
    settings = json.loads((DIGITS / "training_config.json").read_text())
    assert settings == dataclasses.asdict(parse([]))


def test_it_is_small_and_in_half_precision():
    assert sum(path.stat().st_size for path in DIGITS.rglob("*")) < 3e6
    pipe = SDDiTPipeline.from_pretrained(DIGITS, dtype=torch.float16)
    for weight in load_pipeline("digits").transformer.parameters():
        assert weight.dtype == torch.float32 and torch.equal(weight, weight.half().float())
    assert pipe.transformer.dtype == torch.float16


def test_it_has_no_path_of_the_machine_that_made_it():
    for path in DIGITS.rglob("*.json"):
        assert "/" not in path.read_text(), path


def test_a_folder_of_its_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DIGITS, "digits")
    Path("digits/model_index.json").unlink()
    with pytest.raises(ValueError, match="pipeline 'digits' cannot be loaded: (?!there is no such folder)"):
        load_pipeline("digits")


def test_a_name_that_is_nowhere_is_told_in_plain_words():
    with pytest.raises(ValueError, match="'./digitz' cannot be loaded: there is no such folder.$"):
        load_pipeline("./digitz")
    with pytest.raises(
        ValueError, match=r"'digitz' cannot be loaded: there is no such folder, and the Hub .*\)\.$"
    ):
        load_pipeline("digitz")
