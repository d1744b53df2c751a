"""The program, from images to a table, against ADM's evaluator restated, and what each score sees."""

import json
import pickle
import re
from functools import partial

import adm
import numpy as np
import pytest
import torch
from bad_input import refusal
from conftest import randomize
from PIL import Image
from processes import launch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import Dinov2Config, Dinov2Model

from sddit_diffusers import evaluate
from sddit_diffusers.evaluation import features, judge
from sddit_diffusers.evaluation.catalogue import SCORES
from sddit_diffusers.evaluation.classifiers import train_classifier
from sddit_diffusers.evaluation.extractors import DinoExtractor, InceptionExtractor
from sddit_diffusers.evaluation.image_sets import open_images
from sddit_diffusers.evaluation.statistics import read_statistics

DIGITS = open_images("digits", label_column="label")


def pixels_of(rows):
    """Digits as an array `[n, 8, 8, 3]`."""
    return np.stack([DIGITS.read(range(row, row + 1))[0].permute(1, 2, 0).numpy() for row in rows])


def write(path, pixels, **arrays):
    np.savez(path, arr_0=pixels, **arrays)
    return path


def run(capsys, *arguments):
    """The scores of a run, and what it printed."""
    arguments = [str(argument) for argument in arguments]
    folder = next((a for a in arguments if a.endswith(".json")), None)
    capsys.readouterr()
    evaluate.main(arguments)
    printed = capsys.readouterr().out
    return json.loads(open(folder).read()) if folder else None, printed


def pictures(count, seed):
    """Smooth random pictures of 32 x 32, of ten kinds that differ in colour and size of detail."""
    rng = np.random.default_rng(seed)
    sizes = np.arange(count) % 10 + 2
    colours = np.random.default_rng(5).uniform(40, 215, (10, 3))
    images = []
    for size in sizes:
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).resize((32, 32))
        images.append(0.6 * np.asarray(noise) + 0.4 * colours[size - 2])
    return np.stack(images).astype(np.uint8)


@pytest.fixture
def narrow(monkeypatch):
    """Inception gives the first of its features: the roots of matrices of all 2,048 take a minute."""
    widths, forward = {"features": 60, "spatial": 49}, InceptionExtractor.forward

    def first(self, images):
        found = zip(self.features_list, forward(self, images), strict=True)
        return tuple(x[:, : widths.get(name)] for name, x in found)

    monkeypatch.setattr(InceptionExtractor, "forward", first)
    return widths


