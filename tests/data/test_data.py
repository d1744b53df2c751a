import io
import json
import math
import time
import zipfile

import datasets
import numpy as np
import pytest
import torch
from conftest import global_batch
from PIL import Image
from sklearn.datasets import load_digits

from sddit_diffusers.data import order
from sddit_diffusers.data.order import BatchSampler, permuted, prefetch
from sddit_diffusers.data.pictures import (
    ImageDataset,
    UnreadableImageError,
    center_crop,
    content_of,
    decode_image,
)
from sddit_diffusers.data.sources import Source
from sddit_diffusers.seeds import generator_for


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


def test_so_many_of_them_are_drawn_from_all():
    whole = ImageDataset("digits", "image", "label", 1, 8)
    some, again = (ImageDataset("digits", "image", "label", 1, 8, max_samples=200) for _ in range(2))
    assert len(some) == len(some.labels) == 200 and some.num_classes == 10
    assert some.identity() == again.identity() != whole.identity()
    rows, labels = some.__getitems__(list(range(200)))[:2]
    all_rows, all_labels = whole.__getitems__(list(range(len(whole))))[:2]
    known = {(row.numpy().tobytes(), int(label)) for row, label in zip(all_rows, all_labels, strict=True)}
    assert {(row.numpy().tobytes(), int(label)) for row, label in zip(rows, labels, strict=True)} <= known
    assert len(set(labels.tolist())) == 10 and (labels != all_labels[:200]).any()
    assert len(ImageDataset("digits", "image", "", 1, 8, max_samples=5000)) == len(whole)


def test_a_folder_of_parquet(tmp_path, pictures):
    columns = {"img": [Image.fromarray(picture) for picture in pictures], "kind": [0, 1, 2, 2, 1, 0]}
    dataset = ImageDataset(write_parquet(tmp_path / "a", columns, FEATURES), "img", "kind", 3, 8)
    images, labels = dataset.__getitems__([4, 1])
    torch.testing.assert_close(images, torch.tensor(pictures[[4, 1]]).permute(0, 3, 1, 2) / 127.5 - 1)
    assert labels.tolist() == [1, 1] and dataset.id2label == {0: "cat", 1: "dog", 2: "eel"}


def test_the_only_column_of_pictures_is_found(tmp_path, pictures):
    columns = {"img": [Image.fromarray(picture) for picture in pictures], "kind": [0, 1, 2, 2, 1, 0]}
    folder = write_parquet(tmp_path / "a", columns, FEATURES)
    found, named = (ImageDataset(folder, column, "kind", 3, 8) for column in ("", "img"))
    assert found.image_column == "img" and torch.equal(found.pixels(range(6)), named.pixels(range(6)))
    for streaming in (False, True):
        assert Source(folder, "", "kind", "train", "", streaming, 6).image_column == "img"


def test_of_several_columns_of_pictures_image_is_taken(tmp_path, pictures):
    images, other = pictures, 255 - pictures
    columns = {
        name: [Image.fromarray(a) for a in arrays] for name, arrays in (("image", images), ("mask", other))
    }
    features = datasets.Features(mask=datasets.Image(), image=datasets.Image())
    dataset = ImageDataset(write_parquet(tmp_path / "a", columns, features), "", "", 3, 8)
    assert np.array_equal(dataset.pixels([0])[0].permute(1, 2, 0), images[0])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["left", "right"],
            r"has 2 columns of pictures \(left, right\); image_column must be .*: left, right, n",
        ),
        ([], "has no column of pictures; image_column must be one of its columns: n"),
    ],
)
@pytest.mark.parametrize("streaming", [None, False, True])
def test_none_or_several_columns_of_pictures_are_listed(tmp_path, pictures, names, message, streaming):
    columns = {name: [Image.fromarray(picture) for picture in pictures] for name in names}
    features = datasets.Features({name: datasets.Image() for name in names} | {"n": datasets.Value("int64")})
    folder = write_parquet(tmp_path / "a", columns | {"n": range(6)}, features)
    with pytest.raises(ValueError, match=message):
        if streaming is None:
            ImageDataset(folder, "", "n", 3, 8)
        else:
            Source(folder, "", "n", "train", "", streaming, 6)


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


def test_the_order_is_the_permutation_of_seed_and_epoch():
    """What checkpoints rely on."""
    whole = torch.randperm(23, generator=generator_for(3, 0, 1)).tolist()
    assert list(sampler(rank=1, processes=2, start=2, stop=4, seed=3)) == [whole[4:8], whole[12:16]]


def permuted_by_hand(number, size, keys):
    """A number's place by plain integers."""
    half = max(1, math.ceil(math.log2(size) / 2))
    while True:
        left, right = divmod(number, 2**half)
        for key in keys:
            z = (right + key) % 2**64
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ (z ^ z >> 31) % 2**half
        number = left * 2**half + right
        if number < size:
            return number


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1000, 10**9, 2**40 + 1])
def test_permuted_is_what_is_computed_by_hand(size):
    keys = np.random.default_rng(size).integers(2**63, size=6)
    positions = np.unique(np.linspace(0, size - 1, 200).astype(np.int64))
    assert permuted(positions, size, keys).tolist() == [
        permuted_by_hand(position, size, keys.tolist()) for position in positions.tolist()
    ]


