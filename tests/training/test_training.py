"""The script, run as users run it: on the digits, with a network of a few thousand weights."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import is_deepspeed_available
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import launch, write_latents
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import SafetensorError
from small_runs import NETWORK, SCRIPT, SMALL, batches_of, make_trainer, train

import train_sddit
from sddit_diffusers import SDDiTPipeline, evaluate, generate
from sddit_diffusers.data.pictures import ImageDataset
from sddit_diffusers.models.transformer_sddit import SDDiTBlock
from sddit_diffusers.seeds import generator_for
from sddit_diffusers.training import checkpointing
from sddit_diffusers.training.checkpointing import load_state
from sddit_diffusers.training.metrics import read_metrics
from sddit_diffusers.training.trainer import Trainer


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
    trainer = make_trainer(tmp_path, "--max_train_steps", 12)
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


def test_evaluation_scores_the_averaged_weights_and_changes_nothing(tmp_path, capsys):
    options = ["--max_train_steps", 5, "--evaluation_samples", 40]
    plain = train(tmp_path / "plain", *options)
    capsys.readouterr()
    scored = train(tmp_path / "scored", *options, "--evaluation_steps", 2, "--logging_steps", 2)
    assert [row["step"] for row in scored if "fid_pixels" in row] == [2, 4, 5]
    for row, other in zip(scored, [plain[1], plain[3], plain[4]], strict=True):
        assert {name: row[name] for name in other} == other
    last = {name: value for name, value in scored[-1].items() if name.endswith("_pixels")}
    assert f"Step 5: fid_pixels {last['fid_pixels']:.4g}, precision_pixels" in capsys.readouterr().err

    # The last row has the scores of the pipeline that is saved.
    command = ["--model", tmp_path / "scored", "--output_dir", tmp_path / "samples", "--num_samples", 40]
    generate.main([*map(str, command), "--num_inference_steps", "18", "--batch_size", "16"])
    command = [tmp_path / "samples", "digits", "--extractor", "pixels", "--output", tmp_path / "scores.json"]
    evaluate.main([*map(str, command), "--metrics", "fid", "precision", "recall"])
    found = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert {f"{name}_pixels": value for name, value in found.items()} == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize("labels", [True, False])
def test_pictures_of_any_size_are_scored_against_as_they_are_trained_on(tmp_path, labels):
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "pictures" / (str(i % 2) if labels else "")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8 + i % 3, 9 + i % 4), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    options = ["--dataset_name", tmp_path / "pictures", "--label_column", "label" if labels else ""]
    options += ["--evaluation_steps", 1, "--evaluation_samples", 6, "--max_train_steps", 1]
    metrics = train(tmp_path / "run", *options)
    judge = make_trainer(tmp_path / "again", *options).judge
    trained_on = ImageDataset(str(tmp_path / "pictures"), "image", "", 1, 8)
    expected = trained_on.__getitems__(list(range(24)))[0].flatten(1)
    found = judge.reference.features.features[:, :64] * 3**0.5
    torch.testing.assert_close(found.sort(0).values, expected.sort(0).values)
    assert metrics[-1]["fid_pixels"] > 0


def test_a_classifier_scores_too(tmp_path):
    options = ["--evaluation_steps", 2, "--evaluation_samples", 20, "--evaluation_extractor", "classifier"]
    metrics = train(tmp_path, "--max_train_steps", 2, *options)
    assert metrics[-1].keys() >= {"fid_classifier", "precision_classifier", "recall_classifier"}


def test_what_cannot_be_scored_stops_it_before_training(tmp_path, monkeypatch):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    options = ["--evaluation_steps", 1, "--evaluation_samples", 20, "--max_train_steps", 1]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="weights cannot be downloaded"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.hub, "download_url_to_file", no_network)
            train(tmp_path / "run", *options, "--evaluation_reference", tmp_path / "stats.npz",
                  "--evaluation_extractor", "inception")  # fmt: skip
    with pytest.raises(SystemExit, match="statistics of Inception's features, not of pixels"):
        train(tmp_path / "run", *options, "--evaluation_reference", tmp_path / "stats.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(SystemExit, match="statistics of 5 features for fid, not of 2048"):
        train(tmp_path / "run", *options, "--evaluation_reference", tmp_path / "other.npz",
              "--evaluation_extractor", "inception")  # fmt: skip
    np.savez(tmp_path / "one.npz", np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(SystemExit, match="1 image has no covariance"):
        train(tmp_path / "run", *options, "--evaluation_reference", tmp_path / "one.npz")
    with pytest.raises(SystemExit, match="trained on a reference that is a labelled dataset"):
        train(tmp_path / "run", *options, "--evaluation_extractor", "classifier", "--label_column", "")


def no_network(*arguments, **keywords):
    raise OSError("no network")


def test_gradient_accumulation_changes_nothing(tmp_path):
    whole = train(tmp_path / "a", "--max_train_steps", 8, "--train_batch_size", 32)
    parts = train(
        tmp_path / "b", "--max_train_steps", 8, "--train_batch_size", 8, "--gradient_accumulation_steps", 4
    )
    for a, b in zip(whole, parts, strict=True):
        names = set(a) - {"prototypes_used"}  # counted in each micro-batch
        assert {name: b[name] for name in names} == pytest.approx({name: a[name] for name in names}, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_what_one_does(tmp_path, accumulation):
    train(tmp_path / "one", "--max_train_steps", 20, "--train_batch_size", 32)
    options = [*SMALL, "--output_dir", tmp_path / "two", "--max_train_steps", 20]
    options += ["--train_batch_size", 16 // accumulation, "--gradient_accumulation_steps", accumulation]
    result = launch(2, SCRIPT, *options)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "one", tmp_path / "two")


def assert_same_run(one, other):
    """The losses and the pipelines of two folders are equal to rounding."""
    for a, b in zip(*(read_metrics(folder / "metrics.jsonl") for folder in (one, other)), strict=True):
        names = set(a) - {"prototypes_used"}  # counted in each process
        assert {name: b[name] for name in names} == pytest.approx({name: a[name] for name in names}, rel=1e-5)
    weights = [SDDiTPipeline.from_pretrained(folder).transformer.state_dict() for folder in (one, other)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


SHARDED = """
import sys
sys.path.insert(0, {folder!r})
import train_sddit
from torch.distributed.tensor import DTensor

