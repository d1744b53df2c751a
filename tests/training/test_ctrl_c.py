"""Ctrl-C: once saves and tells the command to go on with, twice leaves at once."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import Started
from small_runs import SCRIPT, SMALL, arguments, names

import train_sddit
from sddit_diffusers.training import command
from sddit_diffusers.training.metrics import read_metrics

RESUMED = "--resume_from_checkpoint latest"
# A run whose checkpoints beyond the first take a minute.
SLOW = """
import signal, time
import train_sddit
from sddit_diffusers.training.state import RunState

save = RunState.save

def slow(self, step):
    if step == 1:
        return save(self, step)
    print("saving", flush=True)
    time.sleep(60)

RunState.save = slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests
train_sddit.main()
"""


def start(log, *words):
    """A process whose output goes to a file, and which hears SIGINT, whatever started the tests."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, words)], stdout=file, stderr=file, env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip


def when(condition):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_begun(folder):
    """Two steps of it are done."""
    path = folder / "metrics.jsonl"
    return lambda: path.is_file() and path.read_text().count("\n") >= 2


@pytest.mark.process
def test_ctrl_c_saves_and_tells_the_very_command_to_go_on_with(tmp_path, capsys):
    out, log = tmp_path / "my out", tmp_path / "log"
    options = [*arguments(out, "--max_train_steps", 400), "--overwrite_output_dir"]
    process = start(log, SCRIPT, *options)
    when(has_begun(out))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT, log.read_text()
    told = log.read_text()
    assert f"To leave at once: Ctrl-C again, or kill -INT {process.pid}\n" in told and "Traceback" not in told
    step = int(told.split("Stopped by SIGINT after step ")[1].split()[0].strip(","))
    assert names(out, "checkpoint-*") == [f"checkpoint-{step}"]
    interpreter, script, *rest = shlex.split(told.split("Go on: ")[1])
    assert script == str(SCRIPT) and rest == [*options[:-1], "--resume_from_checkpoint", "latest"]
    train_sddit.main([*rest, "--max_train_steps", str(step + 2)])
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [*range(1, step + 3)]


@pytest.mark.process
@pytest.mark.parametrize("every", [0, 1])
def test_ctrl_c_twice_leaves_at_once_and_tells_what_is_saved(tmp_path, every):
    out, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text(SLOW)
    options = arguments(out, "--max_train_steps", 4000, "--checkpointing_steps", every)
    process = Started(1, script, *options)
    when(has_begun(out))
    os.kill(process.pids[0], signal.SIGINT)
    when(lambda: "saving" in Path(process.folder.name, "out").read_text())
    time.sleep(1.1)  # one within a second is the first, passed on
    begin = time.monotonic()
    os.kill(process.pids[0], signal.SIGINT)
    told = process.wait()
    assert time.monotonic() - begin < 30  # the rest of the saving takes a minute
    assert told.returncode == 128 + signal.SIGINT and "Traceback" not in told.stderr
    assert f"To leave at once: Ctrl-C again, or kill -INT {process.pids[0]}\n" in told.stderr
    expected = "nothing of it is saved. With --checkpointing_steps N it is saved every N steps"
    if every:
        expected = f"the last checkpoint is {out}/checkpoint-1. Go on: the same command with {RESUMED}"
    assert f"Left at once; {expected}\n" in told.stdout


@pytest.fixture
def started(monkeypatch):
    """As if this process had been started by a command line, whose program's options come after a `|`."""

    def start(line, launcher=""):
        head, _, options = line.partition(" | ")
        monkeypatch.setattr(sys, "orig_argv", [*head.split(), *options.split()])
        monkeypatch.setattr(sys, "argv", [head.split()[-1], *options.split()])
        parent = SimpleNamespace(cmdline=launcher.split)
        monkeypatch.setattr(command.psutil, "Process", lambda pid: parent)
        return command.command_to_go_on(train_sddit.parse([*SMALL, *options.split()]))

    monkeypatch.setattr(command.shutil, "which", lambda name: f"/env/bin/{name}")
    return start


@pytest.mark.parametrize(
    "line, launcher, expected",
    [
        ("python train_sddit.py | --seed 3", "bash", f"python train_sddit.py --seed 3 {RESUMED}"),
        ("python train_sddit.py", "bash", f"python train_sddit.py {RESUMED}"),
        ("/env/bin/python -m train_sddit | --seed 3", "", f"python -m train_sddit --seed 3 {RESUMED}"),
        ("/other/bin/python train_sddit.py", "", f"/other/bin/python train_sddit.py {RESUMED}"),
        (
            "/env/bin/python -u train_sddit.py | --seed 3",
            "/env/bin/python /env/bin/accelerate launch --num_processes 2 train_sddit.py --seed 3",
            f"accelerate launch --num_processes 2 train_sddit.py --seed 3 {RESUMED}",
        ),
        (
            "/env/bin/python train_sddit.py",
            "/env/bin/python -m torch.distributed.run --nproc_per_node=2 train_sddit.py",
            f"python -m torch.distributed.run --nproc_per_node=2 train_sddit.py {RESUMED}",
        ),
        (
            "python train_sddit.py | --resume-from-checkpoint out/checkpoint-3 --seed 3",
            "",
            f"python train_sddit.py --seed 3 {RESUMED}",
        ),
        ("python train_sddit.py | --overwrite_output_dir True", "", f"python train_sddit.py {RESUMED}"),
        (
            "python train_sddit.py | --overwrite_output_dir --seed=3",
            "",
            f"python train_sddit.py --seed=3 {RESUMED}",
        ),
        ("python -m sddit_diffusers.reproduce", "", f"the same command with {RESUMED}"),
    ],
)
def test_the_command_is_the_one_that_was_typed(started, line, launcher, expected):
    assert started(line, launcher) == expected


def test_the_command_of_one_program_for_all(monkeypatch, started):
    config = train_sddit.parse(SMALL)
    for words, expected in (
        (["train", "--seed", "3"], f"sddit train --seed 3 {RESUMED}"),
        (["app"], f"the same command with {RESUMED}"),
    ):
        monkeypatch.setattr(sys, "orig_argv", ["/env/bin/python", "/env/bin/sddit", *words])
        monkeypatch.setattr(sys, "argv", ["/env/bin/sddit", *words])
        monkeypatch.setattr(command.psutil, "Process", lambda pid: SimpleNamespace(cmdline=lambda: ["bash"]))
        assert command.command_to_go_on(config) == expected


def test_a_file_of_options_may_have_said_to_begin_anew(tmp_path, started):
    file = tmp_path / "options.json"
    file.write_text('{"overwrite_output_dir": true}')
    told = started(f"python train_sddit.py | --config {file}")
    assert told == f"python train_sddit.py --config {file} --overwrite_output_dir False {RESUMED}"


def test_other_options_than_those_of_the_process_are_not_guessed(monkeypatch, started):
    monkeypatch.setattr(sys, "orig_argv", ["python", "other.py", "--seed", "4"])
    monkeypatch.setattr(sys, "argv", ["train_sddit.py", "--seed", "3"])
    assert command.command_to_go_on(train_sddit.parse(SMALL)) == f"the same command with {RESUMED}"
