"""Pictures beside the latents: each with its own latent, in the order of a stream without them."""

import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_latents

from sddit_diffusers.data import latents
from sddit_diffusers.data.latents import LatentDataset
from sddit_diffusers.data.order import BatchSampler
from sddit_diffusers.data.pictures import ImageDataset, as_webp, from_webp
from sddit_diffusers.data.shards import Manifest, UnreadableShardError, verify

ROWS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "out"
    write_latents(folder, ROWS, 12, "--keep_pictures")
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(latents, "BLOCK", 5)


def batches_of(folder, gives_pictures, start=0, accumulation=1, rank=0, processes=1):
    dataset = LatentDataset(str(folder), gives_pictures)
    return [*dataset.batches(BatchSampler(ROWS, 12, accumulation, rank, processes, 0, start, 20))]


def rows_of(moments):
    """The numbers that the latents themselves tell."""
    return (moments[:, 0, 0, 0, 0] * 1000 + moments[:, 0, 1, 0, 0].float()).int()


@pytest.mark.parametrize(("accumulation", "rank", "processes"), [(1, 0, 1), (2, 1, 2)])
def test_each_comes_with_its_latent_and_changes_no_order(folder, accumulation, rank, processes):
    split = {"accumulation": accumulation, "rank": rank, "processes": processes}
    plain, pictured = batches_of(folder, False, **split), batches_of(folder, True, **split)
    assert len(plain) == len(pictured) == 20 * accumulation
    for (moments, labels), (same_moments, same_labels, pictures) in zip(plain, pictured, strict=True):
        assert torch.equal(moments, same_moments) and torch.equal(labels, same_labels)
        assert pictures.shape == (12, 3, 4, 4) and pictures.dtype == torch.uint8
        green = pictures[:, 1].float().mean((1, 2))  # the row, as `write_latents` paints it
        assert (green - rows_of(moments)).abs().max() < 6


def test_a_run_that_goes_on_sees_the_same_ones(folder):
    later = batches_of(folder, True, start=13)
    for whole, part in zip(batches_of(folder, True)[13:], later, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(whole, part, strict=True))


def test_a_batch_has_them_on_its_device(folder):
    dataset = LatentDataset(str(folder), gives_pictures=True)
    read = next(dataset.batches(BatchSampler(ROWS, 12, 1, 0, 1, 0)))
    batch = dataset.batch(read, torch.zeros(12, 2, 2, 2), torch.device("cpu"))
    assert torch.equal(batch.pictures, read[2]) and batch.labels is read[1]


def test_pixels_are_their_own_pictures():
    dataset = ImageDataset("digits", "image", "label", 1, 8, gives_pictures=True)
    rows = [3, 1, 4]
    batch = dataset.batch(dataset.__getitems__(rows), None, torch.device("cpu"))
    assert torch.equal(batch.pictures, dataset.pixels(rows).expand(-1, 3, -1, -1))
    assert ImageDataset("digits", "image", "label", 1, 8).batch(
        dataset.__getitems__(rows), None, torch.device("cpu")
    ).pictures is None  # fmt: skip


def test_without_them_the_command_that_makes_them_is_named(tmp_path):
    write_latents(tmp_path / "out", ROWS, 12)
    with pytest.raises(ValueError, match=r"no pictures beside.*--keep_pictures.*--vae numbers"):
        LatentDataset(str(tmp_path / "out"), gives_pictures=True)
    assert len(LatentDataset(str(tmp_path / "out"))) == ROWS


def change(folder, pictures):
    """Another picture column in the third shard."""
    path = folder / Manifest.read(str(folder)).shards[2]["file"]
    table = pq.read_table(path)
    column = pa.array([{"bytes": picture, "path": None} for picture in pictures(len(table))])
    place = table.schema.get_field_index("picture")
    pq.write_table(table.set_column(place, table.schema.field("picture"), column.cast(
        table.schema.field("picture").type)), path)  # fmt: skip


BROKEN = {
    "no file": ("cannot be read as WebP", lambda count: [b"RIFF"] * count),
    "none": ("have no picture", lambda count: [None] * count),
    "another size": (
        "is 5 x 5, not 4 x 4",
        lambda count: [as_webp(np.zeros((3, 5, 5), np.uint8))] * count,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_is_told_of(folder, tmp_path, name):
    message, pictures = BROKEN[name]
    shutil.copytree(folder, tmp_path / "broken")
    change(tmp_path / "broken", pictures)
    with pytest.raises(UnreadableShardError, match=f"{re.escape(message)}.*--verify"):
        batches_of(tmp_path / "broken", True)
    assert len(batches_of(tmp_path / "broken", False)) == 20  # a run that does not look goes on
    assert len(verify(str(tmp_path / "broken"))) == 1


def test_webp_loses_little():
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    picture = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp, (64, 1)).T, np.full((64, 64), 90, np.uint8)])
    found = from_webp(as_webp(picture), 64).astype(int)
    assert np.abs(found - picture).mean() < 3