@pytest.mark.long
@pytest.mark.parametrize("count", [12, pytest.param(2000, marks=pytest.mark.slow)])
def test_equals_adms_evaluator(tmp_path, capsys, inception_weights, request, count):
    """All scores of an Inception of random weights, by features that torch-fidelity's own Inception gives."""
    full = count > 1000
    widths = {"features": 2048, "spatial": 2023} if full else request.getfixturevalue("narrow")
    sets = [pictures(count, 1), pictures(count - 3, 3)]
    paths = [write(tmp_path / f"{i}.npz", pixels) for i, pixels in enumerate(sets)]
    net = FeatureExtractorInceptionV3(
        "net", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights)
    )
    branch = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: branch.append(output))
    pool, logits, spatial = [], [], []
    for pixels in sets:
        branch.clear()
        images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        parts = [net(part) for part in images.split(50)]
        pool.append(torch.cat([part[0][:, : widths["features"]] for part in parts]).numpy())
        logits.append(torch.cat([part[1] for part in parts]).numpy())
        first_branch = torch.cat(branch).numpy()
        spatial.append(first_branch[:, :7].transpose(0, 2, 3, 1).reshape(len(pixels), -1))
        spatial[-1] = spatial[-1][:, : widths["spatial"]]
    expected = {
        "fid": adm.fid_of_features(*pool),
        "sfid": adm.fid_of_features(*spatial),
        "is": adm.inception_score(logits[0]),
    }
    if full:  # the covariances, as ADM has them
        expected["fid"] = adm.fid(*map(adm.statistics, pool))
        expected["sfid"] = adm.fid(*map(adm.statistics, spatial))
    expected["precision"], expected["recall"] = adm.precision_recall(*pool)

    options = [*paths, "--inception_weights", inception_weights, "--output", tmp_path / "scores.json"]
    record, printed = run(capsys, *options)
    assert {name: record["scores"][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert [record["scores"][name] for name in ("precision", "recall")] == [
        expected["precision"], expected["recall"],
    ]  # fmt: skip
    assert record["num_samples"] == count and record["num_reference_images"] == count - 3
    for name, value in record["scores"].items():
        assert re.search(
            rf"^{re.escape(SCORES[name].heading)} +{re.escape(f'{value:.5g}')} +{count:,}", printed, re.M
        )
    assert "not the published weights" in printed and f"{count:,} samples: published scores are of" in printed

    record, _ = run(capsys, *options, "--half", "--metrics", "precision", "recall")  # features from the cache
    half = adm.precision_recall(*pool, adm.half_distances)
    assert record["scores"] == {"precision": half[0], "recall": half[1]}


@pytest.mark.long
def test_a_set_scored_against_itself(tmp_path, capsys):
    path = write(tmp_path / "a.npz", pixels_of(range(300)))
    options = ["--extractor", "pixels", "--output", tmp_path / "scores.json"]
    record, printed = run(capsys, path, path, *options)
    scores = record["scores"]
    assert abs(scores["fid"]) < 1e-6 and scores["precision"] == scores["recall"] == 1
    assert scores.keys() == {"fid", "precision", "recall", "kid"}
    assert "compare with themselves alone" in printed


def changed(kind):
    """Real digits that nothing else is scored on, spoilt in one way."""
    rows = range(0, 1797, 2)
    pixels = pixels_of(rows)
    rng = np.random.default_rng(0)
    if kind == "noise":
        return (pixels + rng.normal(0, 40, pixels.shape[:3])[..., None]).clip(0, 255).astype(np.uint8)
    if kind == "a class dropped":
        return pixels[DIGITS.labels[::2] != 3]
    if kind == "an image repeated":
        return np.concatenate([pixels[:450], np.repeat(pixels[:1], 449, axis=0)])
    return pixels


@pytest.mark.thorough
def test_scores_see_what_they_should(tmp_path, capsys):
    """Noise, a lost class, a repeated image: each moves the scores that are to see it, and by how much."""
    reference = write(tmp_path / "reference.npz", pixels_of(range(1, 1797, 2)))
    found = {}
    for kind in ("nothing", "noise", "a class dropped", "an image repeated"):
        samples = write(tmp_path / "samples.npz", changed(kind))
        options = ["--extractor", "classifier", "--label_column", "label"]
        options += ["--metrics", "fid", "is", "precision", "recall"]
        record, _ = run(capsys, samples, "digits", *options, "--output", tmp_path / "scores.json")
        found[kind] = record["scores"]
        options = ["--extractor", "pixels", "--cache_dir", "none", "--output", tmp_path / "scores.json"]
        record, _ = run(capsys, samples, reference, *options)
        found[kind] |= {f"{name} of pixels": value for name, value in record["scores"].items()}
    clean, noise, dropped, repeated = found.values()
    for spoilt in (noise, dropped, repeated):
        assert spoilt["fid"] > 5 * clean["fid"] and spoilt["fid of pixels"] > 1.5 * clean["fid of pixels"]
        assert spoilt["kid of pixels"] > clean["kid of pixels"] + 0.001
        assert spoilt["is"] < clean["is"] - 0.2
    # Noise leaves the manifold of the real images.
    assert noise["precision"] < clean["precision"] - 0.2
    assert noise["precision of pixels"] < 0.5 * clean["precision of pixels"]
    # What is left of the classes, or of the images, is as good as before but covers less.
    assert dropped["is"] == pytest.approx(clean["is"] * 9 / 10, rel=0.03)
    for spoilt in (dropped, repeated):
        assert spoilt["precision of pixels"] > clean["precision of pixels"] - 0.02
        assert spoilt["recall of pixels"] < clean["recall of pixels"] - 0.05
        assert spoilt["recall"] < clean["recall"] - 0.04


def test_the_order_matters_for_the_inception_score_alone(tmp_path, capsys, monkeypatch):
    order = np.argsort(DIGITS.labels, kind="stable")
    by_class = pixels_of(np.tile(order, 3))  # of 5,000 images and more parts are scored
    monkeypatch.setattr(judge, "train_classifier", partial(train_classifier, steps=60))
    mixed = by_class[np.random.default_rng(0).permutation(len(by_class))]
    records, outputs = [], []
    for pixels in (by_class, mixed):
        path = write(tmp_path / "a.npz", pixels)
        options = ["--extractor", "classifier", "--label_column", "label", "--metrics", "fid", "is"]
        record, printed = run(capsys, path, "digits", *options, "--output", tmp_path / "scores.json")
        records.append(record["scores"])
        outputs.append(printed)
    assert records[0]["fid"] == pytest.approx(records[1]["fid"], abs=1e-8)
    assert records[0]["is"] < 0.9 * records[1]["is"]
    warned = float(re.search(r"sorted by class.*in a random order it is (\d+\.?\d*)", outputs[0]).group(1))
    assert warned == pytest.approx(records[1]["is"], rel=0.02) and "sorted" not in outputs[1]


@pytest.mark.thorough
@pytest.mark.process
def test_two_processes_score_as_one(tmp_path, capsys):
    path = write(tmp_path / "a.npz", pixels_of(range(0, 1797, 3)))
    options = [path, "digits", "--extractor", "pixels", "--batch_size", 50, "--output", tmp_path / "one.json"]
    one, _ = run(capsys, *options)
    options = [*options[:-1], tmp_path / "two.json", "--cache_dir", tmp_path / "cache"]
    result = launch(2, "-m", "sddit_diffusers.evaluate", *options)
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-4)  # KID is in float32
    assert two["scores"]["fid"] == pytest.approx(one["scores"]["fid"], rel=1e-9)
    assert result.stdout.count("FID ↓") == 1


def test_features_are_kept_by_content(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "a.npz", pixels_of(range(200)))
    options = ["--extractor", "pixels", "--cache_dir", tmp_path / "cache", "--metrics", "fid"]
    run(capsys, path, path, *options)
    calls, original = [], features.extract
    monkeypatch.setattr(features, "extract", lambda *arguments: calls.append(1) or original(*arguments))
    path = path.rename(tmp_path / "b.npz")
    run(capsys, path, path, *options)  # another name, the same content
    assert len(calls) == 0
    run(capsys, write(tmp_path / "b.npz", pixels_of(range(1, 201))), path, *options)
    assert len(calls) == 1


def distance_of_spreads(a, b):
    """Between Gaussians as if each feature were by itself, without roots of matrices."""
    spreads = [gaussian.covariance.diag().sqrt() for gaussian in (a, b)]
    return sum((x - y).square().sum().item() for x, y in ((a.mean, b.mean), spreads))


@pytest.mark.long
def test_saved_statistics_are_a_reference(tmp_path, capsys, monkeypatch, inception_weights):
    monkeypatch.setattr(judge, "frechet_distance", distance_of_spreads)
    paths = [write(tmp_path / f"{i}.npz", pictures(4, i)) for i in range(2)]
    weights = ["--inception_weights", inception_weights, "--output", tmp_path / "scores.json"]
    whole, _ = run(capsys, *paths, *weights, "--metrics", "fid", "is")
    _, printed = run(capsys, paths[1], "--save_stats", tmp_path / "stats.npz", *weights)
    assert "The statistics of" in printed and read_statistics(tmp_path / "stats.npz").keys() == {
        "fid",
        "sfid",
    }
    by_statistics, printed = run(capsys, paths[0], tmp_path / "stats.npz", *weights)
    assert by_statistics["scores"].keys() == {"fid", "sfid", "is"}
    for name in ("fid", "is"):
        assert by_statistics["scores"][name] == pytest.approx(whole["scores"][name], rel=1e-9)
    assert re.search(r"FID ↓ .* statistics$", printed, re.M)
    assert re.search(r"^[0-9a-f]{64}$", by_statistics["reference"]["sha256"])
    # As ADM's reference batch: statistics of more than its images, which serve precision and recall.
    with np.load(tmp_path / "stats.npz") as arrays:
        write(tmp_path / "adm.npz", pictures(4, 7), **arrays)
    batch, _ = run(capsys, paths[0], tmp_path / "adm.npz", *weights, "--metrics", "fid", "recall")
    assert batch["scores"].keys() == {"fid", "recall"}
    assert batch["scores"]["fid"] == pytest.approx(whole["scores"]["fid"], rel=1e-9)
    assert batch["num_reference_images"] == 4


def test_fd_dinov2_against_images_and_edm2s_statistics(tmp_path, capsys):
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    randomize(Dinov2Model(config)).save_pretrained(tmp_path / "dinov2")
    sets = [pictures(6, 1), pictures(5, 2)]
    paths = [write(tmp_path / f"{i}.npz", pixels) for i, pixels in enumerate(sets)]
    options = ["--fd_dinov2", "--dinov2", tmp_path / "dinov2", "--extractor", "pixels"]
    options += ["--metrics", "kid", "--output", tmp_path / "scores.json"]
    by_images, printed = run(capsys, *paths, *options)
    assert by_images["scores"].keys() == {"kid", "fd_dinov2"} and "FD-DINOv2 ↓" in printed
    extractor = DinoExtractor(
        "sddit-dinov2", ["features"], feature_extractor_weights_path=str(tmp_path / "dinov2")
    )
    features = [extractor(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))[0].numpy() for x in sets]
    expected = adm.fid_of_features(*features)
    assert by_images["scores"]["fd_dinov2"] == pytest.approx(expected, rel=1e-4)

    mean, covariance = adm.statistics(features[1])
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"fd_dinov2": {"mu": mean, "sigma": covariance}}))
    options = [
        "--metrics",
        "fd_dinov2",
        "--dinov2",
        tmp_path / "dinov2",
        "--output",
        tmp_path / "scores.json",
    ]
    by_statistics, _ = run(capsys, paths[0], tmp_path / "edm2.pkl", *options)
    assert by_statistics["scores"] == pytest.approx({"fd_dinov2": expected}, rel=1e-4)


