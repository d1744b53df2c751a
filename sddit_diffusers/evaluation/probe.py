"""What an encoder knows of the classes that it was not told: k-NN and linear probes of its features.

The encoder sees labelled pictures, noised to one level after the other, all patches and the *null* label, so
that no class leaks in. Two classifiers, fitted to four fifths of the pictures, are judged on the last fifth:
a weighted nearest-neighbour vote, as DINO's, and logistic regression. Self-supervised discrimination is to
make the encoder's features say more of the picture; FID cannot show whether it does.
"""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ..data.pictures import ImageDataset
from ..launching import bar
from ..pipelines.pipeline_sddit import SDDiTPipeline
from ..pipelines.sampling import MULTIPLE, image_size
from ..seeds import generator_for


def encoder_features(pipe: SDDiTPipeline, noised: Tensor, sigma: float) -> dict[str, Tensor]:
    """Features of noised samples, by name.

    Args:
        noised: samples as the transformer was trained on them, with noise, `[b, c, h, w]`.
        sigma: how large the noise is beside the signal.

    Returns:
        "input", the noised sample itself `[b, c h w]`, "[CLS]", the encoded token `[b, D]`, of a model that
        has one, and "patches", the mean of the encoded ones `[b, D]`.

    Raises:
        FloatingPointError: they are not finite.
    """
    t = _time(pipe, sigma)
    tokens = pipe.transformer(
        pipe.scheduler.precondition_inputs(noised, t).to(pipe.transformer.dtype),
        pipe.scheduler.precondition_noise(t).float().to(noised.device),
        class_labels=None,
    ).encoder_hidden_states.float()
    if not tokens.isfinite().all():
        raise FloatingPointError(f"What the encoder makes of the pictures at sigma {sigma:g} is not finite.")
    features = {"input": noised.flatten(1)}
    if hasattr(pipe.transformer, "cls_token"):
        features["[CLS]"], tokens = tokens[:, 0], tokens[:, 1:]
    return features | {"patches": tokens.mean(1)}


def _time(pipe: SDDiTPipeline, sigma: float) -> Tensor:
    return torch.tensor(pipe.scheduler.time_of(sigma), dtype=torch.float64)


def labelled_pictures(
    pipe: SDDiTPipeline, name: str, image_column: str, label_column: str, split: str = "train"
) -> ImageDataset:
    """The pictures of a dataset, of the channels and the size that a pipeline was trained on.

    Raises:
        ValueError: there is no such labelled dataset.
    """
    channels = pipe.transformer.config.in_channels if pipe.vae is None else 3
    return ImageDataset(name, image_column, label_column, channels, image_size(pipe), split=split)


def read_samples(
    pipe: SDDiTPipeline, dataset: ImageDataset, rows: Tensor, batch_size: int
) -> tuple[Tensor, np.ndarray]:
    """Clean samples of some rows `[rows, c, h, w]`, encoded if the pipeline has a VAE, and their classes."""
    samples, labels = [], []
    for part in bar(rows.split(batch_size), desc="reading", unit="batch", leave=False):
        x0, classes = dataset.__getitems__(part.tolist())
        samples.append(pipe.encode(x0).cpu())
        labels.append(classes)
    return torch.cat(samples), torch.cat(labels).numpy()


def nearest_neighbours(features: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Classes by votes of the 20 nearest by cosine, weighted by exp(cosine / 0.07) (Caron et al. 2021)."""
    classifier = KNeighborsClassifier(
        min(20, len(features)), metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07)
    )
    return classifier.fit(features, labels).predict(held_out)


def linear(features: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Classes by logistic regression on standardised features."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    return classifier.fit(features, labels).predict(held_out)


def _filled(samples: Tensor) -> Tensor:
    """Samples, and the last one again until a CPU rounds them as it would among any others."""
    return torch.cat([samples, samples[-1:].expand(-len(samples) % MULTIPLE, -1, -1, -1)])


PROBES = {"k-NN": nearest_neighbours, "linear": linear}


@torch.no_grad()
def probe(
    pipe: SDDiTPipeline, dataset: ImageDataset, sigmas: list[float], num_samples: int, batch_size: int = 64
) -> list[dict]:
    """Accuracies on held-out pictures: rows of `sigma`, `features`, `probe` and `accuracy`.

    Args:
        pipe: whose transformer is probed, on its device.
        dataset: labelled pictures of the size that the pipeline makes.
        sigmas: noise levels, as ratios of noise to signal.
        num_samples: pictures that are used at most, drawn at random; a fifth of them is held out.
        batch_size: pictures that are encoded at once. On a CPU the accuracies do not depend on it, for widths
            that are multiples of 16.

    Raises:
        FloatingPointError: the encoder's features are not finite.
        ValueError: the pictures have no labels, or are too few.
    """
    if dataset.labels is None:
        raise ValueError(f"{dataset.name} has no labels to probe for.")
    rows = torch.randperm(len(dataset), generator=generator_for(0))[:num_samples]
    held_out = len(rows) // 5
    if held_out < 1:
        raise ValueError(f"{len(rows)} pictures are too few for a probe; at least 5 are needed.")
    x0, labels = read_samples(pipe, dataset, rows, batch_size)
    noise = torch.randn(x0.shape, generator=generator_for(0, 1))  # the same at every level
    results = []
    for sigma in bar(sigmas, desc="probing", unit="noise level"):
        parts = []
        for part in pipe.scheduler.noised(x0, noise, _time(pipe, sigma)).split(batch_size):
            found = encoder_features(pipe, _filled(part).to(pipe.device), sigma)
            parts.append({name: features[: len(part)] for name, features in found.items()})
        for name in parts[0]:
            features = torch.cat([part[name].cpu() for part in parts]).numpy()
            for kind, predict in PROBES.items():
                found = predict(features[held_out:], labels[held_out:], features[:held_out])
                accuracy = float((found == labels[:held_out]).mean())
                results.append({"sigma": sigma, "features": name, "probe": kind, "accuracy": accuracy})
    return results
