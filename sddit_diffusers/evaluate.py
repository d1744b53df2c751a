"""Scores images as ADM's evaluator does, probes what an encoder has learnt, or tells likelihoods.

    sddit evaluate samples VIRTUAL_imagenet256_labeled.npz --half --output scores.json
    sddit evaluate digits-samples digits --extractor pixels
    sddit evaluate pictures --save_stats statistics.npz
    sddit evaluate --likelihood sddit-digits digits

SAMPLES and REFERENCE are folders of pictures, `.npz` files with images, what `generate` left, or datasets; a
REFERENCE may also be ADM's reference batch, or statistics of EDM (`.npz`) or EDM2 (`.pkl`). Inception's
weights are downloaded once; `--extractor classifier` and `pixels` need nothing, and their scores compare only
with themselves.
"""

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from .cli import Parser, check_options, one_line_errors, option, options
from .data.generated import RECORD
from .evaluation.cache import default_cache
from .evaluation.catalogue import EXTRACTORS, SCORES
from .evaluation.extractors import DinoExtractor, Extractor, InceptionExtractor
from .evaluation.features import Features, features_of_set
from .evaluation.image_sets import open_images
from .evaluation.judge import Reference, build_extractor, open_reference, score
from .evaluation.likelihood import likelihoods
from .evaluation.probe import labelled_pictures, probe
from .evaluation.scores import inception_score
from .evaluation.statistics import save_statistics
from .files import read_json, sha256_of, written_aside
from .launching import check_machine
from .pipelines.loading import load_pipeline
from .pipelines.ode import ATOL, RTOL

OF_PROBE = ("image_column", "label_column", "split", "batch_size", "output", "probe_samples", "probe_sigmas")


@dataclass
class EvaluateConfig:
    """The settings of an evaluation."""

    metrics: list[str] = options(
        [], f"of {', '.join(SCORES)}; all that can be had if not given", group="scores",
        choices=tuple(SCORES),
    )  # fmt: skip
    fd_dinov2: bool = option(False, "FD-DINOv2 too")
    extractor: str = option(
        "inception", "whose features are compared; all but 'inception' need no download",
        choices=tuple(EXTRACTORS),
    )  # fmt: skip
    inception_weights: str = option(
        "", "Inception's weights; from torch's hub cache, or downloaded, if not given", metavar="FILE"
    )
    dinov2: str = option("facebook/dinov2-large", "DINOv2: a folder or a name on the Hub")
    half: bool = option(False, "precision and recall by distances in float16, as ADM's on a GPU")
    image_column: str = option(
        "", "column of the images of a dataset; the only one if not given", group="pictures"
    )
    label_column: str = option("", "column of their labels; 'label' if not given, for the classifier none")
    split: str = option("train", "split of a dataset")
    resolution: int = option(
        0, "side to which the reference's pictures are cropped and resized; 0: those of a dataset to the "
        "samples'", low=0, high=16_384,
    )  # fmt: skip
    batch_size: int = option(64, "images that go through the network at once", low=1)
    output: str = option(
        "", "a JSON file for the results, and all that made them", metavar="FILE", group="output"
    )
    save_stats: str = option("", "an .npz for the statistics of SAMPLES, to be a REFERENCE", metavar="FILE")
    cache_dir: str = option(
        "", f"where features are kept; {default_cache()} if not given, 'none' keeps none", metavar="FOLDER"
    )
    probe: str = option(
        "", "a pipeline, whose encoder is probed on the labelled pictures of SAMPLES instead", group="probe"
    )
    probe_samples: int = option(
        10_000, "pictures that the probe uses at most; a fifth of them is held out", low=5
    )
    probe_sigmas: list[float] = options([0.002, 0.1, 0.3, 1.0, 3.0], "noise levels of the probe")
    likelihood: str = option(
        "", "a pipeline of pixels, whose likelihoods of the pictures of SAMPLES are told instead",
        group="likelihood",
    )  # fmt: skip
    likelihood_samples: int = option(1000, "pictures whose likelihood is told at most", low=2)
    unconditional: bool = option(False, "likelihoods by the null class in place of the pictures' own")
    rtol: float = option(RTOL, "relative tolerance of the solver, dopri5", low=1e-12, high=1)
    atol: float = option(ATOL, "its absolute tolerance", low=1e-12, high=1)

    def __post_init__(self):
        check_options(self)
        if self.probe and self.likelihood:
            raise ValueError("probe and likelihood were both given; one at a time.")
        for name in () if self.likelihood else ("unconditional", "rtol", "atol"):
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise ValueError(f"{name} is {value}; it is an option of --likelihood, which is not chosen.")
        if self.fd_dinov2 and self.metrics and "fd_dinov2" not in self.metrics:
            self.metrics = [*self.metrics, "fd_dinov2"]
        self.fd_dinov2 = self.fd_dinov2 or "fd_dinov2" in self.metrics
        if self.save_stats and Path(self.save_stats).suffix != ".npz":
            raise ValueError(f"save_stats is {self.save_stats!r}; its name must end in .npz.")
        for name in ("save_stats", "output"):
            path = Path(getattr(self, name)).absolute()
            if not path.parent.is_dir():
                raise ValueError(f"{name} is {getattr(self, name)!r}, whose folder is not there.")
            if getattr(self, name) and path.is_dir():
                raise ValueError(f"{name} is {getattr(self, name)!r}, which is a folder; it must be a file.")
        if self.save_stats and self.extractor != "inception":
            raise ValueError(f"Statistics are saved of Inception's features, not of {self.extractor}.")
        if min(self.probe_sigmas, default=0) <= 0:
            raise ValueError(f"probe_sigmas are {self.probe_sigmas}; they must be above 0.")

    @property
    def cache(self) -> Path | None:
        """The folder of the cache."""
        return None if self.cache_dir == "none" else Path(self.cache_dir or default_cache())


