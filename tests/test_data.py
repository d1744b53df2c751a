import io
import time

import datasets
import numpy as np
import pytest
import torch
from conftest import global_batch
from PIL import Image
from sklearn.datasets import load_digits

from sddit_diffusers.data import (
    BatchSampler,
    ImageDataset,
    UnreadableImageError,
    center_crop,
    generator_for,
    prefetch,
)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder, columns, features=None):
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / "train.parquet"))
    return str(folder)


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


FEATURES = datasets.Features(img=datasets.Image(), kind=datasets.ClassLabel(names=["cat", "dog", "eel"]))


def test_digits_are_scikit_learns():
    dataset, digits = ImageDataset("digits", "image", "label", 1, 8), load_digits()
    images, labels = dataset.__getitems__([0, 7, 1796])
    expected = torch.tensor(digits.images[[0, 7, 1796]]).unsqueeze(1) / 8 - 1
    assert images.shape == (3, 1, 8, 8) and (images - expected).abs().max() < 0.5 / 127.5 + 1e-6
    assert labels.tolist() == digits.target[[0, 7, 1796]].tolist()
    assert len(dataset) == 1797 and dataset.num_classes == 10 and dataset.id2label[3] == "3"


def test_a_folder_of_parquet(tmp_path, pictures):
    columns = {"img": [Image.fromarray(picture) for picture in pictures], "kind": [0, 1, 2, 2, 1, 0]}
    dataset = ImageDataset(write_parquet(tmp_path / "a", columns, FEATURES), "img", "kind", 3, 8)
    images, labels = dataset.__getitems__([4, 1])
    torch.testing.assert_close(images, torch.tensor(pictures[[4, 1]]).permute(0, 3, 1, 2) / 127.5 - 1)
    assert labels.tolist() == [1, 1] and dataset.id2label == {0: "cat", 1: "dog", 2: "eel"}


