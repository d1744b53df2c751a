"""Pictures and labels through `datasets`, in an order that follows from (seed, step) alone.

The batch of a step is the same whatever the number of processes and of micro-batches; each takes its rows of
it.
"""

import glob
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets.data_files import get_data_patterns
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..seeds import generator_for
from .order import Batch, BatchSampler, on_device, prefetch

MOST_CLASSES = 1_000_000  # each has a row in a table of the network
_MODES = {1: "L", 3: "RGB"}
_HASHED = 1024  # pictures that stand for all of a dataset
WEBP_QUALITY = 90  # about 20 kB a picture of 256 x 256


class UnreadableImageError(ValueError):
    """A picture that cannot be decoded; the message names its row."""


class ImageDataset(Dataset):
    """Labelled pictures as tensors in -1..1, cropped and resized to a square.

    Args:
        name: "digits" (scikit-learn's 1,797 handwritten digits, 8 x 8), a folder, or a dataset on the Hub.
        image_column: name of the column of pictures; "" finds it where there is one.
        label_column: name of the column of labels, class numbers or strings; "" leaves them out.
        channels: 1 or 3.
        size: side of the pictures that come out, in pixels.
        num_workers: processes that decode pictures; 0: a thread.
        split: of the dataset.
        gives_pictures: whether a batch has its pictures as bytes too.
        max_samples: if there are more, so many of them drawn at random, always the same; 0: all.

    Attributes:
        num_classes: 0 without labels.
        id2label: names of the classes by number, None where there are none.
        levels: values that a pixel can have, evenly spaced in -1..1.
        source: what the pictures are called.
        vae: what made latents of them: nothing did.

    Raises:
        ValueError: a dataset, a column or a label that is not there.
        UnreadableImageError: when read, a picture that cannot be decoded.
    """

    kind = "pictures"
    vae = None

    def __init__(
        self, name: str, image_column: str, label_column: str, channels: int, size: int, num_workers: int = 0,
        split: str = "train", gives_pictures: bool = False, max_samples: int = 0,
    ):  # fmt: skip
        if channels not in _MODES:
            raise ValueError(
                f"The network takes {channels} channels, as latents have, and {name} is no folder of latents "
                "(sddit_diffusers.prepare_latents makes them); pictures have 1 or 3."
            )
        self.num_workers, self.gives_pictures = num_workers, gives_pictures
        self.name = self.source = name
        self.mode, self.size = _MODES[channels], size
        self.levels = 17 if name == "digits" and size == 8 else 256
        rows = _load(name, split)
        if len(rows) == 0:
            raise ValueError(f"{name} is empty.")
        image_column = find_columns(name, rows.column_names, rows.features, image_column, label_column)
        self.images = pictures_of(rows.select_columns(image_column), image_column, name)
        self.image_column = image_column
        self.labels, self.id2label, self.num_classes, self._rows = None, None, 0, None
        if label_column:
            self._read_labels(rows, label_column)
        if 0 < max_samples < len(rows):
            chosen = torch.randperm(len(rows), generator=generator_for(0, 3))[:max_samples].sort().values
            self._rows = chosen.tolist()
            self.images = self.images.select(self._rows)
            self.labels = None if self.labels is None else self.labels[chosen]

    def _read_labels(self, rows: datasets.Dataset, column: str) -> None:
        rows = rows.select_columns(column)
        if getattr(rows.features[column], "dtype", "") in ("string", "large_string"):
            self._refuse_label(_column(rows, column).is_null(), rows, "names")
            rows = rows.class_encode_column(column)
        feature = rows.features[column]
        if not getattr(feature, "dtype", "").startswith(("int", "uint")):
            raise ValueError(
                f"Column {column!r} of {self.name} is {feature}; labels are integers or strings."
            )
        names = getattr(feature, "names", None)
        most, labels = len(names) if names else MOST_CLASSES, _column(rows, column)
        self._refuse_label(pc.invert(pc.and_(pc.greater_equal(labels, 0), pc.less(labels, most))), rows,
                           f"0 to {most - 1}")  # fmt: skip
        self.labels = torch.from_numpy(labels.to_numpy().astype(np.int64))
        self.num_classes = len(names) if names else int(self.labels.max()) + 1
        self.id2label = dict(enumerate(names)) if names else None

    def _refuse_label(self, wrong: pa.ChunkedArray, rows: datasets.Dataset, allowed: str) -> None:
        row = pc.index(wrong.fill_null(True), True).as_py()
        if row >= 0:
            (label,) = rows[row].values()
            raise ValueError(f"Row {row} of {self.name} has the label {label}; allowed are {allowed}.")

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict:
        """What tells these data from others: rows, a hash of the labels, and one of up to 1,024 pictures."""
        labels = b"" if self.labels is None else self.labels.numpy().tobytes()
        sha256 = hashlib.sha256(labels).hexdigest()
        return {"rows": len(self), "sha256": sha256, "pictures": self._pictures_sha256}

    @cached_property
    def _pictures_sha256(self) -> str:
        digest, count = hashlib.sha256(), min(len(self), _HASHED)
        for i in range(count):  # evenly spread, and all of few
            file = self.images[i * len(self) // count][self.image_column]
            digest.update(hashlib.sha256(content_of(file)).digest())
        return digest.hexdigest()

    def batches(self, sampler: "BatchSampler") -> Iterator[tuple[Tensor, Tensor | None]]:
        """Pictures and class numbers of the sampler's micro-batches, read ahead."""
        loader = DataLoader(
            self, batch_sampler=sampler, collate_fn=_as_it_is, num_workers=self.num_workers,
            generator=torch.Generator(), pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        return prefetch(batch for batch in loader)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, device) -> None:
        """What is random in a global batch: nothing."""

    def batch(self, read: tuple[Tensor, Tensor | None], noise: None, device: torch.device) -> Batch:
        """A micro-batch that was read, on a device."""
        x0, labels = on_device(read, device)
        pictures = None
        if self.gives_pictures:
            pictures = ((x0 + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
        return Batch(x0, labels, pictures)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor | None]:
        """Pictures `[b, channels, size, size]` and class numbers `[b]`."""
        images = self.pixels(indices).float() / 127.5 - 1
        return images, None if self.labels is None else self.labels[indices]

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Pictures as bytes, `[b, channels, size, size]`."""
        files = self.images[indices][self.image_column]
        pixels = [self._decode(index, file) for index, file in zip(indices, files, strict=True)]
        return torch.from_numpy(np.stack(pixels))

    def _decode(self, index: int, file: dict) -> np.ndarray:
        try:
            return decode_image(file, self.mode, self.size)
        except ValueError as error:
            row = index if self._rows is None else self._rows[index]
            raise UnreadableImageError(f"Row {row} of {self.name} {error}") from error


def decode_image(file: dict | None, mode: str, size: int | None) -> np.ndarray:
    """The centre of a picture that `datasets.Image(decode=False)` gives, as bytes `[channels, size, size]`.

    Without a size the whole picture as it is, `[channels, h, w]`.

    Raises:
        ValueError: it cannot be decoded.
    """
    path = f"({file['path']}) " if file and file["path"] else ""
    try:
        with Image.open(io.BytesIO(content_of(file))) as image:
            image = _in_8_bits(image).convert(mode)
            image = image if size is None else center_crop(image, size)
    except UnidentifiedImageError as error:  # its message names the buffer
        raise ValueError(f"{path}cannot be read as a picture: it has no format that Pillow knows") from error
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise ValueError(f"{path}cannot be read as a picture: {error}") from error
    return np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)


def as_webp(pixels: np.ndarray) -> bytes:
    """Bytes `[3, h, w]` as a WebP file, which loses what few can see."""
    file = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    picture.save(file, format="WEBP", quality=WEBP_QUALITY)
    return file.getvalue()


def from_webp(content: bytes, size: int) -> np.ndarray:
    """What [`as_webp`] has written, as bytes `[3, size, size]`; it takes half of `decode_image`'s time.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with Image.open(io.BytesIO(content), formats=["WEBP"]) as image:
            pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise ValueError(f"cannot be read as WebP: {error}") from error
    if pixels.shape != (3, size, size):
        raise ValueError(f"is {pixels.shape[1]} x {pixels.shape[2]}, not {size} x {size}")
    return pixels


def content_of(file: dict | None) -> bytes:
    """The bytes of a picture that `datasets.Image(decode=False)` gives; none where there is no picture.

    Its path may be of this machine, within an archive, or of the Hub.
    """
    if file is None:
        return b""
    if file["bytes"] is not None:
        return file["bytes"]
    if "://" not in file["path"]:
        return Path(file["path"]).read_bytes()
    with fsspec.open(file["path"], "rb") as opened:
        return opened.read()


def _in_8_bits(image: Image.Image) -> Image.Image:
    """The picture; one of 16 bits, whose values Pillow would clip, with each divided by 257 and rounded.

    Raises:
        ValueError: it has floating-point values or 32 bits, whose range is nowhere told.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(((np.asarray(image).astype(np.int32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        values = "floating-point values" if image.mode == "F" else "values of 32 bits"
        raise ValueError(f"it has {values}; pictures have 8 or 16 bits")
    return image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve by boxes while twice too large, bicubic to the short side, and the middle square."""
    if image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _as_it_is(batch):
    return batch


def _load(name: str, split: str) -> datasets.Dataset:
    if name == "digits":
        return _digits()
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise ValueError(f"There is no dataset folder {name}.")
    return load_rows(name, split)


def load_rows(name: str, split: str, config_name: str = "", streaming: bool = False):
    """What `datasets.load_dataset` loads; the name of a folder is no pattern.

    Raises:
        ValueError: it cannot be loaded.
    """
    name = os.path.expanduser(name)
    try:
        files, folder = None, Path(name).resolve()
        if folder.is_dir() and (escaped := glob.escape(str(folder))) != str(folder):
            patterns = get_data_patterns(escaped)
            files = {part: [f"{escaped}/{pattern}" for pattern in of] for part, of in patterns.items()}
        return datasets.load_dataset(
            name, config_name or None, split=split, streaming=streaming, data_files=files
        )
    except Exception as error:  # whatever the Hub, the network and the readers raise
        raise ValueError(
            f"The dataset {name!r} cannot be loaded, from here or from the Hub: {error}"
        ) from error


def find_columns(
    name: str, columns: list[str], features: datasets.Features | None, image_column: str, label_column: str
) -> str:
    """The column of a dataset's pictures: the given one, or else "image", or else the only one of pictures.

    Args:
        name: of the dataset, for messages.
        columns, features: what it has; features may be unknown.
        image_column, label_column: as given; "" is not given.

    Raises:
        ValueError: a given column is not there, or none is given where not exactly one holds pictures.
    """
    found = [column for column, feature in (features or {}).items() if isinstance(feature, datasets.Image)]
    for column in filter(None, (image_column, label_column)):
        if column not in columns:
            hint = ""
            if column == label_column:
                hint = " A folder a class gives labels; --label_column '' leaves them out."
                hint = hint if found or not features else " None of them has pictures."
            raise ValueError(f"{name} has no column {column!r}; its columns are {', '.join(columns)}.{hint}")
    if image_column or "image" in columns:
        return image_column or "image"
    if len(found) != 1:
        count = f"{len(found)} columns of pictures ({', '.join(found)})" if found else "no column of pictures"
        raise ValueError(
            f"{name} has {count}; image_column must be one of its columns: {', '.join(columns)}."
        )
    return found[0]


def pictures_of(rows, column: str, name: str):
    """The rows of a dataset or a stream, with the pictures of a column as files.

    Each is a dict of "bytes" and "path", of which one may be None.

    Raises:
        ValueError: it holds no pictures.
    """
    feature = (rows.features or {}).get(column)
    try:
        if isinstance(feature, (list, datasets.List, datasets.LargeList, datasets.Sequence)):
            raise ValueError(f"it is {feature}")
        return rows.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # what pyarrow and datasets raise
        raise ValueError(f"Column {column!r} of {name} holds no pictures: {error}") from None


def _column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    return rows.with_format("arrow")[:][name]


@cache
def _digits() -> datasets.Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)
    # As PGM, whose bytes no library chooses: they are hashed.
    images = [{"bytes": b"P5 8 8 255\n" + image.tobytes(), "path": None} for image in pixels]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(i) for i in range(10)])
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target}, features=features)
