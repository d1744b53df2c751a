"""Makes one file of a transformer, or a pipeline of other people's weights.

    sddit convert sddit-digits digits.safetensors
    sddit convert DiT-XL-2-256x256.pt dit
    sddit convert 2000000.pt maskdit --method maskdit --vae stabilityai/sd-vae-ft-mse
    sddit convert SiT-XL-2-256.pt sit --origin sit --vae stabilityai/sd-vae-ft-ema

The source is a pipeline of this package or a DiTPipeline of diffusers (a folder or a name on the Hub), the
folder of their transformer, or a file: one that this program wrote, or a checkpoint of facebookresearch/DiT,
Anima-Lab/MaskDiT, willisma/SiT or sihyun-yu/REPA. What those were trained for, and what not, is in
`originals.py`.

An output that ends in .safetensors holds the transformer with its config, for `from_single_file`. Any other
is the folder of a pipeline, for `from_pretrained` and `train_sddit.py --pretrained_model_name_or_path`.
"""

import argparse
import inspect
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, SchedulerMixin
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .cli import Parser, check_options, one_line, one_line_errors, option, shortened
from .files import parse_json, remove, save_tensors
from .models.originals import FLOWS, ORIGINS, origin_of, translate
from .models.presets import read_changes
from .models.transformer_sddit import PatchTransformer2DModel, read_single_file
from .pipelines.loading import load_pipeline, load_vae, way_from_checkpoint
from .pipelines.pipeline_sddit import SDDiTPipeline
from .schedulers.scheduling_edm_heun import EDMHeunScheduler
from .schedulers.scheduling_interpolant import InterpolantScheduler
from .training.methods import METHODS

_PICKLES = (".pt", ".pth", ".ckpt", ".bin")
SCHEDULERS = {kind.__name__: kind for kind in (EDMHeunScheduler, InterpolantScheduler)}
_METHODS = {method.transformer.__name__: name for name, method in METHODS.items()}


@dataclass
class ConvertConfig:
    """The settings of a conversion."""

    method: str = option(
        "",
        "the network; if not given the source's own, dit for SiT and REPA, sddit for DiT and MaskDiT",
        choices=("", "sddit", "dit", "maskdit"),
    )
    origin: str = option(
        "",
        "whose weights others' are, where their names do not tell: SiT's are named as DiT's",
        choices=("", *ORIGINS),
    )
    transformer: str = option(
        "{}", "what weights do not tell: num_attention_heads, the size of a decoder that is new",
        metavar="JSON",
    )  # fmt: skip
    num_classes: int = option(
        0, "classes of a DiT, whose table may have a row more; 0: 1000, or else all rows but one", low=0
    )
    vae: str = option("", "of the pipeline: a folder or a name on the Hub; the source's own if not given")

    def __post_init__(self):
        check_options(self)


@dataclass
class Source:
    """What was read.

    Attributes:
        weights: by the names of this package, or by their own where they have none.
        network: arguments of the transformer; of others' weights, those that are not in the shapes.
        method: of a transformer of this package; None for others' weights.
    """

    weights: dict[str, Tensor]
    network: dict = field(default_factory=dict)
    method: str | None = None
    scheduler: SchedulerMixin | None = None
    vae: ModelMixin | None = None
    id2label: dict | None = None


def read_source(name: str) -> Source:
    """Reads what can be converted.

    Raises:
        ValueError: it is not there, it is damaged, or it is something else.
    """
    path = Path(name)
    if path.is_file() or path.suffix in (".safetensors", *_PICKLES):
        return _read_file(path)
    try:
        if (path / "config.json").is_file():
            kind = PatchTransformer2DModel.load_config(path)["_class_name"]
            return _read_transformer(kind, path, subfolder=None)
        index = DiffusionPipeline.load_config(name)
        if index["transformer"][1] != DiTTransformer2DModel.__name__:
            return _read_pipeline(name)
        source = _read_transformer(index["transformer"][1], name, subfolder="transformer")
        source.vae, source.id2label = load_vae(name), index.get("id2label")
        return source
    except Exception as error:  # whatever the Hub, the network and the readers raise
        raise ValueError(
            f"{name!r} cannot be loaded: {way_from_checkpoint(name) or _first_line(error)}"
        ) from None


