"""The pages of docs/: order, links, the reference; a folder of pictures from nothing to scores."""

import importlib
import importlib.util
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import sddit
import sddit_diffusers
from sddit_diffusers import DIGITS, SDDiTPipeline
from sddit_diffusers.evaluation import classifiers

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "pipelines").rglob("README.md")]
REFERENCE = [path for path in PAGES if path.parent.name == "reference"]
NAV = (ROOT / "mkdocs.yml").read_text().split("nav:\n")[1].split("\n\n")[0]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site/hooks.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def anchors(text):
    """As code hosts make them of headings."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text()), target


def test_each_page_has_its_place(hooks):
    named = re.findall(r"[\w/-]+\.md", NAV)
    below = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(named) == len({*named}) and {*named} == below | {*hooks.PAGES}
    assert all((ROOT / source).is_file() for source in hooks.PAGES.values())
    order = [
        "quick-start", "own-data", "methods", "training", "evaluation", "distillation", "sharing", "comfyui",
        "extending", "method", "troubleshooting", "reproduction", "performance", "reference/index",
    ]  # fmt: skip
    assert [name for name in named if name.removesuffix(".md") in order] == [f"{name}.md" for name in order]


def test_the_reference_has_what_it_names():
    """Modules and members, and all of the face."""
    shown = set()
    for page in REFERENCE:
        for block in re.split(r"^::: ", page.read_text(), flags=re.MULTILINE)[1:]:
            path, members = block.split()[0], re.search(r" members:\s+(\[.*?\]|(?:- \w+\s*)+)", block)
            names = re.findall(r"\w+", members[1]) if members else []
            try:
                thing = importlib.import_module(path)
            except ModuleNotFoundError:
                module, _, name = path.rpartition(".")
                thing = getattr(importlib.import_module(module), name)
                shown.add(name)
            assert all(hasattr(thing, name) for name in names), (path, names)
            shown |= {*names}
    assert {*sddit_diffusers.__all__} - shown == {"DIGITS", "PRESETS"}


def test_links_become_those_of_the_site(hooks):
    def of(page, link):
        (found,) = [path for _, path in hooks.linked(page, f"[x]({link}) [y](https://z.md) [z](#there)")]
        return found, hooks.place_in_site(found)

    assert of("index.md", "docs/methods.md#a") == ("docs/methods.md", "methods.md")
    assert of("methods.md", "../pipelines/README.md") == ("pipelines/README.md", "pipelines/saved.md")
    assert of("pipelines/comfyui.md", "graph.png")[1] == "files/pipelines/comfyui/graph.png"
    assert of("reference/index.md", "../own-data.md") == ("docs/own-data.md", "own-data.md")
    assert hooks.place_in_site("README.md") == "index.md"


def test_lists_get_the_line_that_code_hosts_do_without(hooks):
    given = "one of\n- a\n- b\n  more\n\n- c\n\n```\nx\n- y\n```\n"
    assert hooks.spaced_lists(given) == given.replace("one of\n", "one of\n\n")


def test_the_site_asks_nothing_of_other_hosts():
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings and "iframe-worker.js" in settings and "http" not in settings
    for path in (ROOT / "docs/site").iterdir():
        code = re.sub(r"^\s*// ", "", path.read_text(), flags=re.MULTILINE)
        assert path.suffix == ".py" or "//" not in code


@pytest.mark.long
def test_own_pictures_from_nothing_to_scores(tmp_path, monkeypatch, capsys):
    """The commands and snippets of the page's example, in their order; training is two steps."""
    monkeypatch.chdir(tmp_path)
    fit = classifiers._fit_classifier
    monkeypatch.setattr(classifiers, "_fit_classifier", lambda *arguments: fit(*arguments[:-1], 2))
    page = (ROOT / "docs/own-data.md").read_text()
    example = page.split("## Three classes")[1].split("\n## ")[0]
    small = {
        "--max_train_steps": "2",
        "--train_batch_size": "8",
        "--evaluation_steps": "0",
        "--num_validation_images": "30",
    }
    done, variables = [], {}
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", example, re.DOTALL):
        if language == "python":
            assert "range(200)" in block or "from_pretrained" in block
            exec(block.replace("range(200)", "range(24)"), variables)
            continue
        for command in block.replace("\\\n", " ").strip().splitlines():
            words = shlex.split(command)
            few = ["--num_inference_steps", "2", "--num_samples", "30"]
            more = {"train": [word for option in small.items() for word in option], "generate": few}
            assert words[0] == "sddit"
            sddit.main([*words[1:], *more.get(words[1], [])])
            done.append(command)
            AcceleratorState._reset_state(True)
    assert len(done) == 4 and {"triangle.png", "shapes-samples", "sddit-shapes-longer"} <= {*os.listdir()}
    assert SDDiTPipeline.from_pretrained("sddit-shapes").id2label == {0: "circle", 1: "square", 2: "triangle"}
    settings = json.loads(Path("sddit-shapes-longer/training_config.json").read_text())
    assert settings["pretrained_model_name_or_path"] == "sddit-shapes"
    assert "FID" in capsys.readouterr().out


def test_adapters_are_trained_saved_and_merged(tmp_path, monkeypatch):
    """The snippets of the page's section on LoRA; training is two steps."""
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs/own-data.md").read_text().split("LoRA\n")[1].split("\n## ")[0]
    first, second = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert "range(200)" in first
    exec(first.replace("range(200)", "range(2)"), variables := {})
    trained, sample = variables["network"], torch.ones(1, 1, 8, 8)
    expected = trained(sample, torch.zeros(1), torch.tensor([7])).sample
    exec(second, variables)
    merged = SDDiTPipeline.from_pretrained("dark-digits-model").transformer
    actual = merged(sample, torch.zeros(1), torch.tensor([7])).sample
    torch.testing.assert_close(actual, expected)
    original = SDDiTPipeline.from_pretrained(DIGITS).transformer
    assert not torch.allclose(original(sample, torch.zeros(1), torch.tensor([7])).sample, expected, atol=1e-3)
