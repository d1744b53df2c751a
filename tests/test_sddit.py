"""`sddit PROGRAM`: what it is called by, what `--help` says, and the examples of `--config`."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from processes import launch

import sddit
from sddit_diffusers import DIGITS
from sddit_diffusers.cli import Parser, option, options
from sddit_diffusers.training.distill_options import DistillConfig
from sddit_diffusers.training.distill_options import parse as parse_distillation
from sddit_diffusers.training.options import TrainingConfig, parse

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.json"))


@dataclass
class Settings:
    fast: bool = option(False, "be fast")
    safe_mode: bool = option(True, "be safe")
    kind: str = option("a", "what it is", choices=("", "a", "b"), group="others")
    sizes: list[int] = options([1, 2], "how large")
    name: str = option("", "whose, at 100 %")
    limit: int | None = option(None, "at most")


def help_of(capsys, *arguments):
    """What a program says of itself at 100 columns."""
    with pytest.raises(SystemExit) as exit:
        sddit.main([*arguments, "--help"])
    assert not exit.value.code
    return capsys.readouterr().out


@pytest.mark.process
def test_its_help_loads_neither_torch_nor_diffusers():
    code = """
import sys
import sddit
sddit.main(["--help"])
print({"torch", "diffusers", "sddit_diffusers", "numpy"} & {*sys.modules}, file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "set()"
    lines = run.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    for name, program in sddit.PROGRAMS.items():
        assert [line for line in lines if re.fullmatch(rf"  {name} +{re.escape(program.about)}", line)]


def test_the_package_has_the_command_and_ci_calls_every_program():
    setup = (ROOT / "setup.py").read_text()
    assert '"sddit=sddit:main"' in setup
    modules = {program.module for program in sddit.PROGRAMS.values() if "." not in program.module}
    for module in {"sddit", *modules}:
        assert f'"{module}"' in re.search(r"py_modules=\[(.*)\]", setup)[1]
    (named,) = re.findall(r"for program in (.*); do\n +sddit", (ROOT / ".ci/run").read_text())
    assert named.split() == [*sddit.PROGRAMS]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian", "no program 'trian'; did you mean train?"),
        ("prepare", "no program 'prepare'; did you mean prepare-latents?"),
        ("sample", "no program 'sample'; there are train, distill, "),
        ("--preset", "no program '--preset'; there are train, "),
    ],
)
def test_an_unknown_program_gets_a_line_with_the_nearest(name, message, capsys):
    with pytest.raises(SystemExit) as exit:
        sddit.main([name])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sddit: error: {message}") and len(error.splitlines()) == 1


