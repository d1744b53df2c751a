"""Latents prepared from small pictures by a small VAE, as its users would."""

import errno
import io
import json
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from bad_input import refusal
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

from sddit_diffusers import files, prepare_latents
from sddit_diffusers.data.latents import LatentDataset
from sddit_diffusers.data.shards import Manifest

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16], norm_num_groups=4, latent_channels=4, scaling_factor=0.5,
    )  # fmt: skip
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)


def pictures(count, size=16):
    return np.random.default_rng(0).integers(0, 256, (count, size, size + 4, 3), dtype=np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_source(folder, arrays, labels, files=None):
    """Two parquet files, classes in order, as ImageNet comes."""
    folder.mkdir()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    rows = [{"bytes": png(array), "path": f"{i}.png"} for i, array in enumerate(arrays)]
    for i, data in (files or {}).items():
        rows[i]["bytes"] = data
    half = len(rows) // 2
    for i, part in enumerate((slice(0, half), slice(half, None))):
        table = datasets.Dataset.from_dict({"image": rows[part], "label": labels[part]}, features=features)
        table.to_parquet(str(folder / f"train-{i}.parquet"))
    return str(folder)


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source", pictures(30), [i // 10 for i in range(30)])


def prepare(vae, source, folder, *options):
    """Runs the program; returns the rows that `load_dataset` alone reads, and the manifest."""
    arguments = ["--dataset_name", source, "--vae", vae, "--output_dir", folder, "--resolution", 16,
                 "--batch_size", 4, "--block_size", 6, "--shard_size", 8, *options]  # fmt: skip
    try:
        prepare_latents.main([str(argument) for argument in arguments])
    finally:
        AcceleratorState._reset_state(True)
    return list(datasets.load_dataset(str(folder), split="train", streaming=True)), Manifest.read(str(folder))


def moments_of(row, shape=(4, 8, 8)):
    return np.frombuffer(row["moments"], np.float16).reshape(2, *shape)


def encoded(vae, arrays):
    """Mean and deviation of each picture's middle square, one by one."""
    model = AutoencoderKL.from_pretrained(vae)
    for array in arrays:
        pixels = torch.tensor(array[:, 2:-2]).permute(2, 0, 1)[None] / 255 * 2 - 1
        with torch.no_grad():
            mean, logvar = model.quant_conv(model.encoder(pixels)).chunk(2, dim=1)
        yield torch.cat([mean, (0.5 * logvar).exp()]).numpy()


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_stores_each_image_once_with_its_moments_label_and_row(vae, source, tmp_path):
    rows, manifest = prepare(vae, source, tmp_path / "out")
    assert sorted(row["index"] for row in rows) == list(range(30))
    assert [row["index"] for row in rows] != list(range(30))
    expected = list(encoded(vae, pictures(30)))
    for row in rows:
        np.testing.assert_allclose(moments_of(row), expected[row["index"]], rtol=2e-3, atol=1e-4)
        assert row["label"] == row["index"] // 10 and row["flipped"] is False
    features = datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=True).features
    assert features["label"].names == NAMES
    assert (manifest.count, manifest.num_classes, manifest.class_names) == (30, 3, NAMES)
    assert (manifest.shape, manifest.resolution, manifest.source["rows"]) == ([4, 8, 8], 16, 30)
    assert manifest.vae["name"] == vae and manifest.vae["config"]["scaling_factor"] == 0.5
    assert [shard["rows"] for shard in manifest.shards] == [8, 8, 8, 6]
    assert not list((tmp_path / "out").glob(".*"))
    card = (tmp_path / "out/README.md").read_text()
    assert "30 latents of shape 4 x 8 x 8, 3 classes" in card


def test_the_card_tells_how_to_read(vae, source, tmp_path, capsys):
    prepare(vae, source, tmp_path / "out")
    snippet = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    space = {}
    exec(snippet.replace("THIS_DATASET", str(tmp_path / "out")), space)
    assert space["latent"].shape == (4, 8, 8)


def test_parquet_is_as_the_reader_needs_it(vae, source, tmp_path):
    prepare(vae, source, tmp_path / "out", "--shard_size", 300)
    about = pq.ParquetFile(next((tmp_path / "out/data").iterdir())).metadata.row_group(0).column(0)
    assert about.compression == "UNCOMPRESSED" and "PLAIN" in about.encodings


