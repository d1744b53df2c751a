"""Samples and curves in TensorBoard, wandb and what else takes pictures."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, WandBTracker
from PIL import Image
from small_runs import arguments, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_sddit
from sddit_diffusers.training.trackers import log_images
from sddit_diffusers.training.trainer import Trainer

OPTIONS = ["--max_train_steps", 3, "--validation_steps", 1, "--num_validation_images", 10]


@pytest.mark.thorough
@pytest.mark.figures
def test_tensorboard_has_the_samples_and_the_curves(tmp_path):
    """At each validation step and at the end, as they are in the folder."""
    train(tmp_path, *OPTIONS, "--report_to", "tensorboard")
    (folder,) = {path.parent for path in (tmp_path / "sddit").glob("events.out.tfevents*")}
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {"samples", "curves"}
    for name in ("samples", "curves"):
        assert [event.step for event in events.Images(name)] == [1, 2, 3]
    for event, file in zip(events.Images("samples"), ("samples-1", "samples-2", "samples"), strict=True):
        shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert np.array_equal(shown, np.asarray(Image.open(tmp_path / f"{file}.png").convert("RGB")))
    curves = [Image.open(io.BytesIO(event.encoded_image_string)) for event in events.Images("curves")]
    last = Image.open(tmp_path / "curves.png").convert("RGB")
    assert np.array_equal(np.asarray(curves[-1]), np.asarray(last))
    assert not np.array_equal(*map(np.asarray, curves[:2]))
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_wandb_has_them_too(tmp_path, monkeypatch):
    """By a stand-in of wandb, under accelerate's own tracker."""
    logged, settings = [], {}
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    config = SimpleNamespace(update=lambda values, **_: settings.update(values))
    wandb = SimpleNamespace(init=lambda **_: run, config=config, Image=lambda image: image.size)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracker = WandBTracker("sddit")
    Trainer(train_sddit.parse(arguments(tmp_path, *OPTIONS)), Accelerator(log_with=tracker)).run()
    pictures = [(step, *values) for step, values in logged if {"samples", "curves"} & values.keys()]
    assert pictures == [(step, name) for step in (1, 2, 3) for name in ("curves", "samples")]
    (sizes,) = [values["samples"] for step, values in logged if step == 3 and "samples" in values]
    assert sizes == [Image.open(tmp_path / "samples.png").size]
    assert [step for step, _ in logged] == sorted(step for step, _ in logged)  # wandb drops what goes back
    assert settings["max_train_steps"] == 3


def test_without_samples_there_are_the_curves(tmp_path):
    train(tmp_path, *OPTIONS, "--report_to", "tensorboard", "--num_validation_images", 0)
    (folder,) = {path.parent for path in (tmp_path / "sddit").glob("events.out.tfevents*")}
    assert EventAccumulator(str(folder)).Reload().Tags()["images"] == ["curves"]


def test_trackers_get_pictures_as_they_take_them():
    """One by one where a list is none, and none where there is no way."""

    class Tracker(GeneralTracker):
        requires_logging_directory = False
        tracker = None

        def __init__(self, name):
            self.name = name

    class OfOne(Tracker):
        def log_images(self, values, step):
            assert step == 5 and values["samples"].mode == "RGB"
            got.append(self.name)

    got, trackers = [], [Tracker("mlflow"), OfOne("clearml"), OfOne("aim")]
    log_images(SimpleNamespace(trackers=trackers), {"samples": Image.new("L", (4, 4))}, 5)
    assert got == ["clearml", "aim"]
