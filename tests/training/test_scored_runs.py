"""Runs that score themselves."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import make_trainer, train

import train_sddit
from sddit_diffusers import evaluate, generate
from sddit_diffusers.data.pictures import ImageDataset
from sddit_diffusers.evaluation import judge
from sddit_diffusers.evaluation.classifiers import train_classifier
from sddit_diffusers.training.output import is_complete


@pytest.mark.thorough
def test_evaluation_scores_the_averaged_weights_and_changes_nothing(tmp_path, capsys):
    options = ["--max_train_steps", 5, "--evaluation_samples", 40]
    plain = train(tmp_path / "plain", *options)
    capsys.readouterr()
    scored = train(tmp_path / "scored", *options, "--evaluation_steps", 2, "--logging_steps", 2)
    assert [row["step"] for row in scored if "fid_pixels" in row] == [2, 4, 5]
    for row, other in zip(scored, [plain[1], plain[3], plain[4]], strict=True):
        assert {name: row[name] for name in other} == other
    last = {name: value for name, value in scored[-1].items() if name.endswith("_pixels")}
    assert f"Step 5: fid_pixels {last['fid_pixels']:.4g}, precision_pixels" in capsys.readouterr().err

    # The last row has the scores of the pipeline that is saved.
    command = ["--model", tmp_path / "scored", "--output_dir", tmp_path / "samples", "--num_samples", 40]
    generate.main([*map(str, command), "--num_inference_steps", "18", "--batch_size", "16"])
    command = [tmp_path / "samples", "digits", "--extractor", "pixels", "--output", tmp_path / "scores.json"]
    evaluate.main([*map(str, command), "--metrics", "fid", "precision", "recall"])
    found = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert {f"{name}_pixels": value for name, value in found.items()} == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize("labels", [True, False])
def test_pictures_of_any_size_are_scored_against_as_they_are_trained_on(tmp_path, labels):
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "pictures" / (str(i % 2) if labels else "")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8 + i % 3, 9 + i % 4), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    options = ["--dataset_name", tmp_path / "pictures", "--label_column", "label" if labels else ""]
    options += ["--evaluation_steps", 1, "--evaluation_samples", 6, "--max_train_steps", 1]
    metrics = train(tmp_path / "run", *options)
    view = make_trainer(tmp_path / "again", *options).results.judge.views[0]
    trained_on = ImageDataset(str(tmp_path / "pictures"), "image", "", 1, 8)
    expected = trained_on.__getitems__(list(range(24)))[0].flatten(1)
    found = view.reference.features.features[:, :64] * 3**0.5
    torch.testing.assert_close(found.sort(0).values, expected.sort(0).values)
    assert metrics[-1]["fid_pixels"] > 0


@pytest.mark.thorough
def test_several_extractors_score_the_same_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "train_classifier", partial(train_classifier, steps=5))
    options = ["--max_train_steps", 2, "--evaluation_steps", 2, "--evaluation_samples", 20]
    kinds = ["pixels", "classifier", "resnet"]
    together = train(tmp_path / "all", *options, "--evaluation_extractor", *kinds)[-1]
    alone, judges = {}, {}
    for kind in kinds:
        alone |= train(tmp_path / kind, *options, "--evaluation_extractor", kind)[-1]
        judges |= alone["judges"]
    assert together == alone | {"judges": judges} and len({*judges.values()}) == len(kinds)
    scores = {together[f"{name}_{kind}"] for name in ("fid", "precision", "recall") for kind in kinds}
    assert len(scores) > 6  # each sees with eyes of its own


def test_a_run_of_version_0_1_0_has_one_extractor_by_its_name(tmp_path):
    options = ["--evaluation_steps", 2, "--evaluation_samples", 4, "--checkpointing_steps", 1]
    train(tmp_path / "run", *options, "--max_train_steps", 2)
    path = tmp_path / "run/training_config.json"
    saved = json.loads(path.read_text())
    assert saved["evaluation_extractor"] == ["pixels"]
    path.write_text(json.dumps(saved | {"evaluation_extractor": "pixels", "output_dir": ""}))
    config = train_sddit.parse(["--config", str(path)])
    assert config.evaluation_extractor == ["pixels"]
    config.output_dir = str(tmp_path / "run")
    assert is_complete(config)
    with pytest.raises(SystemExit, match="2"):
        train_sddit.parse(["--evaluation_extractor", "pixels", "dinov2"])


def test_what_cannot_be_scored_stops_it_before_training(tmp_path, monkeypatch):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    options = ["--evaluation_steps", 1, "--evaluation_samples", 20, "--max_train_steps", 1]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="weights cannot be downloaded"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.hub, "download_url_to_file", no_network)
            train(tmp_path / "run", *options, "--evaluation_reference", tmp_path / "stats.npz",
                  "--evaluation_extractor", "inception")  # fmt: skip
    with pytest.raises(SystemExit, match="statistics of Inception's features, not of pixels"):
        train(tmp_path / "run", *options, "--evaluation_reference", tmp_path / "stats.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(SystemExit, match="statistics of 5 features for fid, not of 2048"):
        train(tmp_path / "run", *options, "--evaluation_reference", tmp_path / "other.npz",
              "--evaluation_extractor", "inception")  # fmt: skip
    np.savez(tmp_path / "one.npz", np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(SystemExit, match="1 image has no covariance"):
        train(tmp_path / "run", *options, "--evaluation_reference", tmp_path / "one.npz")
    with pytest.raises(SystemExit, match="trained on a reference that is a labelled dataset"):
        train(tmp_path / "run", *options, "--evaluation_extractor", "classifier", "--label_column", "")


def no_network(*arguments, **keywords):
    raise OSError("no network")


def test_each_process_must_have_a_sample_to_make(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.config.evaluation_steps, trainer.config.evaluation_samples = 1, 3
    trainer.accelerator.state._shared_state["num_processes"] = 4
    with pytest.raises(ValueError, match="evaluation_samples is 3; it must be at least 4, one a process"):
        trainer.results._open_judge()
