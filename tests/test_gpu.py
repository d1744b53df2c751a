"""What must hold on a GPU: `pytest -m gpu -n 0`.

Where there is none, a CPU takes its place, small: a plain `pytest` runs the quick ones there, `-m gpu` all
but those that need what a CPU has not.
"""

import json
import os
import socket
import subprocess
import sys
from operator import methodcaller

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import randomize, write_latents
from diffusers.models.attention_dispatch import attention_backend
from processes import ROOT, launch, launch_environment
from small_runs import NETWORK, arguments, batches_of, make_trainer, train
from test_gpu_benchmark import benchmark
from torch.utils._pytree import tree_map_only

import distill_sddit
from sddit_diffusers import EDMHeunScheduler, SDDiTObjective, SDDiTPipeline, SDDiTTransformer2DModel
from sddit_diffusers.pipelines.sampling import generators
from sddit_diffusers.training.auxiliaries import AUXILIARIES
from sddit_diffusers.training.distillation import OBJECTIVES
from sddit_diffusers.training.methods import METHODS
from sddit_diffusers.training.metrics import read_metrics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHORT = ["--max_train_steps", 4, "--learning_rate", 1e-3, "--lr_warmup_steps", 0]
FLOAT32 = ["--mixed_precision", "no", "--allow_tf32", "False"]
SAMPLES = dict(sample_size=8, patch_size=2, in_channels=1, num_classes=10)
WIDER = NETWORK | SAMPLES | dict(attention_head_dim=16, decoder_attention_head_dim=16)
HEAD = dict(num_prototypes=32, head_hidden_dim=16, head_bottleneck_dim=8)
pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
slow_on_cpu = pytest.mark.slow if DEVICE == "cpu" else pytest.mark.long


@pytest.fixture(autouse=True)
def same_products():
    """Products are as precise as before, once a test is over."""
    parts = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [part.allow_tf32 for part in parts]
    yield
    for part, value in zip(parts, before, strict=True):
        part.allow_tf32 = value


def run(folder, *options):
    """The metrics of a few steps on the device; a later option holds."""
    AcceleratorState._reset_state(True)
    rows = train(folder, *SHORT, *options)
    assert AcceleratorState().device.type == DEVICE
    return rows


def losses(rows):
    return [row["loss"] for row in rows]


def weights(folder):
    """Those that a run has left, averaged."""
    return SDDiTPipeline.from_pretrained(folder).transformer.parameters()


def far(tensors, others):
    """The distance of tensors from others, to their norm."""
    a, b = (torch.cat([tensor.detach().flatten().double().cpu() for tensor in list(all_)])
            for all_ in (tensors, others))  # fmt: skip
    return ((a - b).norm() / b.norm()).item()


def on_device(objective, device):
    """Moves it; a batch and its draws, the same on each device."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(16, 1, 8, 8, generator=generator)
    arguments = x0, torch.arange(16) % 10, objective.draw(x0.shape, generator)
    objective.to(device)
    return tree_map_only(torch.Tensor, methodcaller("to", device), arguments)


# float16's first scales are too large for L_D, and such steps move nothing.
FLOAT16 = pytest.param(["--mixed_precision", "fp16", "--auxiliary", "none"], marks=needs_gpu, id="fp16")
BFLOAT16 = pytest.param(["--mixed_precision", "bf16"], id="bf16")


@pytest.mark.parametrize(
    "precision", [BFLOAT16, pytest.param(["--mixed_precision", "no"], id="tf32"), FLOAT16]
)
def test_losses_are_those_of_float32(tmp_path, precision):
    found = run(tmp_path / "found", *precision)
    expected = run(tmp_path / "float32", *precision, *FLOAT32)
    assert losses(found) == pytest.approx(losses(expected), rel=0.01)
    assert far(weights(tmp_path / "found"), weights(tmp_path / "float32")) < 0.01
    assert "grad_norm" in found[0]  # the first step has moved them


def test_losses_and_gradients_are_those_of_a_cpu():
    """Of the same weights and draws, in float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = {}
    for device in ("cpu", DEVICE):
        transformer = SDDiTTransformer2DModel(**NETWORK, **SAMPLES)
        objective = randomize(SDDiTObjective(transformer, EDMHeunScheduler(), **HEAD))
        values = objective(*on_device(objective, device))
        values["loss"].backward()
        gradients = [parameter.grad for parameter in objective.parameters() if parameter.grad is not None]
        found[device] = {name: value.item() for name, value in values.items()}, gradients
    (here, of_here), (there, of_there) = found[DEVICE], found["cpu"]
    assert here == pytest.approx(there, rel=1e-4)
    assert far(of_here, of_there) < 1e-3


