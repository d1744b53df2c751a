import json

import numpy as np
import pytest
import torch
from PIL import Image

from sddit_diffusers.reporting import MetricsLog, draw_curves, draw_grid, read_metrics, sample_grid


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


def test_grid_places_images_row_by_row():
    images = [Image.new("L", (8, 8), 10 * i) for i in range(6)]
    grid = np.asarray(draw_grid(images, ["a", "b"], columns=3).convert("L"))
    size = 8 * 6
    margin = grid.shape[1] - 3 * (size + 2)
    for i in range(6):
        row, column = divmod(i, 3)
        tile = grid[row * (size + 2) :, margin + column * (size + 2) :][:size, :size]
        assert (tile == 10 * i).all()


def test_sample_grid_covers_the_classes(pipe):
    grid = sample_grid(pipe, classes=3, columns=2, num_inference_steps=2)
    assert grid.height == 3 * (8 * 6 + 2)
    one = pipe([3], generator=[torch.Generator().manual_seed(5)], num_inference_steps=2).images[0]
    tile = grid.crop((grid.width - 50, 100, grid.width - 2, 148)).resize((8, 8), Image.Resampling.NEAREST)
    assert np.abs(np.asarray(tile).astype(int) - np.asarray(one).astype(int)).max() <= 1


def test_metrics_are_plain_json(tmp_path):
    MetricsLog(tmp_path / "m.jsonl", 0).write({"step": 1, "loss": 0.5})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == pytest.approx({"step": 1, "loss": 0.5})