save = Trainer.save

def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

def watched(trainer, step):
    moments = [state["exp_avg"] for state in trainer.engine.optimizer.state.values()]
    tensors = {{"Adam": (moments, [p for p in trainer.objective.parameters() if p.requires_grad])}}
    if {weights_too}:
        networks = trainer.objective.transformer, trainer.objective.teacher, trainer.objective.head
        tensors |= {{network._get_name(): [list(network.parameters())] * 2 for network in networks}}
        tensors["EMA"] = [trainer.ema.shadow_params] * 2
    for name, (shards, whole) in tensors.items():
        share = sum(local(shard).numel() for shard in shards) / sum(tensor.numel() for tensor in whole)
        assert 0.45 < share < 0.55, (name, share)
    save(trainer, step)
    if step == 6:
        assert "go on" in sys.argv[-1], "stopped after step 6"

Trainer.save = watched
train_sddit.main({options!r} + sys.argv[1:-1])
"""
needs_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("deepspeed", marks=needs_deepspeed)])
def test_trains_in_shards_what_one_process_does(tmp_path, engine):
    """Losses, checkpoints and pipeline are those of one process; a stopped run goes on with or without it."""
    options = [*SMALL, "--max_train_steps", "12", "--checkpointing_steps", "6", "--max_grad_norm", "0.5"]
    train(tmp_path / "one", *options, "--train_batch_size", 32)
    script = tmp_path / "sharded.py"
    halves = ["--train_batch_size", "8", "--gradient_accumulation_steps", "2"]
    script.write_text(
        SHARDED.format(folder=str(SCRIPT.parent), options=options + halves, weights_too=engine == "fsdp2")
    )
    environment = launch_environment(engine)
    for folder, *arguments in (("two", "go on"), ("parts", "stop"),
                               ("parts", "--resume_from_checkpoint", "latest", "go on")):  # fmt: skip
        result = launch(2, script, "--output_dir", tmp_path / folder, *arguments, **environment)
        stopped = "stopped after step 6" in result.stderr
        assert stopped if arguments == ["stop"] else result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "one", tmp_path / "two")
    for name in ("metrics.jsonl", "transformer/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name

    one, parts = (load_state(tmp_path / folder / "checkpoint-6")["optimizer"] for folder in ("one", "parts"))
    assert parts["param_groups"] == one["param_groups"]
    torch.testing.assert_close(parts["state"], one["state"], rtol=1e-3, atol=1e-4)
    options += ["--train_batch_size", 32, "--resume_from_checkpoint", tmp_path / "parts/checkpoint-6"]
    rest = train(tmp_path / "alone", *options)
    both = read_metrics(tmp_path / "one/metrics.jsonl")[6:]
    assert [row["loss"] for row in rest] == pytest.approx([row["loss"] for row in both], rel=1e-5)


@needs_deepspeed
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"ZERO_STAGE": "3"}, "The ZeRO stage is 3; it must be 1 or 2"),
        ({"OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "DeepSpeed's offload_optimizer is 'cpu'; it must be 'none'"),
    ],
)
def test_deepspeed_is_refused_what_is_not_known_to_work(tmp_path, setting, message):
    environment = launch_environment("deepspeed")
    environment |= {f"ACCELERATE_DEEPSPEED_{name}": value for name, value in setting.items()}
    result = launch(1, SCRIPT, *SMALL, "--output_dir", tmp_path, **environment)
    assert result.returncode != 0 and f"train_sddit.py: error: {message}" in result.stderr


STEPS_THAT_FAIL = """
import sys
sys.path.insert(0, {folder!r})
import torch
import train_sddit

