"""Shards of latents: their manifest, their rows, how they are written, found and verified."""

import dataclasses
import json
import math
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
from huggingface_hub.errors import OfflineModeIsEnabled

from ..cli import one_line, shortened
from ..files import parse_json, sha256_of, written_aside
from ..launching import bar
from .pictures import MOST_CLASSES, from_webp

_MANIFEST = "manifest.json"
_WITH_PICTURES = "sddit-latents-2"  # the format of folders that have pictures too


class UnreadableShardError(ValueError):
    """A shard that is missing, cut short or altered; the message names it."""


@dataclass
class Manifest:
    """What a folder of latents holds, and what made it; kept as `manifest.json`.

    A shard is a parquet file with the columns `moments` (binary: mean and standard deviation of the VAE's
    posterior, unscaled, float16, `[2, *shape]`), `label` (absent without classes), `index` (the row in the
    source) and `flipped`; of format 2 also `picture`, what was encoded.
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
    pictures: dict | None = None  # format and quality of those that are kept

    def __post_init__(self):
        if self.pictures:
            self.format = _WITH_PICTURES

    def save(self, folder: Path) -> None:
        about = dataclasses.asdict(self)
        if not self.pictures:
            del about["pictures"]
        with written_aside(folder / _MANIFEST, "w") as file:
            file.write(json.dumps(about, indent=1) + "\n")

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
        if found not in (cls.format, _WITH_PICTURES):
            raise ValueError(
                f"{root} has the format {shortened(found)}; this version reads {cls.format!r} and "
                f"{_WITH_PICTURES!r}."
            )
        about_pictures = {"pictures": {"format": str, "quality": int}} if found == _WITH_PICTURES else {}
        values = parse_json(content, _STRUCTURE | about_pictures, kind, place)
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

    def check_pictures(self, root: str) -> None:
        """Raises a ValueError, with the command that makes them, where there are no pictures in a folder."""
        if self.pictures:
            return
        given = {"dataset_name": self.source["name"], "vae": self.vae["name"], "resolution": self.resolution}
        names = ("dataset_config_name", "split", "image_column", "label_column", "flip", "dtype")
        given |= {name: self.settings[name] for name in names if self.settings.get(name)}
        options = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in given.items())
        raise ValueError(
            f"There are no pictures beside the latents of {root}, and this run looks at them. This makes "
            "such a folder: accelerate launch -m sddit_diffusers.prepare_latents --keep_pictures "
            f"--output_dir FOLDER {options}"
        )

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


def pictures_of(table: pa.Table) -> list[bytes]:
    """The pictures of a part of a shard, as files.

    Raises:
        ValueError: there are none, or not one a row.
    """
    if "picture" not in table.column_names:
        raise ValueError("it has no pictures")
    column = pc.struct_field(table["picture"], "bytes")
    if column.null_count:
        raise ValueError(f"{column.null_count} of its rows have no picture")
    return column.to_pylist()


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
    name = os.path.expanduser(name)
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
        if on_hub:
            raise ValueError(
                f"There is no folder {name} here, and the Hub cannot be asked for such a dataset: {error}. "
                "HF_HUB_OFFLINE=1 reads what is here of the Hub."
            ) from error
        raise ValueError(f"Nobody knows whether {name} holds latents: {error}.") from error
    return root


_ROW_GROUP = 256  # rows that are read at once; larger groups halve the reading speed


def shard_schema(num_classes: int, class_names: list[str] | None, pictures: bool = False) -> pa.Schema:
    """The columns of a shard, with what `datasets` needs to know of them."""
    features = {"moments": datasets.Value("binary")}
    if num_classes:
        features["label"] = datasets.ClassLabel(names=class_names) if class_names else datasets.Value("int64")
    features |= {"index": datasets.Value("int64"), "flipped": datasets.Value("bool")}
    if pictures:
        features["picture"] = datasets.Image()
    return datasets.Features(features).arrow_schema


def write_shard(path: Path, table: pa.Table) -> None:
    """Writes a parquet file that is read fast and tells when it is damaged."""
    with written_aside(path) as file:
        pq.write_table(
            table, file, row_group_size=_ROW_GROUP, compression="none", use_dictionary=False,
            write_statistics=False, write_page_checksum=True,
        )  # fmt: skip


def holds(path: Path, table: pa.Table) -> bool:
    """Whether a shard that a run before has written is that of a table."""
    try:
        return pq.read_table(path, page_checksum_verification=True).equals(table)
    except (OSError, ValueError):  # pyarrow's errors are among the latter
        return False


def verify(name: str) -> list[str]:
    """Reads a folder of latents as a whole, and says what is wrong with it."""
    root = find_latents(name)
    if root is None:
        raise ValueError(f"There are no latents in {name}: it has no manifest.json.")
    manifest, problems = Manifest.read(root), []
    for shard in bar(manifest.shards, desc="verifying", unit="shard"):
        try:
            with fsspec.open(f"{root}/{shard['file']}") as file:
                if sha256_of(file) != shard["sha256"]:
                    raise ValueError("its content is not what was written")
                file.seek(0)
                table = pq.read_table(file)
            if len(table) != shard["rows"]:
                raise ValueError(f"it has {len(table)} rows, but {shard['rows']} were written")
            moments, _ = manifest.rows_of(table)
            if manifest.pictures:
                for picture in pictures_of(table):
                    from_webp(picture, manifest.resolution)
            for number, row in enumerate(moments):
                if not np.isfinite(row).all():
                    raise ValueError(f"row {number} is not of {len(row)} finite values")
        except Exception as error:  # pyarrow, fsspec and the Hub raise many kinds
            problems.append(f"{shard['file']}: {one_line(error)}")
    return problems


def card(manifest: Manifest) -> str:
    """The dataset card: what the folder holds, and how it is read with and without this package."""
    c, h, w = manifest.shape
    classes = f", {manifest.num_classes} classes" if manifest.num_classes else ""
    pictures = " `picture` is what was encoded, as WebP." if manifest.pictures else ""
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
tags:
- latents
- sd-dit
---

# Latents of {manifest.source["name"]}

{manifest.count} latents of shape {c} x {h} x {w}{classes}, shuffled: the middle square of each image at
{manifest.resolution} x {manifest.resolution} pixels, encoded by `{manifest.vae["name"]}`. `moments` holds the
mean and the standard deviation of the posterior, unscaled; `index` is the row in the source, `flipped` tells
mirror images.{pictures} `manifest.json` lists what made them and each shard's SHA-256.

```python
import numpy as np
from datasets import load_dataset

for row in load_dataset("THIS_DATASET", split="train", streaming=True):
    mean, std = np.frombuffer(row["moments"], np.float16).reshape(2, {c}, {h}, {w}).astype(np.float32)
    latent = mean + std * np.random.randn(*mean.shape)
```

With SD-DiT for diffusers:

```bash
accelerate launch train_sddit.py --preset SD-DiT-S/2 --dataset_name THIS_DATASET
```
"""