def _read_file(path: Path) -> Source:
    if not path.exists():
        raise ValueError(f"There is no file {path}.")
    if path.suffix in _PICKLES:
        return Source(read_pickle(path))
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors, {', '.join(_PICKLES)}, or be a folder.")
    weights, config = read_single_file(path)
    if not config:
        return Source(weights)
    source = _ours(weights, config)
    with safe_open(path, framework="pt") as file:
        beside = file.metadata()
    source.scheduler = _read_scheduler(path, beside.get("scheduler", "null"))
    names = beside.get("id2label", "null")
    source.id2label = parse_json(names, ({str: str}, None), "table of class names", f"{path}: id2label")
    return source


def _read_scheduler(path: Path, text: str) -> SchedulerMixin | None:
    """The scheduler whose config a single file has beside the transformer's; None without."""
    try:
        config = json.loads(text)
        return config and SCHEDULERS[config["_class_name"]].from_config(config)
    except Exception as error:  # whatever the settings of somebody's file make of a scheduler
        raise ValueError(f"{path} has no scheduler of this package: {one_line(error)}") from None


def _read_transformer(kind: str, name: str | Path, subfolder: str | None) -> Source:
    if kind == DiTTransformer2DModel.__name__:
        theirs = DiTTransformer2DModel.from_pretrained(name, subfolder=subfolder)
        told = {key: theirs.config[key] for key in ("num_attention_heads", "sample_size")}
        told["num_classes"] = theirs.config.num_embeds_ada_norm
        return Source(theirs.state_dict(), told)
    if kind not in _METHODS:
        raise ValueError(
            f"it is a {kind}; allowed are {', '.join(_METHODS)}, {DiTTransformer2DModel.__name__}."
        )
    transformer = METHODS[_METHODS[kind]].transformer.from_pretrained(name, subfolder=subfolder)
    return _ours(transformer.state_dict(), config_of(transformer))


def _read_pipeline(name: str) -> Source:
    pipe = load_pipeline(name)
    source = _ours(pipe.transformer.state_dict(), config_of(pipe.transformer))
    source.scheduler, source.vae, source.id2label = pipe.scheduler, pipe.vae, pipe.id2label
    return source


def _ours(weights: dict[str, Tensor], config: dict) -> Source:
    network = {name: value for name, value in config.items() if not name.startswith("_")}
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in _METHODS:
        shown = shortened(kind).strip("'")
        raise ValueError(f"The file holds a {shown}; allowed are {', '.join(_METHODS)}.")
    return Source(weights, network, _METHODS[kind])


