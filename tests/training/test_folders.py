"""A folder and the runs in it: what is kept, what is replaced, what goes on."""

import json
import os

import pytest
import torch
from accelerate.state import AcceleratorState
from bad_input import contents, refusal
from safetensors import SafetensorError
from small_runs import SMALL, make_trainer, names, train, weights_of

from sddit_diffusers import SDDiTPipeline
from sddit_diffusers.training import checkpointing, results
from sddit_diffusers.training.checkpointing import (
    choose_checkpoint,
    find_checkpoints,
    load_state,
    save_checkpoint,
    set_aside,
)
from sddit_diffusers.training.metrics import read_metrics
from sddit_diffusers.training.options import parse
from sddit_diffusers.training.output import is_complete
from sddit_diffusers.training.trainer import MetricsLog


def test_links_in_the_folder_are_replaced_and_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    folder = tmp_path / "run"
    folder.mkdir()
    files_of_a_run = ["samples.png", "samples-1.png", "curves.png", "training_config.json", "metrics.jsonl"]
    files_of_a_run += ["pipeline_sddit.py", "README.md", "model_index.json.tmp", ".samples.png.tmp"]
    for name in files_of_a_run:
        (tmp_path / "mine" / name).write_text("precious")
        (folder / name).symlink_to(tmp_path / "mine" / name)
    for name in ("transformer", "scheduler", "checkpoint-2", ".checkpoint-2.tmp"):
        (tmp_path / "mine" / name).mkdir()
        (folder / name).symlink_to(tmp_path / "mine" / name)
    before = contents(tmp_path / "mine")
    options = ["--num_validation_images", 1, "--validation_steps", 1, "--checkpointing_steps", 2]
    train(folder, "--max_train_steps", 2, *options, "--overwrite_output_dir")
    assert contents(tmp_path / "mine") == before
    for name in files_of_a_run[:5]:
        assert not (folder / name).is_symlink(), name


def test_a_model_is_not_replaced_unless_it_is_asked_for(tmp_path, capsys, monkeypatch):
    train(tmp_path, "--max_train_steps", 2, "--num_validation_images", 1)
    before = contents(tmp_path)
    for options in ([], ["--resume_from_checkpoint", "latest"]):
        with refusal(capsys, "choose another --output_dir", "--overwrite_output_dir", untouched=tmp_path):
            train(tmp_path, "--max_train_steps", 3, *options)

    def fails(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(results, "write_card", fails)
        with pytest.raises(SystemExit, match=f"No space left on device: '{tmp_path}"):
            train(tmp_path, "--max_train_steps", 3, "--overwrite_output_dir")
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    assert len(train(tmp_path, "--max_train_steps", 3, "--overwrite_output_dir")) == 3
    config = json.loads((tmp_path / "training_config.json").read_text())
    assert config["max_train_steps"] == 3 and not config["overwrite_output_dir"]
    assert not (tmp_path / "unfinished").exists() and not (tmp_path / "samples.png").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_new_run_killed_twice_leaves_the_old_model_and_goes_on(tmp_path):
    train(tmp_path, "--max_train_steps", 2)
    old, whole = (
        weights_of(tmp_path),
        train(tmp_path / "whole", "--max_train_steps", 4, "--learning_rate", 1e-3),
    )
    options = ["--max_train_steps", 4, "--learning_rate", 1e-3, "--checkpointing_steps", 1]
    for how in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]):
        trainer = make_trainer(tmp_path, *options, *how)
        trainer.finish = lambda: None
        step = trainer.train_step
        trainer.train_step = lambda i, *others, step=step: step(i, *others) if i % 2 == 0 else stop()
        with pytest.raises(Killed):
            trainer.run()
        AcceleratorState._reset_state(True)
        assert weights_of(tmp_path) == old and len(read_metrics(tmp_path / "metrics.jsonl")) == 2
        if how[0] == "--overwrite_output_dir":  # it gets over its second step
            checkpoint = tmp_path / "checkpoint-1"
            assert checkpoint.is_dir()
    assert train(tmp_path, *options, "--resume_from_checkpoint", "latest") == whole
    assert weights_of(tmp_path) == weights_of(tmp_path / "whole")


class Killed(BaseException):
    pass


def stop():
    raise Killed


def save(folder, step, limit=0):
    return save_checkpoint(folder, step, {"value": step}, {}, limit)