class Evaluation:
    """A run: what there is to score, which scores it allows, the scores, and what is said of them."""

    def __init__(self, config: EvaluateConfig, samples: str, reference: str | None):
        self.config, self.reference_name = config, reference
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
        check_machine(self.accelerator)
        self.samples = open_images(samples, image_column=config.image_column, split=config.split)
        self.generation = self._record_of_samples()
        self.reference_images, self.statistics = None, {}
        if reference is not None:
            self.reference_images, self.statistics = open_reference(
                reference, self.samples.size, config.extractor, config.resolution,
                config.image_column, config.label_column, config.split,
            )  # fmt: skip
        for images in (self.samples, self.reference_images):
            if images is not None and len(images) < 2:
                raise ValueError(f"{images.name} has {len(images)} images; scores need at least 2.")
        self.wanted = self._choose()
        self.extractors: dict[Extractor, list[str]] = {}  # and the scores that each is for
        usual = [name for name in self.wanted if name != "fd_dinov2"]
        if usual:
            self.extractors[self._usual_extractor()] = usual
        if "fd_dinov2" in self.wanted:
            dinov2 = DinoExtractor("sddit-dinov2", ["features"], feature_extractor_weights_path=config.dinov2)
            self.extractors[dinov2.to(self.accelerator.device)] = ["fd_dinov2"]

    def _record_of_samples(self) -> dict | None:
        """What `generate` wrote of them, where it made them."""
        name = Path(self.samples.name)
        path = (name if name.is_dir() else name.parent) / RECORD
        is_there = name.exists() and path.exists()
        return read_json(path, dict, "record of a generation") if is_there else None

    def _usual_extractor(self) -> Extractor:
        config = self.config
        return build_extractor(
            config.extractor, config.inception_weights, self.reference_images, config.cache, self.accelerator
        )

    def _choose(self) -> list[str]:
        """The scores to compute: those that were asked for, or all that can be had.

        Raises:
            ValueError: one that was asked for cannot be had, or none can.
        """
        config = self.config
        for name in config.metrics or ["fd_dinov2"] * config.fd_dinov2:
            if obstacle := self._obstacle(name):
                raise ValueError(f"{name} {obstacle}.")
        usual = [name for name in SCORES if name != "fd_dinov2" or config.fd_dinov2]
        wanted = [name for name in config.metrics or usual if not self._obstacle(name)]
        if not wanted:
            raise ValueError(f"There is nothing to score: fid {self._obstacle('fid')}.")
        return [name for name in SCORES if name in wanted]

    def _obstacle(self, name: str) -> str:
        """Why a score cannot be had; empty where it can."""
        score, extractor = SCORES[name], self.config.extractor
        if score.part not in EXTRACTORS[extractor]:
            return {
                "logits": f"needs the logits of a classifier, and {extractor} have none",
                "spatial": f"is a score of Inception's features, not of {extractor}",
            }[score.part]
        if not score.is_relative or self.reference_images is not None or name in self.statistics:
            return ""
        needed = "images" + f" or {' and '.join(score.statistics)}" * bool(score.statistics)
        has = "there is none" if self.reference_name is None else f"{self.reference_name} has none"
        return f"needs a REFERENCE with {needed}, and {has}"

    def run(self) -> dict[str, float]:
        """Computes, prints and saves the scores, which the main process returns."""
        scores, saved, warnings = {}, {}, []
        for extractor, wanted in self.extractors.items():
            samples, reference = self._features(extractor, wanted)
            if not self.accelerator.is_main_process:
                continue
            scores |= score(samples, reference, wanted)
            warnings += self._warnings(extractor, samples)
            if self.config.save_stats:
                dinov2 = isinstance(extractor, DinoExtractor)
                saved |= {"fd_dinov2" if dinov2 else "fid": samples.gaussian}
                if samples.spatial is not None:
                    saved["sfid"] = samples.spatial
        if self.accelerator.is_main_process:
            if saved:
                save_statistics(Path(self.config.save_stats), saved)
            self._report(scores, list(dict.fromkeys(warnings)))
        self.accelerator.end_training()
        return scores

    def _features(self, extractor: Extractor, wanted: list[str]) -> tuple[Features | None, Reference]:
        """The samples' features, and what the wanted scores are measured against, on the main process."""
        config, features = self.config, None
        arguments = (extractor, self.accelerator, config.batch_size, config.cache)
        samples = features_of_set(self.samples, *arguments)
        if any(SCORES[name].is_relative and name not in self.statistics for name in wanted):
            features = features_of_set(self.reference_images, *arguments)
        return samples, Reference(features, self.statistics, config.half, self.accelerator.device)

    def _warnings(self, extractor: Extractor, samples: Features) -> list[str]:
        """What a reader of the scores must know."""
        warnings = []
        if isinstance(extractor, InceptionExtractor) and not extractor.is_published:
            warnings.append("These are not the published weights of Inception: compare with nothing else.")
        if not isinstance(extractor, (InceptionExtractor, DinoExtractor)):
            warnings.append(f"Scores by {self.config.extractor} compare with themselves alone.")
        if len(samples) < 50_000:
            warnings.append(
                f"{len(samples):,} samples: published scores are of 50,000, and fewer make FID larger."
            )
        if "is" in self.extractors[extractor] and len(samples) > 5000:
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
            mixed = inception_score(samples.logits, order)
            if inception_score(samples.logits) < 0.95 * mixed:
                warnings.append(
                    "The samples seem to be sorted by class, which lowers the Inception Score: "
                    f"in a random order it is {mixed:.4g}."
                )
        return warnings

    def _report(self, scores: dict[str, float], warnings: list[str]) -> None:
        """A table for people, JSON for programs."""
        config, against = self.config, self.reference_images
        by = "" if config.extractor == "inception" else f", by {config.extractor}"
        print(f"\n{self.samples.name} against {self.reference_name or 'nothing'}{by}\n")
        print(f"{'':<20}{'score':>10}{'samples':>10}{'reference':>12}")
        for name, value in scores.items():
            count = ""
            if SCORES[name].is_relative:
                count = "statistics" if name in self.statistics else f"{len(against):,}"
            print(f"{SCORES[name].heading:<20}{value:>10.5g}{len(self.samples):>10,}{count:>12}")
        for warning in warnings:
            print(f"\nWarning: {warning}")
        if config.save_stats:
            print(f"\nThe statistics of {self.samples.name} are in {config.save_stats}.")
        if config.output:
            record = self._record(scores, warnings)
            with written_aside(Path(config.output), "w") as file:
                file.write(json.dumps(record, indent=1) + "\n")

    def _record(self, scores: dict[str, float], warnings: list[str]) -> dict:
        """The scores and all that made them."""
        reference = None
        if self.reference_images is not None:
            reference = self.reference_images.sha256
        elif self.reference_name is not None:
            with open(self.reference_name, "rb") as file:
                reference = sha256_of(file)
        return {
            "scores": scores,
            "num_samples": len(self.samples),
            "num_reference_images": None if self.reference_images is None else len(self.reference_images),
            "statistics_of_the_reference": list(self.statistics),
            "samples": {"name": self.samples.name, "sha256": self.samples.sha256},
            "reference": {"name": self.reference_name, "sha256": reference},
            "extractors": [extractor.identity for extractor in self.extractors],
            "precision_recall": {"k": 3, "distances": "float16" if self.config.half else "float32"},
            "warnings": warnings,
            "versions": {name: version(name) for name in ("sddit-diffusers", "torch", "torch-fidelity")},
            "generation": self.generation,
        }


