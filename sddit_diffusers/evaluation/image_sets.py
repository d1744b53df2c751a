"""Images to be scored, as bytes, in any part: folders of pictures, `.npz` files, datasets; and statistics.

Every kind has a name, a `size` (height, width), `labels` or None, a length, `read`, which gives a range of
its images as uint8 `[n, 3, h, w]`, and `sha256`, a hash of its content in its order.
"""

import hashlib
import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..cli import shortened
from ..data.order import prefetch
from ..data.pictures import ImageDataset, content_of, decode_image
from ..files import sha256_of, written_aside
from .scores import Gaussian

_PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# The names of mean and covariance in .npz files: ADM's and EDM's, and ours for DINOv2.
KEYS = {
    "fid": ("mu", "sigma"),
    "sfid": ("mu_s", "sigma_s"),
    "fd_dinov2": ("mu_dinov2", "sigma_dinov2"),
}
_FEATURES = 16_384  # that statistics may be of


class ImageSet(Protocol):
    """What the module's docstring says of every kind."""

    name: str
    size: tuple[int, int]
    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def read(self, rows: range) -> Tensor: ...

    @property
    def sha256(self) -> str: ...


def open_images(name: str, resolution: int = 0, image_column: str = "image", label_column: str = "",
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
    if (path / ".generating").is_dir() and not (path / "generation.json").is_file():
        raise ValueError(f"{name} is not complete: the command that generates it goes on where it stopped.")
    if (path / "model_index.json").is_file():
        raise ValueError(f"{name} is a pipeline; sddit_diffusers.generate makes images of it.")
    if (path / "samples.npz").is_file():
        path = path / "samples.npz"
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
            labels = _read_array(self._archive, "arr_1", longest=len(self))
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
        self.shape, self._fortran, self.dtype = _read_header(self._file)
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
            first = self.dataset.images[0][image_column]
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
        digest = hashlib.sha256(f"{self.size}".encode() + labels)
        for row in self.dataset.images:
            digest.update(hashlib.sha256(content_of(row[self.dataset.image_column])).digest())
        return digest.hexdigest()


def read_statistics(path: Path) -> dict[str, Gaussian]:
    """The Gaussians of a file of statistics, by the score that they serve: "fid", "sfid", "fd_dinov2".

    Reads ADM's and EDM's `.npz`, EDM2's `.pkl` (numbers alone, so that nothing in it can run) and what
    [`save_statistics`] writes; those that the file does not have are left out.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        found = _read_pickle(path) if path.suffix == ".pkl" else _read_archive(path)
    except Exception as error:  # whatever a damaged or foreign file makes of numpy and pickle
        raise ValueError(f"{path} cannot be read as statistics: {error}") from None
    statistics = {}
    for score, (mean, covariance) in KEYS.items():
        if mean in found and covariance in found:
            statistics[score] = _gaussian(path, mean, found[mean], found[covariance])
    if path.suffix == ".pkl" and not statistics:
        raise ValueError(f"{path} holds no statistics that EDM2's have: fid or fd_dinov2.")
    return statistics


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    """The arrays of EDM2's `.pkl`, by their names in an `.npz`."""
    found = _NumbersUnpickler(path.read_bytes()).load()
    return {
        name: _checked(found[score][part], f"{part} of {score}")
        for score, names in KEYS.items()
        if score in found
        for name, part in zip(names, ("mu", "sigma"), strict=True)
    }


def _checked(array: Any, name: str) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is {shortened(array)}; it must be an array")
    return array


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        there = {name.removesuffix(".npy") for name in archive.namelist()}
        return {
            name: _read_array(archive, name) for names in KEYS.values() for name in names if name in there
        }


def _gaussian(path: Path, name: str, mean: np.ndarray, covariance: np.ndarray) -> Gaussian:
    if np.ndim(mean) != 1 or np.shape(covariance) != 2 * np.shape(mean):
        raise ValueError(
            f"{name} and its covariance in {path} have shapes {np.shape(mean)} and {np.shape(covariance)}."
        )
    gaussian = Gaussian(*(torch.from_numpy(x.astype(np.float64)) for x in (mean, covariance)))
    if not gaussian.mean.isfinite().all() or not gaussian.covariance.isfinite().all():
        raise ValueError(f"{name} or its covariance in {path} is not finite.")
    return gaussian


def save_statistics(path: Path, statistics: dict[str, Gaussian]) -> None:
    """Writes what [`read_statistics`] reads, under ADM's names."""
    arrays = {}
    for score, gaussian in statistics.items():
        mean, covariance = KEYS[score]
        arrays |= {mean: gaussian.mean.numpy(), covariance: gaussian.covariance.numpy()}
    with written_aside(path) as file:
        np.savez(file, **arrays)


class _NumbersUnpickler(pickle.Unpickler):
    """Reads arrays, numbers and containers of them, and refuses all else.

    Nothing of numpy is within the pickle's reach: what it asks for has a stand-in here, which checks what it
    is given.

    Args:
        content: of the file.
    """

    _MOST = 10_000  # operations; statistics take about a hundred

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
            # Else a few bytes could ask for any amount of memory, or for tuples in tuples without end.
            if count > self._MOST or ("PUT" in operation.name and argument > self._MOST):
                raise pickle.UnpicklingError("it is too large for statistics")

    def load(self) -> Any:
        return _numbers(super().load())

    def find_class(self, module: str, name: str) -> "_Call":
        module = module.replace("numpy.core.", "numpy._core.")  # as numpy 1 calls it
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(
                f"it asks for {shortened(f'{module}.{name}')[1:-1]}, and only arrays are read from a pickle"
            )
        return _Call(_STAND_INS[module, name])


class _Call:
    """What a pickle may call."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *arguments):
        return self._function(*arguments)

    def __setstate__(self, state) -> None:
        raise pickle.UnpicklingError("it alters a function")


class _DType:
    """A dtype of numbers."""

    __slots__ = ("_text", "value")

    def __init__(self, text: str, *_):
        if not isinstance(text, str) or not re.fullmatch("[<>|=]?([iu][1248]|f[248]|b1)", text):
            raise pickle.UnpicklingError(f"it has values of the type {shortened(text)}, which are no numbers")
        self._text, self.value = text, np.dtype(text)

    def __setstate__(self, state: tuple) -> None:
        _, order, *others = state
        if order not in ("<", ">", "|", "=") or others != [None, None, None, -1, -1, 0]:
            raise pickle.UnpicklingError(
                f"it has values of the type {shortened(state)}, which are no numbers"
            )
        self.value = np.dtype(order + self._text.lstrip("<>|="))


class _Array:
    """An array, which its state fills."""

    __slots__ = ("value",)

    def __init__(self, *_):
        self.value = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        self.value = _view(content, dtype, shape, "F" if fortran else "C")


def _view(content: bytes | bytearray, dtype: _DType, shape: tuple, order: str) -> np.ndarray:
    """An array of bytes that are exactly its own."""
    if not isinstance(dtype, _DType) or not isinstance(content, (bytes, bytearray)):
        raise pickle.UnpicklingError("it has an array of no numbers")
    _check_shape(shape)
    if math.prod(shape) * dtype.value.itemsize != len(content):
        raise pickle.UnpicklingError(f"it has an array of shape {shortened(shape)} in {len(content)} bytes")
    return np.frombuffer(content, dtype.value).reshape(shape, order=order)


def _filled(content: bytes, dtype: _DType, shape: tuple, order: str) -> _Array:
    array = _Array()
    array.value = _view(content, dtype, shape, order)
    return array


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes, which older protocols write as text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it has text in the encoding {shortened(encoding)}")
    return text.encode(encoding)


def _numbers(value: Any) -> Any:
    """What was read, with arrays in the place of their stand-ins."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items() if isinstance(key, str)}
    return value.value if isinstance(value, _Array) else value


_STAND_INS = {
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "scalar"): lambda dtype, content: _filled(content, dtype, (), "C"),
    ("numpy._core.numeric", "_frombuffer"): _filled,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _latin1,
}


