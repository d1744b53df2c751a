"""Several processes train what one does, whole or in shards."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import is_deepspeed_available
from conftest import CORES, thorough
from processes import launch, launch_environment, torchrun
from small_runs import NETWORK, SCRIPT, SMALL, train

import distill_sddit
from sddit_diffusers import SDDiTPipeline
from sddit_diffusers.launching import check_machine
from sddit_diffusers.training.checkpointing import load_state
from sddit_diffusers.training.methods import METHODS
from sddit_diffusers.training.metrics import read_metrics

pytestmark = pytest.mark.process


@pytest.mark.parametrize(("start", "accumulation"), [(launch, 1), *thorough((torchrun, 2))])
def test_two_processes_train_what_one_does(tmp_path, vision_model, start, accumulation):
    losses = ["--auxiliary", "discrimination", "sra", "repa", "--sra_momentum", "0.9"]
    losses += ["--repa_encoder", vision_model, "--repa_until_step", "7"]
    train(tmp_path / "one", *losses, "--max_train_steps", 10, "--train_batch_size", 32)
    options = [*SMALL, *losses, "--output_dir", tmp_path / "two", "--max_train_steps", 10]
    options += ["--train_batch_size", 16 // accumulation, "--gradient_accumulation_steps", accumulation]
    result = start(2, SCRIPT, *options)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "one", tmp_path / "two")


def assert_same_run(one, other, rel=1e-5):
    """The losses and the pipelines of two folders are equal to rounding."""
    for a, b in zip(*(read_metrics(folder / "metrics.jsonl") for folder in (one, other)), strict=True):
        names = set(a) - {"prototypes_used"}  # counted in each process
        assert {name: b[name] for name in names} == pytest.approx({name: a[name] for name in names}, rel=rel)
    weights = [SDDiTPipeline.from_pretrained(folder).transformer.state_dict() for folder in (one, other)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


SHARDED = """
import os
import sys
import train_sddit
from sddit_diffusers.training.state import RunState
from torch.distributed.tensor import DTensor

save = RunState.save

def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

def watched(state, step):
    moments = [each["exp_avg"] for each in state.engine.optimizer.state.values()]
    tensors = {"Adam": (moments, [p for p in state.objective.parameters() if p.requires_grad])}
    if os.environ["ENGINE"] == "fsdp2":
        loss = state.objective.auxiliaries["discrimination"]
        sra = state.objective.auxiliaries["sra"]
        networks = state.objective.transformer, loss.teacher, loss.head, sra.teacher, sra.head
        tensors |= {i: [list(network.parameters())] * 2 for i, network in enumerate(networks)}
        tensors["EMA"] = [state.ema.shadow_params] * 2
    for name, (shards, whole) in tensors.items():
        share = sum(local(shard).numel() for shard in shards) / sum(tensor.numel() for tensor in whole)
        assert 0.45 < share < 0.55, (name, share)
    save(state, step)
    if step == 6:
        assert "go on" in sys.argv[-1], "stopped after step 6"

RunState.save = watched
train_sddit.main(sys.argv[1:-1])
"""


needs_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")


@pytest.mark.thorough
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("deepspeed", marks=needs_deepspeed)])
def test_trains_in_shards_what_one_process_does(tmp_path, vision_model, engine):
    """Losses, checkpoints and pipeline are those of one process; a stopped run goes on with or without it."""
    options = [*SMALL, "--max_train_steps", "12", "--checkpointing_steps", "6", "--max_grad_norm", "0.5"]
    options += ["--auxiliary", "discrimination", "sra", "repa", "--sra_momentum", "0.9"]
    options += ["--repa_encoder", vision_model]
    train(tmp_path / "one", *options, "--train_batch_size", 32)
    script = tmp_path / "sharded.py"
    halves = ["--train_batch_size", "8", "--gradient_accumulation_steps", "2"]
    script.write_text(SHARDED)
    environment = launch_environment(engine) | {"ENGINE": engine}
    for folder, *arguments in (("two", "go on"), ("parts", "stop"),
                               ("parts", "--resume_from_checkpoint", "latest", "go on")):  # fmt: skip
        command = [script, *options, *halves, "--output_dir", tmp_path / folder, *arguments]
        result = launch(2, *command, **environment)
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


SHARDED_TEACHER = """
import sys
import distill_sddit
from sddit_diffusers.training.distillation import SelfDistillation
from torch.distributed.tensor import DTensor

after_step = SelfDistillation.after_step

def watched(objective, *rest):
    after_step(objective, *rest)
    for network in (objective.transformer, objective.teacher):
        assert all(isinstance(weight, DTensor) for weight in network.parameters())