def run_probe(config: EvaluateConfig, dataset_name: str) -> None:
    """Probes a pipeline's encoder; prints and saves the accuracies.

    Raises:
        ValueError: there is no such pipeline or no such labelled dataset.
    """
    pipe = load_pipeline(config.probe)
    label_column = config.label_column or "label"
    dataset = labelled_pictures(pipe, dataset_name, config.image_column, label_column, config.split)
    pipe.to(Accelerator().device)
    rows = probe(pipe, dataset, config.probe_sigmas, config.probe_samples, config.batch_size)
    used = min(len(dataset), config.probe_samples)
    print(
        f"\nThe encoder of {config.probe} on {dataset_name}: accuracy on {used // 5:,} of {used:,} pictures\n"
    )
    names = dict.fromkeys(f"{row['features']}, {row['probe']}" for row in rows)
    print(f"{'sigma':<8}" + "".join(f"{name:>16}" for name in names))
    for sigma in config.probe_sigmas:
        found = [row["accuracy"] for row in rows if row["sigma"] == sigma]
        print(f"{sigma:<8g}" + "".join(f"{accuracy:>16.1%}" for accuracy in found))
    if config.output:
        record = {"pipeline": config.probe, "dataset": dataset_name, "pictures": used, "accuracies": rows}
        with written_aside(Path(config.output), "w") as file:
            file.write(json.dumps(record, indent=1) + "\n")


