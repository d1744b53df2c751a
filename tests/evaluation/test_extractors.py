import re
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
from accelerate import Accelerator
from conftest import Touch, randomize
from damages import DAMAGES
from safetensors.torch import load, load_file, save
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import Dinov2Config, Dinov2Model

from sddit_diffusers.evaluation import extractors, judge
from sddit_diffusers.evaluation.classifiers import train_classifier
from sddit_diffusers.evaluation.extractors import (
    ClassifierExtractor,
    DinoExtractor,
    InceptionExtractor,
    PixelExtractor,
    find_inception,
)
from sddit_diffusers.evaluation.image_sets import open_images
from sddit_diffusers.evaluation.scores import Gaussian, frechet_distance, kernel_distance

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 20, 24), dtype=np.uint8))
ALL = ["features", "logits", "spatial"]


def inception(path, names=ALL):
    return InceptionExtractor("sddit-inception", names, feature_extractor_weights_path=str(path))


def resized_as_tensorflow_1(images, size):
    """Bilinear, with the corners of the pixels, not their middles, at whole numbers."""
    result = images.numpy().astype(np.float64)
    for axis in (2, 3):
        length = result.shape[axis]
        places = np.arange(size) * length / size
        low = np.floor(places).astype(int)
        weight = (places - low).reshape([-1 if i == axis else 1 for i in range(4)])
        high = np.minimum(low + 1, length - 1)
        result = result.take(low, axis) * (1 - weight) + result.take(high, axis) * weight
    return torch.from_numpy(result).float()