def test_mistakes_have_one_line(tmp_path, capsys, inception_weights):
    samples = write(tmp_path / "a.npz", pixels_of(range(9)))
    few = write(tmp_path / "few.npz", pixels_of(range(3)))
    larger = write(tmp_path / "larger.npz", pictures(5, 0))
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    weights = ["--inception_weights", inception_weights]
    pixels = ["--extractor", "pixels"]
    for arguments, message in [
        ([], "SAMPLES are missing"),
        ([samples, *pixels], "There is nothing to score: fid needs a REFERENCE with images or mu and sigma"),
        ([samples, larger, *pixels], "larger.npz are 32 x 32, and the samples 8 x 8; --resolution"),
        ([samples, few, *pixels], "3 images have no 3 neighbours each; precision and recall need at least 4"),
        (
            [samples, tmp_path / "edm.npz", *weights, "--metrics", "fid", "sfid"],
            "sfid needs a REFERENCE with images or mu_s and sigma_s, and .*edm.npz has none",
        ),
        (
            [samples, tmp_path / "edm.npz", *weights, "--metrics", "recall"],
            "recall needs a REFERENCE with images, and .*edm.npz has none",
        ),
        (
            [samples, tmp_path / "edm.npz", "--fd_dinov2"],
            "fd_dinov2 needs a REFERENCE with images or mu_dinov2 and sigma_dinov2",
        ),
        ([samples, tmp_path / "edm.npz", *pixels], "statistics of Inception's features, not of pixels"),
        ([samples, samples, *pixels, "--metrics", "is"], "is needs the logits of a classifier"),
        ([samples, samples, *pixels, "--metrics", "sfid"], "sfid is a score of Inception's features"),
        ([samples, samples, "--metrics", "fdi"], "metrics is 'fdi'; it must be 'fid', 'sfid'"),
        (
            [samples, samples, "--extractor", "classifier"],
            "trained on a reference that is a labelled dataset",
        ),
        ([samples, samples, "--extractor", "vgg"], "extractor is 'vgg'; it must be 'inception'"),
        ([samples, samples, "--inception_weights", "/none"], "There are no Inception weights in /none"),
        ([samples, "--save_stats", "a.json", *weights], "its name must end in .npz"),
        (
            [samples, samples, "--output", "/none/a.json"],
            "output is '/none/a.json', whose folder is not there",
        ),
        (["/none", samples, *pixels], "There is no dataset folder /none"),
        ([samples, samples, "--extracter", "pixels"], "unknown option --extracter; nearest are --extractor"),
    ]:
        with refusal(capsys, *message.split(".*")):
            evaluate.main([str(argument) for argument in arguments])
