"""The benchmark of equal quality: what its settings mean, and what it recommends."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "quality", Path(__file__).parents[2] / "benchmarks" / "quality.py"
)
quality = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(quality)


def row(setting: str, score: float, speed: float) -> dict:
    return {"setting": setting, "score": score, "evaluations": 5.0, "images_a_second": speed}


ROWS = [row("heun:40", 1.0, 2.0), row("heun:10", 1.04, 8.0), row("euler:20", 1.5, 7.0), row("euler:5", 4, 30)]


def test_a_setting_is_solver_steps_and_words():
    found = quality.read_setting("heun:10:bf16:fbc=0.2:guided=1.5:interval", quality.SOLVERS)
    assert found == ("heun", 10, {"bf16": 1, "fbc": 0.2, "guided": 1.5, "interval": 1})
    for setting in quality.SETTINGS:
        quality.read_setting(setting, quality.SOLVERS)
    for setting in quality.DIT_SETTINGS:
        quality.read_setting(setting, quality.DIT_SOLVERS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rk4:10", "'rk4'; there are heun"),
        ("heun", "'heun' are ''"),
        ("heun:0", "'0'; they must be a whole number"),
        ("heun:5:fbc=much", "'much'; it must be a number"),
        ("heun:5:fbc", "'fbc' of 'heun:5:fbc' is unknown"),
        ("heun:5:bf16=2", "'bf16=2' of"),
    ],
)
def test_a_wrong_setting_is_named(text, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")) as error:
        quality.read_setting(text, quality.SOLVERS)
    assert "\n" not in str(error.value)


def test_the_front_leaves_out_what_another_beats_in_both():
    assert [each["setting"] for each in quality.pareto(ROWS)] == ["euler:5", "heun:10", "heun:40"]


def test_the_fastest_within_the_tolerance_is_recommended():
    assert quality.recommended(ROWS, 0.05)["setting"] == "heun:10"
    assert quality.recommended(ROWS, 0.01)["setting"] == "heun:40"
    assert quality.recommended(ROWS, 3.0)["setting"] == "euler:5"
    with pytest.raises(ValueError, match="0 settings"):
        quality.recommended([], 0.05)
    with pytest.raises(ValueError, match="tolerance -1"):
        quality.recommended(ROWS, -1)


@pytest.mark.figures
def test_the_table_and_the_figure_show_what_is_recommended(tmp_path):
    chosen = quality.recommended(ROWS, 0.05)
    lines = quality.table(ROWS, chosen).splitlines()
    assert lines[2] == "| `heun:40` | 1.000 | 5 | 2.0 | • |"
    assert lines[3] == "| **`heun:10`** | 1.040 | 5 | 8.0 | • |"
    assert lines[4].endswith("| 7.0 |  |")
    for name, one in (("chosen.png", chosen), ("other.png", ROWS[0])):  # the ring is elsewhere
        quality.draw(ROWS, one, tmp_path / name)
    assert (tmp_path / "chosen.png").read_bytes() != (tmp_path / "other.png").read_bytes()
