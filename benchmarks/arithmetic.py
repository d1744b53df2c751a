"""Does the paper's speed come out? `python benchmarks/arithmetic.py [--preset SD-DiT-S/2]`

Counts the multiplications and additions of a training step and of the VAE's encoder, for one image, and sets
them beside the steps a second that the paper gives for S/2 at a global batch of 256 on 8 A100 (Sec. 4.2): the
rate that a GPU must have had, as a share of its peak in three precisions. Nothing is timed. MDT is this
project's: as its authors' script trains it, with all tokens and with 70 % of them in every step.
"""

import argparse
from collections.abc import Callable

import torch
from loops import DOWN, autoencoder, encode
from train_step import build, flops_of

from sddit_diffusers import PRESETS, EDMHeunScheduler
from sddit_diffusers.training.methods import METHODS

GPUS, GLOBAL_BATCH = 8, 256
A100 = {"FP32": 19.5e12, "TF32": 156e12, "BF16": 312e12}  # peaks without sparsity, NVIDIA's data sheet
CPU = torch.device("cpu")
SPEED = {"DiT": 5.03, "MDT": 2.4, "SD-DiT": 9.2}  # steps a second


def mdt_step(preset: str) -> Callable[[], None]:
    """A step of one image, without the optimizer's."""
    method, network = METHODS["mdt"], PRESETS[preset]
    transformer = method.transformer(**method.network(network))
    objective = method.objective(transformer, EDMHeunScheduler(), **method.settings)
    x0 = torch.randn(1, network["in_channels"], network["sample_size"], network["sample_size"])
    return lambda: objective(x0, torch.zeros(1, dtype=torch.long))["loss"].backward()


def operations(preset: str) -> dict[str, int]:
    """Multiplications and additions of one image: in a training step, and in the VAE's encoder."""
    built = {"DiT": "DiT fp32", "SD-DiT without L_D": "without L_D", "SD-DiT": "plain"}
    steps = {name: build(contestant, preset, 1, torch.float32, CPU) for name, contestant in built.items()}
    vae, side = autoencoder(CPU), DOWN * PRESETS[preset]["sample_size"]
    picture = torch.zeros(1, 3, side, side)
    steps |= {"MDT": mdt_step(preset), "VAE": lambda: encode(vae, picture)}
    return {name: flops_of(step) for name, step in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    of_latents = [name for name, network in PRESETS.items() if network["in_channels"] == 4]
    parser.add_argument("--preset", default="SD-DiT-S/2", choices=of_latents)
    counts = operations(parser.parse_args().preset)
    images, vae = GLOBAL_BATCH / GPUS, counts["VAE"]
    rows = {
        "DiT of latents": (counts["DiT"], SPEED["DiT"]),
        "DiT of pictures": (counts["DiT"] + vae, SPEED["DiT"]),
        "MDT of latents": (counts["MDT"], SPEED["MDT"]),
        "MDT of pictures": (counts["MDT"] + vae, SPEED["MDT"]),
        "SD-DiT without L_D": (counts["SD-DiT without L_D"], SPEED["SD-DiT"]),
        "SD-DiT": (counts["SD-DiT"], SPEED["SD-DiT"]),
    }
    print(f"The VAE's encoder has {vae / 1e9:.1f} GFLOP an image.\n")
    peaks = "".join(f" of {name}'s {peak / 1e12:g} |" for name, peak in A100.items())
    print(f"| | GFLOP an image | steps/s | TFLOP/s a GPU |{peaks}")
    print("|---" * (4 + len(A100)) + "|")
    for name, (count, speed) in rows.items():
        rate = count * images * speed
        shares = "".join(f" {100 * rate / peak:.1f} % |" for peak in A100.values())
        print(f"| {name} | {count / 1e9:.1f} | {speed} | {rate / 1e12:.1f} |{shares}")

    rate = counts["SD-DiT"] * images * SPEED["SD-DiT"]
    network, step = counts["DiT"] * images / rate, 1 / SPEED["DiT"]
    encoder, of_mdt = step - network, 1 / SPEED["MDT"]
    print(
        f"\nWith SD-DiT's {rate / 1e12:.1f} TFLOP/s DiT's network takes {1e3 * network:.0f} ms of its step's "
        f"{1e3 * step:.0f}.\nThe rest is the VAE's: {share(vae * images / encoder, 'TF32')}."
        f"\nBeside such a VAE MDT's network has {1e3 * (of_mdt - encoder):.0f} of {1e3 * of_mdt:.0f} ms: "
        f"{share(counts['MDT'] * images / (of_mdt - encoder), 'FP32')}."
    )


def share(rate: float, precision: str) -> str:
    """A rate, and what it is of the peak."""
    return f"{rate / 1e12:.1f} TFLOP/s, {100 * rate / A100[precision]:.1f} % of {precision}'s"


if __name__ == "__main__":
    main()
