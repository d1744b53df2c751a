"""Small networks that are trained on labelled pictures, whose features score, or guide a training."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..cli import one_line
from ..data.order import prefetch
from ..launching import bar
from ..seeds import generator_for
from .cache import keep_tensors, kept_tensors
from .image_sets import DatasetImages


class SmallClassifier(nn.Module):
    """Four convolutions, the mean over the picture, and a linear layer; pictures come to at most 64 x 64."""

    def __init__(self, num_classes: int):
        super().__init__()
        layers, channels = [], 3
        for width, stride in ((32, 1), (64, 2), (128, 2), (128, 1)):
            convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.GroupNorm(8, width), nn.GELU()]
            channels = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """`[b, 128]` of uint8 `[b, 3, h, w]`."""
        return self.map(images).mean((2, 3))

    def map(self, images: Tensor) -> Tensor:
        """The same before the mean, `[b, 128, h', w']`: a quarter of the picture's sides, at most 16."""
        return self.body(small_pixels(images))


class ResidualClassifier(nn.Module):
    """Two residual blocks of two convolutions each, the mean over the picture, and a linear layer.

    It guides nothing, so that it can judge what the other guided.
    It shares no layer, no seed and no order of the pictures with [`SmallClassifier`]. Pictures come to at
    most 64 x 64.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.body = nn.Sequential(stem, ResidualBlock(32, 64), ResidualBlock(64, 128), nn.GroupNorm(8, 128))
        self.head = nn.Linear(128, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """`[b, 128]` of uint8 `[b, 3, h, w]`."""
        return F.silu(self.body(small_pixels(images))).mean((2, 3))


class ResidualBlock(nn.Module):
    """Two convolutions, the first of which halves the sides, beside one of single pixels."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.skip = nn.Conv2d(channels, width, 1, stride=2, bias=False)
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, width, 3, 2, padding=1, bias=False),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.body(x)


def small_pixels(images: Tensor) -> Tensor:
    """uint8 in -1..1, brought to at most 64 x 64."""
    pixels = images.float() / 127.5 - 1
    return F.adaptive_avg_pool2d(pixels, 64) if max(images.shape[2:]) > 64 else pixels


# The networks of labelled pictures that score or guide: class, seed, and steps of training.
CLASSIFIERS = {"classifier": (SmallClassifier, 0, 300), "resnet": (ResidualClassifier, 1, 800)}


def load_classifier(path: str | Path, kind: str = "classifier") -> SmallClassifier | ResidualClassifier:
    """The classifier of a file.

    Args:
        kind: of `CLASSIFIERS`.

    Raises:
        ValueError: the file does not hold its weights.
    """
    try:
        weights = load_file(path)
        net = CLASSIFIERS[kind][0](len(weights["head.bias"]))
        net.load_state_dict(weights)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold a classifier's weights: {one_line(error)}.") from None
    return net


def train_classifier(
    images: DatasetImages,
    cache_dir: Path,
    device: torch.device = "cpu",
    steps: int | None = None,
    kind: str = "classifier",
) -> Path:
    """Weights of a classifier, trained on labelled pictures in seconds or minutes, or found in the cache.

    A tenth of the pictures is held out; its accuracy, which is printed and stored in the file, says how much
    the features know.

    Args:
        kind: of `CLASSIFIERS`, which has the number of steps where none is given.

    Raises:
        ValueError: the pictures have no labels.
    """
    if images.labels is None:
        raise ValueError(f"The classifier needs labelled pictures, and {images.name} has no labels.")
    network, seed, usual = CLASSIFIERS[kind]
    steps = steps or usual
    path = cache_dir / f"{kind}-{images.sha256[:16]}-{steps}.safetensors"
    if kept_tensors(path) is None:
        weights, accuracy = _fit_classifier(images, device, network, seed, steps)
        keep_tensors(path, weights, accuracy=f"{accuracy:.4f}", data=images.name)
        name = kind.capitalize()
        print(f"{name} of {images.name}: {accuracy:.1%} of held-out pictures right", file=sys.stderr)
    return path


def _fit_classifier(
    images: DatasetImages, device, network: type[nn.Module], seed: int, steps: int
) -> tuple[dict[str, Tensor], float]:
    """The weights, and the accuracy on the pictures held out."""
    order = torch.randperm(len(images), generator=generator_for(seed))
    held_out, used = order[: len(images) // 10], order[len(images) // 10 :]
    labels = torch.from_numpy(images.labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = network(images.dataset.num_classes).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)

    def draws():
        for step in range(steps):
            rows = used[torch.randint(len(used), (128,), generator=generator_for(seed, step))]
            yield images.dataset.pixels(rows.tolist()), labels[rows]

    for pixels, targets in bar(prefetch(draws()), total=steps, desc="training the classifier", leave=False):
        loss = F.cross_entropy(net.head(net.features(pixels.to(device))), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    right = 0
    with torch.no_grad():
        for rows in held_out.split(256):
            logits = net.head(net.features(images.dataset.pixels(rows.tolist()).to(device))).cpu()
            right += (logits.argmax(1) == labels[rows]).sum().item()
    weights = {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
    return weights, right / max(1, len(held_out))