trainer = Trainer(train_sddit.parse(sys.argv[1:]))
data = trainer.dataset.batches(trainer.sampler)
weight = trainer.objective.transformer.decoder.proj_in.weight
rank = trainer.accelerator.process_index
trainer.train_step(0, data)
before = {{name: tensor.clone() for name, tensor in trainer.objective.named_parameters()}}

def fails(step, data):
    try:
        trainer.train_step(step, data)
    except FloatingPointError as error:
        print(f"process {{rank}}: {{error}}", file=sys.stderr, flush=True)
    for name, parameter in trainer.objective.named_parameters():
        assert torch.equal(parameter, before[name]), name

hook = weight.register_hook(lambda gradient: gradient * (float("inf") if rank == 1 else 1))
fails(1, data)
images, labels = next(data)
fails(2, iter([(images * float("nan"), labels)]))
"""


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_no_weight_moves_under_deepspeed_either(tmp_path, stage):
    script = tmp_path / "fails.py"
    script.write_text(STEPS_THAT_FAIL.format(folder=str(SCRIPT.parent)))
    environment = launch_environment("deepspeed") | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    result = launch(2, script, *SMALL, "--output_dir", tmp_path / "run", **environment)
    assert result.returncode == 0, result.stderr
    for process in (0, 1):
        said = rf"process {process}: Step 2: not finite: grad_norm \((inf|nan)\), the gradient of "
        assert re.search(said + r"transformer.decoder.proj_in.weight\. No weight", result.stderr), (
            result.stderr
        )
        assert f"process {process}: Step 3: not finite: loss (nan), loss_gen" in result.stderr, result.stderr


def launch_environment(config):
    """What `accelerate launch --config_file configs/...` tells its processes."""
    command = ["--config_file", str(SCRIPT.parent / "configs" / f"{config}.yaml"), str(SCRIPT)]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        arguments.main_process_port = 0  # any: `launch` has its own
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    # DeepSpeed compiles what its CPUs talk through; once is enough, so not into the folder of one session.
    built = Path.home() / ".cache/torch_extensions/sddit-tests"
    settings = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(built)}
    return environment | settings | {"ACCELERATE_MIXED_PRECISION": "no"}


def test_compiled_blocks_train_alike(tmp_path, monkeypatch):
    compiled = []

    def compile(block, **options):
        compiled.append(block)
        torch.nn.Module.compile(block, backend="aot_eager", **options)  # traced, without a C++ compiler

    monkeypatch.setattr(SDDiTBlock, "compile", compile)
    plain = train(tmp_path / "a", "--max_train_steps", 4, "--gradient_checkpointing", "selective")
    traced = train(tmp_path / "b", "--max_train_steps", 4, "--compile")
    assert len(compiled) == 2 + 1 + 2  # student, its decoder, teacher
    for a, b in zip(plain, traced, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    SDDiTPipeline.from_pretrained(tmp_path / "b")


def test_accelerate_launch_uses_all_cores(tmp_path):
    """The README's first command, made small; accelerate itself would leave one thread."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\nimport torch, train_sddit\n"
        "train_sddit.main()\nprint('threads', torch.get_num_threads())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "accelerate.commands.launch", script, *SMALL, "--max_train_steps", 2]
    result = subprocess.run(
        [*map(str, command), "--output_dir", str(tmp_path / "run")],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert f"threads {len(os.sched_getaffinity(0))}" in result.stdout
    assert (tmp_path / "run" / "samples.png").is_file()


def test_pictures_of_a_folder(tmp_path):
    folder = tmp_path / "data" / "train"
    for i in range(40):
        (folder / "cat dog".split()[i % 2]).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 16, 3), dtype=np.uint8))
        picture.save(folder / "cat dog".split()[i % 2] / f"{i}.png")
    network = json.dumps(NETWORK | {"in_channels": 3})
    options = ["--dataset_name", tmp_path / "data", "--max_train_steps", 3, "--transformer", network]
    train(tmp_path / "run", *options, "--dataloader_num_workers", 2)
    pipe = SDDiTPipeline.from_pretrained(tmp_path / "run")
    assert pipe(["dog"], num_inference_steps=2).images[0].mode == "RGB"
    assert pipe.transformer.config.num_classes == 2


