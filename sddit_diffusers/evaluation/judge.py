"""What samples are scored against, by which features, and the scores; and how a run scores itself."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator

from ..files import sha256_of
from ..launching import on_main_process, together
from ..pipelines.pipeline_sddit import SDDiTPipeline
from ..pipelines.sampling import class_of, sample
from .cache import default_cache
from .catalogue import EXTRACTORS, JUDGED, SCORES, metric_name
from .classifiers import CLASSIFIERS, train_classifier
from .extractors import (
    ClassifierExtractor,
    Extractor,
    InceptionExtractor,
    PixelExtractor,
    find_inception,
)
from .features import Extraction, Features, features_of_set, full_precision
from .image_sets import DatasetImages, ImageSet, has_images, open_images
from .scores import Gaussian, Manifold, frechet_distance, inception_score, kernel_distance, precision_recall
from .statistics import read_statistics


@dataclass
class Reference:
    """What samples are scored against: features of images, statistics that take their place, or both."""

    features: Features | None
    statistics: dict[str, Gaussian] = field(default_factory=dict)
    half: bool = False
    device: torch.device | str = "cpu"  # where distances are computed

    def gaussian(self, name: str) -> Gaussian:
        """For a Fréchet distance."""
        if name in self.statistics:
            return self.statistics[name]
        return self.features.gaussian_of(SCORES[name].part)

    @cached_property
    def manifold(self) -> Manifold:
        """Of the images, for precision and recall."""
        return self.features.manifold(self.device, self.half)


def build_extractor(
    kind: str, weights: str | None, images: ImageSet | None, cache: Path | None, accelerator: Accelerator
) -> Extractor:
    """One of `EXTRACTORS`, on the accelerator's device; a classifier is trained on `images`.

    Raises:
        ValueError: there are no weights, or no labelled pictures to train on.
    """
    parts = list(EXTRACTORS[kind])
    if kind == "inception":
        on_main_process(lambda: find_inception(weights), accelerator)  # the others find what it downloads
        extractor = InceptionExtractor("sddit-inception", parts, feature_extractor_weights_path=weights)
    elif kind in CLASSIFIERS:
        if not isinstance(images, DatasetImages) or images.labels is None:
            raise ValueError(
                f"The {kind} is trained on a reference that is a labelled dataset (with --label_column)."
            )
        arguments = images, cache or default_cache(), accelerator.device
        path = on_main_process(lambda: train_classifier(*arguments, kind=kind), accelerator)
        extractor = ClassifierExtractor(f"sddit-{kind}", parts, feature_extractor_weights_path=str(path))
    else:
        extractor = PixelExtractor("sddit-pixels", parts)
    return extractor.to(accelerator.device)


def open_reference(
    name: str, size: tuple[int, int], extractor: str, resolution: int = 0,
    image_column: str = "", label_column: str = "", split: str = "train",
) -> tuple[ImageSet | None, dict[str, Gaussian]]:  # fmt: skip
    """The images and the statistics of a reference, either of which it may lack.

    Args:
        size: of the samples, height and width.
        resolution: pictures are cropped and resized to it; those of a dataset to the samples' size if 0.

    Raises:
        ValueError: there is no such reference, or it does not suit the samples or the extractor.
    """
    path, statistics = Path(name), {}
    if path.suffix in (".npz", ".pkl") and path.is_file():
        statistics = read_statistics(path)
        if extractor != "inception" and statistics:
            raise ValueError(f"{name} has statistics of Inception's features, not of {extractor}.")
        for score_name, gaussian in statistics.items():
            found, dim = len(gaussian.mean), SCORES[score_name].inception_dim
            if found != (dim or found):
                raise ValueError(f"{name} has statistics of {found} features for {score_name}, not of {dim}.")
        if path.suffix == ".pkl" or (statistics and not has_images(path)):
            return None, statistics
    images = open_images(name, resolution, image_column, label_column, split)
    if isinstance(images, DatasetImages) and not resolution:
        images.size = size
    if images.size != size:
        sizes = [f"{height} x {width}" for height, width in (images.size, size)]
        raise ValueError(
            f"The images of {name} are {sizes[0]}, and the samples {sizes[1]}; "
            "--resolution crops and resizes the reference's."
        )
    return images, statistics


def score(samples: Features, reference: Reference, wanted: Sequence[str]) -> dict[str, float]:
    """The wanted scores of samples against a reference, of one extractor's features of both."""
    scores = {}
    for name in wanted:
        if name == "is":
            scores[name] = inception_score(samples.logits)
        elif name == "kid":
            scores[name] = kernel_distance(samples.features, reference.features.features)
        elif SCORES[name].statistics:
            of_samples = samples.gaussian_of(SCORES[name].part)
            scores[name] = frechet_distance(of_samples, reference.gaussian(name))
        elif name not in scores:
            manifold = Manifold(samples.features.to(reference.device), half=reference.half)
            both = precision_recall(manifold, reference.manifold)
            scores |= dict(zip(("precision", "recall"), both, strict=True))
    return {name: scores[name] for name in wanted}


