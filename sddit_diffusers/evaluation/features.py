"""Features of whole sets of images: extracted once, by all processes, and cached by content."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ..cli import one_line
from ..launching import on_main_process, progress_bar
from .cache import keep_tensors, kept_tensors
from .extractors import Extractor
from .image_sets import ImageSet, batches
from .scores import Gaussian, Manifold, Moments


@dataclass
class Features:
    """What an extractor makes of a set: `features` `[images, d]`, and logits and sFID's Gaussian or None.

    Attributes:
        path: the cache's file of them, if they are in one.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Gaussian | None = None
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def gaussian(self) -> Gaussian:
        """Of `features`."""
        return Gaussian.of(self.features)

    def gaussian_of(self, part: str) -> Gaussian | None:
        """Of "features" or of "spatial"."""
        return self.spatial if part == "spatial" else self.gaussian

    def save(self, path: Path) -> None:
        """Writes them as a safetensors file, complete or absent.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {"features": self.features}
        if self.logits is not None:
            tensors["logits"] = self.logits
        if self.spatial is not None:
            tensors |= {"spatial.mean": self.spatial.mean, "spatial.covariance": self.spatial.covariance}
        keep_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()})

    @classmethod
    def load(cls, path: Path) -> "Features | None":
        """Reads what `save` wrote; None, with a warning unless it is missing, where that is not there."""
        found, spatial = kept_tensors(path), None
        if found is None:
            return None
        if "spatial.mean" in found:
            spatial = Gaussian(found["spatial.mean"], found["spatial.covariance"])
        return cls(found["features"], found.get("logits"), spatial, path)

    def manifold(self, device: torch.device | str, half: bool) -> Manifold:
        """For precision and recall, on a device; its radii are kept beside the features.

        Args:
            half: distances are rounded to float16.
        """
        manifold = Manifold(self.features.to(device), half=half)
        if self.path is None or half:
            return manifold
        path = self.path.with_name(f"radii-{manifold.k}-{self.path.name}")
        if (kept := kept_tensors(path)) is not None:
            manifold.radii = kept["radii"].to(device)
            return manifold
        with full_precision():
            radii = manifold.radii.cpu()
        try:
            keep_tensors(path, {"radii": radii})
        except OSError as error:  # a full disk, or a cache of somebody else's
            print(f"{path} cannot be kept ({one_line(error)}).", file=sys.stderr)
        return manifold


def features_of_set(
    images: ImageSet, extractor: Extractor, accelerator: Accelerator, batch_size: int, cache: Path | None
) -> Features | None:
    """The features of all images, from the cache if they are there; None but on the main process.

    Raises:
        ValueError: an image that cannot be read, or there is none.
        OSError: the cache cannot be written.
    """
    if len(images) == 0:
        raise ValueError(f"{images.name} has no images.")

    def path_of_cache() -> Path | None:
        if cache is None:
            return None
        key = f"{images.sha256} {extractor.identity} {' '.join(extractor.features_list)}"
        return cache / f"features-{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    path = on_main_process(path_of_cache, accelerator)
    known = Features.load(path) if path is not None and accelerator.is_main_process else None
    if on_main_process(lambda: known is not None, accelerator):
        return known
    rank, processes = accelerator.process_index, accelerator.num_processes
    mine = range(len(images) * rank // processes, len(images) * (rank + 1) // processes)
    with (
        closing(batches(images, mine, batch_size)) as parts,
        progress_bar(
            accelerator, f"features of {Path(images.name).name}", unit="image", total=len(mine)
        ) as progress,
    ):

        def counted() -> Iterator[Tensor]:
            for part in parts:
                yield part
                progress.update(len(part))

        found = extract(counted(), extractor, accelerator)
    if path is not None:
        on_main_process(lambda: found.save(path), accelerator)
    if found is not None:
        found.path = path
    return found


def extract(parts: Iterable[Tensor], extractor: Extractor, accelerator: Accelerator) -> Features | None:
    """The features of every process's images, in the order of the processes; None but on the main process.

    Args:
        parts: this process's images, as of [`Extraction.add`]; there may be none.
    """
    extraction = Extraction(extractor, accelerator)
    with torch.inference_mode(), full_precision():
        for images in parts:
            extraction.add(images)
    return extraction.features()


class Extraction:
    """The features of images that come in parts, on all processes, which ask for them once."""

    def __init__(self, extractor: Extractor, accelerator: Accelerator):
        self.extractor, self.accelerator = extractor, accelerator
        self.rows: dict[str, list[Tensor]] = {name: [] for name in extractor.features_list}
        self.widths, self.moments = dict.fromkeys(self.rows, 0), Moments()

    def add(self, images: Tensor) -> None:
        """Looks at some of this process's images, uint8 `[b, 3, h, w]`; callers see to [`full_precision`]."""
        outputs = self.extractor(images.to(self.accelerator.device))
        for name, values in self.extractor.convert_features_tuple_to_dict(outputs).items():
            self.widths[name] = values.shape[1]
            if name == "spatial":
                self.moments.add(values)
            else:
                self.rows[name].append(values.float().cpu())

    def features(self) -> Features | None:
        """Of every process's images, in the order of the processes; None but on the main process."""
        accelerator, rows, moments = self.accelerator, self.rows, self.moments
        # A process without images has none of the others' shapes.
        shared = torch.tensor([list(self.widths.values())], device=accelerator.device)
        for name, width in zip(self.widths, accelerator.gather(shared).amax(0).tolist(), strict=True):
            rows[name].append(torch.zeros(0, width))
        spatial = None
        if "spatial" in rows:
            moments.add(rows.pop("spatial")[0].to(accelerator.device))
            moments.sums = accelerator.reduce(moments.sums, "sum")
            spatial = moments.gaussian()
        whole = {name: _gather(torch.cat(values), accelerator) for name, values in rows.items()}
        if not accelerator.is_main_process:
            return None
        return Features(whole["features"], whole.get("logits"), spatial)


def _gather(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """The rows of all processes, one process's after the other's; each may have another number."""
    if accelerator.num_processes == 1:
        return rows
    device = accelerator.device
    counts = accelerator.gather(torch.tensor([len(rows)], device=device)).tolist()
    padded = accelerator.pad_across_processes(rows.to(device), dim=0)
    parts = accelerator.gather(padded).cpu().split(len(padded))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


@contextmanager
def full_precision() -> Iterator[None]:
    """Without TensorFloat-32, whose 10 bits of mantissa move FID."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    earlier = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = earlier