def test_resumed_run_equals_an_undisturbed_one(tmp_path):
    whole = train(tmp_path / "a", "--max_train_steps", 8)
    trainer = make_trainer(tmp_path / "b", "--max_train_steps", 8, "--checkpointing_steps", 3)
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
from sddit_diffusers.data.pictures import ImageDataset

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
    trainer = Trainer(train_sddit.parse([*SMALL, "--output_dir", str(tmp_path), "--max_train_steps", "3"]))
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
    trainer = make_trainer(tmp_path)
    weight = trainer.objective.transformer.decoder.proj_in.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weight.clone()
    message = (
        r"not finite: grad_norm \((inf|nan)\), the gradient of transformer.decoder.proj_in.weight. No weight"
    )
    with pytest.raises(FloatingPointError, match=message):
        trainer.train_step(0, batches_of(trainer))
    assert torch.equal(weight, before)


def test_float16_leaves_out_steps_whose_gradients_overflow(tmp_path):
    """A loss scale too large on purpose: what overflows moves neither weights nor averages."""
    trainer = make_trainer(tmp_path)
    # accelerate scales losses on GPUs only.
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.engine.optimizer = AcceleratedOptimizer(trainer.engine.optimizer.optimizer, scaler=scaler)
    before = [parameter.clone() for parameter in trainer.objective.parameters()]
    data = batches_of(trainer)
    trainer.train_step(0, data)
    assert trainer.ema.optimization_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.objective.parameters(), strict=True))
    scaler.update(2.0**8)
    metrics = trainer.train_step(1, data)
    assert trainer.ema.optimization_step == 1 and np.isfinite(metrics["loss"])
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.objective.parameters(), strict=True))


def test_gradient_norm_is_bounded(tmp_path):
    trainer = make_trainer(tmp_path, "--max_grad_norm", 0.01)
    norms, step = [], trainer.engine.optimizer.optimizer.step

    def watched(*arguments, **keywords):
        gradients = [p.grad.flatten() for p in trainer.objective.parameters() if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())
        return step(*arguments, **keywords)

    trainer.engine.optimizer.optimizer.step = watched
    metrics = trainer.train_step(0, batches_of(trainer))
    assert metrics["grad_norm"] > 0.1  # before
    assert norms == pytest.approx([0.01], rel=1e-3)


