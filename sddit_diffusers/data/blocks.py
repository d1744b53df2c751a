"""What a preparation has encoded until it writes its shards: blocks of rows, and all of them as one table.

A block is an arrow file of the latents of some rows of one unit of the source. Its name has the unit, the
first row, how many rows of the source it is of, and its SHA-256.
"""

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch

from ..files import sha256_of, written_aside
from ..seeds import generator_for
from .shards import shard_schema
from .sources import Source

# A row of a block: a latent, or an image that cannot be read, with the problem.
_ROW = pa.schema(
    {"row": pa.int64(), "flipped": pa.bool_(), "moments": pa.binary(), "label": pa.string()}
    | {"name": pa.string(), "problem": pa.string()}
)
_PICTURE = pa.field("picture", pa.binary())


def write_block(
    folder: Path, unit: int, first: int, count: int, rows: list[dict], pictures: bool = False
) -> None:
    """Writes a block, complete or absent.

    Args:
        first, count: rows of the unit that it is of.
        rows: what came of them, by the columns of `_ROW`.
        pictures: whether they have a `picture` too, a file's bytes.
    """
    table = pa.Table.from_pylist(rows, _ROW.append(_PICTURE) if pictures else _ROW)
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    content = buffer.getbuffer()
    name = f"{unit:06d}-{first:09d}-{count}-{hashlib.sha256(content).hexdigest()}.arrow"
    with written_aside(folder / name) as file:
        file.write(content)


def counts_of_blocks(folder: Path, unit: int) -> list[int]:
    """The numbers of source rows in a unit's blocks that are there."""
    return [int(path.stem.split("-")[2]) for path in folder.glob(f"{unit:06d}-*.arrow")]


def remove_damaged_blocks(folder: Path, units: Iterable[int]) -> bool:
    """Removes blocks that are not as they were written, and those after them in a unit; tells of any."""
    removed = False
    for unit in units:
        whole = True
        for path in sorted(folder.glob(f"{unit:06d}-*.arrow")):
            with path.open("rb") as file:
                whole = whole and sha256_of(file) == path.stem.split("-")[-1]
            if not whole:
                path.unlink()
                removed = True
    return removed


class Blocks:
    """The rows of all blocks of a folder, as one table.

    Attributes:
        order: numbers of the rows that hold latents, shuffled.
        source_rows: number of images in the source.
        unreadable: row, name and problem of each image that could not be read.
        num_classes, class_names: 0 and None without labels, or without names.
    """

    def __init__(self, folder: Path, source: Source, seed: int):
        paths = sorted(folder.glob("*.arrow"))
        units, _, counts = np.array([path.stem.split("-")[:3] for path in paths], np.int64).T
        sizes = np.bincount(units, counts, source.units).astype(np.int64)
        before = sizes.cumsum() - sizes  # rows of the source before each unit
        self.source_rows = int(sizes.sum())
        parts = [datasets.Dataset.from_file(str(path)) for path in paths]
        self._rows = datasets.concatenate_datasets(parts).with_format("arrow")
        about = self._rows.select_columns(["row", "label", "name", "problem"])[:]
        units = np.repeat(units, [len(part) for part in parts])
        self._index = about["row"].to_numpy() + before[units]
        readable = about["problem"].is_null().to_numpy()
        self.order = np.flatnonzero(readable)
        self.order = self.order[torch.randperm(len(self.order), generator=generator_for(seed)).numpy()]
        wrong = np.flatnonzero(~readable)
        self.unreadable = [
            {
                "row": int(self._index[i]),
                "name": about["name"][i].as_py(),
                "problem": about["problem"][i].as_py(),
            }
            for i in wrong
        ]
        if not len(self.order):
            raise ValueError(f"None of the {self.source_rows} images of {source.name} can be read.")
        self._number_labels(about["label"].to_pylist(), readable, source)
        self._has_pictures = "picture" in self._rows.column_names
        self._schema = shard_schema(self.num_classes, self.class_names, self._has_pictures)

    def _number_labels(self, labels: list, readable: np.ndarray, source: Source) -> None:
        self.num_classes, self.class_names, self._labels = 0, source.class_names, None
        if not source.label_column:
            return
        if source.has_named_labels:
            self.class_names = sorted({label for label in labels if label is not None})
            numbers = {name: number for number, name in enumerate(self.class_names)}
            labels = [numbers.get(label, -1) for label in labels]
        self._labels = np.array([-1 if label is None else int(label) for label in labels])
        self.num_classes = len(self.class_names or ()) or int(self._labels.max()) + 1

    def table(self, rows: np.ndarray) -> pa.Table:
        """Some of the rows, as a shard holds them."""
        found = self._rows[rows]
        columns = {"moments": found["moments"], "index": self._index[rows], "flipped": found["flipped"]}
        if self._labels is not None:
            columns["label"] = self._labels[rows]
        if self._has_pictures:
            content = found["picture"].combine_chunks()
            columns["picture"] = pa.StructArray.from_arrays(
                [content, pa.nulls(len(content), pa.string())], ["bytes", "path"]
            )
        return (
            pa.table({name: columns[name] for name in self._schema.names}).cast(self._schema).combine_chunks()
        )
