"""Signals save the run and end it."""

import signal

import pytest
from accelerate.state import AcceleratorState
from small_runs import make_trainer, names, train

from sddit_diffusers.training.results import Results
from sddit_diffusers.training.trainer import Trainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_leaves(tmp_path, capsys, monkeypatch, number):
    whole = train(tmp_path / "a", "--max_train_steps", 6)
    handler, train_step = signal.getsignal(number), Trainer.train_step

    def interrupted(self, step, data, read):
        if step == 3:
            signal.raise_signal(number)
        return train_step(self, step, data, read)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path / "b", "--max_train_steps", 6)
    assert stopped.value.code == 128 + number
    assert f"Stopped by {number.name} after step 4" in capsys.readouterr().out
    assert signal.getsignal(number) == handler
    assert not (tmp_path / "b/model_index.json").exists()
    AcceleratorState._reset_state(True)
    assert train(tmp_path / "b", "--max_train_steps", 6, "--resume_from_checkpoint", "latest") == whole


@pytest.fixture
def heard():
    """Signals as they are in a terminal: what starts the tests may have them ignored."""
    earlier = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_save_and_leave(tmp_path, capsys, heard, number):
    trainer, handler = make_trainer(tmp_path, "--max_train_steps", 6), signal.getsignal(number)
    step = trainer.train_step
    trainer.train_step = lambda i, *others: (i == 2 and signal.raise_signal(number), step(i, *others))[1]
    with pytest.raises(SystemExit) as stopped:
        trainer.run()
    assert stopped.value.code == 128 + number and signal.getsignal(number) == handler
    assert f"Stopped by {number.name} after step 3" in capsys.readouterr().out
    assert names(tmp_path, "checkpoint-*") == ["checkpoint-3"]


def test_a_second_ctrl_c_leaves_at_once(tmp_path, heard):
    trainer = make_trainer(tmp_path, "--max_train_steps", 6)

    def train_step(i, data, read):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # as a launcher passes it on
        trainer.signals.time -= 2
        signal.raise_signal(signal.SIGINT)

    trainer.train_step = train_step
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def test_what_nohup_ignores_stays_ignored(tmp_path):
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with make_trainer(tmp_path).signals.caught():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_a_signal_within_the_last_save_is_told_of(tmp_path, capsys, monkeypatch):
    save = Results.save

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        save(*arguments)

    monkeypatch.setattr(Results, "save", interrupted)
    train(tmp_path, "--max_train_steps", 1)
    assert "SIGTERM came at the end: the run is complete" in capsys.readouterr().out
    assert (tmp_path / "model_index.json").is_file()
