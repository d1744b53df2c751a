"""A folder and the runs in it: what is kept, what is replaced, what goes on."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from bad_input import contents, refusal
from conftest import launch
from small_runs import NETWORK, SMALL

import train_sddit
from sddit_diffusers import SDDiTPipeline
from sddit_diffusers.models.transformer_sddit import SDDiTBlock
from sddit_diffusers.training import trainer as trainers
from sddit_diffusers.training.checkpointing import (
    choose_checkpoint,
    find_checkpoints,
    load_state,
    save_checkpoint,
    set_aside,
)
from sddit_diffusers.training.metrics import read_metrics
from sddit_diffusers.training.options import TrainingConfig, parse
from sddit_diffusers.training.trainer import MetricsLog, Trainer

QUICK = [*SMALL, "--num_validation_images", "0"]


def train(folder, *options):
    train_sddit.main([*QUICK, "--output_dir", str(folder), *map(str, options)])
    return read_metrics(folder / "metrics.jsonl")


def make_trainer(folder, *options):
    return Trainer(parse([*QUICK, "--output_dir", str(folder), *map(str, options)]))


def weights_of(folder):
    return (folder / "transformer/diffusion_pytorch_model.safetensors").read_bytes()


def names(folder, pattern):
    return sorted(path.name for path in folder.glob(pattern))


def test_links_in_the_folder_are_replaced_and_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    folder = tmp_path / "run"
    folder.mkdir()
    files_of_a_run = ["samples.png", "samples-1.png", "curves.png", "training_config.json", "metrics.jsonl"]
    files_of_a_run += ["pipeline_sddit.py", "README.md", "model_index.json.tmp", ".samples.png.tmp"]
    for name in files_of_a_run:
        (tmp_path / "mine" / name).write_text("precious")
        (folder / name).symlink_to(tmp_path / "mine" / name)
    for name in ("transformer", "scheduler", "checkpoint-2", ".checkpoint-2.tmp"):
        (tmp_path / "mine" / name).mkdir()
        (folder / name).symlink_to(tmp_path / "mine" / name)
    before = contents(tmp_path / "mine")
    options = ["--num_validation_images", 1, "--validation_steps", 1, "--checkpointing_steps", 2]
    train(folder, "--max_train_steps", 2, *options, "--overwrite_output_dir")
    assert contents(tmp_path / "mine") == before
    for name in files_of_a_run[:5]:
        assert not (folder / name).is_symlink(), name


# What a resumed run makes of each option that another value is given.
IDENTITY = {"method", "transformer", "dataset_name", "label_column", "seed", "train_batch_size"}
IDENTITY |= {"gradient_accumulation_steps", "num_prototypes", "head_hidden_dim", "head_bottleneck_dim"}
IDENTITY |= {"pretrained_model_name_or_path"}
OF_A_START = {"output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dry_run"}
# Where the others are copied to when the trainer is built, if they are.
COPIES = {
    "learning_rate": lambda t: t.follow_schedules(5)["learning_rate"],
    "adam_beta1": lambda t: t.engine.optimizer.param_groups[0]["betas"][0],
    "adam_beta2": lambda t: t.engine.optimizer.param_groups[0]["betas"][1],
    "adam_weight_decay": lambda t: t.engine.optimizer.param_groups[0]["weight_decay"],
    "ema_decay": lambda t: t.ema.decay,
    "mask_ratio": lambda t: t.objective.mask_ratio,
    "label_dropout": lambda t: t.objective.label_dropout,
    "discriminative_weight": lambda t: t.objective.discriminative_weight,
    "student_temperature": lambda t: t.objective.student_temperature,
    "teacher_sigma": lambda t: str(t.objective.teacher_sigma),
    "center_momentum": lambda t: t.objective.center_momentum,
    "max_train_steps": lambda t: t.sampler.max_steps,
    "dataloader_num_workers": lambda t: t.dataset.num_workers,
}
CHANGED = {
    "max_train_steps": 9, "learning_rate": 0.5, "lr_warmup_steps": 3, "adam_beta1": 0.5, "adam_beta2": 0.6,
    "adam_weight_decay": 0.25, "max_grad_norm": 2.0, "ema_decay": 0.5, "mask_ratio": 0.5,
    "label_dropout": 0.5, "discriminative_weight": 0.5, "student_temperature": 0.5,
    "teacher_temperature_start": 0.5, "teacher_temperature_end": 0.6,
    "teacher_temperature_warmup_epochs": 7.0, "teacher_momentum_start": 0.5, "teacher_momentum_end": 0.6,
    "teacher_sigma": "3.0", "center_momentum": 0.5, "dataloader_num_workers": 1,
}  # fmt: skip
# Read where they are used, or of no influence on what is learnt.
READ = {
    "preset", "image_column", "vae", "mixed_precision", "gradient_checkpointing", "compile", "allow_tf32",
    "mask_ratio_schedule", "mae_weight", "evaluation_steps", "evaluation_samples", "evaluation_reference",
    "evaluation_extractor", "validation_steps", "num_validation_images", "checkpointing_steps",
    "checkpoints_total_limit", "logging_steps", "report_to", "push_to_hub", "hub_model_id",
}  # fmt: skip


def test_of_each_option_it_is_known_what_a_resumed_run_makes_of_it():
    options = {setting.name for setting in dataclasses.fields(TrainingConfig)}
    assert options == IDENTITY | OF_A_START | {*CHANGED} | READ
    assert {*COPIES} <= {*CHANGED}


def test_what_is_changed_at_resume_takes_effect(tmp_path):
    train(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 2)
    options = [word for name, value in CHANGED.items() for word in (f"--{name}", value)]
    trainer = make_trainer(tmp_path, *options, "--resume_from_checkpoint", "latest")
    for name, value in CHANGED.items():
        assert getattr(trainer.config, name) == value
        if name in COPIES:
            assert COPIES[name](trainer) == value, name
    assert trainer.sampler.start_step == 2
    schedule = trainer.follow_schedules(0)
    assert schedule["teacher_momentum"] == pytest.approx(0.5)
    assert schedule["teacher_temperature"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pretrained_model_name_or_path", "elsewhere"], "pretrained_model_name_or_path is 'elsewhere'"),
        (["--max_train_steps", "1"], "max_train_steps is 1; .*checkpoint-2 is of step 2 already"),
        (["--gradient_accumulation_steps", "2"], "global batch: 16 there, 32 here"),
        (["--head_hidden_dim", "8"], "head_hidden_dim: 16 there, 8 here"),
        (["--head_bottleneck_dim", "4"], "head_bottleneck_dim: 8 there, 4 here"),
    ],
)
def test_what_would_be_ignored_at_resume_is_refused(tmp_path, monkeypatch, options, message):
    train(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 2)
    before = contents(tmp_path)
    monkeypatch.setattr(trainers, "build_objective", without_weights(trainers.build_objective))
    with pytest.raises(SystemExit, match=message):
        train(tmp_path, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", *options)
    assert contents(tmp_path) == before


def without_weights(build):
    """`elsewhere` has none that could be loaded."""
    return lambda config, *rest: build(dataclasses.replace(config, pretrained_model_name_or_path=""), *rest)


def test_a_model_is_not_replaced_unless_it_is_asked_for(tmp_path, capsys, monkeypatch):
    train(tmp_path, "--max_train_steps", 2, "--num_validation_images", 1)
    before = contents(tmp_path)
    for options in ([], ["--resume_from_checkpoint", "latest"]):
        with refusal(capsys, "choose another --output_dir", "--overwrite_output_dir", untouched=tmp_path):
            train(tmp_path, "--max_train_steps", 3, *options)

    def fails(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train_sddit, "write_card", fails)
        with pytest.raises(SystemExit, match=f"No space left on device: '{tmp_path}"):
            train(tmp_path, "--max_train_steps", 3, "--overwrite_output_dir")
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    assert len(train(tmp_path, "--max_train_steps", 3, "--overwrite_output_dir")) == 3
    config = json.loads((tmp_path / "training_config.json").read_text())
    assert config["max_train_steps"] == 3 and not config["overwrite_output_dir"]
    assert not (tmp_path / "unfinished").exists() and not (tmp_path / "samples.png").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_complete_run_is_completed_again_and_extended(tmp_path):
    options = ["--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]
    first = train(tmp_path, "--max_train_steps", 4, *options)
    weights = weights_of(tmp_path)
    assert train(tmp_path, "--max_train_steps", 4, *options) == first and weights_of(tmp_path) == weights
    longer = train(tmp_path, "--max_train_steps", 6, *options)
    assert longer[:4] == first and [row["step"] for row in longer] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "unfinished").exists()


def test_a_lost_log_costs_the_rows_alone(tmp_path):
    train(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 2)
    (tmp_path / "metrics.jsonl").unlink()
    assert train(tmp_path, "--max_train_steps", 2, "--resume_from_checkpoint", "latest") == [{"step": 2}]


def test_a_new_run_killed_twice_leaves_the_old_model_and_goes_on(tmp_path):
    train(tmp_path, "--max_train_steps", 2)
    old, whole = (
        weights_of(tmp_path),
        train(tmp_path / "whole", "--max_train_steps", 4, "--learning_rate", 1e-3),
    )
    options = ["--max_train_steps", 4, "--learning_rate", 1e-3, "--checkpointing_steps", 1]
    for how in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]):
        trainer = make_trainer(tmp_path, *options, *how)
        trainer.finish = lambda: None
        step = trainer.train_step
        trainer.train_step = lambda i, data, step=step: step(i, data) if i % 2 == 0 else stop()
        with pytest.raises(Killed):
            trainer.run()
        AcceleratorState._reset_state(True)
        assert weights_of(tmp_path) == old and len(read_metrics(tmp_path / "metrics.jsonl")) == 2
        if how[0] == "--overwrite_output_dir":  # it gets over its second step
            checkpoint = tmp_path / "checkpoint-1"
            assert checkpoint.is_dir()
    assert train(tmp_path, *options, "--resume_from_checkpoint", "latest") == whole
    assert weights_of(tmp_path) == weights_of(tmp_path / "whole")


class Killed(BaseException):
    pass


def stop():
    raise Killed


def save(folder, step, limit=0):
    return save_checkpoint(folder, step, {"value": step}, {}, limit)


def test_what_was_just_written_is_kept(tmp_path):
    for step in (100, 200):
        save(tmp_path, step)
    (tmp_path / "checkpoint-200/state.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="checkpoint-200 is damaged"):
        assert choose_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    save(tmp_path, 150, limit=1)
    with pytest.warns(UserWarning, match="checkpoint-200 is damaged"):
        assert choose_checkpoint(tmp_path, "latest").name == "checkpoint-150"


def test_abandoned_checkpoints_are_set_aside_and_never_chosen(tmp_path):
    for again in ("", "-2"):
        for step in (100, 200, 300):
            save(tmp_path, step)
        renamed = set_aside(tmp_path, 100)
        assert [path.name for path in renamed] == [f"abandoned-checkpoint-{n}{again}" for n in (300, 200)]
        assert choose_checkpoint(tmp_path, "latest").name == "checkpoint-100"
        assert set_aside(tmp_path, 100) == []
    save(tmp_path, 150, limit=1)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-150"]
    assert load_state(tmp_path / "abandoned-checkpoint-300") == {"value": 300}


def test_a_run_that_goes_back_leaves_later_checkpoints_behind(tmp_path, capsys):
    train(tmp_path, "--max_train_steps", 6, "--checkpointing_steps", 2)
    options = ["--max_train_steps", 6, "--checkpointing_steps", 100, "--checkpoints_total_limit", 1]
    trainer = make_trainer(tmp_path, *options, "--resume_from_checkpoint", tmp_path / "checkpoint-2")
    trainer.train_step = lambda *_: stop()
    with pytest.raises(Killed):
        trainer.run()
    assert "set aside" in capsys.readouterr().out
    assert names(tmp_path, "*checkpoint*") == [
        "abandoned-checkpoint-4",
        "abandoned-checkpoint-6",
        "checkpoint-2",
    ]
    AcceleratorState._reset_state(True)
    train(tmp_path, *options, "--resume_from_checkpoint", "latest")
    assert names(tmp_path, "checkpoint*") == ["checkpoint-6"]


def test_weights_of_the_last_step_that_are_not_finite_replace_nothing(tmp_path):
    train(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 1)
    model = weights_of(tmp_path)
    options = ["--learning_rate", 1e300, "--resume_from_checkpoint", "latest"]
    message = (
        "Step 3 has made weights that are not finite.*transformer.*The last checkpoint is .*checkpoint-2"
    )
    for more in ([], ["--checkpointing_steps", 1]):
        with pytest.raises(SystemExit, match=message):
            train(tmp_path, "--max_train_steps", 3, *options, *more)
        AcceleratorState._reset_state(True)
        assert weights_of(tmp_path) == model
        assert names(tmp_path, "checkpoint-*") == ["checkpoint-1", "checkpoint-2"]


def test_samples_that_are_not_finite_cost_the_picture_alone(tmp_path, monkeypatch):
    def fails(*arguments, **keywords):
        raise FloatingPointError("image 3 (seed 17) is not finite")

    monkeypatch.setattr(trainers, "sample_grid", fails)
    with pytest.raises(SystemExit, match="The pipeline is in .* without samples.png: image 3 .seed 17"):
        train(tmp_path / "a", "--max_train_steps", 2, "--num_validation_images", 1)
    assert SDDiTPipeline.from_pretrained(tmp_path / "a")
    AcceleratorState._reset_state(True)
    with pytest.raises(
        SystemExit, match="image 3 .seed 17. is not finite The last checkpoint is .*checkpoint-1"
    ):
        train(tmp_path / "b", "--max_train_steps", 2, "--num_validation_images", 1, "--validation_steps", 1)


@pytest.fixture
def heard():
    """Signals as they are in a terminal: what starts the tests may have them ignored."""
    earlier = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_save_and_leave(tmp_path, capsys, heard, number):
    trainer, handler = make_trainer(tmp_path, "--max_train_steps", 6), signal.getsignal(number)
    step = trainer.train_step
    trainer.train_step = lambda i, data: (i == 2 and signal.raise_signal(number), step(i, data))[1]
    with pytest.raises(SystemExit) as stopped:
        trainer.run()
    assert stopped.value.code == 128 + number and signal.getsignal(number) == handler
    assert f"Stopped by {number.name} after step 3" in capsys.readouterr().out
    assert names(tmp_path, "checkpoint-*") == ["checkpoint-3"]


def test_a_second_ctrl_c_leaves_at_once(tmp_path, heard):
    trainer = make_trainer(tmp_path, "--max_train_steps", 6)

    def train_step(i, data):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # as a launcher passes it on
        trainer.stop_time -= 2
        signal.raise_signal(signal.SIGINT)

    trainer.train_step = train_step
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def test_what_nohup_ignores_stays_ignored(tmp_path):
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with make_trainer(tmp_path).catching_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_a_signal_within_the_last_save_is_told_of(tmp_path, capsys, monkeypatch):
    save_pipeline = Trainer.save_pipeline

    def interrupted(self, pipe):
        signal.raise_signal(signal.SIGTERM)
        save_pipeline(self, pipe)

    monkeypatch.setattr(Trainer, "save_pipeline", interrupted)
    train(tmp_path, "--max_train_steps", 1)
    assert "SIGTERM came at the end: the run is complete" in capsys.readouterr().out
    assert (tmp_path / "model_index.json").is_file()


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(os, "O_NOFOLLOW", 0)
    with pytest.raises(OSError, match="No space left on device: .*metrics.jsonl"):
        log.write({"step": 1})


@pytest.mark.parametrize("method", ["sddit", "maskdit", "mdt"])
def test_one_compilation_serves_all_lengths(tmp_path, monkeypatch, method):
    """Counted by what reaches the backend; torch gives up after eight."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile(block, **options):
        torch.nn.Module.compile(block, backend=count, fullgraph=True, **options)

    monkeypatch.setattr(SDDiTBlock, "compile", compile)
    torch._dynamo.reset()
    network = (
        NETWORK if method != "mdt" else {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}
    )
    options = ["--method", method, "--transformer", json.dumps(network), "--mask_ratio", 0.9, "--compile"]
    options += ["--mask_ratio_schedule", "cosine", "--max_train_steps", 14, "--output_dir", tmp_path]
    options += ["--num_validation_images", 0, "--evaluation_steps", 0, "--train_batch_size", 4]
    train_sddit.main([*map(str, options)])
    lengths = {round(16 * (1 - row["mask_ratio"])) for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert len(lengths) > 8 and len(graphs) < 2 * len(lengths)
    torch._dynamo.reset()


TOGETHER = """
import sys
from accelerate import Accelerator
from sddit_diffusers.launching import main_first, on_main_process, together

accelerator = Accelerator()
rank = accelerator.process_index
order = []

def fails_on(process):
    if rank == process:
        raise OSError(2, f"of process {process}", "a file")
    return rank

for call, on, failing in ((together, 0, 1), (together, 1, 0), (main_first, 0, 1), (main_first, 1, 0)):
    try:
        call(lambda: fails_on(on), accelerator)
        print("nothing was raised")
    except OSError as error:
        print(f"rank {rank}: {call.__name__} {on}: {error}", flush=True)
assert together(lambda: rank, accelerator) == rank == main_first(lambda: rank, accelerator)
assert on_main_process(lambda: f"of {rank}", accelerator) == "of 0"

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(one)

def odd():
    raise Odd("odd", 2)

try:
    on_main_process(odd, accelerator)
except Exception as error:
    print(f"rank {rank}: {type(error).__name__} {error}", flush=True)
"""


def test_an_error_of_any_process_is_raised_on_all(tmp_path):
    (tmp_path / "script.py").write_text(TOGETHER)
    result = launch(2, tmp_path / "script.py")
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):
        for call in ("together", "main_first"):
            for process in (0, 1):
                line = f"rank {rank}: {call} {process}: [Errno 2] of process {process}: 'a file'"
                assert line in result.stdout, result.stdout
    assert "rank 0: Odd odd" in result.stdout and "rank 1: RuntimeError Odd: odd" in result.stdout


def test_each_process_must_have_a_sample_to_make(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.config.evaluation_steps, trainer.config.evaluation_samples = 1, 3
    trainer.accelerator.state._shared_state["num_processes"] = 4
    with pytest.raises(ValueError, match="evaluation_samples is 3; it must be at least 4, one a process"):
        trainer.check_evaluation()
