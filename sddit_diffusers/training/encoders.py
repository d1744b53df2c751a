"""Frozen encoders, whose patch tokens a network's own are aligned to (REPA).

Shapes: b batch, g patches of the network down and across, d width of the encoder's tokens.
"""

import hashlib
import inspect
import math
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoImageProcessor, AutoModel

from ..cli import one_line
from ..data.order import Batch
from ..data.shards import Manifest, find_latents
from ..evaluation.cache import default_cache
from ..evaluation.classifiers import SmallClassifier, load_classifier, train_classifier
from ..evaluation.image_sets import DatasetImages
from ..models.attention_cpu import use_cpu_attention
from ..pipelines.loading import load_pipeline, sha256_of_weights
from .auxiliary import network_inputs

CLASSIFIER = "classifier"
_ALMOST_CLEAN = 0.002  # noise over signal, SD-DiT's of the teacher's view


class Encoder(nn.Module):
    """A frozen network that looks at a batch.

    Args:
        network: what it is; its weights are hashed as they come.
        dtype: of its weights; None for bfloat16, on a CPU, which is slow at that, float32.

    Attributes:
        sha256: of its weights, and of what else decides its tokens.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None = None):
        super().__init__()
        self.sha256 = sha256_of_weights(network)
        self.network, self.wanted = network.requires_grad_(False).eval(), dtype

    @torch.no_grad()
    def forward(self, batch: Batch, side: int) -> Tensor:
        """Its patch tokens in float32, `[b, g g, d]` row by row, for a network of `side` = g.

        Raises:
            ValueError: it has not as many.
        """
        device = batch.x0.device
        dtype = self.wanted or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        with _disable_current_modes():  # a dry run has its weights, too
            self.fit(side)
            if (self.weight.device, self.weight.dtype) != (device, dtype):
                self.to(device, dtype)
        with torch.autocast(device.type, enabled=False):
            return self.tokens(batch, side).float()

    @property
    def weight(self) -> Tensor:
        """One of its weights, which tells where they are and in which precision."""
        return next(self.network.parameters())

    def fit(self, side: int) -> None:
        """Makes it ready for a network of `side` patches down and across."""

    def tokens(self, batch: Batch, side: int) -> Tensor:
        """As `forward`, of its own precision."""
        raise NotImplementedError

    def check_grid(self, found: int, side: int) -> None:
        """Raises a ValueError where it gives another number of tokens than the network has patches."""
        if found != side**2:
            raise ValueError(
                f"repa_encoder gives {found} patch tokens, and the network has {side**2} patches "
                f"({side} x {side}); they must be as many."
            )


class TransformersEncoder(Encoder):
    """A vision transformer of transformers, such as DINOv2.

    As in REPA's code for DINOv2 a picture is divided by 255, normalised, and resized bicubically so that the
    encoder has as many patches as the network; learned positions are resampled once, bicubically and with a
    filter, where the model keeps them as transformers' ViT and DINOv2 do, and elsewhere as the model does.

    Args:
        mean, std: of its image processor, by channel.

    Raises:
        ValueError: it has no patches.
    """

    def __init__(self, network: nn.Module, mean: list[float], std: list[float], **arguments):
        network = getattr(network, "vision_model", network)  # of one that reads texts too
        super().__init__(network, **arguments)
        self.patch_size = getattr(network.config, "patch_size", None)
        if not isinstance(self.patch_size, int):
            self.refuse()
        self.sha256 = hashlib.sha256(f"{self.sha256} {mean} {std}".encode()).hexdigest()
        self.resampled = "interpolate_pos_encoding" in inspect.signature(network.forward).parameters
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        positions = getattr(getattr(network, "embeddings", None), "position_embeddings", None)
        self.positions = None  # of [CLS] and a grid, as they were learned
        if isinstance(positions, nn.Parameter) and math.isqrt(n := positions.shape[1] - 1) ** 2 == n:
            self.positions = positions.detach().clone()

    def refuse(self) -> None:
        """Raises a ValueError that names its class."""
        raise ValueError(
            f"repa_encoder is a {type(self.network).__name__}, which gives no tokens of square patches; a "
            "vision transformer does, such as facebook/dinov2-base."
        )

    def fit(self, side: int) -> None:
        """Resamples positions `[1, 1 + n n, d]` for g x g patches."""
        if self.positions is None or self.network.embeddings.position_embeddings.shape[1] == 1 + side**2:
            return
        trained = math.isqrt(self.positions.shape[1] - 1)
        cls, grid = self.positions.float().split([1, trained**2], dim=1)
        grid = grid.unflatten(1, (trained, trained)).permute(0, 3, 1, 2)  # [1, d, n, n]
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        old = self.network.embeddings.position_embeddings
        self.network.embeddings.position_embeddings = nn.Parameter(
            torch.cat([cls, grid], dim=1).to(old.device, old.dtype), requires_grad=False
        )

    def tokens(self, batch: Batch, side: int) -> Tensor:
        pixels, size = batch.pictures.float() / 255, (side * self.patch_size,) * 2
        self.mean, self.std = self.mean.to(pixels.device), self.std.to(pixels.device)
        pixels = (pixels - self.mean) / self.std
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic")
        options = {"interpolate_pos_encoding": True} if self.resampled else {}
        tokens = self.network(pixels.to(self.weight.dtype), **options).last_hidden_state
        if tokens.ndim != 3:
            self.refuse()
        most_leading = 1 + (getattr(self.network.config, "num_register_tokens", 0) or 0)  # with [CLS]
        leading = tokens.shape[1] - side**2
        if not 0 <= leading <= most_leading:
            self.check_grid(tokens.shape[1] - most_leading, side)
        return tokens[:, leading:]


class PipelineEncoder(Encoder):
    """The encoder of a pipeline of this package, which sees the samples almost without noise.

    Raises:
        ValueError: its scheduler is of diffusers, which does not say how samples are noised.
    """

    def __init__(self, network: nn.Module, process, **arguments):
        super().__init__(network, **arguments)
        if not hasattr(process, "noised"):
            raise ValueError(
                f"repa_encoder has a {type(process).__name__}; its scheduler must be one of this package."
            )
        self.process = process
        use_cpu_attention(network)

    def tokens(self, batch: Batch, side: int) -> Tensor:
        x0, config = batch.x0.float(), self.network.config
        if x0.shape[1] != config.in_channels:
            raise ValueError(
                f"repa_encoder takes samples of {config.in_channels} channels, and these have {x0.shape[1]}."
            )
        self.check_grid((x0.shape[-1] // config.patch_size) ** 2, side)
        t = torch.full((len(x0), 1, 1, 1), self.process.time_of(_ALMOST_CLEAN), device=x0.device)
        sample, timestep = network_inputs(self.process, self.process.noised(x0, torch.zeros_like(x0), t), t)
        tokens = self.network(sample.to(self.weight.dtype), timestep, None).encoder_hidden_states
        return tokens[:, tokens.shape[1] - side**2 :]


class ClassifierEncoder(Encoder):
    """The small classifier of evaluation: its last convolution, averaged over each patch."""

    def __init__(self, network: SmallClassifier, dtype: torch.dtype = torch.float32):
        super().__init__(network, dtype)

    def tokens(self, batch: Batch, side: int) -> Tensor:
        return F.adaptive_avg_pool2d(self.network.map(batch.pictures), side).flatten(2).transpose(1, 2)


def is_pipeline(name: str) -> bool:
    """Whether a folder, or what has the name on the Hub, is a pipeline."""
    if name == CLASSIFIER or Path(name).exists():
        return (Path(name) / "model_index.json").is_file()
    return _is_pipeline_of_hub(name)


@cache
def _is_pipeline_of_hub(name: str) -> bool:
    try:
        DiffusionPipeline.load_config(name)
    except Exception:  # whatever the Hub and the network raise; the next one to look says so
        return False
    return True


def build_encoder(options) -> Encoder:
    """The encoder that a run's options name.

    It leaves the random numbers as they are, and has its weights in a dry run too, which fills no others.

    Args:
        options: of the run: `repa_encoder`, where its pictures are from, and whether it is a dry run, for
            which no classifier is trained.

    Raises:
        ValueError: there is none of that name, or it is no such encoder.
    """
    name = options.repa_encoder
    with torch.random.fork_rng(devices=[]), _disable_current_modes(), torch.device("cpu"):
        if name == CLASSIFIER:
            return ClassifierEncoder(SmallClassifier(10) if options.dry_run else classifier_of(options))
        if name.endswith(".safetensors"):
            return ClassifierEncoder(load_classifier(name))
        if is_pipeline(name):
            pipe = load_pipeline(name)
            return PipelineEncoder(pipe.transformer, pipe.scheduler)
        return TransformersEncoder(*load_transformers(name))


def load_transformers(name: str) -> tuple[nn.Module, list[float], list[float]]:
    """A model of transformers, and its image processor's mean and standard deviation.

    Raises:
        ValueError: there is none.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        model = AutoModel.from_pretrained(name, dtype=torch.float32)
        return model, [*processor.image_mean], [*processor.image_std]
    except Exception as error:  # whatever the Hub, the network and the reader raise
        raise ValueError(
            f"repa_encoder is {name!r}; it must be {CLASSIFIER!r}, its file, a pipeline or a vision "
            f"model of transformers: {one_line(error)}"
        ) from None


def classifier_of(options) -> SmallClassifier:
    """The small classifier of the pictures that a run is trained on, trained now or found in the cache.

    Raises:
        ValueError: the pictures have no labels, or are not beside their latents.
    """
    name, columns = options.dataset_name, (options.image_column, options.label_column)
    size = options.network()["sample_size"]
    root = None if name == "digits" else find_latents(name)
    if root is not None:
        manifest = Manifest.read(root)
        manifest.check_pictures(root)
        size, columns = manifest.resolution, ("picture", "label" * bool(manifest.num_classes))
    images = DatasetImages(name, size, *columns, split="train")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_classifier(train_classifier(images, default_cache(), device))
