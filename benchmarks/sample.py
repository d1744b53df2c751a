"""How fast are images made? `python benchmarks/sample.py [--preset SD-DiT-S/2] [--batch_size 4]`

Latents of N Heun steps, which are 2N - 1 network evaluations, beside diffusers' DiT pipeline of the same
encoder with as many DDIM steps, all in turn, round by round:
- DiTPipeline fp32: guided, as it comes;
- DiTPipeline: the same in the precision of ours;
- SDDiTPipeline: guided at all noise levels;
- interval: guided at those of sigma 0.28 to 2.9 alone;
- conditional: not guided.
Weights are random, and nothing is decoded. Rows are what the network is given for an image: two at an
evaluation with guidance, one at another. FLOPs are counted; MFU is their share of the rate that products of
4096 x 4096 matrices have in that precision. Memory is the peak of a process of its own, above what it has
before the first image.
"""

import argparse
from collections.abc import Callable
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler, DiTPipeline
from diffusers.utils import logging
from train_step import dit_loss, flops_of, in_turn, matmul_rate, peak_memory, printed_apart

from sddit_diffusers import PRESETS, EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel
from sddit_diffusers.launching import keep_freed_memory
from sddit_diffusers.pipelines.loading import DTYPES

CONTESTANTS = ("DiTPipeline fp32", "DiTPipeline", "SDDiTPipeline", "interval", "conditional")
GUIDANCE_SCALE, GUIDANCE_INTERVAL = 1.5, (0.28, 2.9)


class Undecoded:
    """Takes the place of DiTPipeline's VAE and gives the latents back."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=latents)


def build(
    name: str, preset: str, batch_size: int, steps: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], None], torch.nn.Module]:
    """What makes a contestant's batch, and its network."""
    network = PRESETS[preset]
    options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE}
    if name.startswith("DiT"):
        transformer = dit_loss(network, device)[0]
        transformer.register_to_config(out_channels=network["in_channels"])  # the pipeline reads it
        pipe = DiTPipeline(transformer, Undecoded(), DDIMScheduler(clip_sample=False))
        options |= {"num_inference_steps": 2 * steps - 1, "output_type": "pt"}
    else:
        pipe = SDDiTPipeline(SDDiTTransformer2DModel(**network), EDMHeunScheduler())
        options["output_type"] = "latent"
    if name == "interval":
        options["guidance_interval"] = GUIDANCE_INTERVAL
    elif name == "conditional":
        options["guidance_scale"] = 1.0
    for parameter in pipe.transformer.parameters():  # no zeros, behind which there would be nothing to do
        torch.nn.init.normal_(parameter, std=0.02)
    pipe.transformer.eval()
    pipe.to(device, precision(name, dtype))
    pipe.set_progress_bar_config(disable=True)
    labels = [i % network["num_classes"] for i in range(batch_size)]

    def make() -> None:
        pipe(labels, **options)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return make, pipe.transformer


def precision(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith("fp32") else dtype


def count_rows(make: Callable[[], None], transformer: torch.nn.Module) -> int:
    """Samples that the network is given for a batch of images."""
    rows = []
    hook = transformer.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    make()
    hook.remove()
    return sum(rows)


@torch.no_grad()
def flops_of_row(transformer: torch.nn.Module) -> int:
    """FLOPs of an evaluation of one sample."""
    config, device = transformer.config, transformer.device
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    sample = torch.zeros(shape, device=device, dtype=transformer.dtype)
    number = torch.zeros(1, device=device, dtype=torch.long)
    return flops_of(lambda: transformer(sample, number, number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="SD-DiT-S/2", choices=[name for name in PRESETS if "/" in name])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=40, help="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--memory_of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, batch_size, steps = DTYPES[options.dtype], options.batch_size, options.num_inference_steps
    if options.memory_of:
        # Memory does not grow with the steps; of 3, the second is in the interval.
        print(peak_memory(build(options.memory_of, options.preset, batch_size, 3, dtype, device)[0], device))
        return

    memory = {name: printed_apart(__file__, "--memory_of", name) for name in CONTESTANTS}
    keep_freed_memory()
    rates = {kind: matmul_rate(kind, device) for kind in {torch.float32, dtype}}
    built = {name: build(name, options.preset, batch_size, steps, dtype, device) for name in CONTESTANTS}
    flops = {name: flops_of_row(transformer) for name, (_, transformer) in built.items()}
    rows = {name: count_rows(*contestant) / batch_size for name, contestant in built.items()}  # warms up, too
    median = in_turn({name: make for name, (make, _) in built.items()}, options.rounds)
    del built
    torch.cuda.empty_cache()
    products = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {kind}" for kind, rate in rates.items())
    print(
        f"{options.preset}, batch {batch_size}, {2 * steps - 1} evaluations, {options.dtype}, {device.type}; "
        f"products: {products}"
    )
    print(f"{'':<18}{'images/s':>10}{'s/image':>10}{'rows':>8}{'TFLOP':>10}{'MFU':>8}{'memory':>12}")
    for name, value in median.items():
        work, seconds = flops[name] * rows[name], value / batch_size
        print(f"{name:<18}{1 / seconds:>10.3f}{seconds:>10.3f}{rows[name]:>8.0f}{work / 1e12:>10.3f}"
              f"{work / seconds / rates[precision(name, dtype)]:>8.1%}{memory[name]:>8.2f} GiB")  # fmt: skip
    for name, other in (("DiTPipeline fp32", ""), ("DiTPipeline", f" in {options.dtype}")):
        ratio = median[name] / median["SDDiTPipeline"]
        print(f"SDDiTPipeline's images/s to those of {name}{other}: {ratio:.2f}")
    measured, count = (values["SDDiTPipeline"] / values["interval"] for values in (median, rows))
    print(f"the interval saves: measured {measured:.2f}, by count {count:.2f}")


if __name__ == "__main__":
    main()
