"""The stream of latents: its order, its resumption, and what it does with damaged shards."""

import json
import re
import shutil
import socket
import subprocess
import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import global_batch, write_latents
from huggingface_hub import HfFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sddit_diffusers.data import latents
from sddit_diffusers.data.latents import LatentDataset
from sddit_diffusers.data.order import BatchSampler
from sddit_diffusers.data.shards import Manifest, UnreadableShardError, find_latents

ROWS = 403


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """403 latents of a class-sorted source of 10 classes, in 34 shards, which 8 lanes read."""
    folder = tmp_path_factory.mktemp("latents") / "out"
    write_latents(folder, ROWS, shard_size=12)
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(latents, "BLOCK", 5)


def read(folder, rank=0, processes=1, batch_size=24, accumulation=1, start=0, stop=10, seed=0, most=0):
    """The row numbers of each micro-batch."""
    dataset = LatentDataset(str(folder), max_samples=most)
    sampler = BatchSampler(len(dataset), batch_size, accumulation, rank, processes, seed, start, stop)
    batches = []
    for moments, _ in dataset.batches(sampler):
        assert (moments[:, 1] == 0.25).all()
        rows = (moments[:, 0, 0, 0, 0] * 1000 + moments[:, 0, 1, 0, 0].float()).int()
        batches.append(rows.tolist())
    return batches


def test_every_latent_once_an_epoch_in_another_order(folder):
    steps = read(folder, stop=32)  # two epochs of 16 steps, 19 rows dropped
    epochs = [sum(steps[:16], []), sum(steps[16:], [])]
    for rows in epochs:
        assert len(set(rows)) == 384 and ROWS - len(rows) < 24
    assert epochs[0] != epochs[1] and set(epochs[0]) != set(epochs[1])
    assert read(folder, stop=16, seed=1) != steps[:16]
    assert read(folder, stop=16) == steps[:16]


def test_labels_are_those_of_the_rows(folder):
    dataset = LatentDataset(str(folder))
    bounds = [ROWS * i // 10 for i in range(11)]
    for moments, labels in dataset.batches(BatchSampler(ROWS, 24, 1, 0, 1, 0, 0, 16)):
        for row, label in zip(moments[:, 0, 1, 0, 0].tolist(), labels.tolist(), strict=True):
            assert bounds[label] <= row < bounds[label + 1]


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (4, 1), (1, 3), (3, 2), (12, 2)])
def test_the_batch_of_a_step_does_not_depend_on_how_it_is_split(folder, processes, accumulation):
    whole, b = read(folder, stop=20), 24 // processes // accumulation
    parts = [read(folder, rank, processes, b, accumulation, stop=20) for rank in range(processes)]
    for step in range(20):
        assert global_batch(parts, step, accumulation) == whole[step]


@pytest.mark.parametrize("batch_size", [1, 5, 24, 100, 403])
def test_any_batch_size(folder, batch_size):
    steps = ROWS // batch_size
    rows = sum(read(folder, batch_size=batch_size, stop=steps), [])
    assert len(rows) == len(set(rows)) == steps * batch_size


