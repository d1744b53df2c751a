"""Encodes images into shards of VAE latents, once, for training to stream.

    sddit prepare-latents --dataset_name pictures --vae stabilityai/sd-vae-ft-ema --output_dir latents
    sddit prepare-latents --verify latents

First each process encodes its part of the source into `.preparing/`, block by block; then all rows are
written, in a random order, as parquet shards, and at last the manifest. Blocks and shards are complete or
absent and their bytes follow from the settings (and from how the device rounds, which on a CPU depends on the
number of threads), so a run that was stopped goes on with what is missing and ends with the bytes of one that
was not. While it works it takes twice the disk of the latents, which are of 16 KiB each at 256 x 256 pixels
and 4 channels.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import timedelta
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import AutoencoderKL, AutoencoderTiny
from tqdm.auto import tqdm

from .cli import Parser, check_options, differences, one_line_errors, option
from .data.blocks import Blocks, counts_of_blocks, remove_damaged_blocks, write_block
from .data.order import prefetch
from .data.pictures import WEBP_QUALITY, UnreadableImageError, as_webp, decode_image
from .data.shards import Manifest, card, holds, verify, write_shard
from .data.sources import Source
from .files import LOCK, locked, read_json, remove, sha256_of, written_aside
from .launching import check_machine, on_main_process, progress_bar
from .pipelines.loading import DTYPES, load_vae, settings_of, sha256_of_weights


@dataclass
class PrepareConfig:
    """The settings of a preparation."""

    dataset_name: str = option("", "images: a folder, or a dataset on the Hub; required", group="pictures")
    dataset_config_name: str = option("", "configuration of a dataset that has several")
    split: str = option("train", "split of the dataset")
    streaming: bool = option(False, "read the dataset as it comes, without storing it first")
    image_column: str = option("", "column of the images; '' finds the only one")
    label_column: str = option("label", "column of the labels, numbers or names; '' leaves them out")
    skip_unreadable: bool = option(False, "list images that cannot be read in the manifest and go on")
    vae: str = option(
        "", "AutoencoderKL or AutoencoderTiny: a folder or a name on the Hub; required", group="latents"
    )
    dtype: str = option("float32", "precision of the VAE", choices=tuple(DTYPES))
    resolution: int = option(
        256, "side of the square that is cut from each image, in pixels", low=1, high=8192
    )
    flip: bool = option(False, "add each image's mirror image")
    keep_pictures: bool = option(
        False, "store what is encoded beside the latents too, as WebP: --auxiliary repa takes it"
    )
    seed: int = option(0, "of the order of the latents", low=0)
    batch_size: int = option(32, "images that the VAE encodes at once", low=1)
    output_dir: str = option("", "where the latents go; required", metavar="FOLDER", group="output")
    block_size: int = option(256, "images that a stopped run does again at most, in each process", low=1)
    shard_size: int = option(4096, "latents in a shard", low=1)
    verify: str = option(
        "", "check hashes and values of this folder of latents, and do nothing else", metavar="FOLDER"
    )

    def __post_init__(self):
        check_options(self)
        for name in ("dataset_name", "output_dir", "vae"):
            if not self.verify and not getattr(self, name):
                raise ValueError(f"--{name} is missing.")

    def decisive(self) -> dict:
        """The settings that decide the bytes."""
        others = ["output_dir", "vae", "skip_unreadable", "verify"]  # the VAE's weights count, not its name
        others += ["keep_pictures"] * (not self.keep_pictures)  # earlier versions had no such setting
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in others}


class Decoded(NamedTuple):
    """An image of a block, or why there is none."""

    row: int  # in its unit
    label: str | None
    pixels: np.ndarray | None
    name: str | None = None
    problem: str | None = None
    pictures: tuple[bytes, ...] = ()  # as it is and, if wanted, mirrored, where they are kept


class Preparation:
    """A run: encode blocks, write shards, write the manifest."""

    def __init__(self, config: PrepareConfig):
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.blocks_dir = self.output_dir / ".preparing"
        # Processes wait for one another at the end of each phase only, and there for as long as it takes.
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
        check_machine(self.accelerator)
        self.source = Source(
            config.dataset_name, config.image_column, config.label_column, config.split,
            config.dataset_config_name, config.streaming, 4 * config.block_size,
        )  # fmt: skip
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.units = range(rank, self.source.units, processes)  # this process's
        self.vae = load_vae(config.vae)
        self.settings = config.decisive() | {
            "image_column": self.source.image_column,
            "vae_sha256": sha256_of_weights(self.vae),
            "source_rows": self.source.count,
            "source_units": self.source.units,
        }
        self.vae.to(self.accelerator.device)
        if config.dtype != "float32":
            self.vae.to(DTYPES[config.dtype])
        self.shape = self._shape()

    def _shape(self) -> list[int]:
        """Of a latent, [c, h, w].

        Raises:
            ValueError: the VAE cannot encode images of this size.
        """
        size = self.config.resolution
        try:
            return list(moments_of(self.vae, torch.zeros(1, 3, size, size)).shape[2:])
        except RuntimeError as error:
            raise ValueError(f"resolution is {size}; the VAE cannot encode such images: {error}") from None

    def run(self) -> None:
        """Does what is missing, while no other run writes in the folder."""
        with ExitStack() as stack:
            if not on_main_process(lambda: self._begin(stack), self.accelerator):
                self.encode()
                while remove_damaged_blocks(self.blocks_dir, self.units):
                    self.encode()
                self.accelerator.wait_for_everyone()
                self.write_shards()
            self.accelerator.wait_for_everyone()
        manifest = Manifest.read(str(self.output_dir))
        self.accelerator.print(
            f"{self.output_dir}/ holds {manifest.count} latents of {' x '.join(map(str, manifest.shape))}"
            + (f"; {len(manifest.unreadable)} images could not be read" if manifest.unreadable else "")
            + f". Train on them with --dataset_name {self.output_dir}"
        )
        self.accelerator.end_training()

    def _begin(self, stack: ExitStack) -> bool:
        """Begins a preparation or finds one of the same settings; says whether it is complete.

        Args:
            stack: holds the folder's lock.

        Raises:
            ValueError: the folder holds something else, or another run writes in it.
        """
        folder = self.output_dir
        complete = self._is_complete()  # before anything is written
        if complete and not self.blocks_dir.exists() and not (folder / LOCK).exists():
            return True
        stack.enter_context(locked(folder))
        complete = self._is_complete()
        if complete:
            remove(self.blocks_dir)  # a run was stopped before it did
        else:
            self.blocks_dir.mkdir(exist_ok=True)
            with written_aside(self.blocks_dir / "settings.json", "w") as file:
                file.write(json.dumps(self.settings, indent=1) + "\n")
        return complete

    def _is_complete(self) -> bool:
        """Whether the folder holds the finished latents; False where they are begun or the folder is empty.

        Raises:
            ValueError: it holds something else.
        """
        folder, path = self.output_dir, self.blocks_dir / "settings.json"
        complete = (folder / "manifest.json").is_file()
        if complete or path.is_file():
            earlier = (
                Manifest.read(str(folder)).settings
                if complete
                else read_json(path, dict, "settings of a preparation")
            )
            if changed := differences(earlier, self.settings):
                raise ValueError(
                    f"{folder} was prepared otherwise ({'; '.join(changed)}); choose another --output_dir."
                )
        elif folder.exists() and {path.name for path in folder.iterdir()} - {self.blocks_dir.name, LOCK}:
            raise ValueError(f"{folder} holds other files; choose an empty or a new --output_dir.")
        return complete

    def encode(self) -> None:
        """Encodes this process's units, except for the blocks that are there."""
        done = {unit: counts_of_blocks(self.blocks_dir, unit) for unit in self.units}
        share = None if self.source.count is None else self.source.count * len(done) // self.source.units
        rows = sum(sum(counts) for counts in done.values())
        with progress_bar(self.accelerator, "encoding", unit="image", initial=rows, total=share) as progress:
            for unit, counts in done.items():
                if all(count == self.config.block_size for count in counts):  # else its last block is there
                    self._encode_unit(unit, sum(counts), progress)

    def _encode_unit(self, unit: int, offset: int, progress: tqdm) -> None:
        """Encodes the blocks of a unit from a row on."""
        with closing(prefetch(self._decoded_blocks(unit, offset), depth=2)) as blocks:
            for block in blocks:
                rows = self._encode(unit, block)
                write_block(self.blocks_dir, unit, offset, len(block), rows, self.config.keep_pictures)
                offset += len(block)
                progress.update(len(block))

    def _decoded_blocks(self, unit: int, offset: int) -> Iterator[list[Decoded]]:
        """The unit's blocks from a row on, decoded by threads."""
        with ThreadPoolExecutor() as threads:
            for block in self.source.blocks(unit, offset, self.config.block_size):
                rows = range(offset, offset + len(block))
                yield list(threads.map(self._decode, repeat(unit), rows, block))
                offset += len(block)

    def _decode(self, unit: int, row: int, item: tuple) -> Decoded:
        file, label = item
        try:
            pixels = decode_image(file, "RGB", self.config.resolution)
        except ValueError as error:
            if not self.config.skip_unreadable:
                raise UnreadableImageError(f"{self.source.place(unit, row)} {error}") from error
            return Decoded(row, label, None, (file or {}).get("path"), str(error))
        kept = [pixels, pixels[..., ::-1]][: (1 + self.config.flip) * self.config.keep_pictures]
        return Decoded(row, label, pixels, pictures=tuple(map(as_webp, kept)))

    def _encode(self, unit: int, block: list[Decoded]) -> list[dict]:
        """What came of the block's rows, for `write_block`."""
        rows = [
            {"row": item.row, "name": item.name, "problem": item.problem} for item in block if item.problem
        ]
        readable = [item for item in block if not item.problem]
        for i in range(0, len(readable), self.config.batch_size):
            batch = readable[i : i + self.config.batch_size]
            pixels = torch.from_numpy(np.stack([item.pixels for item in batch])).float() / 127.5 - 1
            for flipped in (False, True)[: 1 + self.config.flip]:
                encoded = moments_of(self.vae, pixels.flip(-1) if flipped else pixels)
                for item, moments in zip(batch, encoded, strict=True):
                    if not np.isfinite(moments).all():
                        raise ValueError(
                            f"{self.source.place(unit, item.row)}: the VAE gives values that are not finite "
                            f"in float16; --dtype is {self.config.dtype}."
                        )
                    row = {"row": item.row, "label": item.label, "flipped": flipped}
                    if item.pictures:
                        row["picture"] = item.pictures[flipped]
                    rows.append(row | {"moments": moments.tobytes()})
        return rows

    def write_shards(self) -> None:
        """Writes all latents in a random order, then the manifest, and removes the blocks."""
        blocks = Blocks(self.blocks_dir, self.source, self.config.seed)
        size = self.config.shard_size
        shards = [blocks.order[i : i + size] for i in range(0, len(blocks.order), size)]
        files = [f"data/train-{i:05d}-of-{len(shards):05d}.parquet" for i in range(len(shards))]
        (self.output_dir / "data").mkdir(exist_ok=True)
        mine = range(self.accelerator.process_index, len(shards), self.accelerator.num_processes)
        with progress_bar(self.accelerator, "writing", unit="shard", total=len(mine)) as progress:
            for i in mine:
                path, table = self.output_dir / files[i], blocks.table(shards[i])
                if not (path.exists() and holds(path, table)):
                    write_shard(path, table)
                progress.update()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._finish(blocks, files, [len(shard) for shard in shards])

    def _finish(self, blocks: Blocks, files: list[str], counts: list[int]) -> None:
        """Writes card and manifest; with the latter, the folder is complete."""
        for path in (self.output_dir / "data").glob(".*.tmp"):  # of runs that were stopped
            remove(path)
        shards = []
        with progress_bar(self.accelerator, "hashing", unit="shard", total=len(files)) as progress:
            for name, count in zip(files, counts, strict=True):
                with (self.output_dir / name).open("rb") as file:
                    shards.append({"file": name, "rows": count, "sha256": sha256_of(file)})
                progress.update()
        manifest = Manifest(
            shape=self.shape,
            count=sum(counts),
            num_classes=blocks.num_classes,
            class_names=blocks.class_names,
            resolution=self.config.resolution,
            vae={
                "name": str(Path(self.config.vae).resolve())
                if Path(self.config.vae).exists()
                else self.config.vae,
                "class": type(self.vae).__name__,
                "sha256": self.settings["vae_sha256"],
                "config": json.loads(json.dumps(settings_of(self.vae), default=str)),
            },
            source={"name": self.config.dataset_name, "split": self.config.split, "rows": blocks.source_rows},
            settings=self.settings,
            shards=shards,
            unreadable=blocks.unreadable,
            pictures={"format": "WebP", "quality": WEBP_QUALITY} if self.config.keep_pictures else None,
        )
        with written_aside(self.output_dir / "README.md", "w") as file:
            file.write(card(manifest))
        manifest.save(self.output_dir)
        remove(self.blocks_dir)


@torch.inference_mode()
def moments_of(vae: AutoencoderKL | AutoencoderTiny, pixels: torch.Tensor) -> np.ndarray:
    """Mean and standard deviation of the latents, float16 `[b, 2, c, h, w]`."""
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    if hasattr(encoded, "latent_dist"):
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    else:  # AutoencoderTiny has no noise
        mean, std = encoded.latents, torch.zeros_like(encoded.latents)
    return torch.stack([mean, std], dim=1).half().cpu().numpy()


def main(arguments: Iterable[str] | None = None) -> None:
    parser = Parser(PrepareConfig, prog="prepare_latents", doc=__doc__)
    with one_line_errors(parser.prog, "What is written so far stays; the same command goes on with it."):
        config = PrepareConfig(**parser.parse_known_options(arguments))
        if not config.verify:
            Preparation(config).run()
        elif problems := verify(config.verify):
            sys.exit("\n".join([f"{config.verify}: {len(problems)} damaged shards", *problems]))
        else:
            print(f"{config.verify}: every shard is as it was written, and every value finite.")


if __name__ == "__main__":
    main()