def check_network(network: dict, arguments: Mapping, weights: dict[str, Tensor]) -> None:
    """Holds the arguments of a network against what they can be, before it is built.

    Raises:
        ValueError: one that no network of these weights has.
    """
    sizes = range(1, 1 << 16)
    structure = {f"{name}?": (None, sizes) if name == "out_channels" else sizes for name in arguments}
    structure |= {f"{name}?": float for name in ("mlp_ratio", "timestep_scale", "timestep_shift")}
    # An encoder alone has no decoder; no classes are 0; a route may begin before the first block.
    numbers = range(1 << 16)
    structure |= {f"{name}?": numbers for name in ("num_decoder_layers", "num_classes", "route_start")}
    structure["route_end?"] = (None, numbers)
    parse_json(json.dumps(network), structure, "network", "the config")
    for name in ("num_layers", "num_decoder_layers"):
        if network.get(name, 0) > max(1000, len(weights)):
            raise ValueError(f"{name} is {network[name]}; the source has {len(weights)} weights.")
    if not 0 < network.get("mlp_ratio", 4) <= 64:
        raise ValueError(f"mlp_ratio is {network['mlp_ratio']}; it must be above 0 and at most 64.")
    patches = network.get("sample_size", 32) // network.get("patch_size", 2)
    if not 1 <= patches <= 1024:
        raise ValueError(
            f"sample_size is {network.get('sample_size', 32)}; that is 1 to 1024 patches a side."
        )


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, the averaged ones ("ema") where it has both; no code of it is run.

    Raises:
        ValueError: it holds code, it is damaged, or it is none.
    """
    try:
        # Both authors save their settings too: a Namespace has no code of its own.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever torch makes of foreign and damaged files
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        problem = f"it calls {foreign[1]}, and no code of a pickle is run" if foreign else _first_line(error)
        raise ValueError(f"{path} cannot be read: {problem}.") from None
    content = content if isinstance(content, dict) else {}
    inner = (content.get(key) for key in ("ema", "model", "state_dict"))
    weights = next((weights for weights in inner if isinstance(weights, dict)), content)
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


def choose(source: Source, config: ConvertConfig) -> tuple[str, str]:
    """Whose weights a source's are, '' for those of this package, and the method of their network.

    Raises:
        ValueError: settings that contradict the source or each other.
    """
    if source.method is not None:
        if config.origin:
            raise ValueError(f"origin is {config.origin!r}; the source is a transformer of this package.")
        return "", config.method or source.method
    origin = origin_of(source.weights, config.origin)
    method = config.method or ("dit" if origin in FLOWS else "sddit")
    if origin in FLOWS and method == "maskdit":
        raise ValueError(f"method is 'maskdit'; {ORIGINS[origin]}'s weights are for 'dit' or 'sddit'.")
    return origin, method


def scheduler_for(transformer: PatchTransformer2DModel) -> SchedulerMixin:
    """That of a transformer which came without: a time scale of its own is a flow's."""
    return EDMHeunScheduler() if transformer.config.timestep_scale == 1 else InterpolantScheduler()


def build(source: Source, config: ConvertConfig) -> tuple[PatchTransformer2DModel, list[str], list[str]]:
    """The transformer of a source.

    Returns:
        It, the names of its parameters that the source does not have, which are as initialised, from a fixed
        seed, and the source's names of the weights that it has no place for.

    Raises:
        ValueError: settings that are not the source's, or that are missing.
    """
    origin, method = choose(source, config)
    transformer = METHODS[method].transformer
    arguments = inspect.signature(transformer).parameters
    changes = read_changes(
        config.transformer, {name: each.default for name, each in arguments.items() if name != "out_channels"}
    )
    weights, network, origins = source.weights, source.network, {}
    if source.method is None:
        told = {"num_classes": config.num_classes} if config.num_classes else {}
        weights, origins, network = translate(weights, changes | network | told, origin)
    for name, value in changes.items():
        if network.get(name, value) != value:
            raise ValueError(f"transformer: {name} is {value}; the weights are of {network[name]}.")
    if source.method == "mdt" and method != "mdt":
        network = {name: value for name, value in network.items() if name != "num_decoder_layers"}
    network = {name: value for name, value in (network | changes).items() if name in arguments}
    check_network(network, arguments, weights)
    torch.manual_seed(0)
    built = transformer(**network)
    fresh = built.state_dict()
    fitting = {
        name: weight
        for name, weight in weights.items()
        if name in fresh and weight.shape == fresh[name].shape
    }
    built.load_state_dict(fresh | fitting)
    missing = [name for name in fresh if name not in fitting]
    # What was made up for the source, as a mask token of zeros, is not of it.
    own = origins if source.method is None else dict.fromkeys(weights)
    return built, missing, [own[name] or name for name in weights if name not in fitting and name in own]


def config_of(transformer: PatchTransformer2DModel) -> dict:
    """What config.json would hold, without the place that it was loaded from."""
    config = json.loads(transformer.to_json_string())
    return {name: value for name, value in config.items() if name != "_name_or_path"}


