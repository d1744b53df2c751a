"""What a run leaves tells no path of the machine, and can be used all the same."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from conftest import make_latent_pipe
from diffusers import AutoencoderTiny
from PIL import Image
from small_runs import arguments, train

from sddit_diffusers.training.configuration import place_told, without_places
from sddit_diffusers.training.distill_options import parse as parse_distillation
from sddit_diffusers.training.options import parse
from sddit_diffusers.training.output import is_complete
from sddit_diffusers.training.results import save_weights


@pytest.fixture
def pictures(tmp_path):
    """Two classes of eight pictures."""
    folder, random = tmp_path / "far" / "pets", np.random.default_rng(0)
    for i in range(16):
        path = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


def telling(folder, place):
    """The files below a folder, but for checkpoints, that have a path in them."""
    files = [path for path in folder.rglob("*") if path.is_file() and "checkpoint" not in str(path)]
    assert len(files) > 8
    return [path for path in files if os.fsencode(place) in path.read_bytes()]


@pytest.mark.thorough
def test_a_run_on_absolute_paths_leaves_none(tmp_path, pictures, capsys):
    """Not of its pictures, its folder, its parent, its reference, its checkpoint or its options."""
    train(tmp_path / "parent", "--max_train_steps", 1, "--dataset_name", pictures)
    out = tmp_path / "out"
    options = ["--dataset_name", pictures, "--checkpointing_steps", 1, "--report_to", "tensorboard",
               "--pretrained_model_name_or_path", tmp_path / "parent", "--evaluation_steps", 2,
               "--evaluation_samples", 4, "--evaluation_extractor", "pixels", "--evaluation_reference",
               pictures, "--num_validation_images", 4, "--validation_steps", 1]  # fmt: skip
    train(out, "--max_train_steps", 1, *options)
    AcceleratorState._reset_state(True)
    train(out, "--max_train_steps", 2, *options, "--resume_from_checkpoint", out / "checkpoint-1")
    assert telling(out, tmp_path) == []
    assert list(out.rglob("hparams.yml")) and list(out.rglob("events.out.*"))
    checkpoint = json.loads((out / "checkpoint-2/checkpoint.json").read_text())
    assert checkpoint["settings"]["output_dir"] == str(out)
    assert 'from_pretrained("out"' in (out / "README.md").read_text()
    assert "Changed since" in (told := capsys.readouterr().out) and f'from_pretrained("{out}")' in told

    settings = json.loads((out / "training_config.json").read_text())
    away = ["dataset_name", "evaluation_reference", "pretrained_model_name_or_path"]
    assert sorted(settings["names_only"]) == away
    assert [settings[name] for name in (*away, "output_dir")] == ["./pets", "./pets", "./parent", "./out"]
    assert settings["resume_from_checkpoint"] == ""
    assert is_complete(parse(arguments(out, "--max_train_steps", 2, *options)))


def test_its_options_are_taken_where_the_names_are(tmp_path, pictures, monkeypatch, capsys):
    train(tmp_path / "out", "--max_train_steps", 1, "--dataset_name", pictures)
    file = ["--config", str(tmp_path / "out/training_config.json")]
    with pytest.raises(SystemExit):
        parse(file)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "dataset_name is './pets', the name of what was elsewhere; nothing of that name is here: " in line
    assert line.endswith("give --dataset_name.")
    assert parse([*file, "--dataset_name", str(pictures)]).dataset_name == str(pictures)
    with pytest.raises(SystemExit):  # a child is trained on what its parent was
        parse_distillation(["--model", str(tmp_path / "out")])
    assert "--dataset_name is needed" in capsys.readouterr().err
    monkeypatch.chdir(pictures.parent)
    assert parse(file).dataset_name == "./pets"
    assert parse_distillation(["--model", str(tmp_path / "out")]).dataset_name == "./pets"


def test_what_is_below_the_working_folder_keeps_its_place(tmp_path, pictures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "runs/out", "--max_train_steps", 1, "--dataset_name", pictures)
    settings = json.loads(Path("runs/out/training_config.json").read_text())
    assert (settings["dataset_name"], settings["output_dir"]) == ("./far/pets", "./runs/out")
    assert "names_only" not in settings
    assert 'from_pretrained("runs/out"' in Path("runs/out/README.md").read_text()
    again = ["--config", "runs/out/training_config.json", "--output_dir", "again", "--overwrite_output_dir"]
    shutil.move("runs/out", "elsewhere")
    again[1] = "elsewhere/training_config.json"
    assert parse(again).dataset_name == "./far/pets"


def test_names_and_relative_paths_stay(tmp_path, monkeypatch):
    settings = {"dataset_name": "user/pets", "vae": "../vae", "seed": 3, "auxiliary": ["none"]}
    assert without_places(settings) == settings
    monkeypatch.chdir("/")  # all paths are below it
    assert place_told(str(tmp_path / "pets")) == place_told("file:///data/pets") == "./pets"


def test_parts_do_not_tell_where_they_were_loaded_from(tmp_path):
    pipe = make_latent_pipe("tiny")
    pipe.vae.save_pretrained(tmp_path / "vae")
    pipe.register_modules(vae=AutoencoderTiny.from_pretrained(str(tmp_path / "vae")))
    assert pipe.vae.config._name_or_path == str(tmp_path / "vae")
    folder = tmp_path / "saved"
    tokenizer = folder / "tokenizer/tokenizer_config.json"
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_text(json.dumps({"name_or_path": str(tmp_path), "a": 1}))
    (folder / "vocab.json").write_text('["name_or_path"]')
    save_weights(pipe, folder)
    assert telling(folder, tmp_path) == []
    assert json.loads(tokenizer.read_text()) == {"a": 1}
    pipe.vae.register_to_config(_name_or_path="user/vae")
    save_weights(pipe, folder)
    assert json.loads((folder / "vae/config.json").read_text())["_name_or_path"] == "user/vae"
