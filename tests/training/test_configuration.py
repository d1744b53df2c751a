import json
import re

import pytest
import torch
from diffusers.optimization import get_scheduler

from sddit_diffusers import PRESETS, SDDiTTransformer2DModel
from sddit_diffusers.training.building import build_process
from sddit_diffusers.training.options import parse


def test_without_options_it_is_the_digits_demo():
    config = parse([])
    assert (config.preset, config.dataset_name, config.output_dir) == ("digits", "digits", "sddit-digits")
    assert config.network() == PRESETS["digits"]


def test_a_setting_comes_from_default_preset_file_and_command_line_in_this_order(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"preset": "digits", "train_batch_size": 32, "seed": 5, "learning_rate": 1}))
    config = parse(["--config", str(file), "--seed=7"])
    assert config.seed == 7  # command line
    assert (config.train_batch_size, config.learning_rate) == (32, 1)  # file
    assert config.num_prototypes == 256  # preset
    assert config.adam_beta1 == 0.9  # default


def test_resolved_configuration_is_read_back(tmp_path):
    config = parse(["--preset", "cifar10", "--transformer", '{"num_layers": 2}', "--compile"])
    config.save(tmp_path / "config.json")
    assert parse(["--config", str(tmp_path / "config.json")]) == config
    assert config.compile and config.network()["num_layers"] == 2


