"""Distillations as users start them, of a small parent trained on the digits."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bad_input import contents, refusal
from diffusers import DDIMScheduler
from diffusers.configuration_utils import FrozenDict
from processes import Started
from small_runs import train, weights_of

import distill_sddit
from sddit_diffusers import EDMHeunScheduler, InterpolantScheduler, SDDiTPipeline
from sddit_diffusers.training.configuration import CHECKPOINTING
from sddit_diffusers.training.distill_options import default_weight, defaults_of, parse
from sddit_diffusers.training.distilling import build_distillation, unexplained
from sddit_diffusers.training.metrics import read_metrics
from sddit_diffusers.training.parents import Parent
from sddit_diffusers.training.trainer import training

SHORT = ["--max_train_steps", 3, "--train_batch_size", 16, "--evaluation_steps", 0]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents") / "parent"
    train(folder, "--max_train_steps", 3)
    return folder


def distil(folder, parent, *options):
    options = ["--model", parent, "--output_dir", folder, *SHORT, *options]
    distill_sddit.main([*map(str, options)])
    return folder


@pytest.mark.parametrize("objective", ["ssd", "issd", "progressive"])
def test_a_child_samples_in_its_steps_without_being_told(tmp_path, parent, objective):
    before = contents(parent)
    child = distil(tmp_path / "child", parent, "--objective", objective, "--num_inference_steps", 5)
    assert contents(parent) == before and weights_of(child) != weights_of(parent)
    pipe = SDDiTPipeline.from_pretrained(child)
    assert (pipe.scheduler.config.num_inference_steps, pipe.scheduler.config.solver) == (5, "euler")
    calls = []
    pipe.transformer.register_forward_hook(lambda *call: calls.append(call))
    images = pipe(class_labels=[7], generator=torch.Generator().manual_seed(0), output_type="np").images
    assert len(calls) == 5
    # Euler's five steps of EDM, written out
    sigmas = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)] + [0]
    x, sigma_data = 80 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 0.75
    with torch.no_grad():
        for sigma, end in zip(sigmas, sigmas[1:], strict=False):
            norm = math.hypot(sigma, sigma_data)
            output = pipe.transformer(x / norm, torch.tensor([math.log(sigma) / 4]), torch.tensor([7])).sample
            denoised = (sigma_data / norm) ** 2 * x + sigma * sigma_data / norm * output
            x = x + (end - sigma) * (x - denoised) / sigma
    expected = (x[0, 0] / 2 + 0.5).clamp(0, 1).numpy()
    np.testing.assert_allclose(images[0, ..., 0], expected, atol=1e-4)


def test_all_that_it_says_of_itself(tmp_path, parent, capsys):
    options = ["--evaluation_steps", 3, "--evaluation_samples", 20, "--fusion_weight", 0.4]
    child = distil(tmp_path / "child", parent, "--num_inference_steps", 4, *options)
    first, *rows = read_metrics(child / "metrics.jsonl")
    assert first["step"] == 0 and first["fid_pixels"] > 0 and rows[-1]["fid_pixels"] != first["fid_pixels"]
    card = (child / "README.md").read_text()
    for words in (
        "It is parent, distilled by itself: it samples in 4 steps",
        "with SSD, lambda = 0.4 and the solver euler",
        "| score | parent | child |",
        f"| {first['fid_pixels']:.4g} | {rows[-1]['fid_pixels']:.4g} |",
        "`distill_sddit.py --config` takes it",
    ):
        assert words in card, card
    assert f"Step 0: fid_pixels {first['fid_pixels']:.4g}" in capsys.readouterr().err
    again = tmp_path / "again"
    options = ["--config", child / "training_config.json", "--output_dir", again, "--model", parent]
    distill_sddit.main([*map(str, options)])
    assert weights_of(again) == weights_of(child)


def test_a_chain_goes_from_child_to_child(tmp_path, parent):
    chain = distil(tmp_path / "chain", parent, "--num_inference_steps", 6, 3, "--fusion_weight", 0.5, 0.2)
    first = distil(tmp_path / "first", parent, "--num_inference_steps", 6, "--fusion_weight", 0.5)
    second = distil(tmp_path / "second", first, "--num_inference_steps", 3, "--fusion_weight", 0.2)
    assert weights_of(chain / "steps-6") == weights_of(first)
    assert weights_of(chain / "steps-3") == weights_of(second)
    config = json.loads((chain / "steps-3/training_config.json").read_text())
    assert config["num_inference_steps"] == [3] and config["model"] == "./steps-6"


@pytest.mark.thorough
@pytest.mark.parametrize("objective", ["issd"])
def test_a_dry_run_tells_the_memory_and_distils_nothing(tmp_path, parent, capsys, objective):
    distil(tmp_path / "child", parent, "--objective", objective, "--dry_run")
    assert not (tmp_path / "child").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{objective} of {parent} for 10 steps, 8 x 8")
    assert lines[1].startswith("GiB: weights") and [line.split()[0] for line in lines[3:]] == [*CHECKPOINTING]


def test_a_guided_child_is_not_guided_again(tmp_path, parent):
    for options, guided in (([], True), (["--distil_guidance", "--guidance_scale", 1.5], False)):
        child = distil(tmp_path / str(guided), parent, "--objective", "progressive", *options)
        card = (child / "README.md").read_text()
        assert (", guidance_scale=1.5)" in card) == guided
        assert "| teacher_steps_each | 2 |" in card and "| fusion" not in card and str(parent) not in card


def test_a_chain_that_is_complete_is_left_unless_its_parent_is_another(tmp_path, parent, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(parent, mine)
    steps, latest = ["--num_inference_steps", 4, 2], ["--resume_from_checkpoint", "latest"]
    chain = distil(tmp_path / "chain", mine, *steps)
    before = contents(chain)
    distil(chain, mine, *steps, *latest, "--dataloader_num_workers", 1)
    assert contents(chain) == before and capsys.readouterr().out.count("is complete.") == 2
    train(tmp_path / "other", "--max_train_steps", 2)
    shutil.copytree(tmp_path / "other/transformer", mine / "transformer", dirs_exist_ok=True)
    with pytest.raises(SystemExit, match="steps-4 was begun with other settings: parent_sha256: "):
        distil(chain, mine, *steps, *latest)


def test_of_a_chain_each_stage_has_a_name_on_the_hub(tmp_path, parent):
    for name, more in (("chain", []), ("me/child", ["--hub_model_id", "me/child"])):
        options = [
            "--model",
            parent,
            "--num_inference_steps",
            4,
            2,
            "--output_dir",
            tmp_path / "chain",
            *more,
        ]
        stages = parse([*map(str, options)]).stages()
        assert [stage.hub_model_id for stage in stages] == [f"{name}-4", f"{name}-2"]


def test_help_needs_no_model(capsys):
    with pytest.raises(SystemExit) as exit:
        distill_sddit.main(["--help"])
    assert not exit.value.code and "--num_inference_steps" in capsys.readouterr().out


def test_a_file_of_another_objective_gives_what_both_have(tmp_path, parent, capsys):
    child = distil(tmp_path / "child", parent, "--fusion_weight", 0.3, "--learning_rate", 0.5)
    options = ["--config", child / "training_config.json", "--objective", "progressive"]
    with pytest.raises(SystemExit):  # its folder does not tell where the parent is
        parse([*map(str, options)])
    config = parse([*map(str, options), "--model", str(parent)])
    assert "model is './parent', the name of what was elsewhere" in capsys.readouterr().err
    assert (config.fusion_weight, config.learning_rate, config.max_train_steps) == ([], 0.5, 3)


# Distils, and of a chain's second stage tells when half of it is done.
CHAIN = """
import sys, time
from pathlib import Path
import distill_sddit
from sddit_diffusers.training import trainer