def test_a_folder_of_pictures_by_class(tmp_path, pictures):
    for i, picture in enumerate(pictures):
        folder = tmp_path / "train" / ["cat", "dog"][i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{i}.png")
    dataset = ImageDataset(str(tmp_path), "image", "label", 1, 4)
    images, labels = dataset.__getitems__(list(range(6)))
    assert images.shape == (6, 1, 4, 4) and sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert dataset.id2label == {0: "cat", 1: "dog"}


def test_plain_integers_and_strings_are_labels(tmp_path, pictures):
    files = [png(picture) for picture in pictures]
    numbers = write_parquet(tmp_path / "n", {"image": files, "label": [0, 4, 1, 1, 2, 0]})
    dataset = ImageDataset(numbers, "image", "label", 3, 8)
    assert dataset.num_classes == 5 and dataset.id2label is None
    names = write_parquet(tmp_path / "s", {"image": files, "label": ["b", "a", "c", "a", "a", "b"]})
    dataset = ImageDataset(names, "image", "label", 3, 8)
    assert dataset.id2label == {0: "a", 1: "b", 2: "c"} and dataset.labels.tolist() == [1, 0, 2, 0, 0, 1]
    dataset = ImageDataset(names, "image", "", 3, 8)
    assert dataset.num_classes == 0 and dataset.__getitems__([0])[1] is None


def test_center_crop():
    gradient = np.tile(np.arange(160, dtype=np.uint8)[None, :], (64, 1))
    cropped = np.asarray(center_crop(Image.fromarray(gradient), 16)).astype(float)
    assert cropped.shape == (16, 16)
    # The middle 64 of 160 columns, four to one: their means, up to bicubic's edges.
    expected = np.arange(48, 112).reshape(16, 4).mean(1)
    np.testing.assert_allclose(cropped[8], expected, atol=1)
    image = Image.fromarray(gradient[:16, :16])
    assert center_crop(image, 16) is image


def sampler(rank=0, processes=1, batch_size=4, accumulation=1, start=0, stop=10, size=23, seed=0):
    return BatchSampler(size, batch_size, accumulation, rank, processes, seed, start, stop)


def test_each_epoch_sees_each_row_at_most_once_in_another_order():
    steps = list(sampler(stop=15))
    epochs = [sum(steps[i : i + 5], []) for i in (0, 5, 10)]
    for epoch in epochs:
        assert len(set(epoch)) == 20  # of 23: what is dropped is less than a batch
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({row for epoch in epochs for row in epoch}) == 23
    assert list(sampler(stop=15, seed=1)) != steps


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_the_batch_of_a_step_does_not_depend_on_how_it_is_split(processes, accumulation):
    whole = list(sampler(batch_size=8, stop=6))
    b = 8 // processes // accumulation
    parts = [list(sampler(rank, processes, b, accumulation, stop=6)) for rank in range(processes)]
    for step in range(6):
        assert global_batch(parts, step, accumulation) == whole[step]


def test_begins_at_any_step():
    assert list(sampler(start=7, stop=12)) == list(sampler(stop=12))[7:]


def test_reading_leaves_the_global_generator_alone(tmp_path, pictures):
    dataset = ImageDataset("digits", "image", "label", 1, 8)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    images, labels = next(dataset.batches(sampler(size=1797)))
    assert images.shape == (4, 1, 8, 8) and labels.shape == (4,)
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_give_the_same_batches():
    here, there = (
        list(ImageDataset("digits", "image", "label", 1, 8, workers).batches(sampler(size=1797, stop=3)))
        for workers in (0, 2)
    )
    for (a, la), (b, lb) in zip(here, there, strict=True):
        assert torch.equal(a, b) and torch.equal(la, lb)


def test_generators_of_different_counters_differ():
    draws = [
        torch.rand(4, generator=generator_for(*key)).tolist()
        for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    ]
    assert len({tuple(draw) for draw in draws}) == 4
    assert torch.rand(4, generator=generator_for(0, 0, 1)).tolist() == draws[1]


def test_too_small_a_dataset_is_named():
    with pytest.raises(ValueError, match="has 23 rows, fewer than one global batch of 24"):
        sampler(processes=2, batch_size=4, accumulation=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("./nowhere", "img", "kind", 3, 8), "There is no dataset folder ./nowhere"),
        ((None, "image", "kind", 3, 8), "has no column 'image'; its columns are img, kind"),
        ((None, "img", "label", 3, 8), "has no column 'label'; its columns are img, kind"),
        ((None, "kind", "kind", 3, 8), "Column 'kind' of .* holds no pictures"),
        ((None, "img", "img", 3, 8), "Column 'img' of .* labels are integers or strings"),
        (
            (None, "img", "kind", 4, 8),
            "The network takes 4 channels, as latents have, and .* is no folder of latents",
        ),
    ],
)
def test_bad_sources_are_named(tmp_path, pictures, arguments, message):
    columns = {"img": [Image.fromarray(picture) for picture in pictures], "kind": [0, 1, 2, 2, 1, 0]}
    folder = write_parquet(tmp_path / "a", columns, FEATURES)
    with pytest.raises(ValueError, match=message):
        ImageDataset(arguments[0] or folder, *arguments[1:])


def test_missing_dataset_is_named(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="The dataset 'nobody/nothing' cannot be loaded"):
        ImageDataset("nobody/nothing", "image", "label", 3, 8)


def test_an_unreadable_picture_is_named_by_its_row(tmp_path, pictures):
    files = [png(picture) for picture in pictures]
    files[4] = files[4][:60]
    dataset = ImageDataset(
        write_parquet(tmp_path / "a", {"image": files, "label": [0] * 6}), "image", "label", 3, 8
    )
    dataset.__getitems__([0, 3])
    with pytest.raises(ValueError, match="Row 4 of .* cannot be read as a picture"):
        dataset.__getitems__([3, 4])


def test_a_label_out_of_range_is_named_by_its_row(tmp_path, pictures):
    files = [png(picture) for picture in pictures]
    folder = write_parquet(tmp_path / "a", {"image": files, "label": [0, 1, -1, 0, 0, 0]})
    with pytest.raises(ValueError, match="Row 2 of .* has the label -1; allowed are 0 to 1"):
        ImageDataset(folder, "image", "label", 3, 8)


def test_prefetch_reads_ahead_and_no_further():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    ahead = prefetch(items(), depth=3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert made == [0, 1, 2, 3, 4]  # the one given, three that wait, and the one in hand
    assert list(ahead) == list(range(1, 20))


def test_prefetch_passes_errors_on_and_closes_what_it_reads():
    closed = []

    def items():
        try:
            yield 1
            raise UnreadableImageError("row 7")
        finally:
            closed.append(True)

    ahead = prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(UnreadableImageError, match="row 7"):
        next(ahead)
    ahead = prefetch(items())
    next(ahead)
    ahead.close()
    assert closed == [True, True]
