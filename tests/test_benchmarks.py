"""The benchmark of a training step, from files to the moved weight, at a size for which it takes seconds."""

import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from sddit_diffusers import PRESETS, SDDiTObjective

CPU = torch.device("cpu")
LAYERS, WIDTH = 3, 16
NETWORK = PRESETS["cifar10-latent"] | {
    "num_layers": LAYERS, "num_attention_heads": 2, "attention_head_dim": WIDTH // 2,
    "num_decoder_layers": 1, "decoder_num_attention_heads": 2, "decoder_attention_head_dim": 6,
}  # fmt: skip


def small_autoencoder(device):
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
    ).eval()


@pytest.fixture
def loops(monkeypatch):
    """The module, with few files, a VAE of few channels, and `cifar10-latent` as a smaller network."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(PRESETS, "cifar10-latent", NETWORK)
    import loops

    monkeypatch.setattr(loops, "autoencoder", small_autoencoder)
    monkeypatch.setattr(loops, "FILES", 8)
    return loops


@pytest.fixture
def train_step(loops, monkeypatch):
    """The program, without what takes long or changes the process."""
    import train_step

    monkeypatch.setattr(train_step, "printed_apart", lambda *command: 0.5)
    monkeypatch.setattr(train_step, "matmul_rate", lambda *given: 1e11)
    monkeypatch.setattr(train_step, "keep_freed_memory", lambda: None)
    small = partial(SDDiTObjective, num_prototypes=64, head_hidden_dim=32, head_bottleneck_dim=16)
    monkeypatch.setattr(train_step, "SDDiTObjective", small)
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    yield train_step
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def test_pictures_on_disk_are_encoded_in_every_step(loops):
    with ExitStack() as files:
        feed = loops.open_feed(loops.PICTURES, NETWORK, 8, CPU, files)
        pictures, labels = feed.read()
        assert pictures.shape == (8, 3, 64, 64) and pictures.dtype == torch.float32
        assert -1 <= pictures.min() < -0.5 and 0.5 < pictures.max() <= 1
        assert labels.sort().values.tolist() == [*range(8)]  # an epoch, one of each folder

        batch, again = (feed.prepare((pictures, labels)) for _ in range(2))
        assert batch.x0.shape == (8, 4, 8, 8) and not batch.x0.requires_grad and batch.labels is labels
        posterior = small_autoencoder(CPU).encode(pictures).latent_dist
        noise = (batch.x0 / 0.18215 - posterior.mean) / posterior.std
        assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
        assert not torch.equal(batch.x0, again.x0)


def test_half_of_the_pictures_are_mirrored(loops, tmp_path):
    loops.write_pictures(tmp_path, 8)
    dataset = loops.PictureFolder(tmp_path, 64)
    torch.manual_seed(0)
    seen = torch.stack([dataset[0][0] for _ in range(40)])
    mirrored = (seen == seen[0].flip(-1)).flatten(1).all(1)
    assert ((seen == seen[0]).flatten(1).all(1) ^ mirrored).all() and 8 <= mirrored.sum() <= 32


def test_latents_on_disk_are_drawn_in_every_step(loops):
    with ExitStack() as files:
        feed = loops.open_feed(loops.LATENTS, NETWORK, 8, CPU, files)
        moments, labels = read = feed.read()
        mean, std = moments.float().unbind(1)
        assert mean.shape == (8, 4, 8, 8) and labels.sort().values.tolist() == [*range(8)]
        first, second = feed.prepare(read).x0, feed.prepare(read).x0
        noise = (first - mean) / std
        assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1 and not torch.equal(first, second)
        assert feed().x0.shape == first.shape  # of the next epoch


@pytest.mark.long
def test_the_program_measures_steps_and_loops(train_step, monkeypatch, capsys):
    options = "--loop --preset cifar10-latent --batch_size 2 --rounds 1 --dtype float32"
    monkeypatch.setattr("sys.argv", ["train_step.py", *options.split()])
    train_step.main()
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:14].strip(): line[14:].split() for line in lines[2:7]}
    assert [*rows] == ["DiT fp32", "DiT with VAE", "SD-DiT", "DiT loop", "SD-DiT loop"]
    for per_second, seconds, *_, memory, unit in rows.values():
        assert 0 < float(per_second) and math.isfinite(float(seconds)) and (memory, unit) == ("0.50", "GiB")
    assert sum("whole loop" in line for line in lines) == 2
    assert sum("reading a batch takes" in line for line in lines) == 2


def test_ratios_say_which_is_which(train_step, capsys):
    seconds = {"DiT fp32": 1.0, "DiT with VAE": 4.0, "SD-DiT": 2.0, "DiT loop": 5.0, "SD-DiT loop": 2.5}
    train_step.print_ratios(seconds)
    assert capsys.readouterr().out.splitlines() == [
        "SD-DiT's images/s to those of DiT fp32, step to step: 0.50",
        "SD-DiT's images/s to those of DiT with VAE, step to step: 2.00",
        "SD-DiT's whole loop to DiT's step alone (DiT fp32), in images/s: 0.40",
        "SD-DiT's whole loop to DiT's whole loop (DiT loop), in images/s: 2.00",
    ]


def test_steps_that_used_what_was_read_ahead_are_not_timed(train_step):
    clock, waits = [0.0], iter([7, 7, 3, 5] * 2)

    def step():
        clock[0] += next(waits)

    assert train_step.in_turn({"loop": step}, 2, {"loop": 2}, lambda: clock[0]) == {"loop": 4.0}


def test_operations_of_the_papers_figure(train_step, monkeypatch, capsys):
    import arithmetic

    monkeypatch.setattr(arithmetic, "autoencoder", small_autoencoder)
    counts = arithmetic.operations("cifar10-latent")
    # A forward pass of DiT's blocks on 16 tokens: layers, attention, and the modulation of the image.
    forward = LAYERS * (16 * 2 * 12 * WIDTH**2 + 4 * 16**2 * WIDTH + 2 * 6 * WIDTH**2)
    assert 3 * forward < counts["DiT"] < 4 * forward  # a backward pass is two of them
    assert 1.5 * counts["DiT"] < counts["MDT"] < 3 * counts["DiT"]
    assert counts["SD-DiT without L_D"] < counts["SD-DiT"] and counts["VAE"] > 0

    counts = {"DiT": 4e10, "MDT": 7e10, "VAE": 3e11, "SD-DiT without L_D": 7e10, "SD-DiT": 1e11}
    monkeypatch.setattr(arithmetic, "operations", lambda preset: counts)
    monkeypatch.setattr("sys.argv", ["arithmetic.py"])
    arithmetic.main()
    printed = capsys.readouterr().out
    assert "| SD-DiT | 100.0 | 9.2 | 29.4 | 151.0 % | 18.9 % | 9.4 % |" in printed
    assert "| DiT of pictures | 340.0 | 5.03 | 54.7 |" in printed
