import json
import resource
import shutil

import pytest
import torch

from sddit_diffusers.cli import differences
from sddit_diffusers.training.checkpointing import (
    DamagedCheckpointError,
    choose_checkpoint,
    find_checkpoints,
    load_state,
    read_about,
    save_checkpoint,
)


def save(folder, step, total_limit=0):
    state = {"value": torch.full((1000,), float(step)), "name": "adam"}
    return save_checkpoint(folder, step, state, {"run": {"seed": step}}, total_limit)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_latest_is_the_one_of_the_highest_step(tmp_path):
    for step in (90, 100, 20):
        save(tmp_path, step)
    assert [path.name for path in find_checkpoints(tmp_path)] == [
        "checkpoint-20",
        "checkpoint-90",
        "checkpoint-100",
    ]
    latest = choose_checkpoint(tmp_path, "latest")
    assert load_state(latest)["value"].tolist() == [100.0] * 1000 and load_state(latest)["name"] == "adam"
    assert read_about(latest)["step"] == 100 and read_about(latest)["run"] == {"seed": 100}
    assert choose_checkpoint(tmp_path, str(tmp_path / "checkpoint-20")) == tmp_path / "checkpoint-20"


def test_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, total_limit=2)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]


def test_a_step_that_is_saved_again_replaces_the_first(tmp_path):
    save(tmp_path, 3)
    save_checkpoint(tmp_path, 3, {"value": 7}, {})
    assert load_state(tmp_path / "checkpoint-3") == {"value": 7} and names(tmp_path) == ["checkpoint-3"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path, 2, {"value": lambda: None}, {})
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """A limit on the size of files stands for the disk."""
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["checkpoint-1"]
    assert choose_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"


def test_what_a_kill_leaves_is_no_checkpoint_and_goes_with_the_next(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-2.tmp")
    assert choose_checkpoint(tmp_path, "latest").name == "checkpoint-1"
    save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def cut(folder):
    path = folder / "state.pt"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder):
    data = bytearray((folder / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "state.pt").write_bytes(data)


DAMAGES = {
    "cut": cut,
    "flipped": flip,
    "no state": lambda folder: (folder / "state.pt").unlink(),
    "no description": lambda folder: (folder / "checkpoint.json").unlink(),
    "half a description": lambda folder: (folder / "checkpoint.json").write_text('{"step": 3, "st'),
    "another description": lambda folder: (folder / "checkpoint.json").write_text(json.dumps({"step": 3})),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_left_out_with_a_warning(tmp_path, damage):
    for step in (1, 2, 3):
        save(tmp_path, step)
    damage(tmp_path / "checkpoint-3")
    with pytest.warns(UserWarning, match="checkpoint-3 is damaged: .* It is left out"):
        assert choose_checkpoint(tmp_path, "latest").name == "checkpoint-2"
    with pytest.raises(DamagedCheckpointError, match="checkpoint-3 is damaged"):
        choose_checkpoint(tmp_path, str(tmp_path / "checkpoint-3"))
    for step in (1, 2):
        damage(tmp_path / f"checkpoint-{step}")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="None of the 3 checkpoints .* is whole"):
        choose_checkpoint(tmp_path, "latest")


def test_a_missing_checkpoint_is_named_but_latest_may_be_none(tmp_path):
    assert choose_checkpoint(tmp_path, "latest") is None
    with pytest.raises(ValueError, match="There is no checkpoint nowhere/checkpoint-3"):
        choose_checkpoint(tmp_path, "nowhere/checkpoint-3")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, 1, {"value": print}, {})
    with pytest.raises(Exception, match="print"):
        load_state(folder)


def test_differences_are_named():
    assert differences(
        {"seed": 1, "model": {"layers": 4, "heads": 2}}, {"seed": 1, "model": {"layers": 6}}
    ) == [
        "model heads: 2 there, None here",
        "model layers: 4 there, 6 here",
    ]
    assert differences({"seed": 1}, {"seed": 1}) == []
