"""Model cards, and what a training uploads."""

import html
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from huggingface_hub import HfApi, ModelCard
from loopback_hub import serve
from PIL import Image

import train_sddit
from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel
from sddit_diffusers.data.pictures import ImageDataset
from sddit_diffusers.training import publishing as sharing
from sddit_diffusers.training.options import TrainingConfig

OPTIONS = [
    "--max_train_steps=2", "--train_batch_size=8", "--evaluation_steps=2", "--evaluation_samples=8",
    "--num_validation_images=10", "--checkpointing_steps=1", "--validation_steps=1",
    '--transformer={"num_layers": 1, "num_decoder_layers": 1}',
]  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub in place of the one that huggingface_hub, long imported, knows."""
    with serve(tmp_path / "hub") as (hub, environment):
        api = HfApi(endpoint=environment["HF_ENDPOINT"], token=environment["HF_TOKEN"])
        for name in ("create_repo", "upload_folder"):
            monkeypatch.setattr(sharing, name, getattr(api, name))
        yield hub


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "sddit-digits"
    train_sddit.main([f"--output_dir={folder}", *OPTIONS])
    return folder


def test_a_training_uploads_its_pipeline_and_no_checkpoint(hub, tmp_path, capsys):
    folder = tmp_path / "my-digits"
    train_sddit.main([f"--output_dir={folder}", "--push_to_hub", *OPTIONS])
    pushed = hub.files("user/my-digits")
    assert set(pushed) == {
        "README.md", "model_index.json", "pipeline_sddit.py", "samples.png", "curves.png", "metrics.jsonl",
        "training_config.json", "scheduler/scheduler_config.json", "scheduler/scheduling_edm_heun.py",
        "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
        "transformer/transformer_sddit.py",
    }  # fmt: skip
    assert (folder / "checkpoint-2").is_dir() and (folder / "samples-1.png").is_file()
    assert {name: (folder / name).read_bytes() for name in pushed} == pushed
    assert "/user/my-digits" in capsys.readouterr().out
    assert b'from_pretrained("user/my-digits"' in pushed["README.md"]


def test_nobody_trains_for_a_hub_that_will_not_take_it(hub, tmp_path, monkeypatch, capsys):
    for name, reason in (("user/in/valid", "user/in/valid"), ("", "--push_to_hub")):
        if not name:
            monkeypatch.setattr(sharing, "create_repo", HfApi(endpoint="http://127.0.0.1:9").create_repo)
        with pytest.raises(SystemExit, match=reason) as error:
            options = [f"--output_dir={tmp_path / 'x'}", "--push_to_hub", f"--hub_model_id={name}"]
            train_sddit.main([*options, *OPTIONS])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "x" / "metrics.jsonl").exists()


def test_a_failed_upload_leaves_the_pipeline_and_says_how_to_go_on(hub, trained, monkeypatch):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    monkeypatch.setattr(sharing, "upload_folder", HfApi(endpoint="http://127.0.0.1:9").upload_folder)
    with pytest.raises(OSError, match="hf upload user/digits .* --include 'model_index.json'"):
        sharing.upload(trained, "user/digits")
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_a_card_is_one_that_the_hub_reads(trained):
    card = ModelCard.load(trained / "README.md")
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["fid"] == pytest.approx(last["fid_pixels"], abs=1e-4) and set(results) >= {"recall"}
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "diffusers")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", card.text):
        assert (trained / target).is_file()
    assert "| mask_ratio | 0.2 |" in card.text and "{{" not in card.text and "{%" not in card.text


def test_a_cards_snippet_runs(trained, tmp_path, monkeypatch):
    """Where the folder is, whose place the card does not tell."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (trained / "README.md").read_text(), re.DOTALL)
    (tmp_path / trained.name).symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert (tmp_path / "sample.png").is_file()


@pytest.mark.parametrize("options", [["--method=maskdit"], ["--label_column="]])
def test_cards_of_other_runs(options, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    settings = [f"--output_dir={folder}", *OPTIONS, "--evaluation_steps=0", "--num_validation_images=0"]
    train_sddit.main([*settings, *options])
    text = (folder / "README.md").read_text()
    assert "samples.png" not in text and "## Scores" not in text
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert (tmp_path / "sample.png").is_file()


def test_a_card_claims_no_loss_and_no_licence_that_it_has_not(trained, tmp_path):
    for name, options in (("a", ["--auxiliary=none"]), ("b", ["--discriminative_weight=0"])):
        options += ["--evaluation_steps=0", "--num_validation_images=0", f"--output_dir={tmp_path / name}"]
        train_sddit.main([*OPTIONS, *options, f"--pretrained_model_name_or_path={trained}"])
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data.license is None and "weights and the code" not in card.text
        assert f"The training began with the weights of ./{trained.name}, whose licence" in card.text
        assert "trained without its\nself-supervised discrimination" in card.text
    text = (trained / "README.md").read_text()
    assert "denoising and the self-supervised discrimination" in text and "weights and the code" in text


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "a`b*c_d|e[f](g)~h~$i$#",
    "a\n---\n# b: c\n```\nd",
    "quote\"'\\",
    "{{ 7 * 7 }}{% raw %}",
    '");import os;os.mkdir("made");("',
    "\u202egnp.\udcff",
    "...",
]


