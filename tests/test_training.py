"""The script, run as users run it: on the digits, with a network of a few thousand weights."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

import train_sddit
from sddit_diffusers import SDDiTPipeline
from sddit_diffusers.data import ImageDataset
from sddit_diffusers.reporting import read_metrics

SCRIPT = Path(train_sddit.__file__)
NETWORK = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, num_decoder_layers=1,
               decoder_num_attention_heads=2, decoder_attention_head_dim=8)  # fmt: skip
SMALL = ["--transformer", json.dumps(NETWORK), "--num_prototypes", "32", "--head_hidden_dim", "16",
         "--head_bottleneck_dim", "8", "--train_batch_size", "16"]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerate():
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)


def train(folder, *options):
    train_sddit.main([*SMALL, "--output_dir", str(folder), *map(str, options)])
    return read_metrics(folder / "metrics.jsonl")


def launch(processes, script, *options):
    """`processes` processes on the CPU, joined by gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*command, str(script), *map(str, options)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_leaves_a_pipeline_and_what_people_look_at(tmp_path, capsys, monkeypatch):
    metrics = train(tmp_path / "run", "--max_train_steps", 3, "--validation_steps", 2)
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for name in ("samples.png", "samples-2.png", "curves.png", "model_index.json", "training_config.json"):
        assert (tmp_path / "run" / name).is_file()
    assert not list((tmp_path / "run").rglob("*.bin")) and not list((tmp_path / "run").rglob("*.pt"))

    lines = re.search(r"Use it:\n\n((    .+\n){3})", capsys.readouterr().out).group(1)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in lines.splitlines()), {})
    assert (tmp_path / "sample.png").is_file()
    assert SDDiTPipeline.from_pretrained(tmp_path / "run").id2label[7] == "7"


def test_learns(tmp_path):
    metrics = train(tmp_path, "--max_train_steps", 60, "--train_batch_size", 64)
    first, last = (np.mean([row["loss_generative"] for row in rows]) for rows in (metrics[:5], metrics[-5:]))
    assert last < 0.75 * first
    assert [row["teacher_temperature"] for row in metrics] == sorted(
        row["teacher_temperature"] for row in metrics
    )
    assert metrics[0]["teacher_momentum"] == pytest.approx(0.996) and metrics[-1]["teacher_momentum"] > 0.9989


def test_saves_the_averaged_weights(tmp_path):
    config = train_sddit.parse([*SMALL, "--output_dir", str(tmp_path), "--max_train_steps", "12"])
    trainer = train_sddit.Trainer(config)
    average, history = None, []
    step = trainer.ema.step

    def watched(parameters):
        parameters = list(parameters)
        history.append([parameter.detach().clone() for parameter in parameters])
        step(parameters)

    trainer.ema.step = watched
    trainer.run()
    for i, weights in enumerate(history):
        decay = min(0.9999, (1 + i) / (10 + i)) if i else 0.0
        average = weights if average is None else [
            decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)
        ]  # fmt: skip
    saved = SDDiTPipeline.from_pretrained(tmp_path).transformer
    torch.testing.assert_close(list(saved.parameters()), average, rtol=1e-4, atol=1e-6)
    assert any((a - w).abs().max() > 1e-5 for a, w in zip(average, history[-1], strict=True))


def test_gradient_accumulation_changes_nothing(tmp_path):
    whole = train(tmp_path / "a", "--max_train_steps", 8, "--train_batch_size", 32)
    parts = train(
        tmp_path / "b", "--max_train_steps", 8, "--train_batch_size", 8, "--gradient_accumulation_steps", 4
    )
    for a, b in zip(whole, parts, strict=True):
        names = set(a) - {"prototypes_used"}  # counted in each micro-batch
        assert {name: b[name] for name in names} == pytest.approx({name: a[name] for name in names}, rel=1e-5)