def run_likelihood(config: EvaluateConfig, dataset_name: str) -> None:
    """Prints and saves a pipeline's likelihood of pictures.

    Raises:
        ValueError: there is no such pipeline of pixels, or no such dataset.
    """
    pipe = load_pipeline(config.likelihood)
    by_class = pipe.transformer.config.num_classes > 0 and not config.unconditional
    label_column = (config.label_column or "label") if by_class else ""
    dataset = labelled_pictures(pipe, dataset_name, config.image_column, label_column, config.split)
    pipe.transformer.requires_grad_(False)
    pipe.to(Accelerator().device)
    tolerances = {"rtol": config.rtol, "atol": config.atol}
    bits, evaluations = likelihoods(pipe, dataset, config.likelihood_samples, config.batch_size, **tolerances)
    mean, error = bits.mean().item(), (bits.std() / len(bits) ** 0.5).item()
    print(
        f"\n{config.likelihood} on {len(bits):,} pictures of {dataset_name}, {dataset.levels} levels, "
        f"{'given their classes' if by_class else 'unconditional'}: {mean:.3f} \u00b1 {error:.3f} bits a "
        f"dimension (standard error), in {evaluations:.0f} evaluations"
    )
    if config.output:
        record = {
            "pipeline": config.likelihood, "dataset": dataset_name, "pictures": len(bits),
            "levels": dataset.levels, "conditional": by_class, "bits_per_dim": mean, "standard_error": error,
            "evaluations": evaluations, "noise": "signs", **tolerances, "batch_size": config.batch_size,
        }  # fmt: skip
        with written_aside(Path(config.output), "w") as file:
            file.write(json.dumps(record, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(EvaluateConfig, prog="evaluate", doc=__doc__)
    parser.add_argument(
        "samples", nargs="?", metavar="SAMPLES", help="images; for a probe or likelihoods a dataset"
    )
    parser.add_argument(
        "reference", nargs="?", metavar="REFERENCE", help="images or statistics that they are scored against"
    )
    with one_line_errors("evaluate"):
        try:
            chosen = parser.parse_known_options(arguments)
            samples, reference = chosen.pop("samples"), chosen.pop("reference")
            config = EvaluateConfig(**chosen)
            if samples is None:
                raise ValueError("SAMPLES are missing: a folder of pictures, an .npz file or a dataset.")
        except ValueError as error:
            parser.error(str(error))
        if config.probe:
            run_probe(config, samples)
        elif config.likelihood:
            run_likelihood(config, samples)
        else:
            Evaluation(config, samples, reference).run()


def main_probe(arguments: Sequence[str] | None = None) -> None:
    """Tells what a pipeline's encoder knows of classes.

        sddit probe sddit-digits digits

    It is `evaluate --probe` by a name of its own.
    """
    parser = Parser(EvaluateConfig, only=OF_PROBE, prog="probe", doc=inspect.getdoc(main_probe))
    parser.add_argument("probe", metavar="PIPELINE", help="a folder or a name on the Hub")
    parser.add_argument(
        "dataset", metavar="DATASET", help="labelled pictures: 'digits', a folder or a name on the Hub"
    )
    with one_line_errors("probe"):
        try:
            chosen = parser.parse_known_options(arguments)
            dataset = chosen.pop("dataset")
            config = EvaluateConfig(**chosen)
        except ValueError as error:
            parser.error(str(error))
        run_probe(config, dataset)


if __name__ == "__main__":
    main()
