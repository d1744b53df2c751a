"""Folders of latents: their manifest, and a stream of them in an order that follows from (seed, epoch) alone.

`prepare_latents` writes such folders, shuffled once; this module reads them, from the disk, the Hub or any
fsspec URL. An epoch's sequence is the shards in a new order, with the rows of each block of `BLOCK` in a new
order. The sequence is cut into equal parts, at most `LANES`, read side by side: each gives its share of every
global batch, and a process reads only the lanes that its own rows come from.
"""

import glob
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cached_property, partial

import datasets
import numpy as np
import pyarrow.dataset
import torch
from torch import Tensor

from ..pipelines.pipeline_sddit import scale_latents
from ..seeds import generator_for
from .order import Batch, BatchSampler, on_device, prefetch, read_out
from .pictures import from_webp
from .shards import Manifest, UnreadableShardError, pictures_of

LANES = 8
BLOCK = 1024
DECODERS = 4  # threads for pictures


class LatentDataset:
    """Latents as `prepare_latents` writes them, streamed.

    Args:
        root: a folder or an fsspec URL, as [`find_latents`] gives.
        gives_pictures: whether a batch has the pictures that its latents are of, too.
        max_samples: if there are more, the first so many, which were shuffled when they were made; 0: all.

    Attributes:
        num_classes: 0 without labels.
        id2label: names of the classes by number, None where there are none.
        shape: of a latent, (c, h, w).
        source: what the pictures that they were made of are called.
        vae: what made them: "name", "sha256" of the weights, "config".

    Raises:
        ValueError: there are no latents, or no pictures beside them.
        UnreadableShardError: a shard is missing; and, when read, one is cut short or altered.
    """

    kind = "latents"

    def __init__(self, root: str, gives_pictures: bool = False, max_samples: int = 0):
        self.name, self.manifest = root, Manifest.read(root)
        self.source, self.vae = self.manifest.source["name"], self.manifest.vae
        if gives_pictures:
            self.manifest.check_pictures(root)
        self.gives_pictures = gives_pictures
        self.shape = tuple(self.manifest.shape)
        self.num_classes = self.manifest.num_classes
        names = self.manifest.class_names
        self.id2label = dict(enumerate(names)) if names else None
        rows = np.array([shard["rows"] for shard in self.manifest.shards])
        if max_samples:
            rows = np.diff(np.minimum(np.append(0, rows.cumsum()), max_samples))
        self._rows = rows[rows > 0]  # that are read of each shard
        place = root if "://" in root else os.path.abspath(root)
        files = [glob.escape(f"{place}/{shard['file']}") for shard in self.manifest.shards[: len(self._rows)]]
        self._lanes = min(LANES, max(1, len(files) // 4))  # lanes begin and end within shards
        # What is far away is fetched in large pieces, ahead; that takes memory, and time where it is near.
        options = pyarrow.dataset.ParquetFragmentScanOptions(
            page_checksum_verification=True, pre_buffer="://" in root
        )
        try:
            stream = datasets.load_dataset(
                "parquet",
                data_files={"train": files},
                split="train",
                streaming=True,
                fragment_scan_options=options,
            )
        except Exception as error:  # whatever the Hub, the network and the reader raise
            raise UnreadableShardError(f"The shards of {root} cannot be opened: {error}") from error
        columns = ["moments"] + ["label"] * (self.num_classes > 0) + ["picture"] * gives_pictures
        self._stream = stream.select_columns(columns)

    def __len__(self) -> int:
        return int(self._rows.sum())

    def identity(self) -> dict:
        """What tells these data from others."""
        hashes = "".join(shard["sha256"] for shard in self.manifest.shards)
        return {"rows": len(self), "sha256": hashlib.sha256(hashes.encode()).hexdigest()}

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, device) -> Tensor:
        """What is random in a global batch `[b, c, h, w]`: noise, to draw latents from posteriors."""
        return torch.randn(shape, generator=generator, device=device)

    def batch(self, read: tuple[Tensor | None, ...], noise: Tensor, device: torch.device) -> Batch:
        """A micro-batch that was read, on a device, drawn with its rows of the noise `[b, c, h, w]`."""
        moments, *others = on_device(read, device)
        return Batch(scale_latents(self.sample(moments, noise), self.vae["config"]), *others)

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """The VAE's own latents, drawn from their posteriors; the transformer sees them scaled.

        Args:
            moments: `[b, 2, c, h, w]`, mean and standard deviation.
            noise: `[b, c, h, w]`, of unit variance.

        Returns:
            `[b, c, h, w]` in float32.
        """
        mean, std = moments.unbind(1)
        return torch.addcmul(mean.float(), std.float(), noise)

    def batches(self, sampler: BatchSampler) -> Iterator[tuple[Tensor | None, ...]]:
        """The sampler's micro-batches, read ahead.

        Yields:
            moments `[b, 2, c, h, w]`, class numbers `[b]` or None, and pictures `[b, 3, h', w']` if the
            dataset gives them.
        """
        return prefetch(self._read(sampler))

    def _read(self, sampler: BatchSampler) -> Iterator[tuple[Tensor | None, ...]]:
        step = sampler.start_step
        while step < sampler.max_steps:
            epoch, first = divmod(step, sampler.steps_per_epoch)
            stop = min(sampler.steps_per_epoch, first + sampler.max_steps - step)
            yield from self._read_epoch(sampler, epoch, first, stop)
            step += stop - first

    def _read_epoch(self, sampler: BatchSampler, epoch: int, first: int, stop: int) -> Iterator:
        """The micro-batches of an epoch's steps from `first` to `stop`.

        Row j of the global batch belongs to lane l where edges[l] <= j < edges[l + 1]; the lane's part of the
        sequence begins at steps * edges[l], and each step takes the next rows of it.
        """
        steps, slices = sampler.steps_per_epoch, [sampler.rows(i) for i in range(sampler.accumulation)]
        edges = [sampler.global_batch * lane // self._lanes for lane in range(self._lanes + 1)]
        lanes = [
            _Lane(self._blocks(sampler.seed, epoch, steps * low + first * (high - low), steps * high))
            for low, high in zip(edges, edges[1:], strict=False)
        ]
        try:
            for step in range(first, stop):
                for rows in slices:
                    moments = np.empty((rows.stop - rows.start, 2 * int(np.prod(self.shape))), np.float16)
                    labels, pictures = np.empty(len(moments), np.int64), []
                    for low, high, lane in zip(edges, edges[1:], lanes, strict=False):
                        a, b = max(low, rows.start), min(high, rows.stop)
                        if a < b:
                            start = steps * low + step * (high - low) + a - low
                            part = slice(a - rows.start, b - rows.start)
                            pictures += lane.read(start, moments[part], labels[part])
                    batch = [torch.from_numpy(moments).view(-1, 2, *self.shape), torch.from_numpy(labels)]
                    if self.gives_pictures:
                        batch.append(self._decoded(pictures))
                    if torch.cuda.is_available():
                        batch = [tensor.pin_memory() for tensor in batch]
                    yield tuple(batch) if self.num_classes else (batch[0], None, *batch[2:])
        finally:
            for lane in lanes:
                lane.blocks.close()

    def _decoded(self, pictures: list[bytes]) -> Tensor:
        """Files as bytes `[b, 3, h', w']`, decoded by threads."""
        try:
            decode = partial(from_webp, size=self.manifest.resolution)
            return torch.from_numpy(np.stack(list(self._threads.map(decode, pictures))))
        except ValueError as error:
            raise UnreadableShardError(
                f"A picture beside the latents of {self.name} {error}. {self._advice}"
            ) from error

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(DECODERS)

    @property
    def _advice(self) -> str:
        return f"Check all with: sddit prepare-latents --verify {self.name}"

    def _blocks(self, seed: int, epoch: int, start: int, stop: int) -> Iterator:
        """The blocks that hold the positions from `start` to `stop` of an epoch's sequence.

        Yields:
            position of the first row, moments, labels, pictures if they are wanted, and the order in which
            the rows follow one another.
        """
        order = torch.randperm(len(self._rows), generator=generator_for(seed, 0, epoch)).numpy()
        ends = self._rows[order].cumsum()
        for shard, end in zip(order.tolist(), ends.tolist(), strict=True):
            begin = end - int(self._rows[shard])
            if end <= start or begin >= stop:
                continue
            skipped = max(0, start - begin) // BLOCK * BLOCK
            with closing(self._read_shard(shard, skipped)) as blocks:
                for block in blocks:
                    position = begin + skipped
                    if position >= stop:
                        break
                    generator = generator_for(seed, 0, epoch, 1 + shard, skipped)
                    rows = torch.randperm(len(block[0]), generator=generator).numpy()
                    yield position, *block, rows
                    skipped += len(rows)

    def _read_shard(self, shard: int, skipped: int) -> Iterator[tuple]:
        """Moments, labels and pictures of a shard's blocks after the first rows, until its end."""
        written, name = int(self._rows[shard]), self.manifest.shards[shard]["file"]
        found, whole = skipped, written == self.manifest.shards[shard]["rows"]
        try:
            stream = self._stream.shard(len(self._rows), shard).skip(skipped).with_format("arrow")
            with closing(read_out(stream.iter(BLOCK))) as tables:
                for table in tables:
                    if not whole and not (table := table.slice(0, written - found)).num_rows:
                        break
                    found += table.num_rows
                    yield *self.manifest.rows_of(table), pictures_of(table) if self.gives_pictures else None
            if found != written:
                raise ValueError(f"it has {found} rows, but {written} were written")
        except Exception as error:  # pyarrow, fsspec and the Hub raise many kinds
            raise UnreadableShardError(
                f"The shard {name} of {self.name} cannot be read: {error}. {self._advice}"
            ) from error


class _Lane:
    """Rows of a part of the sequence, by rising positions."""

    def __init__(self, blocks: Iterator):
        self.blocks, self.stop = blocks, -1

    def read(self, start: int, moments: np.ndarray, labels: np.ndarray) -> list[bytes]:
        """Fills the arrays with the rows from position `start` on; returns their pictures, if there are."""
        done, pictures = 0, []
        while done < len(moments):
            while start + done >= self.stop:
                self.position, self.moments, self.labels, self.pictures, self.order = next(self.blocks)
                self.stop = self.position + len(self.order)
            rows = self.order[start + done - self.position :][: len(moments) - done]
            # "clip", for numpy would fill a buffer first.
            np.take(self.moments, rows, axis=0, out=moments[done : done + len(rows)], mode="clip")
            if self.labels is not None:
                labels[done : done + len(rows)] = self.labels[rows]
            if self.pictures is not None:
                pictures += [self.pictures[row] for row in rows.tolist()]
            done += len(rows)
        return pictures