@pytest.mark.parametrize("size", [*range(1, 70), 4095, 4096, 4097, 10_007])
def test_permuted_takes_each_number_once(size):
    keys = np.arange(6) * 12345 + size
    assert sorted(permuted(np.arange(size), size, keys).tolist()) == list(range(size))


def test_permutations_are_as_likely_as_one_another():
    """Where position 0, and beside it position 1, come to be among 7, for 4,200 keys: chi-squared."""
    keys = np.random.default_rng(0).integers(2**63, size=(4200, 6))
    pairs = np.array([permuted(np.arange(2), 7, key) for key in keys])
    counts = np.bincount(pairs[:, 0] * 7 + pairs[:, 1], minlength=49).reshape(7, 7)
    assert counts.trace() == 0
    apart = counts[~np.eye(7, dtype=bool)]
    assert ((apart - 100) ** 2 / 100).sum() < 80.1  # 41 degrees of freedom, p = 0.0002


def test_more_rows_than_a_permutation_has_room_for(monkeypatch):
    monkeypatch.setattr(order, "WHOLE", 22)
    steps = list(sampler(stop=10))
    epochs = [sum(steps[i : i + 5], []) for i in (0, 5)]
    assert all(len(set(epoch)) == 20 and set(epoch) <= set(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] and list(sampler(stop=10, seed=1)) != steps
    assert list(sampler(start=7, stop=10)) == steps[7:]
    parts = [list(sampler(rank, 2, 2, stop=10)) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == steps


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
    with pytest.raises(ValueError, match="are 23 rows to train on, fewer than one global batch of 24"):
        sampler(processes=2, batch_size=4, accumulation=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("./nowhere", "img", "kind", 3, 8), "There is no dataset folder ./nowhere"),
        ((None, "image", "kind", 3, 8), "has no column 'image'; its columns are img, kind"),
        (
            (None, "img", "label", 3, 8),
            "has no column 'label'; its columns are img, kind. A folder a class gives labels",
        ),
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
    some = ImageDataset(dataset.name, "image", "label", 3, 8, max_samples=5)
    assert some.images["image"][-1]["bytes"] == files[5]  # one of the first is left out
    with pytest.raises(ValueError, match="Row 4 of .* cannot be read as a picture"):
        some.__getitems__(range(5))


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_are_read_within_an_archive(tmp_path, pictures, streaming):
    (tmp_path / "a").mkdir()
    with zipfile.ZipFile(tmp_path / "a" / "train.zip", "w") as archive:
        for i, picture in enumerate(pictures):
            archive.writestr(f"{i}.png", png(picture))
        rows = [json.dumps({"file_name": f"{i}.png", "label": i % 2}) for i in range(len(pictures))]
        archive.writestr("metadata.jsonl", "\n".join(rows))
    plain = write_parquet(tmp_path / "b", {"image": list(map(png, pictures)), "label": [0, 1] * 3})
    dataset, expected = (ImageDataset(str(name), "image", "label", 3, 8) for name in (tmp_path / "a", plain))
    assert torch.equal(dataset.pixels(range(6)), expected.pixels(range(6)))
    assert dataset.identity() == expected.identity()
    source = Source(str(tmp_path / "a"), "image", "label", "train", "", streaming, 4)
    files = [file for unit in range(source.units) for block in source.blocks(unit, 0, 9) for file, _ in block]
    assert list(map(content_of, files)) == list(map(png, pictures))


def test_a_folder_may_be_at_home(tmp_path, pictures, monkeypatch):
    write_parquet(tmp_path / "a", {"image": list(map(png, pictures)), "label": [0] * 6})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(ImageDataset("~/a", "image", "label", 3, 8)) == 6


def test_a_label_out_of_range_is_named_by_its_row(tmp_path, pictures):
    files = [png(picture) for picture in pictures]
    folder = write_parquet(tmp_path / "a", {"image": files, "label": [0, 1, -1, 0, 0, 0]})
    with pytest.raises(ValueError, match="Row 2 of .* has the label -1; allowed are 0 to 999999"):
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


# Pictures of more than 8 bits


def decoded(image, format, mode="L", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return decode_image({"bytes": buffer.getvalue(), "path": None}, mode, None)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_pictures_of_16_bits_are_those_of_8(format, mode):
    grey = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decoded(deep, format, mode), decoded(Image.fromarray(grey), "PNG", mode))


def test_values_between_are_rounded():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(decoded(Image.fromarray(values), "PNG")[0], expected)
    swapped = Image.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(decoded(swapped, "TIFF")[0], expected)


@pytest.mark.parametrize(
    ("values", "word"), [(np.float32(0.5), "floating-point"), (np.int32(70_000), "32 bits")]
)
def test_pictures_of_no_known_range_are_refused(values, word):
    with pytest.raises(ValueError, match=f"cannot be read as a picture: .*{word}"):
        decoded(Image.fromarray(np.full((4, 4), values)), "TIFF")


@pytest.mark.parametrize(
    "column", [[[[0.5, 1.0], [0.0, 1.0]]] * 2, [[0.5, 1.0]] * 2, [[3, 4]] * 2, [0.5, 1.0]]
)
def test_lists_of_numbers_are_no_pictures(tmp_path, column):
    folder = write_parquet(tmp_path / "a", {"image": column, "label": [0, 1]})
    with pytest.raises(ValueError, match="Column 'image' of .* holds no pictures: .*"):
        ImageDataset(folder, "image", "label", 3, 8)


# What tells data from others


def identity(folder, files, labels=(0, 1, 0)):
    write_parquet(folder, {"image": files, "label": list(labels)})
    return ImageDataset(str(folder), "image", "label", 3, 8).identity()


def test_other_pictures_of_the_same_labels_are_other_data(tmp_path, pictures):
    files = [png(picture) for picture in pictures]
    first = identity(tmp_path / "a", files[:3])
    assert first == identity(tmp_path / "b", files[:3])  # wherever they are
    others = [identity(tmp_path / "c", files[3:]), identity(tmp_path / "d", [files[0], files[2], files[1]])]
    assert all({**other, "pictures": ""} == {**first, "pictures": ""} for other in others)
    assert len({first["pictures"], *(other["pictures"] for other in others)}) == 3


def test_pictures_as_files_have_an_identity(tmp_path, pictures):
    identities = []
    for name, changed in (("a", 0), ("b", 0), ("c", 1)):
        for i, picture in enumerate(pictures):
            (tmp_path / name / str(i % 2)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture + changed * (i == 3)).save(tmp_path / name / str(i % 2) / f"{i}.png")
        identities.append(ImageDataset(str(tmp_path / name), "image", "label", 3, 8).identity())
    assert identities[0] == identities[1] != identities[2]


def test_the_identity_of_digits_depends_on_no_library():
    digits = load_digits()
    pictures = (digits.images * 255 / 16).round().astype(np.uint8)
    found = ImageDataset("digits", "image", "label", 1, 8).images[:]["image"]
    assert [file["bytes"][-64:] for file in found] == [picture.tobytes() for picture in pictures]
    assert {file["bytes"][:-64] for file in found} == {b"P5 8 8 255\n"}


# Names and labels


@pytest.mark.parametrize("name", ["a[1]", "[x]", "a*b", "what?", "a [b] *", "[!a]"])
@pytest.mark.parametrize("kind", ["parquet", "pictures", "inside"])
def test_names_are_no_patterns(tmp_path, pictures, name, kind):
    folder = tmp_path / name
    if kind == "parquet":
        write_parquet(folder, {"image": [png(picture) for picture in pictures], "label": [0, 1, 0, 1, 0, 1]})
    else:
        folder = folder / "train" if kind == "inside" else folder
        for i, picture in enumerate(pictures):
            (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / str(i % 2) / f"{i}[0].png")
        (tmp_path / "a1").mkdir()
        (tmp_path / "a1/other.png").write_bytes(png(pictures[0]))  # what the pattern would find
    dataset = ImageDataset(str(folder), "image", "label", 3, 8)
    assert len(dataset) == 6 and sorted(dataset.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert dataset.__getitems__([0, 5])[0].shape == (2, 3, 8, 8)


def test_a_name_below_a_folder_that_looks_like_a_pattern(tmp_path, pictures, monkeypatch):
    (tmp_path / "here[1]").mkdir()
    monkeypatch.chdir(tmp_path / "here[1]")
    write_parquet(tmp_path / "here[1]/data", {"image": [png(pictures[0])], "label": [0]})
    assert len(ImageDataset("data", "image", "label", 3, 8)) == 1


@pytest.mark.parametrize("label", [2**31, 10**12, 2**63 - 1, -(2**40), 1_000_000, None])
def test_labels_that_no_table_has_room_for_are_refused(tmp_path, pictures, label):
    labels = [0, 1, label, 0, 0, 0]
    folder = write_parquet(tmp_path / "a", {"image": [png(picture) for picture in pictures], "label": labels})
    with pytest.raises(ValueError, match=f"Row 2 of .* has the label {label}; allowed are 0 to "):
        ImageDataset(folder, "image", "label", 3, 8)


def test_a_name_that_is_missing_is_no_label(tmp_path, pictures):
    labels = ["a", "b", None, "a", "b", "a"]
    folder = write_parquet(tmp_path / "a", {"image": [png(picture) for picture in pictures], "label": labels})
    with pytest.raises(ValueError, match="Row 2 of .* has the label None; allowed are names"):
        ImageDataset(folder, "image", "label", 3, 8)
