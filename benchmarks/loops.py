"""Where the batches of a training step come from: made up once, or read from files in every step.

DiT's own script trains on JPEGs: it decodes, crops and flips them, and its VAE encodes them in every step.
SD-DiT trains on latents that were encoded once. The files are made up here, in a folder that goes afterwards.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from data import parts_of_photographs, write_ours
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sddit_diffusers.data.latents import LatentDataset
from sddit_diffusers.data.order import Batch, BatchSampler
from sddit_diffusers.data.pictures import center_crop

PICTURES, LATENTS = "DiT loop", "SD-DiT loop"  # contestants that read files
FILES, FOLDERS = 256, 8  # at least so many samples; so many classes of pictures
JPEG_SIZE, JPEG_QUALITY = (500, 375), 90  # most of ImageNet's pictures are of this size
SCALING_FACTOR = 0.18215  # of Stable Diffusion's latents
DOWN = 8  # pixels of a picture's side to one of its latent
# On a GPU as DiT's script has them. On a CPU they would take the step's own cores, so it decodes by itself.
WORKERS, READ_AHEAD = 4, 2 * 4


class Feed(NamedTuple):
    """Gives batches; called, the next one."""

    read: Callable[[], Any]  # what is read of a batch
    prepare: Callable[[Any], Batch]  # the batch, on the device, of what was read

    def __call__(self) -> Batch:
        return self.prepare(self.read())


def autoencoder(device: torch.device) -> AutoencoderKL:
    """A VAE of Stable Diffusion's configuration, with random weights."""
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    return vae.eval().to(device)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents `[b, 4, h / 8, w / 8]` of pictures `[b, 3, h, w]` in -1..1: drawn from posteriors, scaled."""
    return vae.encode(pictures).latent_dist.sample().mul_(SCALING_FACTOR)


def open_feed(
    name: str, network: dict, batch_size: int, device: torch.device, files: ExitStack | None = None
) -> Feed:
    """What a contestant trains on.

    Args:
        name: the contestant.
        network: settings of its network.
        batch_size: images of a batch.
        device: where the batches go.
        files: takes the folder of files and their readers, for contestants that have some.
    """
    if name == PICTURES:
        return _pictures_on_disk(network, batch_size, device, files)
    if name == LATENTS:
        return _latents_on_disk(network, batch_size, device, files)
    labels = torch.randint(network["num_classes"], (batch_size,), device=device)
    side = network["sample_size"]
    if name != "DiT with VAE":
        x0 = torch.randn(batch_size, network["in_channels"], side, side, device=device)
        return Feed(lambda: Batch(x0, labels), lambda batch: batch)
    pictures = 2 * torch.rand(batch_size, 3, DOWN * side, DOWN * side, device=device) - 1
    vae = autoencoder(device)

    def flipped() -> Tensor:
        mirrored = torch.rand(batch_size, 1, 1, 1, device=device) < 0.5
        return torch.where(mirrored, pictures.flip(-1), pictures)

    return Feed(flipped, lambda read: Batch(encode(vae, read), labels))


class PictureFolder(Dataset):
    """JPEGs in folders of their classes, decoded as DiT's script does: ADM's crop, a random flip, -1..1."""

    def __init__(self, folder: Path, size: int):
        self.paths, self.size = sorted(folder.glob("*/*.jpg")), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """A picture `[3, size, size]` and its class number."""
        with Image.open(self.paths[i]) as image:
            pixels = np.array(center_crop(image.convert("RGB"), self.size))
        picture = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1)
        return picture.flip(-1) if torch.rand(()) < 0.5 else picture, int(self.paths[i].parent.name)


def write_pictures(folder: Path, count: int) -> None:
    """Parts of two photographs as JPEGs, in folders of their classes."""
    for number in range(FOLDERS):
        (folder / str(number)).mkdir(parents=True)
    for i, part in enumerate(parts_of_photographs(count, *JPEG_SIZE)):
        part.save(folder / str(i % FOLDERS) / f"{i:06d}.jpg", quality=JPEG_QUALITY)


def _pictures_on_disk(network: dict, batch_size: int, device: torch.device, files: ExitStack) -> Feed:
    folder = Path(files.enter_context(tempfile.TemporaryDirectory()))
    write_pictures(folder, max(FILES, batch_size))
    dataset, on_gpu = PictureFolder(folder, DOWN * network["sample_size"]), device.type == "cuda"
    batches = iter(
        DataLoader(
            dataset, batch_sampler=BatchSampler(len(dataset), batch_size, 1, 0, 1, seed=0),
            num_workers=WORKERS if on_gpu else 0, pin_memory=on_gpu,
        )
    )  # fmt: skip
    vae = autoencoder(device)

    def prepare(read: tuple[Tensor, Tensor]) -> Batch:
        pictures, labels = (part.to(device) for part in read)
        return Batch(encode(vae, pictures), labels)

    return Feed(lambda: next(batches), prepare)


def _latents_on_disk(network: dict, batch_size: int, device: torch.device, files: ExitStack) -> Feed:
    folder = Path(files.enter_context(tempfile.TemporaryDirectory())) / "latents"
    shape = network["in_channels"], network["sample_size"], network["sample_size"]
    write_ours(folder, max(FILES, batch_size), shape=shape, num_classes=network["num_classes"])
    dataset = LatentDataset(str(folder))
    batches = dataset.batches(BatchSampler(len(dataset), batch_size, 1, 0, 1, seed=0))
    files.callback(batches.close)

    def prepare(read: tuple[Tensor, Tensor]) -> Batch:
        return dataset.batch(read, dataset.draw((batch_size, *shape), None, device), device)

    return Feed(lambda: next(batches), prepare)