@pytest.mark.parametrize("most", [24, 50, 60, 299])
def test_the_first_so_many_alone(folder, most):
    """Whose last shard is read in part, and of which a run goes on at any step."""
    written = [row for shard in sorted((folder / "data").iterdir()) for row in pq.read_table(shard)["index"]]
    expected = {row.as_py() for row in written[:most]}
    steps = read(folder, batch_size=8, stop=2 * (most // 8), most=most)
    epoch = sum(steps[: most // 8], [])
    assert len(epoch) == len(set(epoch)) == most // 8 * 8 and set(epoch) <= expected
    assert read(folder, batch_size=8, start=3, stop=2 * (most // 8), most=most) == steps[3:]
    assert LatentDataset(str(folder), max_samples=most).identity()["rows"] == most
    assert len(LatentDataset(str(folder), max_samples=ROWS + 1)) == ROWS


@pytest.mark.parametrize("start", [1, 7, 15, 16, 25, 31])
@pytest.mark.parametrize("processes", [1, 2])
def test_begins_at_any_step(folder, start, processes):
    options = dict(rank=processes - 1, processes=processes, batch_size=24 // processes, stop=34)
    assert read(folder, start=start, **options) == read(folder, **options)[start:]


def test_a_process_reads_its_share_alone(folder, monkeypatch):
    opened, read_shard = [], LatentDataset._read_shard
    monkeypatch.setattr(
        LatentDataset, "_read_shard",
        lambda self, shard, skipped: opened.append((shard, skipped)) or read_shard(self, shard, skipped),
    )  # fmt: skip
    read(folder, stop=16)
    whole = len(opened)
    for processes in (2, 4, 8):
        opened.clear()
        read(folder, rank=1, processes=processes, batch_size=24 // processes, stop=16)
        assert len(opened) <= whole / processes + 2


@pytest.mark.thorough
def test_class_counts_are_those_of_random_batches(tmp_path):
    """Pearson's statistic of each batch of 256 against the source's ten equal classes, which come sorted."""
    write_latents(tmp_path / "sorted", 5120, shard_size=512)
    dataset = LatentDataset(str(tmp_path / "sorted"))
    batches = dataset.batches(BatchSampler(5120, 256, 1, 0, 1, 0, 0, 40))
    statistics = []
    for _, labels in batches:
        counts = np.bincount(labels.numpy(), minlength=10)
        statistics.append(((counts - 25.6) ** 2 / 25.6).sum())
    # Drawn without replacement, the statistic's mean is 9 (5120 - 256) / 5119 and its variance about 2 * 9.
    assert abs(np.mean(statistics) - 9 * 4864 / 5119) < 4 * (18 / 40) ** 0.5
    assert max(statistics) < 33.7  # 1 in 10,000 by chance


def test_samples_are_drawn_from_the_scaled_posterior(folder):
    dataset = LatentDataset(str(folder))
    dataset.manifest.vae["config"] = {"scaling_factor": 0.5, "shift_factor": 0.1}
    moments, noise = torch.randn(3, 2, 2, 2, 2).half(), torch.randn(3, 2, 2, 2)
    for i in range(3):
        expected = (moments[i, 0].float() + moments[i, 1].float() * noise[i] - 0.1) * 0.5
        batch = dataset.batch((moments, None), noise, torch.device("cpu"))
        torch.testing.assert_close(batch.x0[i], expected)


def test_from_a_url(folder):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/latents", recursive=True)
    try:
        assert find_latents("memory://latents") == "memory://latents"
        assert read("memory://latents", stop=20) == read(folder, stop=20)
    finally:
        memory.rm("/latents", recursive=True)


@pytest.mark.parametrize("name", ["../secret.parquet", "/etc/passwd", "data/../../secret.parquet"])
def test_shards_outside_of_the_folder_are_refused(folder, tmp_path, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["file"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="names the shard .*; shards are files in the folder"):
        LatentDataset(str(tmp_path))


def test_finds_latents(folder, tmp_path):
    assert find_latents(str(folder)) == str(folder)
    assert find_latents(str(tmp_path)) is None and find_latents("./nowhere") is None
    assert find_latents("no name of the Hub!") is None
    with pytest.raises(ValueError, match="There are no latents in .*: it has no manifest.json"):
        LatentDataset(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="has the format 'other'; this version reads 'sddit-latents-1'"):
        LatentDataset(str(tmp_path))


def test_what_cannot_be_looked_at_is_told(monkeypatch, tmp_path):
    """One process that did not see the manifest would train on pictures."""
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"Nobody knows whether {address}/x holds latents: "):
            find_latents(f"{address}/x")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr(HfFileSystem, "_cache", {})
        with pytest.raises(ValueError, match="no folder somebody/latents here, .*HF_HUB_OFFLINE=1"):
            find_latents("somebody/latents")
    with pytest.raises(ValueError, match="whether nosuch://x holds latents: .*nosuch"):
        find_latents("nosuch://x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_latents("somebody/latents") is None  # the reader knows what is in the cache


@pytest.mark.parametrize("name", ["a[1]", "[x]", "a*b", "what?", "[!a] *"])
def test_names_are_no_patterns(folder, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / name / name)
    assert find_latents(str(copy)) == str(copy)
    assert read(copy, stop=5) == read(folder, stop=5)


def test_a_relative_name_below_a_folder_that_looks_like_a_pattern(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "here[1]" / "out")
    monkeypatch.chdir(tmp_path / "here[1]")
    assert read("out", stop=5) == read(folder, stop=5)


MISSING = object()


def changed(manifest, path, value):
    """A manifest with another value at a path, or without any."""
    manifest = json.loads(json.dumps(manifest))
    *way, last = path
    inner = manifest
    for step in way:
        inner = inner[step]
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value
    return manifest


BAD_MANIFESTS = [
    *(
        (("shape",), value)
        for value in ([2, 2], [2, 2, 2, 2], [2, 0, 2], [2, -2, -2], [2, 2, "2"], [2.0, 2, 2])
    ),
    *((("shape",), value) for value in (None, MISSING, {}, [True, 2, 2], [2, 2, 10**12], [])),
    *((("count",), value) for value in (402, -1, 0, "403", 403.0, None, MISSING, 10**30)),
    *((("num_classes",), value) for value in (-1, 10**12, 2**31, "10", None, MISSING, 9, 0)),
    *((("class_names",), value) for value in (["a"], [1] * 10, "abc", {}, MISSING)),
    *((("resolution",), value) for value in (0, -1, "256", 10**12, MISSING)),
    *((("vae", "config", "scaling_factor"), value) for value in (None, "1", MISSING, 10**400, 0, True)),
    *((("vae", "config", "shift_factor"), value) for value in ("1", [], 10**400)),
    *((("vae",), value) for value in (None, [], {}, {"config": []}, MISSING)),
    *((("source",), value) for value in (None, [], {}, {"name": 3}, MISSING)),
    *((("settings",), value) for value in (None, [], "text", MISSING)),
    *((("shards",), value) for value in (None, {}, [], [1], [{}], MISSING)),
    *((("shards", 3, "rows"), value) for value in (-12, 0, 13, 12.0, "12", None, MISSING)),
    *(
        (("shards", 3, "file"), value)
        for value in ("", ".", "..", "/x", "a/../b", "a::file://x", "a\0b", 3, None)
    ),
    (("shards", 3, "file"), "data/train-00002-of-00034.parquet"),  # twice
    *((("shards", 3, "sha256"), value) for value in (None, 3, MISSING)),
    *((("unreadable",), value) for value in (None, {}, [1], "text")),
    *((("format",), value) for value in ("other", None, 1, MISSING)),
]


@pytest.mark.parametrize(("path", "value"), BAD_MANIFESTS)
def test_manifests_of_another_structure_are_refused(folder, tmp_path, path, value):
    manifest = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(changed(manifest, path, value)))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as refused:
        Manifest.read(str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"null", b"\xff\xfe", b"{", b"[" * 10**5, b'{"count": NaN}', b"1" * 10**4]
)
def test_manifests_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}.* is no manifest of latents"):
        Manifest.read(str(tmp_path))


def test_what_a_later_version_adds_is_left_alone(folder, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text()) | {"new": 3}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert Manifest.read(str(tmp_path)) == Manifest.read(str(folder))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
PATHS = st.sampled_from(sorted({path for path, _ in BAD_MANIFESTS}, key=str))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=PATHS, value=VALUES)
def test_no_manifest_ends_in_anything_but_a_message(folder, path, value):
    place = folder.parent / "mutated"
    place.mkdir(exist_ok=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps(changed(manifest, path, value)))
    try:
        manifest = Manifest.read(str(place))
    except ValueError as error:
        assert str(place) in str(error)
    else:
        assert len(manifest.shape) == 3 and manifest.count == sum(shard["rows"] for shard in manifest.shards)


def shard_of(folder, number):
    return folder / Manifest.read(str(folder)).shards[number]["file"]


# What follows reads two epochs: the shards that end an epoch's sequence are dropped with its last rows.
@pytest.fixture
def damaged(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "damaged")


def test_a_truncated_shard_is_named(damaged):
    path = shard_of(damaged, 2)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        UnreadableShardError, match="The shard data/train-00002-of-00034.parquet of .* cannot be read"
    ):
        read(damaged, stop=32)


def test_a_missing_shard_is_named(damaged):
    shard_of(damaged, 3).unlink()
    with pytest.raises(UnreadableShardError, match="train-00003-of-00034.parquet"):
        read(damaged, stop=32)


def test_a_shorter_shard_is_named(damaged):
    path = shard_of(damaged, 4)
    pq.write_table(pq.read_table(path).slice(0, 10), path)
    with pytest.raises(UnreadableShardError, match="train-00004-of-00034.* has 10 rows, but 12 were written"):
        read(damaged, stop=32)


def test_a_shard_of_other_latents_is_named(damaged):
    path = shard_of(damaged, 6)
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "moments", [[b"1234"] * len(table)]), path)
    with pytest.raises(
        UnreadableShardError, match="train-00006-of-00034.* its rows are not of 32 bytes each"
    ):
        read(damaged, stop=32)


@pytest.mark.parametrize("label", [-1, 10, 2**40, None])
def test_a_label_beyond_the_classes_is_named(damaged, label):
    path = shard_of(damaged, 6)
    table = pq.read_table(path)
    labels = pa.array([0] * 5 + [label] + [0] * (len(table) - 6), pa.int64())
    pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", labels), path)
    message = f"train-00006-of-00034.* has the label {label}; allowed are 0 to 9"
    with pytest.raises(UnreadableShardError, match=message):
        read(damaged, stop=32)


def test_a_shard_without_labels_is_named(damaged):
    path = shard_of(damaged, 6)
    pq.write_table(pq.read_table(path).drop_columns("label"), path)
    with pytest.raises(UnreadableShardError, match="train-00006-of-00034"):
        read(damaged, stop=32)


@pytest.mark.long
def test_no_flipped_bit_changes_a_sample(damaged):
    """A flip in the data is found; one in what else a file holds is found or changes nothing."""
    expected, path = read(damaged, stop=16), shard_of(damaged, 5)
    whole, generator, found = path.read_bytes(), np.random.default_rng(0), 0
    for place in generator.integers(0, len(whole), 12):
        data = bytearray(whole)
        data[place] ^= 1 << generator.integers(8)
        path.write_bytes(data)
        try:
            assert read(damaged, stop=16) == expected
        except UnreadableShardError as error:
            assert "train-00005-of-00034.parquet" in str(error)
            found += 1
    assert found > 2


@pytest.mark.thorough
@pytest.mark.process
def test_training_ends_in_the_middle_of_shards_without_a_crash(folder):
    """pyarrow reads ahead in threads that crash an interpreter which ends before them."""
    code = f"""
from sddit_diffusers.data.order import BatchSampler
from sddit_diffusers.data.latents import LatentDataset
batches = LatentDataset({str(folder)!r}).batches(BatchSampler({ROWS}, 24, 1, 0, 1, 0, 0, 99))
next(batches)
batches.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
