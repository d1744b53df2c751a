"""The benchmark of equal quality: what its settings mean, and what it recommends."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from conftest import TINY, randomize
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from sklearn.datasets import load_digits

from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel

SPEC = importlib.util.spec_from_file_location(
    "quality", Path(__file__).parents[2] / "benchmarks" / "quality.py"
)
quality = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(quality)


def row(setting: str, score: float, speed: float) -> dict:
    return {
        "setting": setting, "score": score, "scores": [score], "evaluations": 5.0, "images_a_second": speed,
    }  # fmt: skip


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


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the program; its rows by the settings' names, and its table."""
    monkeypatch.setattr(quality, "keep_freed_memory", lambda: None)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, words)])
        quality.main()
        rows = json.loads((tmp_path / "out/quality.json").read_text())
        return {row["setting"]: row for row in rows}, (tmp_path / "out/quality.md").read_text()

    return run


@pytest.mark.thorough
@pytest.mark.figures
def test_settings_of_a_pipeline_side_by_side(run, tmp_path):
    settings = ["heun:6", "euler:2", "diffusers-dpm:4:taylor=2", "heun:6:guided=2:interval"]
    rows, table = run(
        "digits", "digits", tmp_path / "out", "--settings", *settings,
        *"--num_samples 64 --repeats 2 --batch_size 32 --rounds 1".split(),
    )  # fmt: skip
    assert [*rows] == settings
    assert [row["evaluations"] for row in rows.values()] == [11, 2, 4, 11]
    assert rows["euler:2"]["score"] > 1.5 * rows["heun:6"]["score"]  # two steps are far too few
    for row in rows.values():
        first, second = row["scores"]
        assert first != second and row["score"] == (first + second) / 2
        assert row["images_a_second"] > 0
    assert table.count("`") == 2 * len(settings) and table.count("**`") == 1 and " ± " in table
    known = json.loads((tmp_path / "out/scores.json").read_text())
    assert [each["scores"] for each in known.values()] == [row["scores"] for row in rows.values()]
    for each in known.values():
        each["scores"] = [1.0, 2.0]  # what is there is not computed again
    (tmp_path / "out/scores.json").write_text(json.dumps(known))
    words = [*settings[:1], *"--num_samples 64 --repeats 2 --batch_size 32 --rounds 1".split()]
    assert run("digits", "digits", tmp_path / "out", "--settings", *words)[0]["heun:6"]["score"] == 1.5
    assert (tmp_path / "out/quality.png").stat().st_size > 10_000


def test_a_dit_pipeline_beside_it(run, tmp_path):
    vae = AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, latent_channels=3,
    )  # fmt: skip
    transformer = randomize(SDDiTTransformer2DModel(**TINY | {"num_classes": 10}))
    SDDiTPipeline(transformer, EDMHeunScheduler(), vae).save_pretrained(tmp_path / "ours")
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    DiTPipeline(theirs, vae, DDIMScheduler()).save_pretrained(tmp_path / "theirs")
    for i, digit in enumerate(load_digits().images[:40]):
        folder = tmp_path / "pictures" / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digit * 15).astype("uint8")).resize((16, 16)).save(folder / f"{i}.png")
    rows, _ = run(
        tmp_path / "ours", tmp_path / "pictures", tmp_path / "out", "--settings", "euler:2",
        "--dit", tmp_path / "theirs", "--dit_settings", "ddim:3", "dpm:2",
        *"--num_samples 16 --batch_size 16 --rounds 1".split(),
    )  # fmt: skip
    assert {name: row["evaluations"] for name, row in rows.items()} == {
        "euler:2": 2, "DiTPipeline-ddim:3": 3, "DiTPipeline-dpm:2": 2,
    }  # fmt: skip
