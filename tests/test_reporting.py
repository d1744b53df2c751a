import json

import numpy as np
import pytest
import torch
from PIL import Image

from sddit_diffusers.reporting import MetricsLog, draw_curves, draw_grid, read_metrics, sample_grid, smooth


def test_log_is_cut_to_the_step_resumed_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(1, 6):
        log.write({"step": step, "loss": step / 2})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    log = MetricsLog(path, 3)
    log.write({"step": 4, "loss": 9.0})
    assert read_metrics(path) == [{"step": i, "loss": i / 2} for i in (1, 2, 3)] + [{"step": 4, "loss": 9.0}]
    MetricsLog(path, 0)
    assert path.read_text() == ""


def test_curves_of_any_run_are_drawn(tmp_path):
    rows = [{"step": i, "loss_generative": 1 / (i + 1), "learning_rate": 1e-4} for i in range(120)]
    draw_curves(rows, tmp_path / "curves.png")
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 5
    draw_curves(rows[:1], tmp_path / "one.png")


def test_smoothing_equals_a_loop_and_keeps_lines():
    values = np.random.default_rng(0).normal(size=9)
    expected = [values[:1].mean(), values[:3].mean(), *(values[i - 2 : i + 3].mean() for i in range(2, 7))]
    expected += [values[6:].mean(), values[8:].mean()]
    np.testing.assert_allclose(smooth(values, 2), expected)
    np.testing.assert_allclose(smooth(np.arange(20.0), 5), np.arange(20.0))


def tile_of(grid, row, column, columns, size=64):
    left = grid.width - (columns - column) * (size + 2)
    return np.asarray(grid.crop((left, row * (size + 2), left + size, row * (size + 2) + size)))


def test_grid_places_images_row_by_row():
    grid = draw_grid([Image.new("L", (8, 8), 10 * i) for i in range(6)], ["a", "b"], columns=3)
    for i in range(6):
        assert (tile_of(grid, *divmod(i, 3), columns=3) == 10 * i).all()


def test_sample_grid_covers_the_classes_with_a_seed_an_image(pipe):
    grid = sample_grid(pipe, classes=3, columns=2, num_inference_steps=2)
    assert grid.height == 3 * 66
    # Of the four classes 0, 2 and 3 are shown; the last image has the seed 5.
    image = pipe([3], generator=[torch.Generator().manual_seed(5)], num_inference_steps=2).images[0]
    enlarged = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(tile_of(grid, 2, 1, columns=2) - enlarged).max() <= 2


def test_metrics_are_plain_json(tmp_path):
    MetricsLog(tmp_path / "m.jsonl", 0).write({"step": 1, "loss": 0.5})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == pytest.approx({"step": 1, "loss": 0.5})