def test_two_processes_train_what_one_does(tmp_path):
    one = train(tmp_path / "one", "--max_train_steps", 20, "--train_batch_size", 32)
    options = [*SMALL, "--output_dir", tmp_path / "two", "--max_train_steps", 20, "--train_batch_size", 16]
    result = launch(2, SCRIPT, *options)
    assert result.returncode == 0, result.stderr
    two = read_metrics(tmp_path / "two" / "metrics.jsonl")
    for a, b in zip(one, two, strict=True):
        names = set(a) - {"prototypes_used"}  # counted in each process
        assert {name: b[name] for name in names} == pytest.approx({name: a[name] for name in names}, rel=1e-5)
    weights = [
        SDDiTPipeline.from_pretrained(tmp_path / name).transformer.state_dict() for name in ("one", "two")
    ]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_resumed_run_equals_an_undisturbed_one(tmp_path):
    whole = train(tmp_path / "a", "--max_train_steps", 8)
    trainer = train_sddit.Trainer(
        train_sddit.parse(
            [
                *SMALL,
                "--output_dir",
                str(tmp_path / "b"),
                "--max_train_steps",
                "8",
                "--checkpointing_steps",
                "3",
            ]
        )
    )
    trainer.finish = lambda: None
    trainer.run()
    for folder in (tmp_path / "b").glob("checkpoint-6"):
        folder.rename(tmp_path / "lost")
    resumed = train(tmp_path / "b", "--max_train_steps", 8, "--resume_from_checkpoint", "latest")
    assert resumed == whole
    a, b = (
        (tmp_path / name / "transformer/diffusion_pytorch_model.safetensors").read_bytes() for name in "ab"
    )
    assert a == b


def test_bfloat16_follows_float32(tmp_path):
    full = train(tmp_path / "a", "--max_train_steps", 40)
    AcceleratorState._reset_state(True)
    half = train(tmp_path / "b", "--max_train_steps", 40, "--mixed_precision", "bf16")
    for name in ("loss_generative", "loss_discriminative"):
        a, b = (np.mean([row[name] for row in rows[-10:]]) for rows in (full, half))
        assert b == pytest.approx(a, rel=0.02)


POISON = """
import sys
sys.path.insert(0, {folder!r})
import torch
import train_sddit
from accelerate import PartialState
from sddit_diffusers.data import ImageDataset

read, calls = ImageDataset.__getitems__, []

def poisoned(self, indices):
    images, labels = read(self, indices)
    calls.append(1)
    if len(calls) == 3 and PartialState().process_index == 1:
        images[0, 0, 0, 0] = float("nan")
    return images, labels

ImageDataset.__getitems__ = poisoned
train_sddit.main()
"""


def test_a_value_that_is_not_finite_stops_all_processes(tmp_path):
    script = tmp_path / "poison.py"
    script.write_text(POISON.format(folder=str(SCRIPT.parent)))
    result = launch(2, script, *SMALL, "--output_dir", tmp_path / "run", "--max_train_steps", 6)
    assert result.returncode != 0
    assert (
        result.stderr.count("error: Step 3: not finite: loss (nan), loss_generative (nan)") == 2
    )  # both processes say so
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_no_weight_moves_in_a_step_that_is_not_finite(tmp_path, monkeypatch):
    trainer = train_sddit.Trainer(
        train_sddit.parse([*SMALL, "--output_dir", str(tmp_path), "--max_train_steps", "3"])
    )
    before = {name: tensor.clone() for name, tensor in trainer.objective.state_dict().items()}
    data = iter([(torch.full((16, 1, 8, 8), float("inf")), torch.zeros(16, dtype=torch.long))])
    with pytest.raises(FloatingPointError, match=r"Step 1: not finite: loss \(nan\), loss_generative"):
        trainer.train_step(0, data)
    for name, tensor in trainer.objective.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(
        torch.equal(a, b)
        for a, b in zip(trainer.ema.shadow_params, trainer.objective.transformer.parameters(), strict=True)
    )