def test_flip_adds_mirror_images(vae, source, tmp_path):
    rows, manifest = prepare(vae, source, tmp_path / "out", "--flip", True)
    assert manifest.count == 60
    assert sorted((row["index"], row["flipped"]) for row in rows) == [
        (i, flipped) for i in range(30) for flipped in (False, True)
    ]
    expected = list(encoded(vae, pictures(30)[:, :, ::-1].copy()))
    for row in filter(lambda row: row["flipped"], rows):
        np.testing.assert_allclose(moments_of(row), expected[row["index"]], rtol=2e-3, atol=1e-4)


def test_keeps_pictures_beside_their_latents(vae, tmp_path):
    """As WebP, which loses a little of smooth pictures, each in its own row; mirrored where the latent is."""
    ramp = np.linspace(0, 255, 20).astype(np.uint8)
    arrays = np.stack([np.stack([np.tile(np.roll(ramp, i), (16, 1))] * 3, -1) for i in range(10)])
    source = write_source(tmp_path / "source", arrays, [i % 3 for i in range(10)])
    plain, before = prepare(vae, source, tmp_path / "plain", "--flip", True)
    rows, manifest = prepare(vae, source, tmp_path / "kept", "--flip", True, "--keep_pictures")
    for with_picture, without in zip(rows, plain, strict=True):
        kept = with_picture.pop("picture")
        assert with_picture == without and kept.format == "WEBP"
        expected = arrays[with_picture["index"]][:, 2:-2].astype(int)
        expected = expected[:, ::-1] if with_picture["flipped"] else expected
        error, of_other = np.abs(kept - expected).mean(), np.abs(kept - expected[:, ::-1]).mean()
        assert error < 12 < of_other
    assert (before.format, before.pictures) == ("sddit-latents-1", None)
    assert (manifest.format, manifest.pictures) == ("sddit-latents-2", {"format": "WebP", "quality": 90})
    about = json.loads((tmp_path / "plain/manifest.json").read_text())
    assert "pictures" not in about and "keep_pictures" not in about["settings"]  # as it ever was
    assert "WebP" in (tmp_path / "kept/README.md").read_text()
    assert "WebP" not in (tmp_path / "plain/README.md").read_text()


def test_pictures_are_not_added_to_what_is_complete(vae, source, tmp_path, capsys):
    prepare(vae, source, tmp_path / "out")
    with refusal(capsys, "keep_pictures"):
        prepare(vae, source, tmp_path / "out", "--keep_pictures")


def test_streaming_stores_the_same(vae, source, tmp_path):
    stored, _ = prepare(vae, source, tmp_path / "a")
    streamed, _ = prepare(vae, source, tmp_path / "b", "--streaming", True)
    by_index = {row["index"]: row for row in stored}
    assert len(streamed) == 30
    for row in streamed:
        np.testing.assert_allclose(moments_of(row), moments_of(by_index[row["index"]]), rtol=2e-3, atol=1e-4)
        assert row["label"] == by_index[row["index"]]["label"]


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset(vae, tmp_path, streaming):
    (tmp_path / "tars").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / f"tars/{shard}.tar", "w") as tar:
            for i in range(shard * 5, shard * 5 + 5):
                for name, data in ((f"{i:03d}.png", png(pictures(10)[i])), (f"{i:03d}.cls", b"%d" % (i % 3))):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    options = ["--image_column", "png", "--label_column", "cls", "--streaming", streaming]
    rows, manifest = prepare(vae, str(tmp_path / "tars"), tmp_path / "out", *options)
    expected = list(encoded(vae, pictures(10)))
    assert sorted(row["index"] for row in rows) == list(range(10)) and manifest.class_names is None
    for row in rows:
        assert row["label"] == row["index"] % 3
        np.testing.assert_allclose(moments_of(row), expected[row["index"]], rtol=2e-3, atol=1e-4)


def test_names_as_labels_are_numbered_in_their_order(vae, tmp_path):
    for i, array in enumerate(pictures(9)):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(array).save(tmp_path / f"in/{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "kind": NAMES[2 - i % 3]}) for i in range(9)]
    (tmp_path / "in/metadata.jsonl").write_text("\n".join(lines))
    rows, manifest = prepare(vae, str(tmp_path / "in"), tmp_path / "out", "--label_column", "kind")
    assert manifest.class_names == NAMES
    assert all(row["label"] == 2 - row["index"] % 3 for row in rows)


def test_without_labels_and_with_a_tiny_autoencoder(source, tmp_path):
    torch.manual_seed(0)
    model = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "tiny")
    rows, manifest = prepare(tmp_path / "tiny", source, tmp_path / "out", "--label_column", "")
    assert "label" not in rows[0] and manifest.num_classes == 0 and manifest.vae["class"] == "AutoencoderTiny"
    assert (moments_of(rows[0])[1] == 0).all() and moments_of(rows[0])[0].std() > 0


