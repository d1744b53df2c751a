"""What a run says on its way: a bar on a terminal, plain lines in a log file."""

import re
import time

import pytest
from small_runs import train
from tqdm.auto import tqdm

from sddit_diffusers.launching import ProgressLines, bar


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told to."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def lines_of(clock, capsys, steps, seconds, **arguments):
    """The lines of so many steps in so many seconds."""
    with ProgressLines(total=steps, **arguments) as progress:
        for _ in range(steps):
            clock.now += seconds / steps
            progress.update()
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    "steps, seconds, fewest, most",
    [(20, 2, 1, 1), (1650, 110, 10, 10), (1650, 600, 10, 11), (1650, 1800, 12, 20), (40_000, 86_400, 20, 50)],
)
def test_lines_come_now_and_then(clock, capsys, steps, seconds, fewest, most):
    lines = lines_of(clock, capsys, steps, seconds)
    assert fewest <= len(lines) <= most
    assert lines[-1].startswith(f"step {steps}/{steps} (100%), ") and " in all" in lines[-1]
    assert sum(f"{steps}/{steps}" in line for line in lines) == 1


def test_a_line_tells_the_speed_the_time_left_and_the_losses(clock, capsys):
    progress = ProgressLines(total=100, initial=20)
    progress.set_postfix({"loss": "0.5"})
    clock.now += 16
    progress.update(40)
    assert capsys.readouterr().err == "step 60/100 (60%), 2.5 steps/s, 0:00:16 left, loss 0.5\n"
    progress.close()  # nothing more was done
    progress.close()
    assert capsys.readouterr().err == ""
    with ProgressLines(desc="reading", unit="batch") as progress:
        clock.now += 2
        progress.update(3)
    assert capsys.readouterr().err == "reading 3, 1.5 batches/s, 0:00:02 in all\n"


def test_what_leaves_nothing_is_told_of_only_while_it_takes_long(clock, capsys):
    assert lines_of(clock, capsys, 79, 9, desc="samples.png", leave=False) == []
    lines = lines_of(clock, capsys, 79, 120, desc="samples.png", leave=False)
    assert 5 <= len(lines) <= 10 and all(line.startswith("samples.png ") for line in lines)


def test_what_is_gone_through_is_counted(clock, capsys):
    assert [*bar("abc", unit="letter")] == ["a", "b", "c"]
    assert capsys.readouterr().err.startswith("letter 3/3 (100%), ")


def test_a_terminal_has_a_bar_whose_count_is_never_old(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with bar(total=10, unit="step") as progress:
        assert isinstance(progress, tqdm)
        progress.update()
        progress.refresh()  # as tqdm's monitor does
        assert "1/10" in capsys.readouterr().err


def test_a_log_file_has_a_handful_of_lines(tmp_path, capsys, monkeypatch):
    """Of the losses, the scores and the end; no bar, no samples.png."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # without the features of other tests
    train(tmp_path, "--max_train_steps", 12, "--evaluation_steps", 6, "--evaluation_samples", 8,
          "--evaluation_extractor", "pixels", "--num_validation_images", 10)  # fmt: skip
    found = capsys.readouterr().err
    assert "\r" not in found and "█" not in found and "%|" not in found
    kinds = (
        r"features of digits 1797/1797 \(100%\), ",
        r"Step 6: fid",
        r"Step 12: fid",
        r"step 12/12 \(100%\), [\d.]+ steps/s, 0:00:\d\d in all, loss \d",
    )
    for kind, line in zip(kinds, found.splitlines(), strict=True):
        assert re.match(kind, line), line