def test_network_may_be_an_object_in_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"transformer": {"num_layers": 3}}')
    assert parse(["--config", str(tmp_path / "config.json")]).network()["num_layers"] == 3


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_network_and_a_recipe(preset):
    config = parse(["--preset", preset, "--dataset_name", "somewhere"])
    assert config.output_dir == f"{config.method}-{preset.replace('/', '-')}"
    SDDiTTransformer2DModel(**config.network() | {"num_layers": 1, "num_decoder_layers": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "SD-DiT-H/2"], "preset is 'SD-DiT-H/2'; it must be 'SD-DiT-S/2', "),
        (["--mask_ration", "0.5"], "unknown option --mask_ration; nearest are --mask_ratio"),
        (["--seed", "one"], "argument --seed: invalid int value: 'one'"),
        (["--max_grad_norm", "-1"], "max_grad_norm is -1.0; it must be at least 0"),
        (["--ema_decay", "2"], "ema_decay is 2.0; it must be in 0..1"),
        (["--logging_steps", "0"], "logging_steps is 0; it must be at least 1"),
        (["--teacher_temperature_end", "nan"], "teacher_temperature_end is nan"),
        (
            ["--gradient_checkpointing", "some"],
            "gradient_checkpointing is 'some'; it must be 'none', 'selective' or 'full'",
        ),
        (["--mixed_precision", "fp8"], "mixed_precision is 'fp8'; it must be 'no', 'bf16' or 'fp16'"),
        (["--teacher_sigma", "none"], "teacher_sigma is 'none'; it must be a number above 0 or 'student'"),
        (["--max_train_steps", "0"], "max_train_steps is 0; it must be at least 1"),
        (["--preset", "SD-DiT-S/2"], "needs --dataset_name"),
        (["--transformer", "{layers: 1}"], "is no JSON"),
        (["--transformer", "[1]"], "must be a JSON object"),
        (["--transformer", '{"layers": 1}'], "has no setting 'layers'; there are sample_size"),
        (["--transformer", '{"num_classes": 5}'], "has no setting 'num_classes'"),
        (["--transformer", '{"num_layers": "x"}'], "num_layers is 'x'; it must be a whole number"),
        (["--transformer", '{"patch_size": 0}'], "patch_size is 0; it must be in 1..65536"),
        (["--config", "nowhere.json"], "nowhere.json cannot be read: No such file"),
        (["--resume_from_checkpoint"], "expected one argument"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error


def test_a_process_brings_its_settings(tmp_path):
    edm = parse(["--preset", "cifar10"])
    assert (edm.p_mean, edm.p_std, edm.sigma_data) == (-1.2, 1.2, 0.5)
    assert build_process(parse(["--sigma_data", "0.3"])).config.sigma_data == 0.3
    config = parse(["--process", "gvp"])
    assert (config.p_mean, config.p_std, config.time_distribution) == (0, 1, "lognormal")
    assert parse(["--process", "linear", "--p_mean", "-0.5"]).p_mean == -0.5
    (tmp_path / "c.json").write_text('{"process": "vp"}')
    assert parse(["--config", str(tmp_path / "c.json")]).p_std == 1
    assert parse(["--preset", "cifar10", "--process", "linear"]).time_distribution == "uniform"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prediction", "score"], "prediction is 'score'; the process edm has no such option"),
        (["--loss_weighting", "velocity"], "loss_weighting is 'velocity'; the process edm has no such"),
        (["--process", "linear", "--prediction", "v"], "prediction is 'v'; it must be 'velocity', 'score'"),
        (["--process", "linear", "--sigma_data", "0.7"], "sigma_data is 0.7; the process linear has no such"),
        (["--sigma_data", "0"], "sigma_data is 0.0; it must be in 1e-06..1000000.0"),
        (["--sigma_data", "nan"], "sigma_data is nan; it must be in 1e-06..1000000.0"),
        (["--lr_scheduler", "step"], "lr_scheduler is 'step'; it must be 'constant', 'linear' or 'cosine'"),
        (["--process", "straight"], "process is 'straight'; it must be 'edm', 'linear', 'gvp' or 'vp'"),
        (
            ["--process", "vp", "--time_distribution", "uniform", "--p_std", "2"],
            "p_std is 2.0; uniform time has no such option: leave it at 1.0",
        ),
        (["--process", "vp", "--p_mean", "nan"], "p_mean is nan"),
    ],
)
def test_options_of_another_process_are_refused(options, message, capsys):
    with pytest.raises((SystemExit, ValueError), match=None) as exit:
        parse(options).check_choices()
    said = capsys.readouterr().err if exit.type is SystemExit else str(exit.value)
    assert message in said, said


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_learning_rate_falls_as_diffusers_schedulers_let_it(name):
    """But in the warm-up, whose first step has a learning rate here."""
    config = parse(["--lr_scheduler", name, "--lr_warmup_steps", "4", "--max_train_steps", "20"])
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.learning_rate)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
    for step in range(20):
        expected = theirs.get_last_lr()[0] + (config.learning_rate / 4 if step < 4 else 0)
        assert config.learning_rate_at(step) == pytest.approx(expected, rel=1e-12), step
        optimizer.step()
        theirs.step()
    assert 0 < config.learning_rate_at(19) < config.learning_rate / 10


def test_a_constant_learning_rate_stays():
    config = parse(["--lr_warmup_steps", "0", "--lr_scheduler", "constant", "--learning_rate", "0.1"])
    assert {config.learning_rate_at(step) for step in (0, 1, config.max_train_steps - 1)} == {0.1}


@pytest.mark.parametrize("content", [b"[1]", b"\xff\xfe", b"{"])
def test_a_file_that_holds_no_options_is_named(tmp_path, content, capsys):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(SystemExit):
        parse(["--config", str(tmp_path / "c.json")])
    assert re.search(
        "c.json is no file of options: it is (no JSON|.1.; it must be an object)", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sead": 1}, "unknown option sead; nearest are seed"),
        ({"seed": "1"}, "seed is '1'; it must be of type int"),
        ({"compile": 1}, "compile is 1; it must be of type bool"),
        ({"auxiliary": [[]]}, "auxiliary is [[]]; it must be a list of texts"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path, options, message, capsys):
    (tmp_path / "c.json").write_text(json.dumps(options))
    with pytest.raises(SystemExit):
        parse(["--config", str(tmp_path / "c.json")])
    error = capsys.readouterr().err
    assert "c.json" in error and message in error
