"""A trained pipeline as others get it: its model card, and its upload to the Hub."""

import html
import json
import re
import shlex
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, create_repo, upload_folder

from ..data.latents import LatentDataset
from ..data.pictures import ImageDataset
from ..evaluation.catalogue import METRICS, SCORES
from ..files import written_aside
from ..pipelines.pipeline_sddit import SDDiTPipeline
from .configuration import RunConfig, without_places
from .metrics import read_metrics

TEMPLATE = Path(__file__).parent / "model_card.md"
# What is uploaded of an output folder; its checkpoints and trial samples are not.
SHARED = (
    "README.md", "model_index.json", "*.py", "transformer/*", "scheduler/*", "vae/*",
    "unet/*", "text_encoder/*", "tokenizer/*", "safety_checker/*", "feature_extractor/*", "image_encoder/*",
    "samples.png", "curves.png", "metrics.jsonl", "training_config.json",
)  # fmt: skip


def open_repo(name: str) -> str:
    """Makes a model repository on the Hub where there is none; returns its full name, `user/name`.

    Raises:
        ValueError: the name is wrong, nobody is logged in or may not write there, or there is no Hub.
    """
    try:
        return create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # those of the client's HTTP library too, which is not always the same
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"--push_to_hub: there is no writing to {name!r}: {reason} Log in with `hf auth login`."
        ) from None


def upload(folder: Path, repo: str) -> str:
    """Uploads a pipeline with its card, pictures and curves; returns its address.

    Raises:
        OSError: the Hub did not take it; the folder is as it was.
    """
    try:
        return upload_folder(folder_path=folder, repo_id=repo, allow_patterns=list(SHARED)).repo_url
    except Exception as error:
        patterns = " ".join(f"--include '{pattern}'" for pattern in SHARED)
        raise OSError(
            f"The pipeline is complete in {folder}/, but was not uploaded to {repo}: {error} "
            f"Try again: hf upload {shlex.quote(repo)} {shlex.quote(str(folder))} . {patterns}"
        ) from error


def write_card(
    folder: Path,
    repo: str,
    pipe: SDDiTPipeline,
    config: RunConfig,
    dataset: ImageDataset | LatentDataset,
) -> None:
    """Writes the model card, README.md, of a training's output folder.

    Args:
        folder: has what there is of the run's metrics.jsonl, samples.png and curves.png.
        repo: the name by which the card's snippet loads the pipeline.
        pipe: what is in the folder.
        dataset: what it was trained on.
    """
    path = folder / "metrics.jsonl"
    rows = read_metrics(path) if path.is_file() else []
    (source, public), about = _source_of(dataset), config.card()
    network = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    scores = [score for row in rows[-1:] for score in row.items() if score[0] in METRICS]
    start = rows[0] if config.scores_start and rows else {}
    title = one_line(repo.split("/")[-1])
    foreign = pipe.transformer if hasattr(pipe.transformer, "snippet") else None  # of a pipeline of diffusers
    data = _data_of(title, config, source, public, scores, foreign)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=markdown(title),
        repo=python_text(repo),
        method=markdown(about["method"]),
        program=about["program"],
        rows=about["rows"],
        distilled=markdown(about["distilled"]),
        discriminates=about["discriminates"],
        start=about["start"] and markdown(without_places({"start": about["start"]})["start"]),
        source=markdown(source),
        images=len(dataset),
        classes=dataset.num_classes,
        steps=config.max_train_steps,
        weights=sum(weight.numel() for weight in pipe.transformer.parameters()),
        side=pipe.transformer.config.sample_size * pipe.vae_scale_factor,
        call=None if foreign else example_call(pipe, about["guided"]),
        foreign=foreign,
        snippet=foreign and foreign.snippet(repo, config.trial_steps, 0, about["guided"]),
        settings={
            name: markdown(str(value))
            for name, value in (_settings(config) | {"transformer": json.dumps(network)}).items()
        },
        scores=[
            (_score_name(key, config), *(f"{row[key]:.4g}" for row in (start, rows[-1]) if key in row))
            for key, _ in scores
        ],
        pictures=[picture for picture in ("samples.png", "curves.png") if (folder / picture).is_file()],
    )
    with written_aside(folder / "README.md", "w") as file:
        file.write(str(card))


