import pytest
import torch

from sddit_diffusers.checkpointing import find_checkpoints, load_checkpoint, save_checkpoint


def test_latest_is_the_one_of_the_highest_step(tmp_path):
    for step in (90, 100, 20):
        save_checkpoint(tmp_path, step, {"value": torch.tensor(step)})
    assert [path.name for path in find_checkpoints(tmp_path)] == [
        "checkpoint-20",
        "checkpoint-90",
        "checkpoint-100",
    ]
    assert load_checkpoint(tmp_path, "latest") == {"step": 100, "value": torch.tensor(100)}
    assert load_checkpoint(tmp_path, str(tmp_path / "checkpoint-20"))["step"] == 20


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, {})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path, 2, {"value": lambda: None})
    assert load_checkpoint(tmp_path, "latest")["step"] == 1
    save_checkpoint(tmp_path, 2, {})
    assert load_checkpoint(tmp_path, "latest")["step"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("name", ["latest", "nowhere/checkpoint-3"])
def test_missing_checkpoint_is_named(tmp_path, name):
    with pytest.raises(ValueError, match="There is no checkpoint .*checkpoint-"):
        load_checkpoint(tmp_path, name)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    torch.save({"step": 1, "value": print}, tmp_path / "checkpoint-1" / "state.pt")
    with pytest.raises(Exception, match="print"):
        load_checkpoint(tmp_path, "latest")