@needs_gpu
def test_float16_leaves_out_a_step_whose_gradients_overflow(tmp_path):
    """No weight moves, the losses' scale is halved, and the next step moves them."""
    trainer = make_trainer(tmp_path, *SHORT, "--mixed_precision", "fp16", "--auxiliary", "none")
    data, scaler = batches_of(trainer), trainer.accelerator.scaler
    hook = trainer.objective.transformer.decoder.proj_in.weight.register_hook(lambda gradient: gradient / 0)
    before, scale = [parameter.clone() for parameter in trainer.objective.parameters()], scaler.get_scale()
    trainer.train_step(0, data)
    assert all(map(torch.equal, before, trainer.objective.parameters()))
    assert scaler.get_scale() == scale / 2 and trainer.ema.optimization_step == 0
    hook.remove()
    trainer.train_step(1, data)
    assert scaler.get_scale() == scale / 2 and trainer.ema.optimization_step == 1
    assert not all(map(torch.equal, before, trainer.objective.parameters()))


BACKENDS = "native", "_native_math", "_native_flash", "flash", "_flash_3", "xformers"
OF_GPUS = "_native_efficient", "_native_cudnn", "flex"


@pytest.mark.parametrize("name", [*BACKENDS, *(pytest.param(name, marks=needs_gpu) for name in OF_GPUS)])
def test_attention_backends_train_alike(name):
    """Of those that are installed, losses and gradients in bfloat16 beside float32 without any."""
    objective = randomize(SDDiTObjective(SDDiTTransformer2DModel(**WIDER), EDMHeunScheduler(), **HEAD))
    given, found = on_device(objective, DEVICE), {}
    with attention_backend("native"):  # a model's backend becomes that of all others, too, until here
        for backend, enabled in (("_native_math", False), (name, True)):
            try:
                objective.transformer.set_attention_backend(backend)
            except RuntimeError as missing:
                pytest.skip(str(missing))
            objective.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
                loss = objective(*given)["loss"]
            loss.backward()
            gradients = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
            found[backend, enabled] = loss.item(), gradients
    (expected, gradients), (loss, of_backend) = found["_native_math", False], found[name, True]
    assert loss == pytest.approx(expected, rel=0.03)
    assert far(of_backend, gradients) < 0.1


@pytest.mark.parametrize("precision", [BFLOAT16, FLOAT16])
def test_a_run_that_broke_off_goes_on(tmp_path, precision):
    """With its weights, optimizer, averages and scale of the losses."""
    options = [*precision, "--max_train_steps", 6]
    whole = run(tmp_path / "whole", *options)
    AcceleratorState._reset_state(True)
    trainer = make_trainer(tmp_path / "parts", *SHORT, *options, "--checkpointing_steps", 3)
    step = trainer.train_step

    def broken(number, *others):
        if number == 4:
            raise InterruptedError
        return step(number, *others)

    trainer.train_step = broken
    with pytest.raises(InterruptedError):
        trainer.run()
    rest = run(tmp_path / "parts", *options, "--resume_from_checkpoint", "latest")
    assert losses(rest) == pytest.approx(losses(whole), rel=1e-3)
    assert far(weights(tmp_path / "parts"), weights(tmp_path / "whole")) < 1e-4