@pytest.mark.parametrize("name", sddit.PROGRAMS)
def test_help_shows_each_option_once_and_no_empty_default(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    before = sys.argv[0]
    text = help_of(capsys, name)
    assert sys.argv[0] == before
    assert text.startswith(f"usage: sddit {name} [OPTIONS]")
    assert max(map(len, text.splitlines())) <= 100
    assert not re.search(r"default: *\)|None|\[\]|'\]|no_|required\)", text)
    shown = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    assert len(shown) == len({*shown}) >= 4
    switches = dict(re.findall(r"^  --(\w+) / --no-(\w+)", text, re.MULTILINE))
    assert all(one == other for one, other in switches.items())
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert len(titles) == len({*titles})


@pytest.mark.parametrize(("name", "config"), [("train", TrainingConfig), ("distill", DistillConfig)])
def test_help_of_training_has_all_options_in_their_groups(name, config, capsys):
    parts = re.split(r"^(\S.*):\n", help_of(capsys, name), flags=re.MULTILINE)[1:]
    groups = dict(zip(parts[::2], parts[1::2], strict=True))
    assert {"data", "optimizer", "evaluation", "output", "Hub"} < groups.keys()
    assert set(re.findall(r"^  --(\w+)", groups["Hub"], re.MULTILINE)) == {"push_to_hub", "hub_model_id"}
    shown = {option for part in groups.values() for option in re.findall(r"^  --(\w+)", part, re.MULTILINE)}
    assert shown - {"config"} == {each.name for each in fields(config)}
    if name == "train":
        order = ["data", "network", "process", "auxiliary losses", "optimizer", "evaluation", "output", "Hub"]
        assert [title for title in groups if title in order] == order
        assert "--process" in groups["process"] and "--sigma_data" in groups["process"]


def test_defaults_that_depend_on_something_say_so(capsys, tmp_path):
    def told(*arguments):
        return " ".join(help_of(capsys, "train", *arguments).split())

    digits, paper = told(), told("--preset", "SD-DiT-XL/2")
    assert "optimizer steps (default: by the preset, here 1650)" in digits
    assert "optimizer steps (default: by the preset, here 2400000)" in paper
    assert "latents (default: by the preset, here none)" in paper
    assert "routed blocks (default: by the preset and method, here 0.2)" in digits
    assert "routed blocks (default: by the preset and method, here 0.5)" in told("--method", "tread")
    assert "in training (default: by the preset and process, here -1.2)" in paper
    assert "seed of weights, data order and noise (default: 0)" in paper
    (tmp_path / "c.json").write_text('{"seed": 5}')
    assert "data order and noise (default: by the file, here 5)" in told("--config", str(tmp_path / "c.json"))
    text = " ".join(help_of(capsys, "distill").split())
    assert (
        "optimizer steps (default: by the model)" in text and "adam_beta1 X of AdamW (default: 0.9)" in text
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (False, True)),
        ("--fast", (True, True)),
        ("--fast True", (True, True)),
        ("--fast=yes", (True, True)),
        ("--fast false", (False, True)),
        ("--fast --no-fast", (False, True)),
        ("--no_safe_mode", (False, False)),
        ("--no-safe_mode", (False, False)),
        ("--no-safe-mode --fast", (True, False)),
        ("--safe-mode 0", (False, False)),
        ("--safe_mode=TRUE", (False, True)),
        ("--name fast --kind safe_mode", (False, True)),  # values that are named as options
    ],
)
def test_booleans_are_understood_in_all_spellings(words, expected):
    parser = Parser(Settings)
    parser.add_argument("path", nargs="?")
    chosen = parser.parse_known_options([*words.split(), "file"])
    assert (chosen["fast"], chosen["safe_mode"], chosen["path"]) == (*expected, "file")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fast=perhaps", "argument --fast: 'perhaps' is neither True nor False"),
        ("--no-fast=True", "argument --fast/--no-fast: ignored explicit argument 'True'"),
        ("--sizes one", "argument --sizes: invalid int value: 'one'"),
    ],
)
def test_values_that_are_none_get_a_line(words, message, capsys):
    with pytest.raises(SystemExit):
        Parser(Settings, prog="it").parse_known_options(words.split())
    assert capsys.readouterr().err == f"it: error: {message}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fas", "unknown option --fas; nearest are --fast"),
        ("--no-name x", "unknown option --no-name; nearest are --name"),
        ("somewhere", "'somewhere' is of no option; see --help."),
    ],
)
def test_words_that_nobody_asked_for_are_named(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Parser(Settings).parse_known_options(words.split())


def test_what_stands_behind_two_hyphens_is_as_it_is():
    parser = Parser(Settings)
    parser.add_argument("paths", nargs="*")
    chosen = parser.parse_known_options(["--sizes", "3", "--", "--safe-mode", "true"])
    assert chosen["paths"] == ["--safe-mode", "true"] and chosen["safe_mode"] and chosen["sizes"] == [3]


def test_help_of_options(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = Parser(Settings, prog="it", doc="Does it.\n\n    it --fast\n\nMore.")
    parser.add_argument("source", metavar="SOURCE", help="from where")
    text = parser.format_help()
    assert text == parser.format_help()  # also a second time
    assert text.startswith("usage: it [OPTIONS] SOURCE\n\nDoes it.\n")
    for line in (
        "--fast / --no-fast be fast (default: off)",
        "--safe_mode / --no-safe_mode be safe (default: on)",
        "others: --kind {a,b} what it is (default: a)",
        "--sizes N [N ...] how large (default: 1 2)",
        "--name NAME whose, at 100 % --limit N at most examples: it --fast",
    ):
        assert line in " ".join(text.split())


def test_examples_in_help_name_programs_and_options_that_there_are(capsys):
    found = 0
    for name in sddit.PROGRAMS:
        options = set(re.findall(r"--[\w-]+", help_of(capsys, name)))
        for line in help_of(capsys, name).partition("examples:\n")[2].splitlines():
            words = shlex.split(line.split("#")[0])
            assert words[words.index("sddit") + 1] == name
            given = {word for word in words[words.index("sddit") :] if word.startswith("--")}
            assert given <= options, line
            found += 1
    assert found >= 15


def test_errors_name_the_program_as_it_was_called(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, code in ((["train", "--seed", "x"], 2), (["generate"], 2)):
        with pytest.raises(SystemExit) as exit:
            sddit.main(arguments)
        assert exit.value.code == code
        assert capsys.readouterr().err.startswith(f"sddit {arguments[0]}: error: ")
    with pytest.raises(SystemExit, match="^sddit plot: error: There is no nowhere/metrics.jsonl"):
        sddit.main(["plot", "scores", "nowhere"])
    with pytest.raises(SystemExit, match="^sddit train: error: "):
        sddit.main(["train", "--prediction", "score"])


def test_probe_is_evaluate_with_probe(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    few = ["--probe_samples", "60", "--probe_sigmas", "0.1", "--output"]
    sddit.main(["probe", str(DIGITS), "digits", *few, str(tmp_path / "one.json")])
    sddit.main(["evaluate", "--probe", str(DIGITS), "digits", *few, str(tmp_path / "other.json")])
    AcceleratorState._reset_state(True)
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "other"))
    assert one == other and one["pictures"] == 60 and len(one["accuracies"]) == 6


@pytest.mark.process
@pytest.mark.long
def test_training_by_accelerate_launch_of_the_command(tmp_path):
    """Two processes, as `accelerate launch -m sddit train` starts them."""
    run = launch(
        2, "-m", "sddit", "train", "--max_train_steps", 1, "--evaluation_steps", 0, "--train_batch_size", 4,
        "--num_validation_images", 0, "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run/model_index.json").is_file()
    refused = launch(1, "-m", "sddit", "train", "--prediction", "score")
    assert "sddit train: error: prediction is 'score'" in refused.stderr


def test_the_model_that_comes_along_is_distilled_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_distillation(["--model", "digits", "--num_inference_steps", "5"])
    assert (config.dataset_name, config.output_dir, config.title) == (
        "digits", "digits-ssd-5", "ssd of digits for 5 steps"
    )  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_examples_of_config_are_runs(path):
    config = parse(["--config", str(path)])
    config.check_choices()
    given = json.loads(path.read_text())
    assert {name: getattr(config, name) for name in given} == given
    assert f"`configs/{path.name}`" in (ROOT / "docs/training.md").read_text()


def test_examples_of_config_cover_what_is_trained():
    configs = [parse(["--config", str(path)]) for path in CONFIGS]
    assert len({config.output_dir for config in configs}) == len(configs) >= 5
    assert {config.process for config in configs} >= {"edm", "linear"}
    assert any("repa" in config.auxiliaries and config.method == "dit" for config in configs)
    (paper,) = [config for config in configs if config.preset == "SD-DiT-XL/2"]
    usual = parse(["--preset", "SD-DiT-XL/2", "--dataset_name", "imagenet-latents"])
    of_a_run = {"output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"}
    changed = {each.name for each in fields(paper) if getattr(paper, each.name) != getattr(usual, each.name)}
    assert changed == of_a_run | {"train_batch_size"} and 8 * paper.train_batch_size == 256
