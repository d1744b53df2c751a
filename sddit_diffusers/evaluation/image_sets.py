"""Images to be scored, as bytes, in any part: folders of pictures, `.npz` files, datasets.

Every kind has a name, a `size` (height, width), `labels` or None, a length, `read`, which gives a range of
its images as uint8 `[n, 3, h, w]`, and `sha256`, a hash of its content in its order.
"""

import hashlib
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..cli import shortened
from ..data.generated import ARRAYS, is_unfinished
from ..data.order import prefetch
from ..data.pictures import ImageDataset, content_of, decode_image
from ..files import sha256_of
from .arrays import read_array, read_header

_PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class ImageSet(Protocol):
    """What the module's docstring says of every kind."""

    name: str
    size: tuple[int, int]
    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def read(self, rows: range) -> Tensor: ...

    @property
    def sha256(self) -> str: ...


def open_images(name: str, resolution: int = 0, image_column: str = "", label_column: str = "",
                split: str = "train") -> ImageSet:  # fmt: skip
    """The images of a folder of pictures, of an `.npz` file, of what `generate` left, or of a dataset.

    Args:
        name: a path, or what `datasets` loads.
        resolution: pictures are cropped to the middle square and resized to this side; 0: they are left as
            they are, and those of a dataset get the short side of its first one.
        image_column, label_column, split: of a dataset.

    Raises:
        ValueError: there are no such images.
    """
    if not name:
        raise ValueError("The name of the images is empty.")
    path = Path(name)
    if is_unfinished(path):
        raise ValueError(f"{name} is not complete: the command that generates it goes on where it stopped.")
    if (path / "model_index.json").is_file():
        raise ValueError(f"{name} is a pipeline; sddit_diffusers.generate makes images of it.")
    if (path / ARRAYS).is_file():
        path = path / ARRAYS
    if path.suffix == ".npz":
        return ImageArray(path)
    pictures = []
    if path.is_dir():
        pictures = sorted(file for file in path.rglob("*") if file.suffix.lower() in _PICTURES)
    if pictures and not label_column:
        return PictureFolder(name, pictures, resolution)
    if path.is_file():
        raise ValueError(f"{name} is no .npz file; images come as a folder of pictures, .npz or a dataset.")
    return DatasetImages(name, resolution, image_column, label_column, split)


def has_images(path: Path) -> bool:
    """Whether an `.npz` file has images beside its statistics."""
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def batches(images: ImageSet, rows: range, batch_size: int) -> Iterator[Tensor]:
    """Some rows' images, `batch_size` at a time, read ahead."""
    parts = (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    return prefetch((images.read(part) for part in parts), depth=2)


class PictureFolder:
    """All pictures in a folder and its folders, ordered by path.

    Raises:
        ValueError: when read, a picture that cannot be decoded, or of another size than the first one.
    """

    labels = None

    def __init__(self, name: str, paths: list[Path], resolution: int = 0):
        self.name, self._paths, self._resolution = name, paths, resolution or None
        self.size = self._decode(paths[0]).shape[1:]
        self._threads = ThreadPoolExecutor()

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, rows: range) -> Tensor:
        pixels = list(self._threads.map(self._decode, self._paths[rows.start : rows.stop]))
        for path, image in zip(self._paths[rows.start :], pixels, strict=False):
            if image.shape[1:] != self.size:
                raise ValueError(
                    f"{path} is {image.shape[1]} x {image.shape[2]}, but {self._paths[0].name} is "
                    f"{self.size[0]} x {self.size[1]}: the images of a set have one size. "
                    "--resolution crops and resizes those of the reference."
                )
        return torch.from_numpy(np.stack(pixels))

    def _decode(self, path: Path) -> np.ndarray:
        try:
            return decode_image({"path": str(path), "bytes": None}, "RGB", self._resolution)
        except ValueError as error:
            raise ValueError(f"A picture {error}") from error

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(str(self._resolution).encode())
        for path in self._paths:
            with path.open("rb") as file:
                digest.update(bytes.fromhex(sha256_of(file)))
        return digest.hexdigest()