def test_pipelines_make_the_images_of_a_cpu(tmp_path, pipe):
    """Of the same seeds, in float32; and in bfloat16 nearly so."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipe.save_pretrained(tmp_path)
    call = dict(class_labels=[0, 1, 2, 3], num_inference_steps=6, output_type="pt")

    def images(device, dtype):
        loaded = SDDiTPipeline.from_pretrained(tmp_path, torch_dtype=dtype).to(device)
        loaded.set_progress_bar_config(disable=True)
        made = loaded(**call, generator=generators(range(4))).images
        assert made.shape == (4, 3, 8, 8) and made.isfinite().all()
        return made.float().cpu()

    expected = images("cpu", torch.float32)
    assert (images(DEVICE, torch.float32) - expected).abs().max() < 1e-3
    assert (images(DEVICE, torch.bfloat16) - expected).abs().mean() < 0.05


@slow_on_cpu
def test_memory_is_what_the_dry_run_says():
    """Weights, averages, optimizer and the peak of a step, to 5 %."""
    parts, device = benchmark("gpu_parts"), torch.device(DEVICE)
    preset, batch_size = ("SD-DiT-S/2", 64) if DEVICE == "cuda" else ("small", 8)
    said = parts.dry_run_of(preset, batch_size, device)
    _, measured = parts.peak_of(lambda: parts.step_of("SD-DiT", preset, batch_size, device, False), device)
    assert measured == pytest.approx(said, rel=0.05)


@needs_gpu
@pytest.mark.parametrize("data", ["digits", "latents"])
def test_the_host_waits_for_nothing_between_logging_steps(tmp_path, data):
    options = ["--mixed_precision", "bf16", "--max_train_steps", 15, "--logging_steps", 5]
    if data == "latents":
        write_latents(tmp_path / "data", 300, shard_size=64)
        network = NETWORK | {"in_channels": 2, "sample_size": 2, "patch_size": 1}
        options += ["--dataset_name", tmp_path / "data", "--vae", "none"]
        options += ["--transformer", json.dumps(network)]
    trainer = make_trainer(tmp_path / "run", *options)
    step, watched = trainer.train_step, []

    def watch(number, *others):
        # The first five make the optimizer's state; what follows a step in the loop is watched too.
        if number >= 5 and (number + 1) % 5:
            watched.append(number)
            torch.cuda.set_sync_debug_mode("error")
        else:
            torch.cuda.set_sync_debug_mode("default")
        return step(number, *others)

    trainer.train_step = watch
    try:
        trainer.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched == [5, 6, 7, 8, 10, 11, 12, 13]


@slow_on_cpu
def test_compiled_it_trains_and_samples_alike(tmp_path):
    options = ["--mixed_precision", "bf16"]
    expected = run(tmp_path / "eager", *options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run(tmp_path / "compiled", *options, "--compile", "True")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 2 and not torch._dynamo.utils.counters["graph_break"]  # encoder and decoder
    assert losses(compiled) == pytest.approx(losses(expected), rel=0.01)

    pipe = SDDiTPipeline.from_pretrained(tmp_path / "compiled").to(DEVICE)
    call = dict(class_labels=[1, 2], num_inference_steps=4, output_type="latent")
    plain = pipe(**call, generator=generators(range(2))).images
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    assert far([pipe(**call, generator=generators(range(2))).images], [plain]) < 0.02


# Each beside the losses that go with it.
RUNS = {
    "all losses": ["--auxiliary", *AUXILIARIES],
    "dit": ["--method", "dit", "--process", "linear"],
    "maskdit": ["--method", "maskdit", "--mask_ratio_schedule", "cosine"],
    "mdt": ["--method", "mdt", "--process", "vp"],
    "tread": ["--method", "tread", "--process", "gvp", "--auxiliary", "sra"],
    "selective": ["--gradient_checkpointing", "selective"],
    "full": ["--gradient_checkpointing", "full", "--gradient_accumulation_steps", 2, "--max_grad_norm", 1],
    "scored": ["--evaluation_steps", 2, "--evaluation_samples", 20, "--evaluation_extractor", "pixels",
               "--num_validation_images", 10],
}  # fmt: skip


@slow_on_cpu
@pytest.mark.parametrize("name", RUNS)
def test_all_kinds_of_runs(tmp_path, name, vision_model):
    options, method = RUNS[name], name if name in METHODS else "sddit"
    network = METHODS[method].network(NETWORK | {"num_layers": 3})
    options = [*options, "--mixed_precision", "bf16", "--transformer", json.dumps(network)]
    if "repa" in options:
        options += ["--repa_encoder", vision_model]
    rows = run(tmp_path, *options)
    assert len(rows) == 4
    if name == "scored":
        assert rows[1]["fid_pixels"] > 0 and (tmp_path / "samples.png").is_file()


@slow_on_cpu
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_distils(tmp_path, objective):
    run(tmp_path / "parent", "--mixed_precision", "bf16")
    AcceleratorState._reset_state(True)
    options = ["--model", tmp_path / "parent", "--objective", objective, "--num_inference_steps", 3]
    options += ["--mixed_precision", "bf16", "--max_train_steps", 2, "--train_batch_size", 16]
    options += ["--evaluation_steps", 0, "--output_dir", tmp_path / "child"]
    distill_sddit.main([*map(str, options)])
    assert len(read_metrics(tmp_path / "child/metrics.jsonl")) == 2


SHARDED = """
import sys
import torch
import train_sddit
from torch.distributed.tensor import DTensor
from sddit_diffusers.training.trainer import Trainer

run = Trainer.run

def watched(trainer):
    print("joined by", torch.distributed.get_backend(), "on", trainer.accelerator.device.type)
    assert all(isinstance(weight, DTensor) for weight in trainer.objective.transformer.parameters())
    run(trainer)

Trainer.run = watched
train_sddit.main(sys.argv[1:])
"""


@slow_on_cpu
@pytest.mark.process
def test_shards_train_what_one_process_does(tmp_path):
    """FSDP2 with one process, by NCCL (gloo on a CPU); its checkpoint goes on without it."""
    options = [*SHORT, *FLOAT32, "--checkpointing_steps", 2]
    expected = run(tmp_path / "one", *options)
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [script, *arguments(tmp_path / "shards", *options)]
    if DEVICE == "cpu":
        result = launch(1, *command, **launch_environment("fsdp2"))
    else:
        result = launch_on_gpu(*command, **launch_environment("fsdp2"))
    assert result.returncode == 0, result.stderr
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    assert f"joined by {backend} on {DEVICE}\n" in result.stdout
    assert losses(read_metrics(tmp_path / "shards/metrics.jsonl")) == pytest.approx(
        losses(expected), rel=1e-4
    )
    checkpoint = tmp_path / "shards/checkpoint-2"
    rest = run(tmp_path / "alone", *options, "--resume_from_checkpoint", checkpoint)
    assert losses(rest) == pytest.approx(losses(expected)[2:], rel=1e-4)


def launch_on_gpu(*command, **environment):
    """A process as a launcher starts it, not forked, for CUDA is not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "LOCAL_RANK": 0}
    environment |= {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True,
        env=os.environ | {name: str(value) for name, value in environment.items()},
    )  # fmt: skip
