"""What the README says is so."""

import importlib
import os
import re
import shlex
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from conftest import TINY, randomize

from sddit import PROGRAMS
from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel
from sddit_diffusers.app import AppConfig
from sddit_diffusers.cli import Parser
from sddit_diffusers.convert import ConvertConfig
from sddit_diffusers.evaluate import EvaluateConfig
from sddit_diffusers.generate import GenerateConfig
from sddit_diffusers.plot import PlotConfig
from sddit_diffusers.prepare_latents import PrepareConfig
from sddit_diffusers.reproduce import ReproduceConfig
from sddit_diffusers.training.distill_options import parse as parse_distillation
from sddit_diffusers.training.options import TrainingConfig, parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
TEXT = "".join([README, *PAGES.values()])
# By tests of their own: one adds to the package's tables, one goes from a folder of pictures to scores.
CARRIED_OUT = ("extending.md", "own-data.md")


def blocks(language):
    text = TEXT
    for name in CARRIED_OUT if language == "python" else ():
        text = text.replace(PAGES[name], "")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_python_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transformer = randomize(SDDiTTransformer2DModel(**TINY | {"num_classes": 10}))
    SDDiTPipeline(transformer, EDMHeunScheduler()).save_pretrained("sddit-digits")
    child = EDMHeunScheduler(num_inference_steps=10, solver="euler")
    SDDiTPipeline(transformer, child).save_pretrained("sddit-digits-progressive-10")
    variables = {}
    for block in blocks("python"):
        lines = [line for line in block.splitlines() if "# needs the Hub" not in line]
        exec("\n".join(lines), variables)
    assert (tmp_path / "seven.png").is_file() and (tmp_path / "digit-seven.png").is_file()
    assert variables["images"].shape == (3, 8, 8, 1)  # the README's last


def commands():
    """Those of the documents, `sddit PROGRAM` as the script or module that it runs."""
    for block in blocks("bash"):
        lines = block.replace("\\\n", " ").splitlines()
        yield from (re.sub(r"(?:-m |^)sddit ([\w-]+)", script, line.split("#")[0].strip()) for line in lines)


def script(called):
    module = PROGRAMS[called[1]].module
    name = f"-m {module}" if "." in module else f"{module}.py"
    return f"{name} --probe" if called[1] == "probe" else name


@pytest.mark.parametrize("command", [c for c in commands() if "train_sddit.py --" in c and "--help" not in c])
def test_training_commands_parse(command):
    assert isinstance(parse(shlex.split(command.split("train_sddit.py ")[1])), TrainingConfig)


def test_commands_of_distillation_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transformer = SDDiTTransformer2DModel(**TINY)
    SDDiTPipeline(transformer, EDMHeunScheduler()).save_pretrained("sddit-digits")
    Path("sddit-digits/training_config.json").write_text('{"preset": "digits", "dataset_name": "digits"}')
    found = [line for line in commands() if "distill_sddit.py --model sddit-digits" in line]
    assert len(found) >= 2
    folders = [
        parse_distillation(shlex.split(line.split("distill_sddit.py")[1])).output_dir for line in found
    ]
    assert "sddit-digits-progressive-10" in folders


@pytest.mark.parametrize(
    ("program", "config", "least"),
    [
        ("app", AppConfig, 2),
        ("convert", ConvertConfig, 5),
        ("prepare_latents", PrepareConfig, 2),
        ("generate", GenerateConfig, 2),
        ("evaluate", EvaluateConfig, 4),
        ("plot", PlotConfig, 1),
        ("reproduce", ReproduceConfig, 2),
    ],
)
def test_commands_of_programs_parse(program, config, least):
    found = [line for line in commands() if f"sddit_diffusers.{program}" in line]
    assert len(found) >= least
    for command in found:
        words = shlex.split(command)
        parser = Parser(config)
        parser.add_argument("names", nargs="*")
        chosen = parser.parse_known_options(words[words.index(f"sddit_diffusers.{program}") + 1 :])
        del chosen["names"]
        config(**chosen)


@pytest.mark.long
def test_commands_that_need_no_download_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transformer = SDDiTTransformer2DModel(**TINY | {"num_classes": 10, "in_channels": 1})
    SDDiTPipeline(randomize(transformer), EDMHeunScheduler()).save_pretrained("sddit-digits")
    quick = {  # what a command has besides
        "generate --model sddit-digits --num_samples 2000": "--num_samples 20 --num_inference_steps 2",
        "evaluate digits-samples digits": "",
        "evaluate --probe sddit-digits": "",
        "plot path sddit-digits": "--num_inference_steps 2",
        "convert sddit-digits digits.safetensors": "",
        "convert digits.safetensors digits-again": "",
    }
    for begin, more in quick.items():
        command, *_ = [line for line in commands() if f"-m sddit_diffusers.{begin}" in line]
        words = shlex.split(f"{command} {more}")
        module = words[words.index("-m") + 1]
        importlib.import_module(module).main(words[words.index("-m") + 2 :])
        AcceleratorState._reset_state(True)
    assert {"digits-samples", "path.png", "digits.safetensors", "digits-again"} <= set(os.listdir())


def test_the_two_commands_are_there_and_ci_runs_the_second():
    first, second = (
        "pip install -e . && sddit train",
        'pip install -e ".[test]" && pytest',
    )
    assert {first, second} <= set(commands())
    ci = (ROOT / ".ci/run").read_text()
    assert re.search(r'pip install [^\n]*-e "\.\[test\]"', ci) and re.search(r"^pytest$", ci, re.MULTILINE)


def test_files_that_it_names_exist():
    tree = re.search(r"## The code\n.*?```\n(.*?)```", PAGES["paper.md"], re.DOTALL).group(1)
    wing = ""
    for line in tree.splitlines():
        indent, names = len(line) - len(line.lstrip()), re.findall(r"[\w.]+(?:\.py|/)(?=[\s:;,]|$)", line)
        folder = [ROOT, ROOT / "sddit_diffusers", ROOT / "sddit_diffusers" / wing][indent // 2]
        wing = names[0] if indent == 2 else wing
        assert names
        for name in names:
            assert (folder / name).exists() or [*folder.rglob(name)], name
    assert len(README.splitlines()) <= 150
