"""Networks that turn images into features, all of them feature extractors of torch-fidelity.

- `sddit-inception`: ADM's Inception, with the spatial features of sFID, which torch-fidelity's does not give;
- `sddit-dinov2`: DINOv2 as EDM2 uses it for FD-DINOv2;
- `sddit-classifier`, `sddit-resnet` and `sddit-pixels`: small ones without downloads. Their scores compare
  with themselves alone: two runs scored on the same data may be compared, figures of a paper may not.

Each takes uint8 `[b, 3, h, w]` and gives some of: `features` `[b, d]`, for FID, KID, precision and recall,
`logits` `[b, classes]`, for the Inception Score, and `spatial` `[b, d']`, for sFID.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import register_feature_extractor
from transformers import Dinov2Model

from ..files import sha256_of
from .cache import hash_of
from .classifiers import load_classifier

# torch-fidelity's conversion of TensorFlow's weights, as it and others name it; the hash is in the name.
_INCEPTION = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
_INCEPTION_SHA256 = "6726825d"  # its first digits


class Extractor(FeatureExtractorBase):
    """What the extractors have in common.

    Attributes:
        identity: what tells its features from those of others, for caches and records.
    """

    provided: tuple[str, ...] = ("features",)
    identity = ""

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        return cls.provided

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


class InceptionExtractor(Extractor):
    """Inception v3 of 2015: pool_3, the logits without bias, and a part of mixed_6's first branch.

    That is `Mixed_6d.branch1x1`, the first 7 of its 192 channels of 17 x 17, channels last: 2,023 numbers.

    Raises:
        ValueError: the weights are not those of this network.
    """

    provided = ("features", "logits", "spatial")

    def __init__(self, name: str, features_list, feature_extractor_weights_path: str | None = None, **kwargs):
        super().__init__(name, features_list)
        path = find_inception(feature_extractor_weights_path)
        with path.open("rb") as file:
            self.identity = f"inception-{sha256_of(file)}"
        try:
            torch.load(path, weights_only=True)  # torch-fidelity would run what is in a pickle
            self.inception = FeatureExtractorInceptionV3(
                name, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except Exception as error:  # what torch makes of a damaged or foreign file
            problem = str(error).strip().split("\n")[0]
            raise ValueError(f"{path} does not hold the weights of Inception v3: {problem}") from None
        self.inception.Mixed_6d.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, arguments, output: Tensor) -> None:
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    @property
    def is_published(self) -> bool:
        """Whether these are the weights that the field's figures are made with."""
        return self.identity.startswith(f"inception-{_INCEPTION_SHA256}")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features, logits = self.inception(images)
        found = {"features": features, "logits": logits, "spatial": self._spatial}
        return tuple(found[name] for name in self.features_list)


def find_inception(path: str | None = None) -> Path:
    """The file of Inception's weights: the path if given, one in torch's hub cache, or else downloaded there.

    Raises:
        ValueError: it is not there and cannot be downloaded, or a cached one is damaged.
    """
    if path:
        if not Path(path).is_file():
            raise ValueError(f"There are no Inception weights in {path}.")
        return Path(path)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in _INCEPTION:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                if not sha256_of(file).startswith(_INCEPTION_SHA256):
                    raise ValueError(f"{folder / name} is damaged: remove it, and it is downloaded again.")
            return folder / name
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / _INCEPTION[0]
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(target), hash_prefix=_INCEPTION_SHA256)
    except (OSError, RuntimeError) as error:  # no network, or another content
        raise ValueError(
            f"Inception's weights cannot be downloaded from {URL_INCEPTION_V3} ({error}); "
            "download them elsewhere and name the file with --inception_weights."
        ) from None
    return target


class DinoExtractor(Extractor):
    """DINOv2's [CLS], as EDM2 measures FD-DINOv2 (Karras et al. 2024): 224 pixels, bicubic, antialiased.

    Args:
        feature_extractor_weights_path: a `Dinov2Model`, a folder or a name on the Hub.

    Raises:
        ValueError: there is none.
    """

    def __init__(
        self, name: str, features_list,
        feature_extractor_weights_path: str | None = None, **kwargs,
    ):  # fmt: skip
        super().__init__(name, features_list)
        source = feature_extractor_weights_path or "facebook/dinov2-large"
        try:
            self.model = Dinov2Model.from_pretrained(source)
        except Exception as error:  # whatever the Hub, the network and the reader raise
            problem = str(error).strip().split("\n")[0]
            raise ValueError(f"DINOv2 cannot be loaded from {source}: {problem}") from None
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in self.model.parameters()))
        self.identity = f"dinov2-{digest.hexdigest()}"
        self._fit_positions(224 // self.model.config.patch_size)
        self.requires_grad_(False).eval()

    def _fit_positions(self, side: int) -> None:
        """Interpolates the positions once, with the offset of 0.1 that the original code has.

        transformers leaves it out, which moves FD-DINOv2 by more than a percent.
        """
        embeddings = self.model.embeddings
        cls, grid = embeddings.position_embeddings.detach().split(
            [1, embeddings.patch_embeddings.num_patches], 1
        )
        trained = int(grid.shape[1] ** 0.5)
        grid = grid.unflatten(1, (trained, trained)).permute(0, 3, 1, 2)  # [1, d, trained, trained]
        scale = (side + 0.1) / trained
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")  # [1, d, side, side]
        positions = torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)
        embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pixels = F.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True) / 255
        return (self.model((pixels - self.mean) / self.std).last_hidden_state[:, 0],)


class PixelExtractor(Extractor):
    """The pixels themselves, in -1..1, of pictures brought to at most 16 x 16.

    They are divided by the root of 3, so that distances between grey pictures are those of one channel.
    """

    identity = "pixels"

    def __init__(self, name: str, features_list, **kwargs):
        super().__init__(name, features_list)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pixels = images.float() / 127.5 - 1
        if max(images.shape[2:]) > 16:
            pixels = F.adaptive_avg_pool2d(pixels, 16)
        return (pixels.flatten(1) / 3**0.5,)


class ClassifierExtractor(Extractor):
    """The 128 features and the logits of one of `CLASSIFIERS`, which the name tells ([`train_classifier`]).

    Raises:
        ValueError: the file does not hold its weights.
    """

    provided = ("features", "logits")

    def __init__(self, name: str, features_list, feature_extractor_weights_path: str | None = None, **kwargs):
        super().__init__(name, features_list)
        if not feature_extractor_weights_path:
            raise ValueError("The classifier has weights of its own data: train_classifier makes them.")
        kind = name.removeprefix("sddit-")
        self.net = load_classifier(feature_extractor_weights_path, kind)
        self.requires_grad_(False).eval()
        self.identity = f"{kind}-{hash_of('', self.net.state_dict())}"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.net.features(images)
        found = {"features": features, "logits": self.net.head(features)}
        return tuple(found[name] for name in self.features_list)


for _name, _class in (
    ("sddit-inception", InceptionExtractor),
    ("sddit-dinov2", DinoExtractor),
    ("sddit-classifier", ClassifierExtractor),
    ("sddit-resnet", ClassifierExtractor),
    ("sddit-pixels", PixelExtractor),
):
    register_feature_extractor(_name, _class)
