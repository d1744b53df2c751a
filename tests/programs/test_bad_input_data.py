"""What the programs and functions of data refuse: each in one line that names what is wrong."""

import json

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from bad_input import refusal
from diffusers import AutoencoderKL
from PIL import Image

from sddit_diffusers import prepare_latents
from sddit_diffusers.data.latents import LatentDataset
from sddit_diffusers.data.pictures import ImageDataset
from sddit_diffusers.evaluation.image_sets import open_images
from sddit_diffusers.evaluation.statistics import read_statistics


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], norm_num_groups=4,
    )  # fmt: skip
    model.save_pretrained(tmp_path_factory.mktemp("vae") / "vae")
    return tmp_path_factory.getbasetemp() / "vae0/vae"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for i in range(4):
        (folder / str(i % 2)).mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (i, i, i)).save(folder / str(i % 2) / f"{i}.png")
    return folder


def prepare(model, source, folder, **options):
    options = {
        "dataset_name": source,
        "vae": model,
        "output_dir": folder,
        "resolution": 16,
        "batch_size": 4,
    } | options
    try:
        prepare_latents.main([f"--{name}={value}" for name, value in options.items()])
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("resolution", 0, "in 1..8192"),
        ("resolution", -1, "in 1..8192"),
        ("resolution", 10**12, "in 1..8192"),
        ("resolution", 1, "the VAE cannot encode"),
        ("resolution", "nan", "invalid int"),
        ("resolution", "Infinity", "invalid int"),
        ("batch_size", 0, "at least 1"),
        ("batch_size", 10**12, "at most"),
        ("block_size", 0, "at least 1"),
        ("block_size", 2**31, "at most"),
        ("shard_size", -5, "at least 1"),
        ("shard_size", 10**12, "at most"),
        ("seed", -1, "at least 0"),
        ("seed", 2**64, "at most"),
        ("seed", 1.5, "invalid int"),
        ("dtype", "float8", "'float32', 'bfloat16' or 'float16'"),
        ("dtype", "", "'float32', 'bfloat16' or 'float16'"),
        ("flip", "maybe", "flip"),
        ("dataset_name", "", "--dataset_name is missing"),
        ("dataset_name", "a\0b", "no null bytes"),
        ("dataset_name", "./nowhere", "./nowhere"),
        ("output_dir", "", "--output_dir is missing"),
        ("output_dir", "a\0b", "no null bytes"),
        ("vae", "", "--vae is missing"),
        ("vae", "a\0b", "no null bytes"),
        ("vae", "./nowhere", "The VAE './nowhere' cannot be loaded"),
        ("split", "nothing", "nothing"),
        ("split", "a\0b", "no null bytes"),
        ("dataset_config_name", "nothing", "nothing"),
        ("image_column", "nothing", "has no column 'nothing'; its columns are image, label"),
        ("image_column", "label", "holds no pictures"),
        ("label_column", "nothing", "has no column 'nothing'"),
        ("resolutoin", 8, "nearest are --resolution"),
        ("verify", "./nowhere", "There are no latents in ./nowhere"),
        ("verify", "a\0b", "no null bytes"),
    ],
)
def test_options(vae, source, tmp_path, capsys, name, value, allowed):
    with refusal(capsys, allowed, untouched=tmp_path):
        prepare(vae, source, tmp_path / "out", **{name: value})


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"seed": NaN}', "[" * 10**5])
def test_settings_of_a_preparation(vae, source, tmp_path, capsys, content):
    (tmp_path / "out/.preparing").mkdir(parents=True)
    (tmp_path / "out/.preparing/settings.json").write_text(content)
    with refusal(capsys, "settings.json is no settings of a preparation", untouched=tmp_path):
        prepare(vae, source, tmp_path / "out")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", '{"format": "sddit-latents-1"}', '{"format": "x"}']
)
def test_manifests(vae, source, tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text(content)
    with refusal(capsys, str(tmp_path / "out"), untouched=tmp_path):
        prepare(vae, source, tmp_path / "out")
    with refusal(capsys, str(tmp_path / "out"), untouched=tmp_path):
        prepare_latents.main(["--verify", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=str(tmp_path / "out")):
        LatentDataset(str(tmp_path / "out"))


@pytest.mark.parametrize("other", ["thesis.tex", "data/x.parquet", ".hidden", ".preparing.txt"])
def test_folders_of_other_files(vae, source, tmp_path, capsys, other):
    (tmp_path / "out" / other).parent.mkdir(parents=True)
    (tmp_path / "out" / other).write_text("years of work")
    with refusal(capsys, "holds other files", untouched=tmp_path):
        prepare(vae, source, tmp_path / "out")


def test_a_file_where_the_folder_would_be(vae, source, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    with refusal(capsys, str(tmp_path / "out"), untouched=tmp_path):
        prepare(vae, source, tmp_path / "out")
    with refusal(capsys, str(tmp_path / "out"), untouched=tmp_path):
        prepare(vae, source, tmp_path / "out" / "below")


def labelled(folder, labels):
    image = [Image.new("RGB", (16, 16))] * len(labels)
    folder.mkdir()
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    table = datasets.Dataset.from_dict({"image": image, "label": labels}, features=features)
    table.to_parquet(str(folder / "a.parquet"))
    return folder


@pytest.mark.parametrize("label", [-1, 2**31, 10**12, 1_000_000, 2**63 - 1, None])
def test_labels(vae, tmp_path, capsys, label):
    folder = labelled(tmp_path / "in", [0, 1, label, 0])
    for streaming in (False, True):
        with refusal(capsys, f"has the label {label}; allowed are integers from 0 to 999999"):
            prepare(vae, folder, tmp_path / f"out-{streaming}", streaming=streaming)
    with pytest.raises(ValueError, match=f"Row 2 of .* has the label {label}; allowed are 0 to 999999"):
        ImageDataset(str(folder), "image", "label", 3, 16)


@pytest.mark.parametrize("column", ["image", "label"])
@pytest.mark.parametrize(
    "values", [[0.5, 1.0], [[0.5], [1.0]], [{"a": 1}] * 2, [None, None], [[[0.5, 1.0]]] * 2]
)
def test_columns(vae, tmp_path, capsys, column, values):
    (tmp_path / "in").mkdir()
    good = {"image": [{"bytes": b"", "path": None}] * 2, "label": [0, 1]}
    datasets.Dataset.from_dict(good | {column: values}).to_parquet(str(tmp_path / "in/a.parquet"))
    with refusal(capsys, str(tmp_path / "in"), untouched=tmp_path / "in"):
        prepare(vae, tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["a\0b", "", "./nowhere", "/nowhere", "no name of the Hub!", "nosuch://x", "x.npz"]
)
def test_names_of_images(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError):
        open_images(name)
    with pytest.raises(ValueError):
        ImageDataset(name, "image", "label", 3, 8)


@pytest.mark.parametrize("suffix", [".npz", ".pkl"])
@pytest.mark.parametrize(
    "content", [b"", b"PK", b"\0" * 100, b"\x93NUMPY", b"\x80\x05", b"(((((", b"PK\5\6" + bytes(18)]
)
def test_files_of_statistics(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    try:
        assert read_statistics(path) == {}
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pictures_of_no_known_range(vae, tmp_path, capsys, mode):
    for i in range(2):
        (tmp_path / "in" / str(i)).mkdir(parents=True)
        Image.fromarray(np.full((16, 16), i, {"F": np.float32, "I": np.int32}[mode])).save(
            tmp_path / "in" / str(i) / "a.tif"
        )
    with refusal(capsys, "Row 0 of", "a.tif", "pictures have 8 or 16 bits"):
        prepare(vae, tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="a.tif.* pictures have 8 or 16 bits"):
        open_images(str(tmp_path / "in"))


def test_a_shard_that_is_missing(vae, source, tmp_path):
    prepare(vae, source, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    (tmp_path / "out" / manifest["shards"][0]["file"]).unlink()
    with pytest.raises(ValueError, match="cannot be opened"):
        LatentDataset(str(tmp_path / "out"))