def test_a_gradient_that_is_not_finite_is_named(tmp_path):
    options = [*SMALL, "--output_dir", str(tmp_path), "--max_train_steps", "3"]
    trainer = train_sddit.Trainer(train_sddit.parse(options))
    weight = trainer.objective.transformer.decoder.proj_in.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weight.clone()
    message = (
        r"not finite: grad_norm \((inf|nan)\), the gradient of transformer.decoder.proj_in.weight. No weight"
    )
    with pytest.raises(FloatingPointError, match=message):
        trainer.train_step(0, iter(train_sddit.batches(trainer.dataset, trainer.sampler)))
    assert torch.equal(weight, before)


def test_float16_leaves_out_steps_whose_gradients_overflow(tmp_path):
    """A loss scale too large on purpose: what overflows moves neither weights nor averages."""
    options = [*SMALL, "--output_dir", str(tmp_path), "--max_train_steps", "4"]
    trainer = train_sddit.Trainer(train_sddit.parse(options))
    # accelerate scales losses on GPUs only.
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    before = [parameter.clone() for parameter in trainer.objective.parameters()]
    data = iter(train_sddit.batches(trainer.dataset, trainer.sampler))
    trainer.train_step(0, data)
    assert trainer.ema.optimization_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.objective.parameters(), strict=True))
    scaler.update(2.0**8)
    metrics = trainer.train_step(1, data)
    assert trainer.ema.optimization_step == 1 and np.isfinite(metrics["loss"])
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.objective.parameters(), strict=True))


def test_gradient_norm_is_bounded(tmp_path):
    metrics = train(tmp_path, "--max_train_steps", 2, "--max_grad_norm", 0.01)
    assert metrics[0]["grad_norm"] > 0.01  # the norm before


def test_warm_up_of_the_learning_rate(tmp_path):
    metrics = train(tmp_path, "--max_train_steps", 5, "--lr_warmup_steps", 4, "--learning_rate", 0.004)
    assert [row["learning_rate"] for row in metrics] == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.004])


def test_tensorboard(tmp_path):
    train(tmp_path, "--max_train_steps", 2, "--report_to", "tensorboard")
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_without_labels_and_without_discrimination(tmp_path):
    metrics = train(tmp_path, "--max_train_steps", 2, "--label_column", "", "--discriminative_weight", 0)
    assert "loss_discriminative" not in metrics[0]
    assert SDDiTPipeline.from_pretrained(tmp_path).transformer.config.num_classes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image_column", "picture"], "digits has no column 'picture'; its columns are image, label"),
        (["--dataset_name", "./nowhere"], "There is no dataset folder ./nowhere"),
        (["--train_batch_size", "2000"], "The dataset has 1797 rows, fewer than one global batch of 2000"),
        (["--resume_from_checkpoint", "latest"], "There is no checkpoint"),
        (["--report_to", "clouds"], "report_to is 'clouds'"),
        (["--mixed_precision", "fp16"], "mixed_precision is 'fp16', which needs a GPU"),
    ],
)
def test_mistakes_stop_it_before_training(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        train(tmp_path, *options)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_unwritable_folder_stops_it_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="The output folder .*file/run cannot be written: Not a directory"):
        train(tmp_path / "file" / "run")


def test_checkpoints_of_an_earlier_run_are_not_overwritten(tmp_path):
    train(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 2)
    with pytest.raises(
        SystemExit, match="holds checkpoints of an earlier run: go on with --resume_from_checkpoint"
    ):
        train(tmp_path, "--max_train_steps", 2)


def test_an_unreadable_picture_is_named(tmp_path, monkeypatch):
    decode = ImageDataset._decode
    broken = {"bytes": b"no picture", "path": "five.png"}
    monkeypatch.setattr(
        ImageDataset, "_decode", lambda self, i, file: decode(self, i, broken if i == 5 else file)
    )
    with pytest.raises(SystemExit, match=r"Row 5 of digits \(five.png\) cannot be read as a picture"):
        train(tmp_path, "--max_train_steps", 200, "--train_batch_size", 64)