def _check_shape(shape: Any) -> None:
    """Raises a ValueError where these are no sides of an array."""
    sides = shape if isinstance(shape, tuple) else (None,)
    if not all(type(side) is int and 0 <= side < 2**48 for side in sides):
        raise ValueError(f"an array has the shape {shortened(shape)}")


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is in Fortran's order, and dtype of an `.npy` file that stands at its beginning.

    Raises:
        ValueError: it is none, or of an impossible shape.
    """
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"it is of the version {version}; 1.0 and 2.0 are read")
    shape, fortran, dtype = readers[version](file)
    _check_shape(shape)
    return shape, fortran, dtype


def _read_array(archive: zipfile.ZipFile, name: str, longest: int = _FEATURES) -> np.ndarray:
    """An array of numbers, once its header and its size in the archive agree.

    Args:
        longest: side that it may have, lest a little file unpack to more than the memory.

    Raises:
        ValueError: it is damaged, of no numbers or too large.
    """
    try:
        with archive.open(f"{name}.npy") as file:
            shape, fortran, dtype = _read_header(file)
            if dtype.kind not in "biuf" or len(shape) > 2 or max(shape, default=0) > longest:
                raise ValueError(f"it is {shortened(str(dtype))[1:-1]} of shape {shortened(shape)}")
            size, there = math.prod(shape) * dtype.itemsize, archive.getinfo(f"{name}.npy").file_size
            if size != there - file.tell():
                raise ValueError(f"its shape is {shape}, and it has {there} bytes")
            return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # zipfile, zlib, numpy and Python's own parser raise many kinds
        raise ValueError(f"{name} cannot be read: {error}") from None