class ImageArray:
    """The array `arr_0` of an `.npz` file, uint8 `[images, h, w, 3]` as ADM writes it, never held whole.

    `labels` are the array `arr_1`, where there is one.

    Raises:
        ValueError: there is no such array; and, when read, it is damaged.
    """

    def __init__(self, path: Path):
        self.name, self._path = str(path), path
        try:
            self._archive = zipfile.ZipFile(path)
        except Exception as error:  # a damaged file makes zipfile raise many kinds
            raise ValueError(f"{path} cannot be read: {error}") from None
        names = [name.removesuffix(".npy") for name in self._archive.namelist()]
        if "arr_0" not in names:
            raise ValueError(
                f"{path} has no images, which would be its arr_0; it has {shortened(', '.join(names))[1:-1]}."
            )
        with self._naming_damage():
            self._open()
        if self.shape[1:][2:] != (3,) or 0 in self.shape or self.dtype != np.uint8 or self._fortran:
            raise ValueError(
                f"arr_0 of {path} is {self.dtype} of shape {self.shape}; it must be uint8 of shape "
                "(images, height, width, 3) without a 0, in C order."
            )
        self.size = self.shape[1:3]
        self.labels = self._read_labels() if "arr_1" in names else None

    def _read_labels(self) -> np.ndarray:
        try:
            labels = read_array(self._archive, "arr_1", longest=len(self))
            if labels.shape != self.shape[:1] or labels.dtype.kind not in "iu":
                raise ValueError(f"they are {labels.dtype} of shape {labels.shape}")
        except ValueError as error:
            raise ValueError(f"The labels of {self.name}, its arr_1, cannot be read: {error}") from None
        return labels

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as above
            raise ValueError(f"{self.name} is damaged: {error}") from error

    def _open(self) -> None:
        """Stands before the first image."""
        self._file = self._archive.open("arr_0.npy")
        self.shape, self._fortran, self.dtype = read_header(self._file)
        self._start, self._next = self._file.tell(), 0

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: range) -> Tensor:
        image = int(np.prod(self.shape[1:]))
        with self._naming_damage():
            if rows.start != self._next:
                self._file.seek(self._start + rows.start * image)
            content = self._file.read(len(rows) * image)
            self._next = rows.stop
        if len(content) < len(rows) * image:
            raise ValueError(f"{self.name} is damaged: its arr_0 ends before image {rows.stop}.")
        pixels = np.frombuffer(content, np.uint8).reshape(-1, *self.shape[1:])
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    @cached_property
    def sha256(self) -> str:
        with self._path.open("rb") as file:
            return sha256_of(file)


class DatasetImages:
    """The pictures of a dataset, cropped to the middle square.

    Attributes:
        dataset: the `ImageDataset` that reads them.
    """

    def __init__(self, name: str, resolution: int, image_column: str, label_column: str, split: str):
        self.dataset = ImageDataset(name, image_column, label_column, 3, resolution or 1, split=split)
        if not resolution:
            first = self.dataset.images[0][self.dataset.image_column]
            try:
                self.dataset.size = min(decode_image(first, "RGB", None).shape[1:])
            except ValueError as error:
                raise ValueError(f"Row 0 of {name} {error}") from error
        self.name = name
        self.labels = None if self.dataset.labels is None else self.dataset.labels.numpy()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, which may be set before anything is read."""
        return (self.dataset.size, self.dataset.size)

    @size.setter
    def size(self, size: tuple[int, int]) -> None:
        self.dataset.size = min(size)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, rows: range) -> Tensor:
        return self.dataset.pixels(rows)

    @cached_property
    def sha256(self) -> str:
        labels = b"" if self.labels is None else self.labels.tobytes()
        return hashlib.sha256(f"{self.size}".encode() + labels + self._contents).hexdigest()

    @cached_property
    def sha256_of_pictures(self) -> str:
        """Whatever their labels, which may not have been read."""
        return hashlib.sha256(f"{self.size}".encode() + self._contents).hexdigest()

    @cached_property
    def _contents(self) -> bytes:
        """The hashes of the pictures."""
        column = self.dataset.image_column
        return b"".join(hashlib.sha256(content_of(row[column])).digest() for row in self.dataset.images)