def test_teacher_and_centers_follow_the_schedule(tmp_path):
    """What the training loop does after each optimizer step, done again by hand."""
    trainer = make_trainer(tmp_path, "--max_train_steps", 4)
    objective, data = trainer.objective, batches_of(trainer)
    expected = {name: p.clone() for name, p in objective.teacher.named_parameters()}
    center, logits = torch.zeros(32), []
    unit, head = torch.nn.functional.normalize, objective.teacher.head

    def keep(module, inputs, features):
        logits.append(unit(features, dim=-1) @ unit(head.prototypes, dim=-1).T)

    head.mlp.register_forward_hook(keep)
    for step in range(4):
        trainer.train_step(step, data)
        beta = 0.999 - 0.003 * (1 + math.cos(math.pi * step / 4)) / 2
        student = dict(objective.transformer.named_parameters("encoder"))
        student |= dict(objective.head.named_parameters("head"))
        expected = {name: beta * p + (1 - beta) * student[name].detach() for name, p in expected.items()}
        center = 0.9 * center + 0.1 * logits[-1][:, 1:].mean((0, 1))
    for name, parameter in objective.teacher.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(objective.center_patch.value, center)
    assert center.norm() > 0


def test_temperature_warms_up_over_the_epochs(tmp_path):
    trainer = make_trainer(tmp_path, "--train_batch_size", 400, "--teacher_temperature_warmup_epochs", 2)
    assert trainer.sampler.steps_per_epoch == 4
    values = [trainer.follow_schedules(step)["teacher_temperature"] for step in (0, 4, 8, 9)]
    assert values == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert trainer.objective.teacher_temperature == 0.07


def test_validation_leaves_the_weights_alone(tmp_path):
    assert train(tmp_path / "a", "--max_train_steps", 4, "--validation_steps", 1) == train(
        tmp_path / "b", "--max_train_steps", 4
    )


def test_warm_up_of_the_learning_rate(tmp_path):
    metrics = train(tmp_path, "--max_train_steps", 5, "--lr_warmup_steps", 4, "--learning_rate", 0.004)
    assert [row["learning_rate"] for row in metrics] == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.004])