def test_what_was_just_written_is_kept(tmp_path):
    for step in (100, 200):
        save(tmp_path, step)
    (tmp_path / "checkpoint-200/state.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="checkpoint-200 is damaged"):
        assert choose_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    save(tmp_path, 150, limit=1)
    with pytest.warns(UserWarning, match="checkpoint-200 is damaged"):
        assert choose_checkpoint(tmp_path, "latest").name == "checkpoint-150"


def test_abandoned_checkpoints_are_set_aside_and_never_chosen(tmp_path):
    for again in ("", "-2"):
        for step in (100, 200, 300):
            save(tmp_path, step)
        renamed = set_aside(tmp_path, 100)
        assert [path.name for path in renamed] == [f"abandoned-checkpoint-{n}{again}" for n in (300, 200)]
        assert choose_checkpoint(tmp_path, "latest").name == "checkpoint-100"
        assert set_aside(tmp_path, 100) == []
    save(tmp_path, 150, limit=1)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-150"]
    assert load_state(tmp_path / "abandoned-checkpoint-300") == {"value": 300}


def test_a_run_that_goes_back_leaves_later_checkpoints_behind(tmp_path, capsys):
    train(tmp_path, "--max_train_steps", 6, "--checkpointing_steps", 2)
    options = ["--max_train_steps", 6, "--checkpointing_steps", 100, "--checkpoints_total_limit", 1]
    trainer = make_trainer(tmp_path, *options, "--resume_from_checkpoint", tmp_path / "checkpoint-2")
    trainer.train_step = lambda *_: stop()
    with pytest.raises(Killed):
        trainer.run()
    assert "set aside" in capsys.readouterr().out
    assert names(tmp_path, "*checkpoint*") == [
        "abandoned-checkpoint-4",
        "abandoned-checkpoint-6",
        "checkpoint-2",
    ]
    AcceleratorState._reset_state(True)
    train(tmp_path, *options, "--resume_from_checkpoint", "latest")
    assert names(tmp_path, "checkpoint*") == ["checkpoint-6"]


def test_weights_of_the_last_step_that_are_not_finite_replace_nothing(tmp_path):
    train(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 1)
    model = weights_of(tmp_path)
    options = ["--learning_rate", 1e300, "--resume_from_checkpoint", "latest"]
    message = (
        "Step 3 has made weights that are not finite.*transformer.*The last checkpoint is .*checkpoint-2"
    )
    for more in ([], ["--checkpointing_steps", 1]):
        with pytest.raises(SystemExit, match=message):
            train(tmp_path, "--max_train_steps", 3, *options, *more)
        AcceleratorState._reset_state(True)
        assert weights_of(tmp_path) == model
        assert names(tmp_path, "checkpoint-*") == ["checkpoint-1", "checkpoint-2"]


def test_samples_that_are_not_finite_cost_the_picture_alone(tmp_path, monkeypatch):
    def fails(*arguments, **keywords):
        raise FloatingPointError("image 3 (seed 17) is not finite")

    monkeypatch.setattr(results, "sample_grid", fails)
    with pytest.raises(SystemExit, match="The pipeline is in .* without samples.png: image 3 .seed 17"):
        train(tmp_path / "a", "--max_train_steps", 2, "--num_validation_images", 1)
    assert SDDiTPipeline.from_pretrained(tmp_path / "a")
    AcceleratorState._reset_state(True)
    with pytest.raises(
        SystemExit, match="image 3 .seed 17. is not finite The last checkpoint is .*checkpoint-1"
    ):
        train(tmp_path / "b", "--max_train_steps", 2, "--num_validation_images", 1, "--validation_steps", 1)


def test_a_full_disk_stops_it_with_the_earlier_checkpoints(tmp_path, monkeypatch):
    def full(state, file):
        if "checkpoint-4" in file.name:
            raise OSError(28, "No space left on device", file.name)
        torch.save(state, file)

    monkeypatch.setattr(checkpointing, "_save", full)
    with pytest.raises(SystemExit, match="error: .*No space left on device"):
        train(tmp_path, "--max_train_steps", 8, "--checkpointing_steps", 2)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_a_full_disk_at_the_end_costs_nothing(tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(SDDiTPipeline, "save_pretrained", full)
        with pytest.raises(SystemExit, match="The pipeline cannot be written: .*No space left"):
            train(tmp_path, "--max_train_steps", 3, "--checkpointing_steps", 100)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    train(tmp_path, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "model_index.json").exists()


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(os, "O_NOFOLLOW", 0)
    with pytest.raises(OSError, match="No space left on device: .*metrics.jsonl"):
        log.write({"step": 1})


def test_a_run_of_a_version_with_fewer_options_is_complete(tmp_path):
    train(tmp_path, "--max_train_steps", 2)
    config = parse([*SMALL, "--output_dir", str(tmp_path), "--max_train_steps", "2"])
    path = tmp_path / "training_config.json"
    settings = json.loads(path.read_text())
    for name in ("process", "auxiliary"):
        del settings[name]
    path.write_text(json.dumps(settings))
    assert is_complete(config)
    path.write_text(json.dumps(settings | {"seed": 1}))
    with pytest.raises(ValueError, match="begun with other settings: seed: 1 there, 0 here"):
        is_complete(config)
