"""How fast latents come: training-ready batches a second of this project's stream and of others, in one run.

    python benchmarks/data.py [--rows 32768] [--rounds 3]

Every reader gives shuffled batches of 256 in one process, from the same made-up moments: first the moments
themselves, `[256, 2, 4, 32, 32]` in float16, as they go to a GPU, then the float32 latents drawn from them,
`[256, 4, 32, 32]`. The others are `load_dataset` with the Array3D feature and torch format, as datasets'
documentation shows; webdataset, if it is installed; and a torch DataLoader over one `.npy` a sample, as the
public code of DiT's relatives does. Then it tells the memory that the stream takes for a small and a large
dataset, how soon the first batch comes after a resume deep in an epoch, and how fast latents come with the
pictures that they are of, decoded, of several sizes.
"""

import argparse
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from sddit_diffusers.data.latents import LatentDataset
from sddit_diffusers.data.order import BatchSampler
from sddit_diffusers.data.pictures import WEBP_QUALITY, as_webp
from sddit_diffusers.data.shards import Manifest, shard_schema, write_shard

SHAPE, BATCH, SHARD = (4, 32, 32), 256, 4096


def moments_of(start: int, count: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Made-up moments of some rows, `[count, 2, *shape]`."""
    generator = np.random.default_rng(start)
    return generator.standard_normal((count, 2, *shape), np.float32).astype(np.float16)


def sample(moments: Tensor) -> Tensor:
    """A draw from the posteriors."""
    mean, std = moments.unbind(1)
    return torch.addcmul(mean.float(), std.float(), torch.randn(mean.shape))


def parts_of_photographs(count: int, width: int, height: int) -> Iterator[Image.Image]:
    """Parts of two photographs, from random places."""
    generator, photographs = np.random.default_rng(0), load_sample_images().images
    for i in range(count):
        image = photographs[i % 2]
        sides = zip(image.shape[:2], (height, width), strict=True)
        top, left = (generator.integers(whole - part + 1) for whole, part in sides)
        yield Image.fromarray(image[top : top + height, left : left + width])


def pictures_of(size: int, count: int) -> list[dict]:
    """Parts of two photographs as WebP files, as a shard holds them."""
    parts = (part.resize((size, size)) for part in parts_of_photographs(count, 256, 256))
    return [{"bytes": as_webp(np.asarray(part).transpose(2, 0, 1)), "path": None} for part in parts]


def write_ours(
    folder: Path, rows: int, size: int = 0, shape: tuple[int, ...] = SHAPE, num_classes: int = 1000
) -> None:
    """Made-up latents; with a size, and pictures of it beside them."""
    (folder / "data").mkdir(parents=True)
    shards, files = [], pictures_of(size, 512) if size else []
    about = {"format": "WebP", "quality": WEBP_QUALITY} if size else None
    for start in range(0, rows, SHARD):
        count = min(SHARD, rows - start)
        columns = {
            "moments": [row.tobytes() for row in moments_of(start, count, shape)],
            "label": np.arange(start, start + count) % num_classes,
            "index": np.arange(start, start + count),
            "flipped": np.zeros(count, bool),
        }
        if size:
            columns["picture"] = [files[i % len(files)] for i in range(start, start + count)]
        name = f"data/train-{start // SHARD:05d}.parquet"
        schema = shard_schema(num_classes, None, pictures=bool(size))
        write_shard(folder / name, pa.table({each: columns[each] for each in schema.names}).cast(schema))
        shards.append({"file": name, "rows": count, "sha256": ""})
    vae = {"name": "", "sha256": "", "config": {"scaling_factor": 1.0}}
    Manifest(
        list(shape), rows, num_classes, None, size or 256, vae, {"name": "made up"}, {}, shards,
        pictures=about,
    ).save(folder)  # fmt: skip


def read_ours(folder: Path, start_step: int = 0, pictures: bool = False) -> Iterator[Tensor]:
    dataset = LatentDataset(str(folder), pictures)
    for moments, *_ in dataset.batches(BatchSampler(len(dataset), BATCH, 1, 0, 1, 0, start_step)):
        yield moments


def write_array3d(folder: Path, rows: int) -> None:
    features = datasets.Features(
        mean=datasets.Array3D(SHAPE, "float16"),
        std=datasets.Array3D(SHAPE, "float16"),
        label=datasets.Value("int64"),
    )  # fmt: skip
    folder.mkdir()
    for start in range(0, rows, SHARD):
        part = moments_of(start, min(SHARD, rows - start))
        columns = {"mean": part[:, 0], "std": part[:, 1], "label": np.arange(len(part))}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(str(folder / f"train-{start // SHARD:05d}.parquet"), batch_size=BATCH)


def read_array3d(folder: Path) -> Iterator[Tensor]:
    stream = datasets.load_dataset(str(folder), split="train", streaming=True)
    for epoch in range(1000):
        rows = stream.shuffle(seed=epoch, buffer_size=1024).with_format("torch")
        for batch in rows.iter(BATCH, drop_last_batch=True):
            yield torch.stack([batch["mean"], batch["std"]], dim=1)


def write_webdataset(folder: Path, rows: int) -> None:
    folder.mkdir()
    for start in range(0, rows, SHARD):
        with tarfile.open(folder / f"{start // SHARD:05d}.tar", "w") as tar:
            for i, row in enumerate(moments_of(start, min(SHARD, rows - start)), start):
                buffer = io.BytesIO()
                np.save(buffer, row)
                for name, data in ((f"{i:08d}.npy", buffer.getvalue()), (f"{i:08d}.cls", b"%d" % (i % 1000))):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def read_webdataset(folder: Path) -> Iterator[Tensor]:
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    stream = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1024).decode()
    stream = stream.to_tuple("npy", "cls").batched(BATCH, partial=False)
    for _ in range(1000):
        for moments, _ in stream:
            yield torch.from_numpy(np.asarray(moments))


def write_npy(folder: Path, rows: int) -> None:
    folder.mkdir()
    for start in range(0, rows, SHARD):
        for i, row in enumerate(moments_of(start, min(SHARD, rows - start)), start):
            np.save(folder / f"{i:08d}.npy", row)


class NpyFolder(torch.utils.data.Dataset):
    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("*.npy"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.load(self.paths[i])), i % 1000


def read_npy(folder: Path) -> Iterator[Tensor]:
    loader = torch.utils.data.DataLoader(NpyFolder(folder), BATCH, shuffle=True, drop_last=True)
    for _ in range(1000):
        for moments, _ in loader:
            yield moments


READERS = {
    "this project": (write_ours, read_ours),
    "load_dataset, Array3D, torch": (write_array3d, read_array3d),
    "webdataset": (write_webdataset, read_webdataset),
    "DataLoader over .npy": (write_npy, read_npy),
}


def speed(read: Callable[[Path], Iterator[Tensor]], folder: Path, seconds: float, draw: bool) -> float:
    """Samples a second after the first batches, over some seconds."""
    batches, count = read(folder), 0
    for _ in range(4):
        assert next(batches).shape == (BATCH, 2, *SHAPE)
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        moments = next(batches)
        if draw:
            sample(moments)
        count += BATCH
    rate = count / (time.perf_counter() - start)
    batches.close()
    return rate


MEMORY = """
import resource, sys, threading
from pathlib import Path
sys.path.insert(0, {here!r})
import data, torch
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, most = resident(), 0
for step, _ in zip(range({steps}), data.read_ours(Path({folder!r}), pictures={pictures})):
    most = max(most, resident())
print((most - before) / 2**20)
"""


def memory(folder: Path, steps: int, pictures: bool = False) -> float:
    """Largest resident memory of the reader beyond what its imports take, in MiB, in a process of its own."""
    here = str(Path(__file__).parent)
    code = MEMORY.format(here=here, folder=str(folder), steps=steps, pictures=pictures)
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return float(output)


def first_batch(folder: Path, step: int) -> float:
    """Seconds from nothing opened to the first batch of a run that resumes after `step`."""
    start = time.perf_counter()
    batches = read_ours(folder, step)
    next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=32768, help="latents in the comparison")
    parser.add_argument("--large", type=int, default=131072, help="latents in the large dataset")
    parser.add_argument(
        "--rounds", type=int, default=3, help="every reader is measured so many times, in turn"
    )
    parser.add_argument("--seconds", type=float, default=4, help="length of a measurement")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)  # as in a DataLoader's worker: more of them stand in the readers' way
    with tempfile.TemporaryDirectory() as root:
        folders = {}
        for name, (write, read) in READERS.items():
            folder = Path(root) / name.replace(" ", "-")
            try:
                write(folder, arguments.rows)
                next(read(folder))
                folders[name] = folder
            except ImportError as error:
                print(f"{name} is left out: {error}")
        rates = {(name, draw): [] for name in folders for draw in (False, True)}
        for _ in range(arguments.rounds):
            for name, draw in rates:
                rates[name, draw].append(speed(READERS[name][1], folders[name], arguments.seconds, draw))
        medians = {key: statistics.median(found) for key, found in rates.items()}
        print(
            f"| reader ({arguments.rows} latents) | moments/s | ours to it | drawn latents/s | ours to it |"
        )
        print("|---|---|---|---|---|")
        for name in folders:
            cells = [
                f"{medians[name, draw]:,.0f} | {medians['this project', draw] / medians[name, draw]:.1f}"
                for draw in (False, True)
            ]
            print(f"| {name} | {' | '.join(cells)} |")

        large = Path(root) / "large"
        write_ours(large, arguments.large)
        steps = arguments.large // BATCH
        print("\n| latents | memory of the reader, MiB |\n|---|---|")
        for folder, rows in ((folders["this project"], arguments.rows), (large, arguments.large)):
            print(f"| {rows} | {memory(folder, rows // BATCH + 10):.0f} |")
        print("\n| resumed at | seconds to the first batch |\n|---|---|")
        first_batch(large, 0)  # what is loaded once in a process is loaded
        for where, step in (
            ("the start", 0),
            ("half of epoch 1", steps // 2),
            ("the end of epoch 50", 50 * steps - 2),
        ):
            print(f"| {where} | {first_batch(large, step):.2f} |")

        print("\n| pictures beside them | bytes each | samples/s | memory, MiB |\n|---|---|---|---|")
        for size in (32, 64, 256):
            folder = Path(root) / f"pictures-{size}"
            write_ours(folder, 8192, size)
            read = partial(read_ours, pictures=True)
            rates = [speed(read, folder, arguments.seconds, True) for _ in range(arguments.rounds)]
            each = statistics.mean(len(file["bytes"]) for file in pictures_of(size, 64))
            rate, taken = statistics.median(rates), memory(folder, 60, pictures=True)
            print(f"| {size} x {size} | {each:,.0f} | {rate:,.0f} | {taken:.0f} |")


if __name__ == "__main__":
    main()