@torch.no_grad()
def test_inceptions_features_are_adms(inception_weights):
    net = FeatureExtractorInceptionV3("net", ["2048"], feature_extractor_weights_path=str(inception_weights))
    x = (resized_as_tensorflow_1(IMAGES, 299) - 128) / 128
    names = """Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2
    Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c"""
    for name in names.split():
        if name == "Mixed_6d":
            first_branch = net.Mixed_6d.branch1x1(x).numpy()
        x = getattr(net, name)(x)
    pool = x.mean((2, 3))
    rows = [  # channels last
        [first_branch[i, channel, y, z] for y in range(17) for z in range(17) for channel in range(7)]
        for i in range(3)
    ]
    features, logits, spatial = inception(inception_weights)(IMAGES)
    torch.testing.assert_close(features, pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, pool @ net.fc.weight.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(spatial, torch.tensor(np.array(rows)), rtol=1e-4, atol=1e-5)
    assert spatial.shape == (3, 2023) and spatial.std() > 0.01


def test_weights_are_found_by_path_in_the_cache_or_by_download(inception_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert find_inception(str(inception_weights)) == inception_weights
    with pytest.raises(ValueError, match="There are no Inception weights in /none"):
        find_inception("/none")

    def unreachable(url, path, hash_prefix):
        raise urllib.error.URLError("no network")

    def downloaded(url, path, hash_prefix):
        assert hash_prefix == "6726825d" and "6726825d" in url
        open(path, "wb").write(inception_weights.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ValueError, match="cannot be downloaded from http.*no network.*--inception_weights"):
        find_inception()
    monkeypatch.setattr(torch.hub, "download_url_to_file", downloaded)
    path = find_inception()
    assert path.name == "weights-inception-2015-12-05-6726825d.pth" and tmp_path in path.parents
    with pytest.raises(ValueError, match="6726825d.pth is damaged: remove it"):
        find_inception()  # random weights have another hash
    extractor = inception(path, ["features"])
    assert not extractor.is_published
    monkeypatch.setattr(extractors, "_INCEPTION_SHA256", extractor.identity.removeprefix("inception-")[:8])
    assert extractor.is_published and find_inception() == path


def test_no_pickle_runs_code(tmp_path):
    flag = tmp_path / "was run"
    torch.save({"fc.weight": Touch(flag)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth does not hold the weights of Inception v3"):
        inception(tmp_path / "a.pth")
    assert not flag.exists()
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="b.pth does not hold the weights of Inception v3"):
        inception(tmp_path / "b.pth")


@torch.no_grad()
def test_dinov2_is_the_original(tmp_path):
    """Its positions are interpolated by the scale (16 + 0.1) / trained side, and not as transformers does."""
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
    )
    model = randomize(Dinov2Model(config)).eval()
    model.save_pretrained(tmp_path)
    extractor = DinoExtractor("sddit-dinov2", ["features"], feature_extractor_weights_path=str(tmp_path))

    pixels = F.interpolate(IMAGES.float() / 255, (224, 224), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (pixels - mean) / std
    grid = model.embeddings.position_embeddings[:, 1:].reshape(1, 5, 5, 24).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(16.1 / 5, 16.1 / 5), mode="bicubic")
    positions = torch.cat(
        [model.embeddings.position_embeddings[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1
    )
    tokens = torch.cat(
        [model.embeddings.cls_token.expand(3, -1, -1), model.embeddings.patch_embeddings(pixels)], dim=1
    )
    encoded = model.encoder(tokens + positions).last_hidden_state
    expected = model.layernorm(encoded)[:, 0]
    (features,) = extractor(IMAGES)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert (model.embeddings.interpolate_pos_encoding(tokens, 224, 224) - positions).abs().max() > 0.01
    with pytest.raises(ValueError, match="DINOv2 cannot be loaded from /none"):
        DinoExtractor("sddit-dinov2", ["features"], feature_extractor_weights_path="/none")


def test_grey_pixels_are_as_far_apart_as_in_one_channel():
    grey = IMAGES[:2, :1, :8, :8]
    (features,) = PixelExtractor("sddit-pixels", ["features"])(grey.expand(-1, 3, -1, -1))
    one_channel = grey.flatten(1).float() / 127.5 - 1
    torch.testing.assert_close(torch.cdist(features, features), torch.cdist(one_channel, one_channel))
    (features,) = PixelExtractor("sddit-pixels", ["features"])(IMAGES)
    assert features.shape == (3, 3 * 16 * 16)


@pytest.fixture(scope="module")
def digits():
    return open_images("digits", label_column="label")


@pytest.mark.long
def test_the_classifier_learns_is_cached_and_is_the_same_again(digits, tmp_path, capsys):
    path = train_classifier(digits, tmp_path / "a", steps=60)
    first = load_file(path)
    assert "right" in capsys.readouterr().err
    extractor = ClassifierExtractor(
        "sddit-classifier", ["features", "logits"], feature_extractor_weights_path=str(path)
    )
    features, logits = extractor(digits.read(range(300)))
    assert features.shape == (300, 128)
    assert (logits.argmax(1).numpy() == digits.labels[:300]).mean() > 0.8
    written = path.stat().st_mtime_ns
    assert train_classifier(digits, tmp_path / "a", steps=60) == path and path.stat().st_mtime_ns == written
    again = load_file(train_classifier(digits, tmp_path / "b", steps=60))
    assert all(torch.equal(again[name], first[name]) for name in first)
    with pytest.raises(ValueError, match="needs labelled pictures, and digits has no labels"):
        train_classifier(open_images("digits"), tmp_path)


@pytest.mark.long
def test_the_residual_classifier_learns_and_is_another(digits, tmp_path):
    path = train_classifier(digits, tmp_path, steps=60, kind="resnet")
    names = ["features", "logits"]
    held_out = ClassifierExtractor("sddit-resnet", names, feature_extractor_weights_path=str(path))
    features, logits = held_out(digits.read(range(300)))
    assert features.shape == (300, 128) and held_out.identity.startswith("resnet-")
    assert (logits.argmax(1).numpy() == digits.labels[:300]).mean() > 0.8
    for kind, of in (("classifier", "resnet"), ("resnet", "classifier")):
        other = train_classifier(digits, tmp_path, steps=2, kind=of)
        with pytest.raises(ValueError, match="does not hold a classifier's weights"):
            ClassifierExtractor(f"sddit-{kind}", names, feature_extractor_weights_path=str(other))


@pytest.mark.thorough
def test_torch_fidelity_knows_them_by_name(digits):
    class Part(torch.utils.data.Dataset):
        def __init__(self, start):
            self.start = start

        def __len__(self):
            return 400

        def __getitem__(self, i):
            if i >= len(self):
                raise IndexError(i)
            return digits.read(range(self.start + i, self.start + i + 1))[0]

    theirs = torch_fidelity.calculate_metrics(
        input1=Part(0), input2=Part(800), feature_extractor="sddit-pixels", fid=True, kid=True, cuda=False,
        kid_subset_size=400, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    extractor = PixelExtractor("sddit-pixels", ["features"])
    a, b = (extractor(digits.read(range(start, start + 400)))[0] for start in (0, 800))
    assert frechet_distance(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-4
    )
    assert kernel_distance(a, b) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_classifier_is_trained_again(digits, tmp_path, capsys, damage):
    path = train_classifier(digits, tmp_path, steps=2)
    weights = load(path.read_bytes())  # and no map of a file that is to change
    damage(path)
    capsys.readouterr()
    assert train_classifier(digits, tmp_path, steps=2) == path
    torch.testing.assert_close(load_file(path), weights, rtol=0, atol=0)
    assert re.search(rf"^{re.escape(str(path))} is damaged or .*; it is made again", capsys.readouterr().err)


def test_a_classifier_of_other_data_under_the_name_is_trained_again(digits, tmp_path, capsys):
    path = train_classifier(digits, tmp_path, steps=2)
    weights = load(path.read_bytes())  # and no map of a file that is to change
    path.write_bytes(train_classifier(digits, tmp_path, steps=3).read_bytes())
    torch.testing.assert_close(
        load_file(train_classifier(digits, tmp_path, steps=2)), weights, rtol=0, atol=0
    )
    assert "its hash is another" in capsys.readouterr().err


def test_weights_of_something_else_are_no_classifier(tmp_path):
    for content in (b"", b"x" * 100, save({"head.bias": torch.zeros(3)}), save({"x": torch.zeros(3)})):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="a.safetensors does not hold a classifier's weights"):
            ClassifierExtractor(
                "sddit-classifier", ["features"],
                feature_extractor_weights_path=str(tmp_path / "a.safetensors"),
            )  # fmt: skip


def test_all_extractors_of_a_judge_see_the_same_pictures(monkeypatch):
    """Of a folder with parts, those of the part that a classifier learns from."""
    opened = []
    monkeypatch.setattr(judge, "View", lambda *arguments: opened.append((arguments[1], arguments[5])))
    for kinds in (["pixels", "classifier"], ["pixels", "inception"]):
        judge.Judge("folder", kinds, (8, 8), 4, "image", "kind", None)
    assert opened == [("pixels", "kind"), ("classifier", "kind"), ("pixels", ""), ("inception", "")]


def test_a_judge_is_known_by_its_weights_and_its_pictures(tmp_path, monkeypatch):
    """Scores of two compare only if both are the same."""
    monkeypatch.setattr(judge, "default_cache", lambda: tmp_path)
    np.savez(tmp_path / "a.npz", arr_0=np.arange(384, dtype=np.uint8).reshape(2, 8, 8, 3))
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    for name in ("c", "d"):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(2048, float(name == "d")), sigma=np.eye(2048))

    def identity(reference: str, weights: str) -> str:
        extractor = PixelExtractor("sddit-pixels", ["features"])
        extractor.identity = weights
        monkeypatch.setattr(judge, "build_extractor", lambda *arguments: extractor)
        arguments = (8, 8), 2, "", "", Accelerator(cpu=True)
        return judge.Judge(str(tmp_path / reference), ["inception"], *arguments).identities["inception"]

    seen = {identity(f"{name}.npz", weights) for name in "abcd" for weights in ("one", "two")}
    assert len(seen) == 8 and {identity("a.npz", "one"), identity("c.npz", "two")} <= seen


def test_a_sample_that_is_not_finite_is_told_of_as_such(monkeypatch, inception_weights):
    """The first too, where no image has features yet; a run saves a checkpoint of it."""

    def sample(*arguments):
        raise FloatingPointError("The image of seed 0 is not finite.")

    accelerator = Accelerator(cpu=True)
    extractor = judge.build_extractor("inception", str(inception_weights), None, None, accelerator)
    monkeypatch.setattr(judge, "View", lambda *arguments: SimpleNamespace(extractor=extractor))
    monkeypatch.setattr(judge, "sample", sample)
    monkeypatch.setattr(judge, "class_of", lambda *arguments: 0)
    with pytest.raises(FloatingPointError, match="The image of seed 0"):
        judge.Judge("folder", ["inception"], (8, 8), 4, "image", "", accelerator)(None, 2)
