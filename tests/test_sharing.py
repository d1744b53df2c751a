"""Model cards, and what a training uploads."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from loopback_hub import serve

import train_sddit
from sddit_diffusers import sharing

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
    (snippet,) = re.findall(r"```python\n(.*?)```", (trained / "README.md").read_text(), re.DOTALL)
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


def test_the_template_is_where_people_look_for_it():
    shown = Path(__file__).parents[1] / "pipelines/hub/model_card.md"
    assert shown.resolve() == sharing.TEMPLATE.resolve()