class Judge:
    """Scores a pipeline's samples against one reference, again and again while it is trained.

    Args:
        reference: its pictures are cropped and resized to `size`.
        extractors: by whose features; the samples are made once for all of them.
        image_column, label_column: as of a program's run.
        size: of the samples, height and width.
        num_samples: images that are made each time, of the same seeds and classes.

    Raises:
        ValueError: as [`open_reference`] and [`build_extractor`] do, or fewer than two samples.
    """

    def __init__(
        self, reference: str, extractors: Sequence[str], size: tuple[int, int], num_samples: int,
        image_column: str, label_column: str, accelerator: Accelerator,
    ):  # fmt: skip
        if num_samples < 2:
            raise ValueError(f"{num_samples} sample has no covariance; a score needs at least 2.")
        self.num_samples, self.accelerator = num_samples, accelerator
        # Only classifiers need labels, but all are to see the same pictures.
        columns = image_column, label_column if any(kind in CLASSIFIERS for kind in extractors) else ""
        self.views = [View(reference, kind, size, num_samples, *columns, accelerator) for kind in extractors]

    @property
    def identities(self) -> dict[str, str]:
        """By extractor, what tells its scores from those by other weights or against other pictures."""
        return {view.kind: view.identity for view in self.views}

    def __call__(self, pipe: SDDiTPipeline, batch_size: int, **arguments) -> dict[str, float]:
        """The scores, on the main process, by their names in metrics.jsonl.

        `arguments` go to the pipeline's call.

        Raises:
            FloatingPointError: a sample is not finite.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = range(self.num_samples * rank // processes, self.num_samples * (rank + 1) // processes)
        seen, problems = [Extraction(view.extractor, self.accelerator) for view in self.views], []
        with torch.inference_mode(), full_precision():
            for i in range(0, len(mine), batch_size):
                seeds = mine[i : i + batch_size]
                labels = [class_of(pipe, ["random"], 0, seed) for seed in seeds]
                try:
                    pixels = torch.from_numpy(sample(pipe, seeds, labels, **arguments))
                except FloatingPointError as error:  # the other processes wait for this one's share
                    problems.append(error)
                    break
                for extraction in seen:
                    extraction.add(pixels.permute(0, 3, 1, 2).expand(-1, 3, -1, -1))

        def check() -> None:
            if problems:
                raise problems[0]

        together(check, self.accelerator)  # before the features, which may be of no image at all
        found = [extraction.features() for extraction in seen]
        scores = {}
        for view, samples in zip(self.views, found, strict=True):
            scores |= view.score(samples) if samples is not None else {}
        return scores


class View:
    """A judge's reference as one extractor sees it; the arguments are the judge's."""

    def __init__(
        self, reference: str, kind: str, size: tuple[int, int], num_samples: int,
        image_column: str, label_column: str, accelerator: Accelerator,
    ):  # fmt: skip
        images, statistics = open_reference(reference, size, kind, size[0], image_column, label_column)
        self.kind, features, self.wanted = kind, None, ["fid"]
        self.extractor = build_extractor(kind, None, images, default_cache(), accelerator)
        if "fid" not in statistics and images is None:
            raise ValueError(f"{reference} has neither images nor {' and '.join(SCORES['fid'].statistics)}.")
        if images is not None:
            features = features_of_set(images, self.extractor, accelerator, 64, default_cache())
            # Precision and recall compare all images with one another.
            if 3 < len(images) <= 50_000 and num_samples > 3:
                self.wanted = [*JUDGED]
        self.reference = Reference(features, statistics, device=accelerator.device)
        on_main_process(lambda: bool(self.reference.gaussian("fid")), accelerator)  # fails now, if ever

        def identify() -> str:
            if isinstance(images, DatasetImages):
                pictures = images.sha256_of_pictures
            elif images is not None:
                pictures = images.sha256
            else:
                with open(reference, "rb") as file:
                    pictures = sha256_of(file)
            return hashlib.sha256(f"{pictures} {self.extractor.identity}".encode()).hexdigest()

        self.identity = on_main_process(identify, accelerator)[:16]

    def score(self, samples: Features) -> dict[str, float]:
        """The scores by their names in metrics.jsonl."""
        scores = score(samples, self.reference, self.wanted)
        return {metric_name(name, self.kind): value for name, value in scores.items()}
