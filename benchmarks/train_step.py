"""How fast is a training step? `python benchmarks/train_step.py [--preset SD-DiT-S/2] [--batch_size 32]`

One whole step (views, teacher, losses, backward, AdamW, averages, centers) of SD-DiT beside diffusers' own
DiT of the same encoder, all in turn, round by round:
- DiT fp32: `DiTTransformer2DModel`, epsilon-loss, AdamW and EMA, as its authors train it;
- DiT: the same in the precision of ours;
- DiT with VAE: DiT fp32 as its authors' script runs it: pictures, of 256 x 256 pixels for latents of 32 x 32,
  are flipped at random and encoded by a VAE of Stable Diffusion's configuration in every step;
- without L_D: SD-DiT without teacher and head;
- plain: SD-DiT in float32, with the logits of all tokens at once;
- selective: SD-DiT whose backward pass computes again what is cheap (`--gradient_checkpointing selective`);
- SD-DiT, as it trains by default (with `--compile` compiled, as is DiT).
With `--loop` there are two more, from files on disk to the moved weight:
- DiT loop: DiT with VAE from a folder of JPEGs, which a DataLoader reads, decodes, crops and flips;
- SD-DiT loop: SD-DiT from a folder of latents that were encoded once, which its own stream reads.
FLOPs are counted; MFU is their share of the rate that products of 4096 x 4096 matrices have in that
precision. Memory is the peak of a process of its own, above what it has before the first step; as a GPU's
allocator would count it, that is without what is lost between blocks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from loops import LATENTS, PICTURES, READ_AHEAD, Feed, open_feed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from sddit_diffusers import PRESETS, EDMHeunScheduler, SDDiTObjective, SDDiTTransformer2DModel
from sddit_diffusers.launching import keep_freed_memory
from sddit_diffusers.models.attention_cpu import use_cpu_attention
from sddit_diffusers.training import discrimination
from sddit_diffusers.training.engines import Alone
from sddit_diffusers.training.memory import keep_products
from sddit_diffusers.training.prototypes import Agreement, cross_entropy
from sddit_diffusers.training.step import train_step

CONTESTANTS = ("DiT fp32", "DiT", "without L_D", "plain", "selective", "SD-DiT")
WITH_VAE = "DiT with VAE"  # on a CPU eight times as slow as the slowest of them
LOOPS = (PICTURES, LATENTS)
FLOAT32 = ("DiT fp32", WITH_VAE, PICTURES, "plain")


def dit_loss(network: dict, device: torch.device) -> tuple[torch.nn.Module, Callable]:
    """diffusers' DiT of the encoder's size, and the loss of a batch: of the noise, at a random timestep."""
    model = DiTTransformer2DModel(
        num_attention_heads=network["num_attention_heads"],
        attention_head_dim=network["attention_head_dim"],
        num_layers=network["num_layers"],
        in_channels=network["in_channels"],
        sample_size=network["sample_size"],
        num_embeds_ada_norm=1000,
    ).to(device)
    alphas = torch.linspace(1, 0.01, 1000, device=device)

    def loss(x0: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        noise, t = torch.randn_like(x0), torch.randint(1000, (len(x0),), device=device)
        alpha = alphas[t].view(-1, 1, 1, 1)
        noised = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        return F.mse_loss(model(noised, t, labels, return_dict=False)[0].float(), noise)

    return model, loss


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """As the trainer's."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)


