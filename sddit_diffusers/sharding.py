"""Training over several processes: what it takes that the model is whole on each, or in shards (FSDP2).

Whole tensors are what checkpoints and pipelines are made of, whatever the engine, so a run may go on with
another one.
"""

import os

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

_ENGINES = "one process, DDP or FSDP version 2"


def check_engine(accelerator: Accelerator) -> None:
    """Makes sure that the engine is one that training knows, and lets FSDP2 run on CPUs.

    Raises:
        ValueError: another engine.
    """
    state = accelerator.state
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and state.distributed_type == DistributedType.MULTI_CPU:
        # accelerate shards on accelerators only, though torch does so on CPUs too.
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if state.distributed_type == DistributedType.FSDP:
        if state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("This accelerate configuration asks for FSDP version 1; use version 2.")
        # Weights stay float32, as under DDP: autocast rounds for the products alone.
        state.fsdp_plugin.mixed_precision_policy = None
    elif state.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"The engine is {state.distributed_type.value}; training runs on {_ENGINES}.")


def whole(tensor: Tensor) -> Tensor:
    """The tensor that a shard is part of; all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: nn.Module, tensors: list[Tensor]) -> dict[str, Tensor]:
    """A state dict of `tensors`, which stand for the parameters of `model` in their order."""
    return {name: whole(tensor) for (name, _), tensor in zip(model.named_parameters(), tensors, strict=True)}


def gather_state(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel) -> dict[str, dict]:
    """The whole state on the main process's CPU, in part on the others; all processes call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    averages = ema.state_dict()
    averages["shadow_params"] = [whole(tensor).cpu() for tensor in averages["shadow_params"]]
    return {"objective": weights, "optimizer": moments, "ema": averages}


def scatter_state(
    state: dict[str, dict], model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel
) -> None:
    """Loads what [`gather_state`] gave, which each process has read."""
    set_state_dict(
        model, optimizer, model_state_dict=state["objective"], optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )  # fmt: skip
    averages = dict(state["ema"])
    for shadow, saved in zip(ema.shadow_params, averages.pop("shadow_params"), strict=True):
        saved = saved.to(shadow.device)
        if isinstance(shadow, DTensor):
            saved = distribute_tensor(saved, shadow.device_mesh, shadow.placements)
        shadow.copy_(saved)
    ema.load_state_dict(averages)
