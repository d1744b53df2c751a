import json
import re

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler
from PIL import Image

from sddit_diffusers import plot
from sddit_diffusers.pipelines.sampling import draw_grid, path_grid, sample_grid
from sddit_diffusers.training import metrics as reporting
from sddit_diffusers.training.metrics import MetricsLog, draw_curves, read_metrics, smooth

pytestmark = pytest.mark.figures


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


def test_scores_have_panels_of_their_own(tmp_path):
    rows = [{"step": i, "loss_generative": 1.0} for i in range(20)]
    for row in rows[::5]:
        row |= {"fid_pixels": 9 / (row["step"] + 1), "recall_pixels": 0.5}
    draw_curves(rows, tmp_path / "with.png")
    draw_curves([{"step": 1, "loss_generative": 1.0}], tmp_path / "without.png")
    widths = [Image.open(tmp_path / name).width for name in ("with.png", "without.png")]
    assert widths == [1000, 500]


def test_auxiliary_losses_have_panels_of_their_own(tmp_path, monkeypatch):
    """Parts of the generative loss have none."""
    names = ["loss", "loss_generative", "loss_mae", "loss_masked", "loss_sra", "loss_dispersive"]
    titles = []
    monkeypatch.setattr(reporting.plt.Axes, "set_title", lambda self, title: titles.append(title))
    draw_curves([dict.fromkeys(names, -1.0) | {"step": i} for i in range(3)], tmp_path / "curves.png")
    assert titles == ["generative loss", "dispersive loss", "sra loss"]


def test_several_runs_are_drawn_in_one_figure(tmp_path, monkeypatch):
    for name, end in (("a", 3.0), ("b", 5.0)):
        (tmp_path / name).mkdir()
        log = MetricsLog(tmp_path / name / "metrics.jsonl", 0)
        for step in range(10):
            log.write({"step": step, "fid": end + 9 - step})
    monkeypatch.chdir(tmp_path)
    plot.main(["scores", "a", "b"])
    assert np.asarray(Image.open("scores.png").convert("L")).std() > 5
    lines = []
    monkeypatch.setattr(
        reporting.plt.Axes, "plot", lambda self, x, y, **style: lines.append((y, style["label"]))
    )
    monkeypatch.setattr(reporting.plt.Axes, "legend", lambda self: None)
    plot.main(["scores", "a", "b", "--metric", "fid", "--output", "again.png"])
    assert [label for _, label in lines] == ["a (3)", "b (5)"]
    np.testing.assert_array_equal(lines[1][0], 14 - np.arange(10.0))
    for arguments, message in [
        (["scores", "a", "--metric", "fdi"], "The run a has no 'fdi'; it has fid."),
        (["scores", "c"], "There is no c/metrics.jsonl"),
        (["grid", "a", "b"], "grid draws one pipeline, and 2 were named"),
        (["grid", "/none"], "The pipeline '/none' cannot be loaded"),
    ]:
        with pytest.raises(SystemExit, match=re.escape(message)):
            plot.main(arguments)


def test_a_path_shows_d_at_each_sigma(pipe):
    """The last column is the image itself, the first the mean that the network expects from noise alone."""
    grid = path_grid(pipe, columns=4, labels=[1, 3], num_inference_steps=4)
    assert grid.size == (14 + 7 * len("golden retriever, retriever") + 4 * 66, 18 + 2 * 66)
    found = {}

    def keep(pipe, i, t, tensors):
        x = tensors["latents"]
        found[i] = tensors["pred_original_sample"], float(pipe.scheduler.sigmas[i]), x
        return {}

    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    images = pipe([1, 3], generator=generators, num_inference_steps=4, callback_on_step_end=keep,
                  callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"]).images  # fmt: skip
    # Euler's step from sigma_max (Algorithm 2, line 8) leads from x towards D.
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=g.manual_seed(i)) for i, g in enumerate(generators)])
    denoised, sigma, after = found[0]
    following = found[1][1]
    torch.testing.assert_close(
        after, denoised + following / sigma * (80 * noise - denoised), rtol=1e-3, atol=1e-3
    )
    last = np.asarray(images[1].resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    tile = np.asarray(grid.crop((grid.width - 66, 18 + 66, grid.width - 2, 18 + 66 + 64)))
    assert np.abs(tile - last).max() <= 2
    first = pipe.decode(denoised)[0].resize((64, 64), Image.Resampling.BICUBIC)
    left = grid.width - 4 * 66
    tile = np.asarray(grid.crop((left, 18, left + 64, 18 + 64)))
    assert np.abs(tile - np.asarray(first).astype(int)).max() <= 2


def test_a_path_as_a_film_ends_in_the_samples(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "load_pipeline", lambda name: pipe)
    file = tmp_path / "path.webp"
    plot.main(
        [*"path anything --columns 3 --class_labels 1 3 --num_inference_steps 5 --output".split(), str(file)]
    )
    film = Image.open(file)
    assert film.n_frames == 5
    film.seek(4)
    last = np.asarray(film.convert("RGB")).astype(int)
    assert film.info["duration"] > 1000
    samples = sample_grid(pipe, columns=3, labels=[1, 3], num_inference_steps=5)
    assert film.size == samples.size and np.abs(last - np.asarray(samples)).mean() < 8  # lossy
    film.seek(0)
    assert np.abs(np.asarray(film.convert("RGB")).astype(int) - last).mean() > 16


def test_a_path_needs_a_scheduler_that_tells_d(pipe):
    pipe.scheduler = EDMDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EDMDPMSolverMultistepScheduler does not tell the denoised samples"):
        path_grid(pipe, labels=[1], num_inference_steps=3)