def build(
    name: str,
    preset: str,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool = False,
    feed: Feed | None = None,
) -> Callable[[], None]:
    """A contestant's step."""
    feed = feed or open_feed(name, PRESETS[preset], batch_size, device)
    half = dtype if dtype != torch.float32 and name not in FLOAT32 else None
    of = dit_step if name.startswith("DiT") else sddit_step
    move = of(name, PRESETS[preset], feed, half, device, compiled)

    def step() -> None:
        move()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def dit_step(
    name: str, network: dict, feed: Feed, half: torch.dtype | None, device: torch.device, compiled: bool
) -> Callable[[], None]:
    """What moves the weights of diffusers' DiT."""
    model, loss = dit_loss(network, device)
    if compiled and name == "DiT":
        model.compile_repeated_blocks(dynamic=False)
    optimizer, ema = optimizer_of(model), EMAModel(model.parameters(), decay=0.9999, foreach=True)

    def move() -> None:
        batch = feed()
        with torch.autocast(device.type, half, enabled=half is not None):
            value = loss(batch.x0, batch.labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    return move


def sddit_step(
    name: str, network: dict, feed: Feed, half: torch.dtype | None, device: torch.device, compiled: bool
) -> Callable[[], None]:
    """What moves the weights of SD-DiT."""
    transformer = SDDiTTransformer2DModel(**network)
    weight = 0.0 if name == "without L_D" else 1.0
    objective = SDDiTObjective(transformer, EDMHeunScheduler(), discriminative_weight=weight).to(device)
    if name == "selective":
        transformer.enable_gradient_checkpointing(keep_products)
    if device.type == "cpu" and name != "plain":
        use_cpu_attention(objective)
    if compiled and name != "plain":
        objective.compile_blocks()
    engine = Alone(objective, optimizer_of(objective), device.type, half)
    ema = EMAModel(transformer.parameters(), decay=0.9999, foreach=True)

    def move() -> None:
        discrimination.cross_entropy = whole_cross_entropy if name == "plain" else cross_entropy
        train_step(engine, ema, [(feed(), None)])

    return move


def whole_cross_entropy(teacher, student, center, tau_t: float, tau_s: float) -> Agreement:
    """L_D as it is written, by autograd, with the logits of all tokens."""
    logits = F.linear(*teacher)
    log_t = ((logits - center) / tau_t).log_softmax(-1)
    log_s = (F.linear(*student) / tau_s).log_softmax(-1)
    t = log_t.exp()
    used = torch.zeros_like(center).index_fill_(0, log_t.argmax(-1).flatten(), 1)
    loss, entropy = -(t * log_s).sum(-1).mean(), -(t * log_t).sum(-1).mean()
    return Agreement(loss, entropy, used, logits.mean((0, 1)))


def matmul_rate(dtype: torch.dtype, device) -> float:
    """Multiplications and additions a second of the machine's matrix product, in this precision."""
    a, b = (torch.randn(4096, 4096, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * 4096**3 / min(times)


@register_flop_formula(torch.ops.sddit.attention)
def attention_flops(query: tuple, *others, **outputs) -> int:
    """Two products of n x n x d in each of g heads."""
    g, n, d = query
    return 2 * g * 2 * n * n * d


@register_flop_formula(torch.ops.sddit.attention_backward)
def attention_backward_flops(grad: tuple, *others, **outputs) -> int:
    """Two products for each one of forward; what is computed again is not counted."""
    return 2 * attention_flops(grad)


def flops_of(step: Callable[[], None]) -> int:
    """Counted, with attention as the products that it is made of."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


def peak_memory(step: Callable[[], None], device) -> float:
    """GiB of three steps above what was there."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        [step() for _ in range(3)]
        return torch.cuda.max_memory_allocated() / 2**30
    before = resident("VmRSS")
    [step() for _ in range(3)]
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """GiB of this process, now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 2**20


def in_turn(
    steps: dict[str, Callable[[], None]], rounds: int, ahead: dict[str, int] | None = None
) -> dict[str, float]:
    """Median seconds of each step, all in turn, round by round.

    Where batches were read ahead while others had their turn, as many steps go untimed first, and as many are
    timed.
    """
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            waiting = (ahead or {}).get(name, 0)
            for _ in range(waiting):
                step()
            start = time.perf_counter()
            for _ in range(max(1, waiting)):
                step()
            seconds[name].append((time.perf_counter() - start) / max(1, waiting))
    return {name: statistics.median(values) for name, values in seconds.items()}


def printed_apart(program: str, *more: str) -> float:
    """The number that a program prints in a process of its own, with this one's options and `more`."""
    command = [sys.executable, program, *sys.argv[1:], *more]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives each tensor back at once
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def reading_seconds(feed: Feed, batches: int = 20) -> float:
    """Of one batch, where nothing else is done."""
    for _ in range(READ_AHEAD):
        feed.read()
    start = time.perf_counter()
    for _ in range(batches):
        feed.read()
    return (time.perf_counter() - start) / batches


def parse_options() -> argparse.Namespace:
    """The command line's options; `contestants` are all that are to run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    of_latents = [name for name, network in PRESETS.items() if network["in_channels"] == 4]
    parser.add_argument("--preset", default="SD-DiT-S/2", choices=of_latents)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--loop", action="store_true", help="add the whole loops, from files on disk")
    parser.add_argument("--contestants", nargs="+", choices=[*CONTESTANTS[:-1], WITH_VAE],
                        help="beside SD-DiT; all are in memory at once (default: all but 'DiT with VAE'; "
                        "with --loop: 'DiT fp32' and 'DiT with VAE')")  # fmt: skip
    parser.add_argument("--memory_of", choices=[*CONTESTANTS, WITH_VAE, *LOOPS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    others = options.contestants or (["DiT fp32", WITH_VAE] if options.loop else CONTESTANTS[:-1])
    options.contestants = [*others, "SD-DiT", *(LOOPS if options.loop else ())]
    return options


def main() -> None:
    options = parse_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    arguments = options.preset, options.batch_size, dtype, device, options.compile
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    names, memory = [options.memory_of], {}
    if not options.memory_of:
        names = options.contestants
        # Apart and first: this process keeps what it frees.
        memory = {name: printed_apart(__file__, "--memory_of", name) for name in names}
        keep_freed_memory()
    with ExitStack() as files:
        source = PRESETS[options.preset], options.batch_size, device, files
        feeds = {name: open_feed(name, *source) for name in names}
        steps = {name: build(name, *arguments, feed) for name, feed in feeds.items()}
        if options.memory_of:
            print(peak_memory(steps[options.memory_of], device))
            return
        rates = {kind: matmul_rate(kind, device) for kind in {torch.float32, dtype}}
        flops = {name: flops_of(step) for name, step in steps.items()}
        for step in steps.values():
            step()
        ahead = dict.fromkeys(LOOPS, READ_AHEAD) if device.type == "cuda" else {}
        median = in_turn(steps, options.rounds, ahead)
        reading = {name: reading_seconds(feeds[name]) for name in LOOPS if name in feeds}
        del steps
    products = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {kind}" for kind, rate in rates.items())
    print(
        f"{options.preset}, batch {options.batch_size}, {options.dtype}, {device.type}; products: {products}"
    )
    print(f"{'':<14}{'images/s':>10}{'s/step':>10}{'TFLOP':>10}{'MFU':>8}{'memory':>12}")
    for name, value in median.items():
        rate = rates[torch.float32 if name in FLOAT32 else dtype]
        print(f"{name:<14}{options.batch_size / value:>10.2f}{value:>10.2f}{flops[name] / 1e12:>10.2f}"
              f"{flops[name] / value / rate:>8.1%}{memory[name]:>8.2f} GiB")  # fmt: skip
    print_ratios(median)
    for name, seconds in reading.items():
        print(f"Of {name}, reading a batch takes {seconds:.4f} s by itself.")


def print_ratios(median: dict[str, float]) -> None:
    """What SD-DiT is to each of the others, and its loop to DiT's step and loop, in images a second."""
    for name, value in median.items():
        if name not in ("SD-DiT", *LOOPS):
            print(f"SD-DiT's images/s to those of {name}, step to step: {value / median['SD-DiT']:.2f}")
    if LATENTS in median:
        for name, what in (("DiT fp32", "step alone"), (PICTURES, "whole loop")):
            if name in median:
                ratio = median[name] / median[LATENTS]
                print(f"SD-DiT's whole loop to DiT's {what} ({name}), in images/s: {ratio:.2f}")


if __name__ == "__main__":
    main()
