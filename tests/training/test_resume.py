"""What a resumed run shares with the one before, and what it may change."""

import dataclasses
import json
import shlex
import shutil

import pytest
from bad_input import contents, refusal
from small_runs import NETWORK, make_trainer, train, weights_of

from sddit_diffusers import SDDiTPipeline, convert, generate
from sddit_diffusers.training.checkpointing import load_state
from sddit_diffusers.training.options import TrainingConfig


def test_resumed_run_equals_an_undisturbed_one(tmp_path):
    steps = ["--max_train_steps", 8, "--lr_warmup_steps", 2, "--lr_scheduler", "cosine"]
    whole = train(tmp_path / "a", *steps)
    trainer = make_trainer(tmp_path / "b", *steps, "--checkpointing_steps", 3)
    trainer.finish = lambda: None
    trainer.run()
    for folder in (tmp_path / "b").glob("checkpoint-6"):
        folder.rename(tmp_path / "lost")
    resumed = train(tmp_path / "b", *steps, "--resume_from_checkpoint", "latest")
    assert resumed == whole
    a, b = (
        (tmp_path / name / "transformer/diffusion_pytorch_model.safetensors").read_bytes() for name in "ab"
    )
    assert a == b


def test_a_checkpoint_is_no_pipeline_and_its_training_makes_one(tmp_path, capsys):
    run, output = tmp_path / "a run", tmp_path / "out"
    train(run, "--max_train_steps", 3, "--checkpointing_steps", 2)
    shutil.rmtree(run / "transformer")
    name = str(run / "checkpoint-2")
    options = ["--resume_from_checkpoint", name, "--max_train_steps", "2"]
    for program, command in (
        (convert, [name, str(output)]), (generate, ["--model", name, "--output_dir", str(output)])
    ):  # fmt: skip
        with refusal(capsys, "it is a checkpoint", shlex.join(options), untouched=tmp_path):
            program.main(command)
    assert train(run, *options)[-1]["step"] == 2
    assert SDDiTPipeline.from_pretrained(run).transformer.config.num_layers == 2