def step(*arguments, usual=trainer.train_step):
    step.done += 1
    if step.done == stop:
        Path(flag).touch()
        time.sleep(60)
    return usual(*arguments)

step.done, flag, stop, arguments = 0, sys.argv[1], int(sys.argv[2]), sys.argv[3:]
trainer.train_step = step
distill_sddit.main(arguments)
"""


@pytest.mark.thorough
@pytest.mark.process
@pytest.mark.parametrize("objective", ["issd", "progressive"])
def test_a_chain_killed_in_each_of_its_stages_ends_as_an_undisturbed_one(tmp_path, parent, objective):
    script, flag = tmp_path / "chain.py", tmp_path / "flag"
    script.write_text(CHAIN)

    def start(name, stop=0):
        options = ["--model", parent, "--output_dir", tmp_path / name, "--objective", objective, *SHORT]
        options += ["--max_train_steps", 6, "--checkpointing_steps", 2, "--num_inference_steps", 4, 2]
        options += ["--resume_from_checkpoint", "latest", "--teacher_momentum", 0.9]
        return Started(2, script, flag, stop, *options)

    def finish(name):
        result = start(name).wait()
        assert result.returncode == 0, result.stderr
        return result.stdout

    finish("whole")
    for stop in (4, 7):  # within the first stage; then, two steps of it being done, within the second
        start("killed", stop).kill_when(flag.exists)
        flag.unlink()
    assert (tmp_path / "killed/steps-2/checkpoint-2").is_dir()
    assert f"{tmp_path / 'killed/steps-4'} is complete.\n" in finish("killed")
    for stage in ("steps-4", "steps-2"):
        whole, killed = tmp_path / "whole" / stage, tmp_path / "killed" / stage
        assert weights_of(whole) == weights_of(killed)
        assert read_metrics(whole / "metrics.jsonl") == read_metrics(killed / "metrics.jsonl")


def test_a_run_goes_on_with_its_own_parent_alone(tmp_path, parent):
    train(tmp_path / "other", "--max_train_steps", 2)
    options = ["--checkpointing_steps", 3, "--num_inference_steps", 4]
    distil(tmp_path / "child", parent, *options)
    options += ["--resume_from_checkpoint", "latest", "--max_train_steps", 4]
    for change, words in (
        (["--objective", "progressive"], "objective: ssd there, progressive here"),
        (["--num_inference_steps", 5], "num_inference_steps: .4. there, .5. here"),
        (["--solver", "heun"], "solver: euler there, heun here"),
        (["--model", tmp_path / "other"], "parent: .* there, .* here"),
    ):
        with pytest.raises(SystemExit, match=words):
            distil(tmp_path / "child", parent, *options, *change)
    distil(tmp_path / "child", parent, *options)


def test_an_untrained_parent_is_told_of(tmp_path, parent, capsys, monkeypatch):
    distil(tmp_path / "child", parent, "--num_inference_steps", 4)
    assert f"Warning: {parent} looks untrained" in capsys.readouterr().err


def test_trained_is_what_knows_more_than_a_guess(tmp_path, parent, monkeypatch):
    """The guess knows mean and variance; here it is written out, and the data itself is no error."""
    config = parse([*map(str, ["--model", parent, "--output_dir", tmp_path, *SHORT])])
    with training(config, build_distillation) as trainer:
        process = trainer.objective.scheduler = InterpolantScheduler(prediction_type="sample")
        trainer.objective.times, seen, noised = process.refined(1)[:-1], [], process.noised
        monkeypatch.setattr(process, "noised", lambda x0, *rest: seen.append(x0) or noised(x0, *rest))

        def guess(network, x, t, labels):
            x0, alpha = seen[0], 1 - t
            mean = x0.mean(0)
            variance = (x0 - mean).square().mean()
            return mean + alpha * variance / (alpha**2 * variance + t**2) * (x - alpha * mean)

        for output, expected in ((lambda *inputs: seen[0], 0), (guess, 1)):
            seen.clear()
            monkeypatch.setattr(trainer.objective, "output", output)
            assert unexplained(trainer) == pytest.approx(expected, abs=1e-5)


SIZES = {"S/2": (12, 384), "B/2": (12, 768), "L/2": (24, 1024), "XL/2": (28, 1152)}
# Of the supplement: iSSD's lambda for 50, 20 and 10 steps.
TABLE_9 = {"S/2": [0.05, 0.1, 0.05], "B/2": [0.35, 0.25, 0.25], "L/2": [0.25] * 3, "XL/2": [0.3, 0.25, 0.25]}


def parent_of(size, path=None, **settings):
    layers, width = SIZES[size]
    sizes = dict(num_layers=layers, num_attention_heads=width // 64, attention_head_dim=64, sample_size=32)
    network = SimpleNamespace(config=FrozenDict(sizes))
    process = EDMHeunScheduler() if path is None else InterpolantScheduler(path=path)
    return Parent(size, network, process, None, "DiT", settings=settings)


def test_lambda_is_that_of_the_papers_tables():
    for size, row in TABLE_9.items():
        found = [default_weight("issd", parent_of(size), steps, False) for steps in (50, 20, 10)]
        assert found == row
    assert [default_weight("ssd", parent_of("XL/2"), steps, False) for steps in (50, 32, 10, 2)] == [0.3] * 4
    assert default_weight("ssd", parent_of("XL/2", "linear"), 10, False) == 1  # Eq. 17
    chains = [default_weight("issd", parent_of("XL/2"), steps, True) for steps in (32, 10, 5, 4)]
    assert chains == [0.2, 0.25, 0.05, 0.05]


def test_defaults_are_the_papers_and_the_parents_own():
    rates = {"S/2": (1e-5, 512), "B/2": (5e-6, 256), "L/2": (5e-6, 256), "XL/2": (5e-6, 128)}
    for size, expected in rates.items():
        found = defaults_of(parent_of(size), "ssd")
        assert (found["learning_rate"], found["train_batch_size"]) == expected
    of_training = {"dataset_name": "pictures", "evaluation_samples": 77, "learning_rate": 3.0}
    found = defaults_of(parent_of("B/2", **of_training), "ssd")
    assert (found["dataset_name"], found["evaluation_samples"], found["learning_rate"]) == (
        "pictures",
        77,
        5e-6,
    )
    of_a_child = of_training | {"objective": "ssd"}
    assert defaults_of(parent_of("B/2", **of_a_child), "ssd")["learning_rate"] == 3.0
    of_the_digits = parent_of("S/2", preset="digits")
    rates = [defaults_of(of_the_digits, objective)["learning_rate"] for objective in ("ssd", "progressive")]
    assert rates == [1e-4, 1e-3]


BAD = {
    "no model": (["--model", ""], "--model is needed"),
    "one step": (["--num_inference_steps", 1], "num_inference_steps is 1; it must be in 2..1000000"),
    "steps that rise": (["--num_inference_steps", 5, 10], "num_inference_steps is [5, 10]; it must"),
    "lambda of 1.5": (["--fusion_weight", 1.5], "fusion_weight is 1.5; it must be in 0..1"),
    "lambda of nan": (["--fusion_weight", "nan"], "fusion_weight is nan"),
    "lambdas of others": (["--fusion_weight", 0.1, 0.2], "one for each of [10] steps"),
    "lambda of none": (["--objective", "progressive", "--fusion_weight", 0.1], "has none"),
    "another objective": (["--objective", "consistency"], "objective is 'consistency'"),
    "Heun's steps": (["--objective", "progressive", "--solver", "heun"], "is for steps of 'euler'"),
    "guidance that falls": (["--guidance_scale", 3, 2], "guidance_scale is [3.0, 2.0]"),
    "guidance below 0": (["--guidance_scale", -1], "guidance_scale is -1.0"),
    "no guidance to learn": (["--distil_guidance"], "needs a guidance_scale other than 1"),
    "steps of no teacher": (["--teacher_steps", 4], "teacher_steps is 4; ssd takes one: leave it at 0"),
    "very many steps": (
        ["--objective", "progressive", "--teacher_steps", 1000, "--num_inference_steps", 1_000_000],
        "teacher_steps is 1000; they may be a million in all",
    ),
    "no such model": (["--model", "./nowhere"], "./nowhere"),
    "other classes": (["--label_column", ""], "digits has 0 classes; "),
}  # fmt: skip


@pytest.mark.parametrize(("options", "words"), BAD.values(), ids=BAD)
def test_what_is_refused(tmp_path, parent, capsys, options, words):
    folder = tmp_path / "child"
    folder.mkdir()
    with refusal(capsys, words, untouched=folder):
        distil(folder, parent, *options)


def test_the_parent_is_never_replaced(parent, capsys):
    with refusal(capsys, "which is the model: it is never changed", untouched=parent):
        distil(parent, parent, "--overwrite_output_dir")


def test_guidance_needs_classes(tmp_path, capsys):
    train(tmp_path / "plain", "--label_column", "", "--max_train_steps", 1)
    options = ["--guidance_scale", 3, "--distil_guidance"]
    with refusal(capsys, "The model has no classes: it needs guidance_scale 1"):
        distil(tmp_path / "child", tmp_path / "plain", *options)


def test_a_scheduler_that_cannot_be_distilled(tmp_path, parent, capsys):
    other = tmp_path / "other"
    shutil.copytree(parent, other)
    DDIMScheduler().save_pretrained(other / "scheduler")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "DDIMScheduler"]}))
    with refusal(capsys, "DDIMScheduler; those that can be distilled are EDMHeunScheduler and Interpolant"):
        distil(tmp_path / "child", other)
