"""The methods by name: SD-DiT and those that it is compared with, each a network and what trains it."""

from pathlib import Path

from ..models.attention_cpu import use_cpu_attention
from ..models.transformer_baselines import (
    MaskDiTTransformer2DModel,
    MDTTransformer2DModel,
    PlainDiTTransformer2DModel,
)
from ..models.transformer_sddit import PatchTransformer2DModel, SDDiTTransformer2DModel, differing_names
from ..pipelines.loading import load_pipeline
from ..schedulers.scheduling_edm_heun import EDMHeunScheduler
from .baselines import DiTObjective, MaskDiTObjective, MDTObjective
from .checkpointing import choose_checkpoint, load_state
from .denoising import DenoisingObjective
from .memory import keep_products
from .objective import SDDiTObjective
from .options import TrainingConfig

TRANSFORMERS = {
    "sddit": SDDiTTransformer2DModel,
    "dit": PlainDiTTransformer2DModel,
    "maskdit": MaskDiTTransformer2DModel,
    "mdt": MDTTransformer2DModel,
}


def build_objective(
    config: TrainingConfig, network: dict, scheduler: EDMHeunScheduler, device: str
) -> DenoisingObjective:
    """The network of the configured method and what trains it on a kind of device.

    Args:
        network: its arguments.
        device: type of the device.

    Raises:
        ValueError: the weights to begin with are not there, or of another network.
    """
    transformer = TRANSFORMERS[config.method](**network)
    if config.pretrained_model_name_or_path:
        load_weights(transformer, config.pretrained_model_name_or_path)
    if config.gradient_checkpointing != "none":
        selective = config.gradient_checkpointing == "selective"
        transformer.enable_gradient_checkpointing(keep_products if selective else None)
    common = {"label_dropout": config.label_dropout, "mask_ratio": config.mask_ratio}
    if config.method == "dit":
        objective = DiTObjective(transformer, scheduler, **common)
    elif config.method == "maskdit":
        objective = MaskDiTObjective(transformer, scheduler, mae_weight=config.mae_weight, **common)
    elif config.method == "mdt":
        objective = MDTObjective(transformer, scheduler, **common)
    else:
        objective = SDDiTObjective(
            transformer,
            scheduler,
            discriminative_weight=config.discriminative_weight,
            teacher_sigma=config.teacher_noise(),
            num_prototypes=config.num_prototypes,
            head_hidden_dim=config.head_hidden_dim,
            head_bottleneck_dim=config.head_bottleneck_dim,
            student_temperature=config.student_temperature,
            center_momentum=config.center_momentum,
            **common,
        )
    if device == "cpu":
        use_cpu_attention(objective)
    return objective


def load_weights(transformer: PatchTransformer2DModel, name: str) -> None:
    """Loads the weights of a pipeline (the averaged ones), of a single file or of a checkpoint, in place.

    Labels of another number of classes are left as they are.

    Raises:
        ValueError: there are none, or they are of another network.
    """
    if (Path(name) / "checkpoint.json").is_file():
        state = load_state(choose_checkpoint(Path(name).parent, name), "objective")["objective"]
        prefix = "transformer."
        weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    elif name.endswith(".safetensors"):
        weights = type(transformer).from_single_file(name).state_dict()
    else:
        weights = load_pipeline(name).transformer.state_dict()
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
