"""What training refuses: with one line, and with nothing written."""

import json

import pytest
import torch
from bad_input import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

import train_sddit
from sddit_diffusers import files
from sddit_diffusers.files import locked
from sddit_diffusers.models.presets import read_changes
from sddit_diffusers.training.building import load_weights
from sddit_diffusers.training.checkpointing import choose_checkpoint, load_state, read_about, save_checkpoint
from sddit_diffusers.training.metrics import MetricsLog, read_metrics
from sddit_diffusers.training.options import TrainingConfig, parse

OPTIONS = {
    "learning rate inf": (["--learning_rate", "inf"], "learning_rate is inf"),
    "learning rate nan": (["--learning_rate", "nan"], "learning_rate is nan"),
    "learning rate below 0": (["--learning_rate=-1e-4"], "learning_rate is -0.0001"),
    "beta 1 of 1": (["--adam_beta1", "1"], "adam_beta1 is 1.0"),
    "beta 2 of 1": (["--adam_beta2", "1"], "adam_beta2 is 1.0"),
    "decay inf": (["--adam_weight_decay", "inf"], "adam_weight_decay is inf"),
    "mask ratio 1": (["--mask_ratio", "1"], "mask_ratio is 1.0"),
    "mask ratio nan": (["--mask_ratio", "nan"], "mask_ratio is nan"),
    "seed of 64 bits": (["--seed", str(2**64)], "seed is 18446744073709551616"),
    "seed below 0": (["--seed", "-1"], "seed is -1; it must be in 0..4294967295"),
    "many steps": (["--max_train_steps", "1" + "0" * 12], "max_train_steps is 1000000000000"),
    "no steps": (["--max_train_steps", "0"], "max_train_steps is 0"),
    "a huge batch": (["--train_batch_size", "1000000000"], "fewer than one global batch of 1000000000"),
    "a huge accumulation": (["--gradient_accumulation_steps", "1000000"], "fewer than one global batch"),
    "many prototypes": (["--num_prototypes", "2000000000"], "num_prototypes is 2000000000"),
    "one prototype": (["--num_prototypes", "1"], "num_prototypes is 1"),
    "a wide head": (["--head_hidden_dim", "1000000000"], "head_hidden_dim is 1000000000"),
    "a wide bottleneck": (["--head_bottleneck_dim", "1000000000"], "head_bottleneck_dim is 1000000000"),
    "many pictures": (["--num_validation_images", "1000000000"], "num_validation_images is 1000000000"),
    "many workers": (["--dataloader_num_workers", "1000000"], "dataloader_num_workers is 1000000"),
    "temperature 0": (["--student_temperature", "0"], "student_temperature is 0.0"),
    "momentum 2": (["--teacher_momentum_end", "2"], "teacher_momentum_end is 2.0"),
    "teacher's noise 0": (["--teacher_sigma", "0"], "teacher_sigma is 0.0; it must be a number above 0"),
    "teacher's noise nan": (["--teacher_sigma", "nan"], "teacher_sigma is nan"),
    "teacher's noise inf": (["--teacher_sigma", "inf"], "teacher_sigma is inf"),
    "a null byte": (["--dataset_name", "a\0b"], "dataset_name is 'a\\x00b'; text has no null bytes"),
    "no such dataset": (["--dataset_name", "./nowhere"], "no dataset folder ./nowhere"),
    "no such column": (["--image_column", "picture"], "digits has no column 'picture'"),
    "no such tracker": (["--report_to", "clouds"], "report_to is 'clouds'"),
    "no such preset": (["--preset", "digit"], "preset is 'digit'"),
    "no such method": (["--method", "sit"], "method is 'sit'"),
    "no such option": (["--learning_rat", "1"], "unknown option --learning_rat; nearest are --learning_rate"),
    "no such checkpoint": (["--resume_from_checkpoint", "nowhere"], "There is no checkpoint nowhere"),
    "no such weights": (["--pretrained_model_name_or_path", "./nowhere.safetensors"], "nowhere.safetensors"),
    "a number that is none": (["--ema_decay", "much"], "ema_decay"),
    "prototypes of DiT": (["--method", "dit", "--num_prototypes", "64"], "leave it at 256"),
    "L_MAE of DiT": (["--method", "dit", "--mae_weight", "3"], "mae_weight is 3.0"),
    "L_MAE of SD-DiT": (["--mae_weight", "3"], "sddit has no such option: leave it at 0.1"),
    "a teacher of MDT": (["--method", "mdt", "--teacher_sigma", "student"], "teacher_sigma is 'student'"),
    "a mask of DiT": (["--method", "dit", "--mask_ratio", "0.5"], "mask_ratio is 0.5; dit has no mask"),
    "a schedule of DiT": (["--method", "dit", "--mask_ratio_schedule", "cosine"], "mask_ratio_schedule"),
    "MLPs without width": (["--transformer", '{"mlp_ratio": 0.0001}'], "mlp_ratio is 0.0001"),
    "MLPs of nan": (["--transformer", '{"mlp_ratio": NaN}'], "mlp_ratio is nan"),
    "MLPs of infinity": (["--transformer", '{"mlp_ratio": Infinity}'], "mlp_ratio is inf"),
    "huge MLPs": (["--transformer", '{"mlp_ratio": 1e9}'], "mlp_ratio is 1000000000.0; it must be in 0..64"),
    "a huge network": (["--transformer", '{"num_layers": 1000000000000}'], "num_layers is 1000000000000"),
    "a half layer": (["--transformer", '{"num_layers": 1.5}'], "num_layers is 1.5"),
    "layers of truth": (["--transformer", '{"num_layers": true}'], "num_layers is True"),
    "deep JSON": (["--transformer", "[" * 100_000], "transformer is '[[["),
    "an array": (["--transformer", "[]"], "it must be a JSON object"),
    "both ways": (["--overwrite_output_dir", "--resume_from_checkpoint", "latest"], "choose one"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "words"), OPTIONS.values(), ids=OPTIONS)