def _data_of(
    title: str, config: RunConfig, source: str, public: str | None, scores: list[tuple[str, float]], foreign
) -> ModelCardData:
    """What the Hub is told of the model."""
    about, task = config.card(), foreign.task if foreign else "unconditional-image-generation"
    tags = about["tags"]
    return ModelCardData(
        # None: that of others' weights, which nobody has told.
        license=None if foreign or about["start"] else "apache-2.0",
        library_name="diffusers",
        pipeline_tag=task,
        tags=tags if foreign else ["sd-dit", *tags, "class-conditional", "diffusion-transformer"],
        datasets=[public] if public else None,
        model_name=title,
        eval_results=[
            EvalResult(
                task_type=task, dataset_type=public or "custom",
                dataset_name=source, metric_type=METRICS[key][0],
                metric_name=_score_name(key, config), metric_value=round(value, 4),
            )
            for key, value in scores
        ]
        or None,
    )  # fmt: skip


def one_line(name: str) -> str:
    """A foreign name without line breaks and what else cannot be seen."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())


def markdown(name: str) -> str:
    """Markdown, also of a table's cell, that shows a foreign name as it is."""
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(one_line(name), quote=False))


def python_text(text: str) -> str:
    """Python of a text: in double quotes, where it has no quotes itself."""
    quoted = repr(text)
    return quoted if "'" in text or '"' in text else f'"{quoted[1:-1]}"'


def example_call(pipe: SDDiTPipeline, guided: bool = True) -> str:
    """Python that makes and saves an image of [`example_class`] with `pipe`.

    Args:
        guided: whether it samples with guidance, where there are classes.
    """
    label = example_class(pipe)
    scale = ", guidance_scale=1.5" if guided and label else ""
    return f'pipe(class_labels=[{label}]{scale}).images[0].save("sample.png")'


def example_class(pipe: SDDiTPipeline) -> str | None:
    """Python of a class: its name, or its number where no name is its own; None without classes.

    It is the third from the end, a 7 of the digits, or the first of fewer.
    """
    if not (classes := pipe.transformer.config.num_classes):
        return None
    numbers = sorted(pipe.id2label) or range(classes)
    number = numbers[max(0, len(numbers) - 3)]
    name = pipe.id2label.get(number, "")
    return python_text(name) if pipe.label2ids.get(name.strip().lower()) == [number] else str(number)


def _source_of(dataset: ImageDataset | LatentDataset) -> tuple[str, str | None]:
    """What the pictures were, for people, and their name on the Hub if they have one."""
    name = dataset.source
    if name == "digits":
        return "scikit-learn's handwritten digits", None
    if re.fullmatch(r"[a-zA-Z0-9][\w.-]*/[\w.-]+", name, re.ASCII) and not Path(name).exists():
        return name, name
    return one_line(Path(name).name), None  # of a folder or URL, without where it was


def _score_name(key: str, config: RunConfig) -> str:
    score, extractor = METRICS[key]
    extractor = {"inception": "Inception"}.get(extractor, extractor)
    made = f"{config.evaluation_samples} samples, {config.trial_steps} steps, no guidance"
    return f"{SCORES[score].title} ({extractor}, {made})"


def _settings(config: RunConfig) -> dict[str, object]:
    """What of the configuration tells how it was trained."""
    names = (
        "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "adam_beta1",
        "adam_beta2", "ema_decay", "mixed_precision", "seed", *config.own(),
    )  # fmt: skip
    settings = without_places({name: getattr(config, name) for name in names})
    return {name: settings[name] for name in names}