def save_single_file(
    transformer: PatchTransformer2DModel,
    path: Path,
    scheduler: SchedulerMixin | None = None,
    id2label: dict | None = None,
) -> None:
    """Writes what `from_single_file` reads: the weights, with the config in the metadata.

    The scheduler's config and the names of the classes are beside it, for a conversion back into a pipeline.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    about = {"config": json.dumps(config_of(transformer))}
    if type(scheduler).__name__ in SCHEDULERS:
        about["scheduler"] = scheduler.to_json_string()
    if id2label:
        about["id2label"] = json.dumps(id2label)
    save_tensors(path, transformer.state_dict(), format="pt", **about)


def save_pipeline(pipe: SDDiTPipeline, folder: Path) -> None:
    """Writes the folder of a pipeline, complete or absent.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    remove(aside)
    try:
        pipe.save_pretrained(aside)
        aside.rename(folder)
    except SafetensorError as error:  # what safetensors makes of a disk that is full
        raise OSError(f"{folder} cannot be written: {error}") from error
    except OSError as error:
        if error.filename is None:
            error.filename = str(folder)
        raise
    finally:
        remove(aside)


def convert(name: str, output: Path, config: ConvertConfig) -> str:
    """Converts a source, and tells what came of it.

    Raises:
        ValueError: the source, the output or a setting is wrong.
        OSError: the output cannot be written.
    """
    single = output.suffix == ".safetensors"
    if output.suffix in _PICKLES:
        raise ValueError(f"output is {output}; it must end in .safetensors, or be a folder.")
    if output.exists():
        raise ValueError(f"{output} exists; choose another output.")
    if single and config.vae:
        raise ValueError(f"{output} holds the transformer alone; --vae is for the folder of a pipeline.")
    source = read_source(name)
    transformer, missing, unused = build(source, config)
    vae = load_vae(config.vae) if config.vae else source.vae
    scheduler = source.scheduler or scheduler_for(transformer)
    if single:
        save_single_file(transformer, output, scheduler, source.id2label)
    else:
        save_pipeline(SDDiTPipeline(transformer, scheduler, vae=vae, id2label=source.id2label), output)
    sizes = ", ".join(
        f"{key} {transformer.config[key]}" for key in ("num_layers", "num_attention_heads", "num_classes")
    )
    count = f"{transformer.num_parameters() / 1e6:.1f}M parameters"
    lines = [f"{output}: {type(transformer).__name__}, {count}, {sizes}."]
    if single and isinstance(scheduler, InterpolantScheduler):
        settings = (f"{key}={scheduler.config[key]!r}" for key in ("path", "prediction_type"))
        lines.append(f"It is sampled with InterpolantScheduler({', '.join(settings)}).")
    if missing:
        lines += [f"Not in {name}, so as initialised:", *summary(missing)]
    if unused:
        lines += [f"In {name}, but not used:", *summary(unused)]
    return "\n".join(lines)


def summary(names: Iterable[str]) -> list[str]:
    """A line a name; those that differ in the number of a block only have one, with how many they are."""
    counts = Counter(re.sub(r"\.\d+\.(?=.*\.)", ".*.", name, count=1) for name in names)
    return [f"  {name}" + (f" ({count})" if count > 1 else "") for name, count in counts.items()]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(ConvertConfig, prog="convert", doc=__doc__)
    parser.add_argument(
        "source", metavar="SOURCE", help="a pipeline, a transformer's folder, a single file or a checkpoint"
    )
    parser.add_argument("output", metavar="OUTPUT", help="FILE.safetensors, or a folder for a pipeline")
    with one_line_errors("convert"):
        chosen = parser.parse_known_options(arguments)
        source, output = chosen.pop("source"), Path(chosen.pop("output"))
        print(convert(source, output, ConvertConfig(**chosen)))


if __name__ == "__main__":
    main()
