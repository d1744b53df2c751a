"""Folders of latents: their manifest, and a stream of them in an order that follows from (seed, epoch) alone.

`prepare_latents` writes such folders, shuffled once; this module reads them, from the disk, the Hub or any
fsspec URL. An epoch's sequence is the shards in a new order, with the rows of each block of `BLOCK` in a new
order. The sequence is cut into equal parts, at most `LANES`, read side by side: each gives its share of every
global batch, and a process reads only the lanes that its own rows come from.
"""

import dataclasses
import glob
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, AutoModel
from huggingface_hub.errors import OfflineModeIsEnabled
from torch import Tensor

from .cli import shortened
from .data import MOST_CLASSES, BatchSampler, generator_for, prefetch, read_out
from .files import parse_json, written_aside

LANES = 8
BLOCK = 1024
_MANIFEST = "manifest.json"


class UnreadableShardError(ValueError):
    """A shard that is missing, cut short or altered; the message names it."""


@dataclass
class Manifest:
    """What a folder of latents holds, and what made it; kept as `manifest.json`.

    A shard is a parquet file with the columns `moments` (binary: mean and standard deviation of the VAE's
    posterior, unscaled, float16, `[2, *shape]`), `label` (absent without classes), `index` (the row in the
    source) and `flipped`.
    """

    shape: list[int]  # of a latent, [c, h, w]
    count: int  # rows of all shards
    num_classes: int  # 0 without labels
    class_names: list[str] | None
    resolution: int  # side of the encoded images, in pixels
    vae: dict  # name, sha256 of the weights, config
    source: dict  # name, split, rows
    settings: dict  # what else decides the bytes
    shards: list[dict]  # file, rows, sha256
    unreadable: list[dict] = field(default_factory=list)  # row, name, problem
    format: str = "sddit-latents-1"

    def save(self, folder: Path) -> None:
        with written_aside(folder / _MANIFEST, "w") as file:
            file.write(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, root: str) -> "Manifest":
        """Reads the manifest of a folder or URL.

        Raises:
            ValueError: there is none that this version reads and that holds together.
        """
        place = f"{root}/{_MANIFEST}"
        try:
            with fsspec.open(place, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            raise ValueError(f"There are no latents in {root}: it has no {_MANIFEST}.") from None
        except Exception as error:  # whatever the network and fsspec raise
            raise ValueError(f"{place} cannot be read: {error}") from None
        kind = "manifest of latents"
        found = parse_json(content, {"format": str}, kind, place)["format"]
        if found != cls.format:
            raise ValueError(f"{root} has the format {shortened(found)}; this version reads {cls.format!r}.")
        values = parse_json(content, _STRUCTURE, kind, place)
        names = {field.name for field in dataclasses.fields(cls)}
        manifest = cls(**{name: value for name, value in values.items() if name in names})
        if problem := manifest._problem():
            raise ValueError(f"{place} is no {kind}: {problem}.")
        return manifest

    def _problem(self) -> str:
        """What does not hold together; empty where all does."""
        files = [shard["file"] for shard in self.shards]
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or "::" in name or "\0" in name:
                return f"it names the shard {shortened(name)}; shards are files in the folder"
        rows = sum(shard["rows"] for shard in self.shards)
        problems = {
            f"its shape {self.shape} is not that of a latent, [c, h, w]": len(self.shape) != 3,
            "two of its shards are the same file": len(set(files)) < len(files),
            f"its count is {self.count}, and its shards have {rows} rows": self.count != rows,
            f"it has {self.num_classes} classes, and {len(self.class_names or ())} names": bool(
                self.class_names
            )
            and len(self.class_names) != self.num_classes,
            "its vae.config.scaling_factor is 0": self.vae["config"]["scaling_factor"] == 0,
        }
        return next((problem for problem, there in problems.items() if there), "")

    def rows_of(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray | None]:
        """The moments `[rows, 2 * c * h * w]` and class numbers `[rows]` of a part of a shard.

        Raises:
            ValueError: they are not of the manifest's shape and classes.
        """
        moments = _array(table, 2 * math.prod(self.shape))
        if not self.num_classes:
            return moments, None
        if "label" not in table.column_names:
            raise ValueError("it has no labels")
        column = table["label"]
        right = pc.and_(pc.greater_equal(column, 0), pc.less(column, self.num_classes)).fill_null(False)
        if (wrong := pc.index(right, False).as_py()) >= 0:
            label = column[wrong].as_py()
            raise ValueError(f"a row has the label {label}; allowed are 0 to {self.num_classes - 1}")
        return moments, column.to_numpy()


_ROWS = range(1, 2**48)
_STRUCTURE = {
    "shape": [range(1, 2**16)],
    "count": _ROWS,
    "num_classes": range(MOST_CLASSES + 1),
    "class_names": ([str], None),
    "resolution": range(1, 2**31),
    "vae": {"name": str, "sha256": str, "config": {"scaling_factor": float, "shift_factor?": (None, float)}},
    "source": {"name": str},
    "settings": dict,
    "shards": [{"file": str, "rows": _ROWS, "sha256": str}],
    "unreadable?": [dict],
}


def find_latents(name: str) -> str | None:
    """The place of a folder of latents given by path, URL or name on the Hub; None where there is none.

    What is on the Hub counts as none where HF_HUB_OFFLINE is set.

    Raises:
        ValueError: it could not be looked at, such as where the network fails.
    """
    local = Path(name).exists() or name.startswith((".", "/", "~"))
    on_hub = not local and "://" not in name
    root = f"hf://datasets/{name}" if on_hub else name
    try:
        filesystem, path = fsspec.core.url_to_fs(root)
        filesystem.info(f"{path}/{_MANIFEST}")
    except (FileNotFoundError, NotADirectoryError, OfflineModeIsEnabled):
        return None
    except Exception as error:  # whatever the Hub, the network and fsspec raise
        if on_hub and isinstance(error, ValueError):  # no name that the Hub could have
            return None
        advice = " HF_HUB_OFFLINE=1 reads what is here of the Hub." if on_hub else ""
        raise ValueError(f"Nobody knows whether {name} holds latents: {error}.{advice}") from error
    return root


def load_vae(name: str, **arguments) -> AutoencoderKL | AutoencoderTiny:
    """A VAE by name or path, of its own or within a pipeline.

    Raises:
        ValueError: there is none.
    """
    problems = []
    for subfolder in (None, "vae"):
        try:
            vae = AutoModel.from_pretrained(name, subfolder=subfolder, **arguments)
            break
        except Exception as error:  # whatever the Hub, the network and the reader raise
            problems.append(str(error).strip().split("\n")[0])
    else:
        raise ValueError(f"The VAE {name!r} cannot be loaded: {problems[0]}")
    if not isinstance(vae, (AutoencoderKL, AutoencoderTiny)):
        raise ValueError(
            f"{name!r} is a {type(vae).__name__}; allowed are AutoencoderKL and AutoencoderTiny."
        )
    return vae.eval().requires_grad_(False)


def sha256_of_weights(model: torch.nn.Module) -> str:
    """A SHA-256 of a model's weights and their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class LatentDataset:
    """Latents as `prepare_latents` writes them, streamed.

    Args:
        root: a folder or an fsspec URL, as [`find_latents`] gives.

    Attributes:
        num_classes: 0 without labels.
        id2label: names of the classes by number, None where there are none.
        shape: of a latent, (c, h, w).

    Raises:
        ValueError: there are no latents.
        UnreadableShardError: a shard is missing; and, when read, one is cut short or altered.
    """

    def __init__(self, root: str):
        self.name, self.manifest = root, Manifest.read(root)
        self.shape = tuple(self.manifest.shape)
        self.num_classes = self.manifest.num_classes
        names = self.manifest.class_names
        self.id2label = dict(enumerate(names)) if names else None
        self._rows = np.array([shard["rows"] for shard in self.manifest.shards])
        place = root if "://" in root else os.path.abspath(root)
        files = [glob.escape(f"{place}/{shard['file']}") for shard in self.manifest.shards]
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
        self._stream = stream.select_columns(["moments"] + ["label"] * (self.num_classes > 0))

    def __len__(self) -> int:
        return self.manifest.count

    def identity(self) -> dict:
        """What tells these data from others."""
        hashes = "".join(shard["sha256"] for shard in self.manifest.shards)
        return {"rows": len(self), "sha256": hashlib.sha256(hashes.encode()).hexdigest()}

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Latents drawn from their posteriors, scaled as the transformer sees them.

        Args:
            moments: `[b, 2, c, h, w]`, mean and standard deviation.
            noise: `[b, c, h, w]`, of unit variance.

        Returns:
            `[b, c, h, w]` in float32.
        """
        config = self.manifest.vae["config"]
        mean, std = moments.unbind(1)
        latents = torch.addcmul(mean.float(), std.float(), noise)
        return latents.sub_(config.get("shift_factor") or 0.0).mul_(config["scaling_factor"])

    def batches(self, sampler: BatchSampler) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Moments `[b, 2, c, h, w]` and class numbers `[b]` of the sampler's micro-batches, read ahead."""
        return prefetch(self._read(sampler))

    def _read(self, sampler: BatchSampler) -> Iterator[tuple[Tensor, Tensor | None]]:
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
                    labels = np.empty(len(moments), np.int64)
                    for low, high, lane in zip(edges, edges[1:], lanes, strict=False):
                        a, b = max(low, rows.start), min(high, rows.stop)
                        if a < b:
                            start = steps * low + step * (high - low) + a - low
                            part = slice(a - rows.start, b - rows.start)
                            lane.read(start, moments[part], labels[part])
                    batch = torch.from_numpy(moments).view(-1, 2, *self.shape), torch.from_numpy(labels)
                    if torch.cuda.is_available():
                        batch = tuple(tensor.pin_memory() for tensor in batch)
                    yield batch if self.num_classes else (batch[0], None)
        finally:
            for lane in lanes:
                lane.blocks.close()

    def _blocks(self, seed: int, epoch: int, start: int, stop: int) -> Iterator:
        """The blocks that hold the positions from `start` to `stop` of an epoch's sequence.

        Yields:
            position of the first row, moments, labels, and the order in which the rows follow one another.
        """
        order = torch.randperm(len(self._rows), generator=generator_for(seed, 0, epoch)).numpy()
        ends = self._rows[order].cumsum()
        for shard, end in zip(order.tolist(), ends.tolist(), strict=True):
            begin = end - int(self._rows[shard])
            if end <= start or begin >= stop:
                continue
            skipped = max(0, start - begin) // BLOCK * BLOCK
            with closing(self._read_shard(shard, skipped)) as blocks:
                for moments, labels in blocks:
                    position = begin + skipped
                    if position >= stop:
                        break
                    generator = generator_for(seed, 0, epoch, 1 + shard, skipped)
                    rows = torch.randperm(len(moments), generator=generator).numpy()
                    yield position, moments, labels, rows
                    skipped += len(moments)

    def _read_shard(self, shard: int, skipped: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Moments and labels of a shard's blocks after the first rows, until its end."""
        written, name = self.manifest.shards[shard]["rows"], self.manifest.shards[shard]["file"]
        found = skipped
        try:
            stream = self._stream.shard(len(self._rows), shard).skip(skipped).with_format("arrow")
            with closing(read_out(stream.iter(BLOCK))) as tables:
                for table in tables:
                    found += table.num_rows
                    yield self.manifest.rows_of(table)
            if found != written:
                raise ValueError(f"it has {found} rows, but {written} were written")
        except Exception as error:  # pyarrow, fsspec and the Hub raise many kinds
            raise UnreadableShardError(
                f"The shard {name} of {self.name} cannot be read: {error}. "
                f"Check all with: python -m sddit_diffusers.prepare_latents --verify {self.name}"
            ) from error


class _Lane:
    """Rows of a part of the sequence, by rising positions."""

    def __init__(self, blocks: Iterator):
        self.blocks, self.stop = blocks, -1

    def read(self, start: int, moments: np.ndarray, labels: np.ndarray) -> None:
        """Fills the arrays with the rows from position `start` on."""
        done = 0
        while done < len(moments):
            while start + done >= self.stop:
                self.position, self.moments, self.labels, self.order = next(self.blocks)
                self.stop = self.position + len(self.order)
            rows = self.order[start + done - self.position :][: len(moments) - done]
            # "clip", for numpy would fill a buffer first.
            np.take(self.moments, rows, axis=0, out=moments[done : done + len(rows)], mode="clip")
            if self.labels is not None:
                labels[done : done + len(rows)] = self.labels[rows]
            done += len(rows)


def _array(table: pa.Table, width: int) -> np.ndarray:
    """The column `moments` as float16 `[rows, width]`, without a copy where it is in one piece.

    Raises:
        ValueError: a row of another length.
    """
    column = table["moments"].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset :][: len(column) + 1]
    if column.null_count or (np.diff(offsets) != 2 * width).any():
        raise ValueError(f"its rows are not of {2 * width} bytes each")
    values = np.frombuffer(column.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    return values.view(np.float16).reshape(-1, width)
