"""What a generation leaves: batches of images while it runs, then arrays, pictures and a record."""

import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..cli import one_line
from ..files import remove, written_aside

RECORD = "generation.json"
ARRAYS = "samples.npz"
BATCHES = ".generating"  # a folder


def is_unfinished(folder: Path) -> bool:
    """Whether a generation was begun here and did not come to its end."""
    return (folder / BATCHES).is_dir() and not (folder / RECORD).is_file()


class Batches:
    """The images that are made so far, in files of consecutive ones, each complete or absent.

    Args:
        folder: of the files.
        count: images of the generation.
        shape: of an image, (h, w, channels).
    """

    def __init__(self, folder: Path, count: int, shape: tuple[int, int, int]):
        self.folder, self.count, self.shape = folder, count, shape

    def files(self) -> list[tuple[range, Path]]:
        """What is there, in the order of its images: their numbers, and the file."""
        return [(self._numbers(path), path) for path in sorted(self.folder.glob("*.npy"))]

    @staticmethod
    def _numbers(path: Path) -> range:
        """The images of a file, by its name; none where it is no such name."""
        match = re.fullmatch("([0-9]{9,10})-([0-9]{9,10})", path.stem)
        return range(*map(int, match.groups())) if match else range(0)

    def save(self, numbers: range, images: np.ndarray) -> None:
        """Keeps some images, `[n, h, w, channels]`."""
        with written_aside(self.folder / f"{numbers.start:09d}-{numbers.stop:09d}.npy") as file:
            np.save(file, images)

    def missing(self, most: int) -> Iterator[range]:
        """The images that are missing, `most` in a range at most."""
        missing = np.ones(self.count, bool)
        for images, _ in self.files():
            missing[images.start : images.stop] = False
        numbers = np.flatnonzero(missing)
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
            for i in range(0, len(run), most):
                part = run[i : i + most]
                yield range(int(part[0]), int(part[-1]) + 1)

    def remove_damaged(self) -> None:
        """Removes files that are not whole, with a warning: their images are made again."""
        files = [(numbers, path, self._problem(numbers, path)) for numbers, path in self.files()]
        owners = np.zeros(self.count, int)  # files that have an image
        for numbers, _, problem in files:
            if not problem:
                owners[numbers] += 1
        for numbers, path, problem in files:
            if not problem and (owners[numbers] > 1).any():
                problem = "another file has its images too"
            if problem:
                print(f"{path} is damaged ({problem}); it is made again.", file=sys.stderr)
                remove(path)

    def _problem(self, numbers: range, path: Path) -> str:
        """What is wrong with a file; empty where it can be used."""
        if not numbers or numbers.stop > self.count:
            return "its name has no images of this generation"
        shape = (len(numbers), *self.shape)
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
            found = images.dtype, images.shape
        except (OSError, EOFError, ValueError, AttributeError) as error:  # AttributeError: an archive
            return one_line(error)
        right = found == (np.uint8, shape)
        return "" if right else f"it is {found[0]} of shape {found[1]}, not uint8 of {shape}"

    def write_npz(self, path: Path, labels: list[int]) -> None:
        """`arr_0`, uint8 `[images, h, w, 3]`, and `arr_1`, their labels, a file in memory at a time."""
        files = self.files()
        height, width = np.load(files[0][1], mmap_mode="r").shape[1:3]
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)),
            "fortran_order": False,
            "shape": (self.count, height, width, 3),
        }
        with written_aside(path) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for _, batch in files:
                    images = np.load(batch)
                    member.write(np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3))))
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.array(labels, np.int64))