SelfDistillation.after_step = watched
distill_sddit.main(sys.argv[1:])
"""


@pytest.mark.thorough
@pytest.mark.parametrize("objective", ["issd", "progressive"])
def test_distils_in_shards_what_one_process_does(tmp_path, objective):
    train(tmp_path / "parent", "--max_train_steps", 4)
    options = ["--model", str(tmp_path / "parent"), "--objective", objective, "--teacher_momentum", "0.9"]
    options += ["--num_inference_steps", "3", "--max_train_steps", "8", "--evaluation_steps", "0"]
    distill_sddit.main([*options, "--train_batch_size", "32", "--output_dir", str(tmp_path / "one")])
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED_TEACHER)
    options += ["--train_batch_size", "16", "--output_dir", tmp_path / "two"]
    result = launch(2, script, *options, **launch_environment("fsdp2"))
    assert result.returncode == 0, result.stderr
    # The losses, of 1e-8, are small differences of large numbers.
    assert_same_run(tmp_path / "one", tmp_path / "two", rel=1e-3)


@pytest.mark.parametrize("method", ["maskdit", *thorough("mdt")])
def test_what_only_a_mask_uses_is_not_distilled(tmp_path, method):
    """Two processes wait for no gradient of it, and a checkpoint has no state of it."""
    network = METHODS[method].network(NETWORK | {"num_layers": 3})
    of_parent = ["--method", method, "--transformer", json.dumps(network), "--max_train_steps", "2"]
    train(tmp_path / "parent", *of_parent)
    options = ["--model", tmp_path / "parent", "--num_inference_steps", "3", "--evaluation_steps", "0"]
    options += [
        "--train_batch_size",
        "16",
        "--checkpointing_steps",
        "2",
        "--resume_from_checkpoint",
        "latest",
    ]
    for steps in (2, 4):
        command = [*options, "--max_train_steps", steps, "--output_dir", tmp_path / "child"]
        result = launch(2, SCRIPT.parent / "distill_sddit.py", *command)
        assert result.returncode == 0, result.stderr
    parent, child = (
        SDDiTPipeline.from_pretrained(tmp_path / name).transformer.state_dict()
        for name in ("parent", "child")
    )
    kept = {name for name in parent if torch.equal(parent[name], child[name]) and name != "pos_embed.table"}
    only_with_mask = METHODS[method].transformer.only_with_mask
    assert {name.split(".")[0] for name in kept} - {"label_embed"} == {*only_with_mask}


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
import torch
from sddit_diffusers.training.options import parse
from sddit_diffusers.training.trainer import Trainer

trainer = Trainer(parse(sys.argv[1:]))
data = trainer.dataset.batches(trainer.sampler)
weight = trainer.objective.transformer.decoder.proj_in.weight
rank = trainer.accelerator.process_index
trainer.train_step(0, data)
before = {name: tensor.clone() for name, tensor in trainer.objective.named_parameters()}

def fails(step, data):
    try:
        trainer.train_step(step, data)
    except FloatingPointError as error:
        print(f"process {rank}: {error}", file=sys.stderr, flush=True)
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
    script.write_text(STEPS_THAT_FAIL)
    environment = launch_environment("deepspeed") | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    result = launch(2, script, *SMALL, "--output_dir", tmp_path / "run", **environment)
    assert result.returncode == 0, result.stderr
    for process in (0, 1):
        said = rf"process {process}: Step 2: not finite: grad_norm \((inf|nan)\), the gradient of "
        assert re.search(said + r"transformer.decoder.proj_in.weight\. No weight", result.stderr), (
            result.stderr
        )
        assert f"process {process}: Step 3: not finite: loss (nan), loss_gen" in result.stderr, result.stderr


@pytest.mark.parametrize(("launcher", "threads"), [(None, 1), ("TORCHELASTIC_RUN_ID", 3)])
def test_one_thread_is_a_choice_unless_a_launcher_made_it(monkeypatch, launcher, threads):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv(launcher, "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    torch.set_num_threads(1)
    check_machine(Accelerator(cpu=True))
    assert torch.get_num_threads() == threads


@pytest.mark.thorough
def test_accelerate_launch_uses_all_cores(tmp_path):
    """The README's first command, made small; accelerate itself would leave one thread."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\nimport torch, train_sddit\n"
        "train_sddit.main()\nprint('threads', torch.get_num_threads())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "accelerate.commands.launch", script, *SMALL, "--max_train_steps", 2]
    command += ["--num_validation_images", 1]
    result = subprocess.run(
        [*map(str, command), "--output_dir", str(tmp_path / "run")],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=lambda: os.sched_setaffinity(0, CORES),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert f"threads {len(CORES)}\n" in result.stdout
    assert (tmp_path / "run" / "samples.png").is_file()


POISON = """
import sys
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
    script.write_text(POISON)
    result = launch(2, script, *SMALL, "--output_dir", tmp_path / "run", "--max_train_steps", 6)
    assert result.returncode != 0
    assert (
        result.stderr.count("error: Step 3: not finite: loss (nan), loss_generative (nan)") == 2
    )  # both processes say so
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


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
