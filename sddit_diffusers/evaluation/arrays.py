"""Arrays of other people's files: `.npy` within archives, and pickles, of which nothing is run."""

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from ..cli import shortened


def _check_shape(shape: Any) -> None:
    """Raises a ValueError where these are no sides of an array."""
    sides = shape if isinstance(shape, tuple) else (None,)
    if not all(type(side) is int and 0 <= side < 2**48 for side in sides):
        raise ValueError(f"an array has the shape {shortened(shape)}")


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
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


def read_array(archive: zipfile.ZipFile, name: str, longest: int) -> np.ndarray:
    """An array of numbers, once its header and its size in the archive agree.

    Args:
        longest: side that it may have, lest a little file unpack to more than the memory.

    Raises:
        ValueError: it is damaged, of no numbers or too large.
    """
    try:
        with archive.open(f"{name}.npy") as file:
            shape, fortran, dtype = read_header(file)
            if dtype.kind not in "biuf" or len(shape) > 2 or max(shape, default=0) > longest:
                raise ValueError(f"it is {shortened(str(dtype))[1:-1]} of shape {shortened(shape)}")
            size, there = math.prod(shape) * dtype.itemsize, archive.getinfo(f"{name}.npy").file_size
            if size != there - file.tell():
                raise ValueError(f"its shape is {shape}, and it has {there} bytes")
            return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # zipfile, zlib, numpy and Python's own parser raise many kinds
        raise ValueError(f"{name} cannot be read: {error}") from None


def read_pickle(content: bytes) -> Any:
    """What a pickle of arrays, numbers and containers of them holds; nothing in it can run.

    Raises:
        pickle.UnpicklingError: it asks for something else.
        Exception: of many kinds, where it is damaged.
    """
    return _numbers(_NumbersUnpickler(content).load())


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