def test_options(tmp_path, capsys, options, words):
    folder = tmp_path / "run"
    folder.mkdir()
    with refusal(capsys, words, untouched=folder):
        train_sddit.main(["--output_dir", str(folder), "--evaluation_steps", "0", *options])


@pytest.mark.parametrize("folder", ["a\0b", "file/run", "file"])
def test_folders(tmp_path, capsys, monkeypatch, folder):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    with refusal(capsys, "output", untouched=tmp_path):
        train_sddit.main(["--output_dir", folder])


CONFIGS = {
    "cut": ('{"seed": 1', "no JSON"),
    "an array": ("[1]", "must be an object"),
    "NaN": ('{"learning_rate": NaN}', "NaN is no number of JSON"),
    "infinity": ('{"learning_rate": 1e999}', "learning_rate is inf"),
    "deep": ("[" * 100_000, "no JSON"),
    "another type": ('{"seed": "1"}', "seed is '1'; it must be of type int"),
    "a list": ('{"output_dir": ["a"]}', "output_dir is ['a']"),
    "a null byte": ('{"dataset_name": "a\\u0000"}', "null bytes"),
    "no such option": ('{"sead": 1}', "unknown option sead"),
    "a huge number": ('{"train_batch_size": 1000000000000}', "train_batch_size is 1000000000000"),
    "another method's": ('{"method": "dit", "num_prototypes": 64}', "num_prototypes is 64"),
}


@pytest.mark.parametrize(("content", "words"), CONFIGS.values(), ids=CONFIGS)
def test_files_of_options(tmp_path, capsys, content, words):
    path = tmp_path / "c.json"
    path.write_text(content)
    with refusal(capsys, words, untouched=tmp_path):
        train_sddit.main(["--config", str(path), "--output_dir", str(tmp_path / "run")])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
NAMES = st.sampled_from([*TrainingConfig.__dataclass_fields__]) | st.text(max_size=5)