def card_of(folder, source, names=("cat", "dog"), repo=None):
    """The card of a run on a dataset that is called so, and its snippet."""
    dataset = ImageDataset("digits", "image", "label", 1, 8)
    transformer = SDDiTTransformer2DModel(**TINY | {"num_classes": 2})
    pipe = SDDiTPipeline(transformer, EDMHeunScheduler(), id2label=dict(enumerate(names)))
    folder.mkdir(exist_ok=True)
    dataset.source = str(source)
    config = TrainingConfig(output_dir=str(folder))
    sharing.write_card(folder, repo or str(folder), pipe, config, dataset)
    card = ModelCard.load(folder / "README.md")
    (snippet,) = re.findall(r"```python\n(.*?)^```", card.text, re.DOTALL | re.MULTILINE)
    return card, snippet


@pytest.mark.parametrize("name", HOSTILE)
def test_foreign_names_are_shown_and_not_obeyed(name, tmp_path, monkeypatch):
    """Of a dataset's folder, a class and the output's folder, which had no metrics."""
    folder = tmp_path / "out" / name
    folder.parent.mkdir()
    card, snippet = card_of(folder, tmp_path / "in" / name, (name, "zebra"))
    text = card.text
    assert not re.search(r"<(?!\w+@)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    title = text.strip().splitlines()[0]
    shown = re.sub(r"\\([^a-zA-Z0-9\s])", r"\1", html.unescape(title))  # as Markdown reads it
    plain = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    assert shown == f"# {plain}: SD-DiT on {plain}"
    assert not re.search(r"(?<!\\)[`*_\[\]|~$]", title)
    for row in re.findall(r"^\|.*$", text, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) == 3, row

    made, calls = [], []

    class Pipeline:
        def from_pretrained(name, **_):
            made.append(name)
            return Pipeline()

        def __call__(self, class_labels, **_):
            calls.append(class_labels)
            return type("", (), {"images": [Image.new("RGB", (8, 8))]})

    monkeypatch.chdir(tmp_path)
    exec(re.sub(r"from .* import \w+", "", snippet), {"DiffusionPipeline": Pipeline})
    assert made == [str(folder)] and calls[0][0] == name
    assert not (tmp_path / "made").exists()


def test_ordinary_names_stand_as_they_are(tmp_path):
    card, snippet = card_of(tmp_path / "my-digits", tmp_path / "pictures", repo="user/my-digits")
    assert card.text.strip().startswith("# my-digits: SD-DiT on pictures\n")
    assert 'from_pretrained("user/my-digits", trust_remote_code=True)' in snippet
    assert 'pipe(class_labels=["cat"], guidance_scale=1.5)' in snippet


@pytest.mark.thorough
@pytest.mark.process
def test_the_example_is_the_same_class_whatever_the_order_of_sets():
    code = (
        "from sddit_diffusers.training.publishing import example_class;"
        "from sddit_diffusers import *;"
        f"print(example_class(SDDiTPipeline(SDDiTTransformer2DModel(**{TINY}), EDMHeunScheduler(),"
        "id2label={3: 'd', 1: 'Tench, Tinca tinca', 2: 'c'})))"
    )
    folders = f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}"
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": folders, "PATH": ""}
        found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert found.stdout == '"Tench, Tinca tinca"\n', found.stderr


def test_a_name_of_several_classes_is_no_example(pipe):
    pipe.id2label, pipe.label2ids = {0: "crane", 1: "crane"}, {"crane": [0, 1]}
    assert sharing.example_class(pipe) == "0"


def test_the_example_is_the_third_class_from_the_end_and_unguided_where_guidance_was_learnt(pipe):
    """Of the fixture's four classes that is one of several names."""
    assert sharing.example_class(pipe) == '"golden retriever, retriever"'
    call = 'pipe(class_labels=["golden retriever, retriever"]).images[0].save("sample.png")'
    assert sharing.example_call(pipe, guided=False) == call
    assert "], guidance_scale=1.5)" in sharing.example_call(pipe)


def test_an_upload_that_failed_is_told_with_quoted_names(hub, trained, tmp_path, monkeypatch):
    folder = tmp_path / "my run; rm -rf x"
    folder.mkdir()
    monkeypatch.setattr(sharing, "upload_folder", HfApi(endpoint="http://127.0.0.1:9").upload_folder)
    with pytest.raises(OSError, match="Try again") as error:
        sharing.upload(folder, "user/digits")
    command = shlex.split(str(error.value).split("Try again: ")[1])
    assert command[:5] == ["hf", "upload", "user/digits", str(folder), "."]


def test_the_template_is_where_people_look_for_it():
    shown = Path(__file__).parents[2] / "pipelines/hub/model_card.md"
    assert shown.resolve() == sharing.TEMPLATE.resolve()