DEAD = 2**22 + 1  # a number that no process has


class Killed(BaseException):
    pass


@pytest.mark.thorough
def test_stopped_at_any_moment_it_ends_with_the_same_bytes(vae, source, tmp_path, monkeypatch):
    prepare(vae, source, tmp_path / "whole", "--keep_pictures")
    expected, replace = content(tmp_path / "whole"), files.os.replace
    for moment in range(14):  # 1 file of settings, 6 blocks, 4 shards, card, manifest
        writes = []

        def stopping(aside, path, writes=writes, moment=moment):
            writes.append(path)
            if len(writes) == moment + 1:
                aside.with_name(f".{path.name}.{DEAD}.tmp.kept").write_bytes(aside.read_bytes()[:100])
                raise Killed
            replace(aside, path)

        folder = tmp_path / f"stopped-{moment}"
        monkeypatch.setattr(files.os, "replace", stopping)
        if moment < 13:
            with pytest.raises(Killed):
                prepare(vae, source, folder, "--keep_pictures")
        else:
            prepare(vae, source, folder, "--keep_pictures")
        monkeypatch.setattr(files.os, "replace", replace)
        for kept in folder.rglob("*.kept"):  # what a kill leaves is half of a file
            kept.rename(kept.with_suffix(""))
        prepare(vae, source, folder, "--keep_pictures")
        assert content(folder) == expected, moment