@settings(max_examples=150, deadline=None)
@given(options=st.dictionaries(NAMES, VALUES, max_size=3))
def test_any_file_of_options_is_read_or_refused(tmp_path_factory, options):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(options))
    try:
        assert isinstance(parse(["--config", str(path)]), TrainingConfig)
    except SystemExit as exit:
        assert exit.code == 2


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(["mlp_ratio", "num_layers", "patch_size", "x"]), VALUES))
def test_any_change_of_the_network_is_read_or_refused(changes):
    try:
        found = read_changes(json.dumps(changes), TrainingConfig().network())
    except ValueError as error:
        assert "transformer" in str(error) and "\n" not in str(error)
    else:
        assert found == changes and all(value > 0 for value in found.values())


ROWS = {
    "an array": ("[1]\n", "row of metrics"),
    "no step": ('{"loss": 1}\n', "has no 'step'"),
    "a step below 0": ('{"step": -1}\n', "step is -1"),
    "half a step": ('{"step": 1.5}\n', "step is 1.5"),
    "text": ('{"step": 1, "loss": "low"}\n', "loss is 'low'; it must be a finite number"),
    "NaN": ('{"step": 1, "loss": NaN}\n', "NaN is no number of JSON"),
    "a judge without a name": (
        '{"step": 1, "judges": {"pixels": 1}}\n',
        "judges.pixels is 1; it must be text",
    ),
    "a cut line": ('{"step": 1}\n{"st\n{"step": 3}\n', "line 2"),
    "bytes": (b"\xff\xfe\n", "line 1"),
}


@pytest.mark.parametrize(("content", "words"), ROWS.values(), ids=ROWS)
def test_metrics(tmp_path, content, words):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="metrics.jsonl, line") as error:
        read_metrics(path)
    assert words in str(error.value)


@settings(max_examples=150, deadline=None)
@given(
    content=st.binary(max_size=30) | VALUES.map(lambda value: json.dumps({"step": 1, "loss": value}).encode())
)
def test_any_metrics_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    path.write_bytes(content + b"\n")
    try:
        rows = read_metrics(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(type(row["step"]) is int for row in rows)


def test_a_log_follows_no_link(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "mine")
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="metrics.jsonl"):
        log.write({"step": 2})
    assert (tmp_path / "mine").read_text() == "precious"


@settings(max_examples=100, deadline=None)
@given(
    about=VALUES
    | st.fixed_dictionaries({"step": VALUES, "state.pt": VALUES | st.fixed_dictionaries({"bytes": VALUES})})
)
def test_any_description_of_a_checkpoint_is_read_or_refused(tmp_path_factory, about):
    folder = tmp_path_factory.getbasetemp() / "checkpoint-1"
    folder.mkdir(exist_ok=True)
    (folder / "checkpoint.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="checkpoint.json"):
        read_about(folder)
    with pytest.raises(ValueError, match="checkpoint-1 is damaged"):
        choose_checkpoint(folder.parent, str(folder))


def test_states(tmp_path):
    folder = save_checkpoint(tmp_path, 1, {"objective": {}}, {})
    with pytest.raises(ValueError, match="state.pt is no state of a training: it has no 'ema'"):
        load_state(folder, "objective", "ema")
    folder = save_checkpoint(tmp_path, 2, [1], {})
    with pytest.raises(ValueError, match="it is a list"):
        load_state(folder)
    (folder / "state.pt").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="state.pt cannot be read as a state"):
        load_state(folder)
    with pytest.raises(ValueError, match="state.pt is no state of a training: it has no 'objective'"):
        load_weights(torch.nn.Linear(1, 1), str(save_checkpoint(tmp_path, 3, {}, {})))


def test_two_runs_in_one_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "_PATIENCE", 0.1)
    with locked(tmp_path), refusal(capsys, f"{tmp_path} is in use by process", untouched=tmp_path):
        train_sddit.main(["--output_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())
