"""What a pipeline is, for the head of the page: from its parts, training and model card."""

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download

from ..pipelines.loading import DIGITS, is_embedded
from ..pipelines.pipeline_sddit import SDDiTPipeline, default_steps
from ..pipelines.sampling import image_size
from ..training.methods import METHODS

PAPER = "https://arxiv.org/abs/2403.17004"
HUB = "https://huggingface.co"
_KINDS = {1: "grey", 3: "colour"}


@dataclass
class About:
    """What is told of a pipeline.

    Attributes:
        title: its name, without the folders above it.
        sentence: method, size, pictures, classes and data.
        card: the address of its model card, empty if it is not on the Hub.
        guided: whether guidance is of use: there are classes, and distillation has not learnt it.
    """

    title: str
    sentence: str
    card: str
    guided: bool

    def html(self) -> str:
        """The head of the page; foreign names are text in it."""
        links = [("Paper", PAPER)]
        if self.card:
            links.insert(0, ("Model card", self.card))
        shown = " · ".join(
            f'<a href="{html.escape(address)}" target="_blank" rel="noopener">{name}</a>'
            for name, address in links
        )
        return f"<h1>{html.escape(self.title)}</h1><p>{html.escape(self.sentence)} <span>{shown}</span></p>"


def about(pipe: SDDiTPipeline, model: str) -> About:
    """Tells what the pipeline is that `load_pipeline` found by a name. Never fails for want of a file."""
    folder = DIGITS if is_embedded(model) else Path(model)
    settings, card = _settings(folder, model), _card(folder, model)
    on_hub = is_hub_name(model) and not folder.is_dir()
    classes = pipe.transformer.config.num_classes
    weights = sum(weight.numel() for weight in pipe.transformer.parameters())
    side, channels = image_size(pipe), (pipe.vae or pipe.transformer).config.in_channels
    kind = _KINDS.get(channels, f"{channels}-channel")
    parts = [
        f"{_method(pipe, settings)}: a diffusion transformer of {_count(weights)} weights",
        f"{kind} pictures of {side} × {side} pixels{f' of {classes} classes' * bool(classes)}",
    ]
    sentence = " for ".join(parts)
    if data := _data(settings, card):
        sentence += f", trained on {data}"
    if "objective" in settings:
        sentence += f", distilled to {default_steps(pipe.scheduler)} steps"
    return About(
        str(card.get("model_name") or (model if on_hub else folder.resolve().name)),
        f"{sentence}.",
        f"{HUB}/{model}" if on_hub else "",
        bool(classes) and not settings.get("distil_guidance"),
    )


def is_hub_name(name: str) -> bool:
    """Whether it can be a repository's, `user/name`."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII))


def _count(number: int) -> str:
    """A number in words: 431 thousand, 1.1 million."""
    if number < 1e6:
        return f"{number / 1e3:.0f} thousand"
    return f"{number / 1e6:.1f} million" if number < 1e9 else f"{number / 1e9:.1f} billion"


def _method(pipe: SDDiTPipeline, settings: dict) -> str:
    """The title of the method, by the settings or else by the network."""
    row = METHODS.get(str(settings.get("method")))
    rows = [row] if row else [each for each in METHODS.values() if each.transformer is type(pipe.transformer)]
    return rows[0].title if rows else type(pipe.transformer).__name__


def _data(settings: dict, card: dict) -> str:
    """What it was trained on, for people, as far as it is told."""
    name = str(settings.get("dataset_name") or "")
    if name == "digits":
        return "scikit-learn's handwritten digits"
    if is_hub_name(name) and not Path(name).exists():
        return name
    named = card.get("datasets")
    if isinstance(named, list) and named:
        return ", ".join(map(str, named))
    return Path(name).name


def _file(folder: Path, model: str, name: str) -> str:
    """A file of a pipeline as text, empty where there is none."""
    if not folder.is_dir() and not is_hub_name(model):
        return ""
    try:
        path = folder / name if folder.is_dir() else Path(hf_hub_download(model, name, etag_timeout=3))
        return path.read_text(encoding="utf-8")
    except Exception:  # whatever the Hub and its client raise: nothing here is needed
        return ""


def _settings(folder: Path, model: str) -> dict:
    try:
        settings = json.loads(_file(folder, model, "training_config.json"))
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _card(folder: Path, model: str) -> dict:
    """What the model card tells the Hub."""
    text = _file(folder, model, "README.md")
    try:
        return ModelCard(text).data.to_dict() if text.startswith("---") else {}
    except Exception:  # a foreign text, read as YAML
        return {}