def test_checkpoints_of_an_earlier_run_are_not_overwritten(tmp_path):
    train(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 2)
    with pytest.raises(
        SystemExit, match="holds checkpoints of an earlier run: go on with --resume_from_checkpoint"
    ):
        train(tmp_path, "--max_train_steps", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", 1], "seed: 0 there, 1 here"),
        (["--train_batch_size", 8], "global batch: 16 there, 8 here"),
        (["--num_prototypes", 64], "model num_prototypes: 32 there, 64 here"),
        (["--sigma_data", 0.25], "sigma_data: 0.75 there, 0.25 here"),
        (["--discriminative_weight", 0], ".*model num_prototypes: 32 there, None here"),
        (["--transformer", json.dumps(NETWORK | {"num_layers": 3})], "model num_layers: 2 there, 3 here"),
        (["--label_column", ""], "dataset sha256: .* there, .* here; model num_classes: 10 there, 0 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, options, message):
    train(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=f"checkpoint-2 is of another run; {message}"):
        train(tmp_path, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", *options)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_that_knows_no_sigma_data_is_of_0_5(tmp_path):
    sigma_data = ["--sigma_data", 0.5]
    train(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 2, *sigma_data)
    about = tmp_path / "checkpoint-2" / "checkpoint.json"
    content = json.loads(about.read_text())
    assert content["run"].pop("sigma_data") == 0.5 == content["settings"].pop("sigma_data")
    about.write_text(json.dumps(content))
    options = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    with pytest.raises(SystemExit, match="sigma_data: 0.5 there, 0.25 here"):
        train(tmp_path, *options, "--sigma_data", 0.25)
    assert len(train(tmp_path, *options, *sigma_data)) == 4


def test_what_may_change_is_said(tmp_path, capsys):
    train(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 2, "--learning_rate", 0.003)
    options = ["--resume_from_checkpoint", "latest", "--learning_rate", 0.001, "--checkpointing_steps", 2]
    train(tmp_path, "--max_train_steps", 4, *options)
    changes = "learning_rate: 0.003 there, 0.001 here; max_train_steps: 2 there, 4 here"
    told = capsys.readouterr().out
    assert f"Changed since checkpoint-2: {changes}.\n" in told
    assert f"The run goes on after step 2, from {tmp_path / 'checkpoint-2'}.\n" in told


def test_latest_begins_where_there_is_no_checkpoint(tmp_path, capsys):
    assert len(train(tmp_path, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")) == 2
    assert "There is no checkpoint in" in capsys.readouterr().out


def test_checkpoints_are_limited_and_the_last_step_has_one(tmp_path):
    train(tmp_path, "--max_train_steps", 7, "--checkpointing_steps", 2, "--checkpoints_total_limit", 2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7"]


def test_a_damaged_checkpoint_costs_its_steps_alone(tmp_path):
    whole = train(tmp_path / "a", "--max_train_steps", 8)
    train(tmp_path / "b", "--max_train_steps", 8, "--checkpointing_steps", 3)
    path = tmp_path / "b" / "checkpoint-8" / "state.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="checkpoint-8 is damaged"):
        resumed = train(tmp_path / "b", "--max_train_steps", 8, "--resume_from_checkpoint", "latest",
                        "--checkpointing_steps", 3)  # fmt: skip
    assert resumed == whole
    states = load_state(tmp_path / "b" / "checkpoint-8")["optimizer"]["state"].values()
    assert {state["step"].item() for state in states} == {8}


# What a resumed run makes of each option that another value is given.
IDENTITY = {"method", "transformer", "dataset_name", "label_column", "seed", "train_batch_size"}
IDENTITY |= {"gradient_accumulation_steps", "num_prototypes", "head_hidden_dim", "head_bottleneck_dim"}
IDENTITY |= {"pretrained_model_name_or_path", "auxiliary", "sra_layer", "sra_teacher_layer"}
IDENTITY |= {"sigma_data", "max_train_samples"}
IDENTITY |= {"repa_layer", "repa_encoder", "repa_projector_dim", "repa_convolution"}


OF_A_START = {"output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dry_run"}


# Where the others are copied to when the trainer is built, if they are.
COPIES = {
    "learning_rate": lambda t: t.follow_schedules(3)["learning_rate"],  # after the warm-up
    "adam_beta1": lambda t: t.engine.optimizer.param_groups[0]["betas"][0],
    "adam_beta2": lambda t: t.engine.optimizer.param_groups[0]["betas"][1],
    "adam_weight_decay": lambda t: t.engine.optimizer.param_groups[0]["weight_decay"],
    "ema_decay": lambda t: t.ema.decay,
    "mask_ratio": lambda t: t.objective.mask_ratio,
    "p_mean": lambda t: t.objective.scheduler.config.p_mean,
    "p_std": lambda t: t.objective.scheduler.config.p_std,
    "label_dropout": lambda t: t.objective.label_dropout,
    "discriminative_weight": lambda t: t.objective.auxiliaries["discrimination"].weight,
    "student_temperature": lambda t: t.objective.auxiliaries["discrimination"].student_temperature,
    "teacher_sigma": lambda t: str(t.objective.auxiliaries["discrimination"].teacher_sigma),
    "center_momentum": lambda t: t.objective.auxiliaries["discrimination"].center_momentum,
    "discriminative_token_ratio": lambda t: t.objective.auxiliaries["discrimination"].token_ratio,
    "max_train_steps": lambda t: t.sampler.max_steps,
    "dataloader_num_workers": lambda t: t.dataset.num_workers,
}


CHANGED = {
    "max_train_steps": 9, "learning_rate": 0.5, "lr_scheduler": "linear", "lr_warmup_steps": 3,
    "adam_beta1": 0.5, "adam_beta2": 0.6, "adam_weight_decay": 0.25, "max_grad_norm": 2.0,
    "ema_decay": 0.5, "mask_ratio": 0.5, "p_mean": 0.5, "p_std": 0.6,
    "label_dropout": 0.5, "discriminative_weight": 0.5, "student_temperature": 0.5,
    "teacher_temperature_start": 0.5, "teacher_temperature_end": 0.6,
    "teacher_temperature_warmup_epochs": 7.0, "teacher_momentum_start": 0.5, "teacher_momentum_end": 0.6,
    "teacher_sigma": "3.0", "center_momentum": 0.5, "dataloader_num_workers": 1,
    "discriminative_token_ratio": 0.5,
}  # fmt: skip


# Read where they are used, or of no influence on what is learnt.
READ = {
    "preset", "process", "prediction", "time_distribution", "loss_weighting", "image_column",
    "vae", "mixed_precision", "gradient_checkpointing", "compile", "allow_tf32",
    "mask_ratio_schedule", "mae_weight", "evaluation_steps", "evaluation_samples", "evaluation_reference",
    "evaluation_extractor", "validation_steps", "num_validation_images", "checkpointing_steps",
    "checkpoints_total_limit", "logging_steps", "report_to", "push_to_hub", "hub_model_id",
}  # fmt: skip
# Of losses that these runs have not; the losses' own tests change them.
READ |= {"dispersive_weight", "dispersive_temperature", "dispersive_layer", "contrastive_weight"}
READ |= {"sra_weight", "sra_interval", "sra_momentum", "repa_weight", "repa_spatial_norm", "repa_until_step"}


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
def test_what_would_be_ignored_at_resume_is_refused(tmp_path, options, message):
    train(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 2)
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match=message):
        train(tmp_path, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", *options)
    assert contents(tmp_path) == before


def test_a_run_goes_on_without_the_weights_that_it_began_with(tmp_path):
    train(tmp_path / "parent", "--max_train_steps", 1)
    begin = ["--pretrained_model_name_or_path", tmp_path / "parent", "--checkpointing_steps", 2]
    whole = train(tmp_path / "a", "--max_train_steps", 4, *begin)
    shutil.copytree(tmp_path / "a/checkpoint-2", tmp_path / "b/checkpoint-2")
    shutil.rmtree(tmp_path / "parent")
    resumed = train(tmp_path / "b", "--max_train_steps", 4, *begin, "--resume_from_checkpoint", "latest")
    assert resumed == whole[2:] and weights_of(tmp_path / "b") == weights_of(tmp_path / "a")


def test_what_an_earlier_version_did_as_usual_has_changed_too(tmp_path, capsys):
    train(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 2)
    about = tmp_path / "checkpoint-2" / "checkpoint.json"
    content = json.loads(about.read_text())
    del content["settings"]["discriminative_token_ratio"], content["settings"]["label_dropout"]
    about.write_text(json.dumps(content))
    options = ["--resume_from_checkpoint", "latest", "--checkpointing_steps", 2]
    train(tmp_path, "--max_train_steps", 4, *options, "--discriminative_token_ratio", 0.5)
    told = capsys.readouterr().out.split("Changed since checkpoint-2: ")[1].split("\n")[0]
    assert "discriminative_token_ratio: 1.0 there, 0.5 here" in told and "label_dropout" not in told


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
