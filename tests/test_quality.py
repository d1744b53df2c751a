"""The benchmark of sampling at equal quality, with few samples."""

import json
import sys
from pathlib import Path

import pytest
from conftest import TINY, randomize
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from sklearn.datasets import load_digits

from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import quality

    monkeypatch.setattr(quality, "keep_freed_memory", lambda: None)
    return quality


@pytest.fixture
def run(quality, monkeypatch, tmp_path):
    """Runs the program; its rows by the settings' names, and its table."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, words)])
        quality.main()
        rows = json.loads((tmp_path / "out/quality.json").read_text())
        return {row["setting"]: row for row in rows}, (tmp_path / "out/quality.md").read_text()

    return run


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


@pytest.mark.parametrize(
    "setting, told",
    [
        ("huen:4", "'huen'; there are heun, euler"),
        ("heun:0", "'0'; they must be a whole number from 1"),
        ("heun:4:guided=much", "'much'; it must be a number"),
        ("heun:4:fast", "'fast' of 'heun:4:fast' is unknown"),
    ],
)
def test_a_setting_that_there_is_not(quality, setting, told):
    with pytest.raises(ValueError, match=told):
        quality.read_setting(setting, quality.SOLVERS)


def test_the_fastest_within_the_tolerance_is_recommended(quality):
    rows = [
        {"setting": name, "score": score, "images_a_second": speed}
        for name, score, speed in [("best", 1.0, 1), ("near", 1.04, 5), ("poor", 1.2, 9), ("beaten", 1.3, 8)]
    ]
    assert quality.recommended(rows, 0.05)["setting"] == "near"
    assert quality.recommended(rows, 0.2)["setting"] == "poor"
    assert [row["setting"] for row in quality.pareto(rows)] == ["poor", "near", "best"]
    with pytest.raises(ValueError, match="tolerance nan"):
        quality.recommended(rows, float("nan"))