def test_tensorboard(tmp_path):
    train(tmp_path, "--max_train_steps", 2, "--report_to", "tensorboard")
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_without_labels_and_without_discrimination(tmp_path):
    metrics = train(tmp_path, "--max_train_steps", 2, "--label_column", "", "--discriminative_weight", 0)
    assert not {"loss_discriminative", "teacher_momentum"} & set(metrics[0])
    assert SDDiTPipeline.from_pretrained(tmp_path).transformer.config.num_classes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image_column", "picture"], "digits has no column 'picture'; its columns are image, label"),
        (["--dataset_name", "./nowhere"], "There is no dataset folder ./nowhere"),
        (["--train_batch_size", "2000"], "The dataset has 1797 rows, fewer than one global batch of 2000"),
        (["--resume_from_checkpoint", "run/checkpoint-7"], "There is no checkpoint run/checkpoint-7"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", 1], "seed: 0 there, 1 here"),
        (["--train_batch_size", 8], "global batch: 16 there, 8 here"),
        (["--num_prototypes", 64], "model num_prototypes: 32 there, 64 here"),
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


def test_what_may_change_is_said(tmp_path, capsys):
    train(tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 2)
    options = ["--resume_from_checkpoint", "latest", "--learning_rate", 0.001, "--checkpointing_steps", 2]
    train(tmp_path, "--max_train_steps", 4, *options)
    changes = "learning_rate: 0.003 there, 0.001 here; max_train_steps: 2 there, 4 here"
    assert f"Changed since checkpoint-2: {changes}.\n" in capsys.readouterr().out


def test_latest_begins_where_there_is_no_checkpoint(tmp_path, capsys):
    assert len(train(tmp_path, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")) == 2
    assert "There is no checkpoint in" in capsys.readouterr().out


def test_checkpoints_are_limited_and_the_last_step_has_one(tmp_path):
    train(tmp_path, "--max_train_steps", 7, "--checkpointing_steps", 2, "--checkpoints_total_limit", 2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_leaves(tmp_path, capsys, monkeypatch, number):
    whole = train(tmp_path / "a", "--max_train_steps", 6)
    handler, train_step = signal.getsignal(number), Trainer.train_step

    def interrupted(self, step, data):
        if step == 3:
            signal.raise_signal(number)
        return train_step(self, step, data)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path / "b", "--max_train_steps", 6)
    assert stopped.value.code == 128 + number
    assert f"Stopped by {number.name} after step 4" in capsys.readouterr().out
    assert signal.getsignal(number) == handler
    assert not (tmp_path / "b/model_index.json").exists()
    AcceleratorState._reset_state(True)
    assert train(tmp_path / "b", "--max_train_steps", 6, "--resume_from_checkpoint", "latest") == whole


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


def test_a_full_disk_stops_it_with_the_earlier_checkpoints(tmp_path, monkeypatch):
    def full(state, file):
        if "checkpoint-4" in file.name:
            raise OSError(28, "No space left on device", file.name)
        torch.save(state, file)

    monkeypatch.setattr(checkpointing, "_save", full)
    with pytest.raises(SystemExit, match="error: .*No space left on device"):
        train(tmp_path, "--max_train_steps", 8, "--checkpointing_steps", 2)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_a_full_disk_at_the_end_costs_nothing(tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(SDDiTPipeline, "save_pretrained", full)
        with pytest.raises(SystemExit, match="The pipeline cannot be written: .*No space left"):
            train(tmp_path, "--max_train_steps", 3, "--checkpointing_steps", 100)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    train(tmp_path, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "model_index.json").exists()


LATENTS = json.dumps(NETWORK | {"in_channels": 2, "sample_size": 2, "patch_size": 1})


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "latents"
    write_latents(folder, 300, shard_size=64)
    return folder


def test_latents_are_drawn_anew_each_step(tmp_path, latents):
    options = ["--transformer", LATENTS, "--dataset_name", latents, "--vae", "none"]
    trainer, seen = make_trainer(tmp_path, *options), []
    trainer.engine.prepared.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    moments, labels = next(batches_of(trainer))
    for step in (0, 1):
        trainer.train_step(step, iter([(moments, labels)]))
    for step, x0 in enumerate(seen):
        noise = torch.randn(16, 2, 2, 2, generator=generator_for(0, 2, step))
        torch.testing.assert_close(x0, 0.5 * (moments[:, 0].float() + 0.25 * noise))


def test_latents_make_a_pipeline_with_their_vae(tmp_path, latents):
    """A VAE that decodes them is saved with the pipeline, which makes pictures."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16], norm_num_groups=4, latent_channels=2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    options = ["--transformer", LATENTS, "--dataset_name", latents, "--vae", tmp_path / "vae"]
    pictures = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", pictures)
    options += ["--evaluation_steps", 2, "--evaluation_samples", 5]
    options += ["--evaluation_reference", tmp_path / "pictures.npz"]
    with pytest.warns(UserWarning, match="is not the one that made the latents"):
        metrics = train(tmp_path / "run", "--max_train_steps", 2, "--num_validation_images", 20, *options)
    assert metrics[-1]["fid_pixels"] > 0
    pipe = SDDiTPipeline.from_pretrained(tmp_path / "run")
    assert pipe(["7"], num_inference_steps=2).images[0].size == (4, 4)
    assert Image.open(tmp_path / "run/samples.png").height == 2 * 66


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "latents are 2 x 2 x 2; the network takes 1 x 8 x 8"),
        (
            ["--transformer", LATENTS, "--vae", "/nowhere/vae"],
            "The VAE '/nowhere/vae' cannot be loaded: .* Name another with --vae, or",
        ),
        (
            ["--transformer", LATENTS, "--vae", "none", "--evaluation_steps", 1],
            "--evaluation_steps needs --evaluation_reference: images, or their statistics",
        ),
        (
            ["--transformer", LATENTS, "--vae", "none", "--evaluation_steps", 1]
            + ["--evaluation_reference", "digits"],
            "--evaluation_steps needs a VAE, which decodes the samples",
        ),
    ],
)
def test_latents_of_another_shape_or_vae(tmp_path, latents, options, message):
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        train(tmp_path, "--dataset_name", latents, *options)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_named(tmp_path, monkeypatch, workers):
    decode = ImageDataset._decode
    broken = {"bytes": b"no picture", "path": "five.png"}
    monkeypatch.setattr(
        ImageDataset, "_decode", lambda self, i, file: decode(self, i, broken if i == 5 else file)
    )
    with pytest.raises(SystemExit, match=r"Row 5 of digits \(five.png\) cannot be read as a picture"):
        train(
            tmp_path, "--max_train_steps", 200, "--train_batch_size", 64, "--dataloader_num_workers", workers
        )
