"""What a configuration asks for: the network, its objective and the weights to begin with."""

import json
import warnings
from pathlib import Path

from torch import nn

from ..models.attention_cpu import use_cpu_attention
from ..models.transformer_sddit import PLAIN_TIME, PatchTransformer2DModel, differing_names
from ..pipelines.loading import load_pipeline
from .auxiliaries import AUXILIARIES
from .auxiliary import Process
from .checkpointing import choose_checkpoint, load_state, read_about
from .memory import keep_products
from .methods import METHODS
from .objective import Objective
from .options import TrainingConfig
from .processes import PROCESSES


def build_process(config: TrainingConfig) -> Process:
    """The scheduler of the configured process."""
    return PROCESSES[config.process].build(config)


def build_objective(
    config: TrainingConfig, network: dict, device: str, process: Process | None = None
) -> Objective:
    """The configured method's network and what trains it on the configured process, on a kind of device.

    Args:
        network: its arguments.
        device: type of the device.
        process: the configured one, where there is one already.

    Raises:
        ValueError: the weights to begin with are not there, or of another network.
    """
    method, process = METHODS[config.method], process or build_process(config)
    transformer = method.transformer(**network)
    if config.pretrained_model_name_or_path:
        sigma_data = getattr(process.config, "sigma_data", None)
        load_weights(transformer, config.pretrained_model_name_or_path, sigma_data)
    set_checkpointing(transformer, config.gradient_checkpointing)
    auxiliaries = {name: AUXILIARIES[name].build(transformer, config) for name in config.auxiliaries}
    objective = method.objective(
        transformer,
        process,
        {name: auxiliary for name, auxiliary in auxiliaries.items() if auxiliary is not None},
        mask_ratio=config.mask_ratio,
        mask_ratio_schedule=config.mask_ratio_schedule,
        label_dropout=config.label_dropout,
        **{name: getattr(config, name) for name in method.options},
    )
    if device == "cpu":
        use_cpu_attention(objective)
    return objective


def set_checkpointing(network: nn.Module, kind: str) -> None:
    """Lets a network keep less for its backward pass; `kind` is one of `CHECKPOINTING`."""
    if kind != "none":
        network.enable_gradient_checkpointing(keep_products if kind == "selective" else None)


def load_weights(transformer: PatchTransformer2DModel, name: str, sigma_data: float | None = None) -> None:
    """Loads the weights of a pipeline (the averaged ones), of a single file or of a checkpoint, in place.

    Labels of another number of classes are left as they are. Weights that a pipeline samples with another
    sigma_data get a warning: what they expect as input and give as output has another scale.

    Args:
        sigma_data: of the process that they are trained on, if it has one.

    Raises:
        ValueError: there are none, or they are of another network.
    """
    weights, settings, known = read_weights(type(transformer), name)
    if known and sigma_data and known != sigma_data:
        warnings.warn(
            f"The weights of {name} are of sigma_data {known}, and sigma_data is {sigma_data} here.",
            stacklevel=2,
        )
    times = {key: settings.get(key, usual) for key, usual in PLAIN_TIME.items()}
    if times != {key: transformer.config[key] for key in PLAIN_TIME}:
        raise ValueError(
            f"The weights of {name} embed another time: train with --transformer '{json.dumps(times)}'."
        )
    fresh = transformer.state_dict()
    if (
        "label_embed.weight" in weights
        and weights["label_embed.weight"].shape != fresh["label_embed.weight"].shape
    ):
        weights["label_embed.weight"] = fresh["label_embed.weight"]
    if others := differing_names(fresh, weights):
        raise ValueError(
            f"The weights of {name} are of another network: it differs in {', '.join(others[:4])}."
        )
    transformer.load_state_dict(weights)


def read_weights(kind: type[PatchTransformer2DModel], name: str) -> tuple[dict, dict, float | None]:
    """The weights of a pipeline, a single file or a checkpoint, their network's settings, and sigma_data.

    Raises:
        ValueError: there are none.
    """
    if (Path(name) / "checkpoint.json").is_file():
        folder = choose_checkpoint(Path(name).parent, name)
        run, prefix = read_about(folder).get("run", {}), "transformer."
        state = load_state(folder, "objective")["objective"]
        weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        return weights, run.get("model", {}), run.get("sigma_data")
    if name.endswith(".safetensors"):
        network = kind.from_single_file(name)
        return network.state_dict(), network.config, None
    pipe = load_pipeline(name)
    return pipe.transformer.state_dict(), pipe.transformer.config, pipe.scheduler.config.get("sigma_data")