def test_a_complete_folder_is_left_alone(vae, source, tmp_path):
    prepare(vae, source, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    prepare(vae, source, tmp_path / "out")
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def fails(capsys, message, *arguments):
    with refusal(capsys, message):
        prepare(*arguments)


@pytest.mark.parametrize("complete", [True, False])
def test_other_settings_are_refused(vae, source, tmp_path, capsys, complete, monkeypatch):
    if complete:
        prepare(vae, source, tmp_path / "out")
    else:
        with monkeypatch.context() as patch:
            patch.setattr(prepare_latents.Preparation, "write_shards", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                prepare(vae, source, tmp_path / "out")
    before = content(tmp_path / "out")
    message = "was prepared otherwise (resolution: 16 there, 8 here); choose"
    fails(capsys, message, vae, source, tmp_path / "out", "--resolution", 8)
    model = AutoencoderKL.from_pretrained(vae)
    model.quant_conv.bias.data += 1
    model.save_pretrained(tmp_path / "other")
    fails(capsys, "was prepared otherwise (vae_sha256", tmp_path / "other", source, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_an_unreadable_image_is_named_or_listed(vae, tmp_path, capsys):
    arrays = pictures(30)
    source = write_source(tmp_path / "in", arrays, [0] * 30, {17: png(arrays[17])[:80], 3: b"no picture"})
    fails(capsys, "Row 3 of", vae, source, tmp_path / "out")
    fails(capsys, "(3.png) cannot be read as a picture", vae, source, tmp_path / "out")
    fails(capsys, "Row 3 of part 0 (of 0 to 1) of", vae, source, tmp_path / "s", "--streaming", True)
    rows, manifest = prepare(vae, source, tmp_path / "out", "--skip_unreadable", True)
    assert sorted(row["index"] for row in rows) == [i for i in range(30) if i not in (3, 17)]
    assert [(item["row"], item["name"]) for item in manifest.unreadable] == [(3, "3.png"), (17, "17.png")]
    assert manifest.count == 28 and manifest.source["rows"] == 30


def test_bad_sources_are_named(vae, source, tmp_path, capsys):
    out = tmp_path / "out"
    fails(
        capsys,
        "has no column 'img'; its columns are image, label.",
        vae,
        source,
        out,
        "--image_column",
        "img",
    )
    fails(capsys, "holds no pictures", vae, source, out, "--image_column", "label", "--label_column", "")
    fails(capsys, "cannot be loaded", vae, str(tmp_path / "nowhere"), out)
    fails(capsys, "cannot be loaded", tmp_path / "nowhere", source, out)
    fails(capsys, "dtype is 'float8'", vae, source, out, "--dtype", "float8")
    fails(capsys, "--vae is missing", "", source, out)
    fails(
        capsys, "unknown option --resolutoin; nearest are --resolution", vae, source, out, "--resolutoin", 8
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    pq.write_table(features.arrow_schema.empty_table(), empty / "a.parquet")
    for streaming in (
        False,
        True,
    ):  # in the words of datasets, which differ from release to release, or in ours
        fails(capsys, str(empty), vae, str(empty), out, "--streaming", streaming)
    assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    fails(capsys, "holds other files", vae, source, out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_label_out_of_range_is_named(vae, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    rows = {
        "image": [{"bytes": png(array), "path": None} for array in pictures(6)],
        "label": [0, 1, -1, 0, 0, 0],
    }
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "in/a.parquet"))
    fails(
        capsys, "has the label -1; allowed are integers from 0", vae, str(tmp_path / "in"), tmp_path / "out"
    )


def test_a_latent_that_is_not_finite_is_named(source, tmp_path, vae, capsys):
    model = AutoencoderKL.from_pretrained(vae)
    model.quant_conv.bias.data[0] = 1e6  # beyond float16
    model.save_pretrained(tmp_path / "hot")
    fails(capsys, "Row 0 of", tmp_path / "hot", source, tmp_path / "out")


def test_verify_names_what_is_damaged(vae, source, tmp_path, capsys):
    prepare(vae, source, tmp_path / "out")
    prepare_latents.main(["--verify", str(tmp_path / "out")])
    assert "every shard is as it was written" in capsys.readouterr().out
    shards = sorted((tmp_path / "out/data").iterdir())
    data = bytearray(shards[0].read_bytes())
    data[len(data) // 2] ^= 4
    shards[0].write_bytes(data)
    shards[1].write_bytes(shards[1].read_bytes()[:-50])
    shards[3].unlink()
    with pytest.raises(SystemExit) as stopped:
        prepare_latents.main(["--verify", str(tmp_path / "out")])
    lines = stopped.value.code.splitlines()
    assert lines[0].endswith("3 damaged shards")
    assert [line.split(":")[0] for line in lines[1:]] == [f"data/{shards[i].name}" for i in (0, 1, 3)]
    with refusal(capsys, "There are no latents in"):
        prepare_latents.main(["--verify", str(tmp_path / "nowhere")])


def test_verify_finds_values_that_are_not_finite(vae, source, tmp_path):
    """As a faulty program would have written them, hash and all."""
    _, manifest = prepare(vae, source, tmp_path / "out")
    path = tmp_path / "out" / manifest.shards[2]["file"]
    table = pq.read_table(path)
    rows = table["moments"].to_pylist()
    rows[5] = np.full(512, np.nan, np.float16).tobytes()
    pq.write_table(table.set_column(0, "moments", [rows]), path)
    with path.open("rb") as file:
        manifest.shards[2]["sha256"] = files.sha256_of(file)
    manifest.save(tmp_path / "out")
    with pytest.raises(SystemExit, match="train-00002-of-00004.parquet: row 5 is not of 512 finite values"):
        prepare_latents.main(["--verify", str(tmp_path / "out")])


# Two at once, stopped, and damaged


def test_two_runs_do_not_write_in_one_folder(vae, source, tmp_path, capsys, monkeypatch):
    """The second begins while the first encodes."""
    monkeypatch.setattr(files, "_PATIENCE", 0.1)
    encode, refused = prepare_latents.Preparation.encode, []

    def meanwhile(self):
        if not refused:
            refused.append(True)
            with refusal(capsys, f"{tmp_path / 'out'} is in use by process", untouched=tmp_path):
                second = prepare_latents.main
                second(
                    [
                        *ARGUMENTS,
                        "--dataset_name",
                        source,
                        "--vae",
                        vae,
                        "--output_dir",
                        str(tmp_path / "out"),
                    ]
                )
        encode(self)

    monkeypatch.setattr(prepare_latents.Preparation, "encode", meanwhile)
    rows, _ = prepare(vae, source, tmp_path / "out")
    assert refused and len(rows) == 30 and not list((tmp_path / "out").glob(".*"))


ARGUMENTS = "--resolution 16 --batch_size 4 --block_size 6 --shard_size 8".split()


def test_what_a_killed_run_leaves_of_its_lock_is_no_other_file(vae, source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lock").write_text("process 1")
    prepare(vae, source, tmp_path / "out")
    (tmp_path / "out/.lock").write_text("process 1")
    prepare(vae, source, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))


def test_killed_before_it_cleans_up_the_next_start_does(vae, source, tmp_path, monkeypatch, capsys):
    prepare(vae, source, tmp_path / "whole")

    def killed(path):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(prepare_latents, "remove", killed)
        with pytest.raises(Killed):
            prepare(vae, source, tmp_path / "out")
    assert (tmp_path / "out/manifest.json").is_file() and (tmp_path / "out/.preparing").is_dir()
    prepare(vae, source, tmp_path / "out")
    assert "holds 30 latents" in capsys.readouterr().out
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def stopped_before(method, vae, source, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_latents.Preparation, method, lambda self, *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(vae, source, folder)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "of an earlier version"])
def test_damaged_blocks_are_encoded_again(vae, source, tmp_path, damage):
    prepare(vae, source, tmp_path / "whole")
    stopped_before("write_shards", vae, source, tmp_path / "out")
    blocks = sorted((tmp_path / "out/.preparing").glob("*.arrow"))
    assert len(blocks) == 6
    data = bytearray(blocks[1].read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    blocks[1].write_bytes(
        {"flipped": data, "truncated": data[:-100]}.get(damage, data if "v" in damage else b"")
    )
    if damage == "of an earlier version":
        blocks[1].rename(blocks[1].with_name("-".join(blocks[1].stem.split("-")[:3]) + ".arrow"))
    prepare(vae, source, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_blocks_damaged_before_they_are_used_are_encoded_again(vae, source, tmp_path, monkeypatch):
    prepare(vae, source, tmp_path / "whole")
    encode, damaged = prepare_latents.Preparation.encode, []

    def damaging(self):
        encode(self)
        if not damaged:
            damaged.extend(sorted((tmp_path / "out/.preparing").glob("*.arrow"))[2:3])
            data = bytearray(damaged[0].read_bytes())
            data[-600] ^= 8
            damaged[0].write_bytes(data)

    monkeypatch.setattr(prepare_latents.Preparation, "encode", damaging)
    prepare(vae, source, tmp_path / "out")
    assert damaged and content(tmp_path / "out") == content(tmp_path / "whole")


def test_shards_damaged_before_they_are_hashed_are_written_again(vae, source, tmp_path):
    prepare(vae, source, tmp_path / "whole")
    stopped_before("_finish", vae, source, tmp_path / "out")
    shard = sorted((tmp_path / "out/data").iterdir())[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    prepare(vae, source, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_full_disk_is_told_with_the_file(vae, source, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with refusal(capsys, "No space left on device", str(tmp_path / "out"), "the same command goes on"):
        prepare(vae, source, tmp_path / "out")


# One check of a folder


@pytest.mark.parametrize("column", ["label", "moments"])
def test_verify_refuses_what_training_refuses(vae, source, tmp_path, column):
    _, manifest = prepare(vae, source, tmp_path / "out")
    path = tmp_path / "out" / manifest.shards[2]["file"]
    table = pq.read_table(path)
    values = {"label": pa.array([0, 1, 2, 3, 0, 0, 0, 0], pa.int64()), "moments": [b"1234"] * 8}[column]
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, [values]), path)
    with path.open("rb") as file:
        manifest.shards[2]["sha256"] = files.sha256_of(file)
    manifest.save(tmp_path / "out")
    word = {"label": "has the label 3; allowed are 0 to 2", "moments": "not of 1024 bytes each"}[column]
    with pytest.raises(SystemExit, match=f"train-00002-of-00004.parquet: .*{word}"):
        prepare_latents.main(["--verify", str(tmp_path / "out")])


def test_verify_refuses_a_manifest_that_does_not_hold_together(vae, source, tmp_path, capsys):
    _, manifest = prepare(vae, source, tmp_path / "out")
    manifest.count += 1
    manifest.save(tmp_path / "out")
    with refusal(capsys, "its count is 31, and its shards have 30 rows", untouched=tmp_path):
        prepare_latents.main(["--verify", str(tmp_path / "out")])


# Names


@pytest.mark.parametrize("streaming", [False, True])
def test_names_are_no_patterns(vae, tmp_path, streaming):
    folder = tmp_path / "a[1] *"
    folder.mkdir()
    source = write_source(folder / "[in]", pictures(6), [0, 1, 2, 0, 1, 2])
    options = ["--dataset_name", source, "--vae", vae, "--output_dir", str(folder / "out[!x]")]
    prepare_latents.main([*ARGUMENTS, *options, "--streaming", str(streaming)])
    prepare_latents.main(["--verify", str(folder / "out[!x]")])
    assert Manifest.read(str(folder / "out[!x]")).count == 6
    assert len(LatentDataset(str(folder / "out[!x]"))) == 6
