"""The runner of the first minutes on a GPU: what fits is run, what fails is named, and nothing is lost."""

import importlib
from types import SimpleNamespace

import pytest
from processes import ROOT


def benchmark(name):
    """A module of `benchmarks/`, whose modules find one another there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def gpu():
    return benchmark("gpu")


@pytest.fixture
def play(gpu):
    """Runs parts of (title, needs, limit, seconds that it takes or an error) by a clock that they move."""

    def play(seconds, *plays):
        now, files, given = [0.0], [], {}
        takes = {title: taken for title, _, _, taken in plays}

        def run(part, limit):
            given[part.title], taken = limit, takes[part.title]
            if isinstance(taken, Exception):
                now[0] += 5
                raise taken
            now[0] += min(taken, limit)
            return f"{part.title} says\n", "Stopped." if taken > limit else ""

        parts = [gpu.Part(title, [], needs, limit) for title, needs, limit, _ in plays]
        keep = lambda outcomes: files.append(gpu.report(outcomes, "on a GPU", "command"))  # noqa: E731
        outcomes = gpu.run_parts(parts, seconds, run, keep, clock=lambda: now[0])
        return SimpleNamespace(outcomes=outcomes, files=files, given=given)

    return play


def test_each_part_has_its_limit_or_what_is_left(play):
    played = play(100, ("one", 10, 60, 30), ("two", 10, 40, 50), ("three", 10, 60, 20))
    assert played.given == {"one": 60, "two": 40, "three": 30}
    assert [outcome.problem for outcome in played.outcomes.values()] == ["", "Stopped.", ""]
    assert [outcome.seconds for outcome in played.outcomes.values()] == [30, 40, 20]
    assert "two says" in played.files[-1]  # what it had by then


def test_what_does_not_fit_is_named_and_what_fits_goes_on(play):
    played = play(100, ("long", 10, 95, 95), ("large", 6, 60, 1), ("small", 5, 60, 1))
    assert {*played.given} == {"long", "small"}
    assert played.outcomes["large"].problem == "Not run: it needs 6 s, and 5 were left."
    assert played.outcomes["large"].seconds is None
    assert "**Not run: it needs 6 s, and 5 were left.**" in played.files[-1]


def test_a_part_that_fails_is_named_and_the_others_go_on(play):
    played = play(100, ("bad", 1, 60, RuntimeError("out of memory")), ("good", 1, 60, 1))
    assert "**Failed: RuntimeError: out of memory**\n\nIt took 5 s." in played.files[-1]
    assert "good says" in played.files[-1]


def test_there_is_a_file_after_each_part(play):
    played = play(100, ("one", 1, 60, 1), ("two", 1, 60, 1))
    first, second = played.files
    assert "one says" in first and "## two\n\n**Not run yet.**" in first
    assert "two says" in second and "Not run yet" not in second


@pytest.mark.process
@pytest.mark.parametrize(
    ("code", "text", "problem"),
    [
        ("print('| a |')", "| a |\n", ""),
        ("print('| a |'); raise ValueError('no\\nmemory')", "| a |\n", "Failed: memory"),
        ("print('| a |', flush=True); import time; time.sleep(60)", "| a |\n", "Stopped after 1 s"),
        ("print('{seconds}'); raise SystemExit(3)", "1\n", "Failed: 1"),
    ],
)
def test_processes_keep_what_they_printed(gpu, code, text, problem, capsys):
    printed, found = gpu.run_process(gpu.Part("part", ["-c", code], 0, 1), 1)
    assert printed == text and found.startswith(problem) and bool(found) == bool(problem)
    assert f"    {text}" in capsys.readouterr().err


def test_parts_run_what_there_is(gpu, tmp_path):
    """Programs, and presets whose parts take options that they have."""
    parser = benchmark("gpu_parts").parser()
    parts = [*gpu.parts_on_gpu(), *gpu.parts_on_cpu()]
    parts.append(gpu.training("latents", tmp_path / "gpu.md", 8, ["--max_train_steps", "3"]))
    for part in parts:
        assert part.needs <= part.limit
        program, *options = [argument.format(seconds=1) for argument in part.arguments]
        if program != "-m":
            assert program == str(ROOT / "benchmarks/gpu_parts.py")
            parser.parse_args(options)
    assert parser.parse_args(options).of_training == ["--max_train_steps", "3"]
