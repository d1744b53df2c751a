"""Training over several processes: what it takes that the model is whole on each, or in shards (FSDP2), or
that gradients and optimizer alone are in shards (DeepSpeed's ZeRO).

Whole tensors are what checkpoints and pipelines are made of, whatever the engine, so a run may go on with
another one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    compare_versions,
)
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

_ENGINES = "one process, DDP, FSDP version 2 or DeepSpeed's ZeRO stages 1 and 2"
_MOMENTS = "exp_avg", "exp_avg_sq"  # of Adam


def check_engine(accelerator: Accelerator) -> None:
    """Makes sure that the engine is one that training knows, and lets FSDP2 and DeepSpeed run on CPUs.

    Raises:
        ValueError: another engine.
    """
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        # accelerate shards on accelerators only, though torch and DeepSpeed do so on CPUs too.
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            state.distributed_type = DistributedType.FSDP
        elif os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            state.deepspeed_plugins = DeepSpeedPlugin()
            state.deepspeed_plugins.set_mixed_precision(state.mixed_precision)
            state.deepspeed_plugins.select(_from_accelerator_state=True)
            state.distributed_type = DistributedType.DEEPSPEED
        PartialState._shared_state["distributed_type"] = state.distributed_type
    if state.distributed_type == DistributedType.FSDP:
        if state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("This accelerate configuration asks for FSDP version 1; use version 2.")
        # Weights stay float32, as under DDP: autocast rounds for the products alone.
        state.fsdp_plugin.mixed_precision_policy = None
    elif state.distributed_type == DistributedType.DEEPSPEED:
        if compare_versions("deepspeed", "<", "0.19.8"):  # 0.18 divides by the accumulation steps twice
            raise ValueError("This DeepSpeed is too old; use 0.19.8 or later.")
        zero = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if zero["stage"] not in (1, 2):
            raise ValueError(
                f"The ZeRO stage is {zero['stage']}; it must be 1 or 2. FSDP2 shards weights too."
            )
        offload = (zero.get("offload_optimizer") or {}).get("device") or "none"
        if offload != "none":
            raise ValueError(f"DeepSpeed's offload_optimizer is {offload!r}; it must be 'none'.")
        if accelerator.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f"mixed_precision is {accelerator.mixed_precision!r}; under DeepSpeed it is 'bf16' or 'no'."
            )
    elif state.distributed_type == DistributedType.MEGATRON_LM:
        raise ValueError(f"The engine is {state.distributed_type.value}; training runs on {_ENGINES}.")


class Alone:
    """A model and its optimizer on one device, and what an optimizer step asks of them.

    Args:
        device: its type.
        dtype: of autocast; None without.
    """

    scaler = None  # of fp16's losses

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: str,
        dtype: torch.dtype | None = None,
    ):
        self.model, self.optimizer = model, optimizer
        self._autocast = {"device_type": device, "dtype": dtype, "enabled": dtype is not None}

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around forward and backward of a micro-batch."""
        yield

    def forward(self, *arguments) -> dict[str, Tensor]:
        """What the model returns, under autocast."""
        with torch.autocast(**self._autocast):
            return self.model(*arguments)

    def backward(self, loss: Tensor) -> None:
        """The gradients of a loss."""
        loss.backward()

    def reduce(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        return tensor

    @property
    def looks_at_once(self) -> bool:
        """Whether the host looks at a step first, for the device alone cannot leave out the weights."""
        return self.scaler is not None

    def gradient_norm(self) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The norm of all gradients together, without the scale of fp16's losses; and of each, by name."""
        parameters = self.model.named_parameters()
        gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
        norms = torch._foreach_norm(list(gradients.values()))
        total = torch.linalg.vector_norm(torch.stack(norms))
        return whole(total), dict(zip(gradients, norms, strict=True))

    def step(self, norm: Tensor, max_norm: float, failed: Tensor | None = None) -> None:
        """An optimizer step with gradients of `norm`, clipped to `max_norm` unless that is 0; they go.

        Args:
            failed: float32 on the device; where it is 1, no weight moves and no moment.
        """
        if max_norm:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm)
        if not self.looks_at_once:
            # What torch's own scaler gives a fused optimizer.
            self._adam.grad_scale, self._adam.found_inf = None, failed
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """torch's own."""
        return self.optimizer


class Engine(Alone):
    """A model and its optimizer, whole on each process, or both in shards (FSDP2).

    Whole tensors are what it gives; all processes call its methods.

    Attributes:
        model: what was given, whose weights may be shards now.
        prepared: what is called in its place.
        optimizer: has the `param_groups`.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.accelerator, self.model = accelerator, model
        self.prepared, self.optimizer = accelerator.prepare(model, optimizer)

    @property
    def scaler(self):
        return self.accelerator.scaler

    def accumulating(self):
        return self.accelerator.accumulate(self.prepared)

    def forward(self, *arguments) -> dict[str, Tensor]:
        with self.accelerator.autocast():
            return self.prepared(*arguments)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def reduce(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "mean")

    def gradient_norm(self) -> tuple[Tensor, dict[str, Tensor] | None]:
        self.accelerator.unscale_gradients()
        return super().gradient_norm()

    @property
    def _adam(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def gather(self, ema: EMAModel) -> dict[str, dict]:
        """The whole state on the main process's CPU, in part on the others."""
        weights, moments = self._gather(StateDictOptions(full_state_dict=True, cpu_offload=True))
        averages = ema.state_dict()
        averages["shadow_params"] = [whole(tensor).cpu() for tensor in averages["shadow_params"]]
        return {"objective": weights, "optimizer": moments, "ema": averages}

    def scatter(self, state: dict[str, dict], ema: EMAModel) -> None:
        """Loads what [`gather`] gave with any engine, which each process has read; settings stay as here."""
        groups = self.optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        self._scatter(state["objective"], state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group |= own
        averages = state["ema"] | {"decay": ema.decay}
        for shadow, saved in zip(ema.shadow_params, averages.pop("shadow_params"), strict=True):
            saved = saved.to(shadow.device)
            if isinstance(shadow, DTensor):
                saved = distribute_tensor(saved, shadow.device_mesh, shadow.placements)
            shadow.copy_(saved)
        ema.load_state_dict(averages)

    def _gather(self, options: StateDictOptions) -> tuple[dict, dict]:
        return get_state_dict(self.model, self._adam, options=options)

    def _scatter(self, weights: dict, moments: dict) -> None:
        set_state_dict(
            self.model, self._adam, model_state_dict=weights, optim_state_dict=moments,
            options=StateDictOptions(full_state_dict=True),
        )  # fmt: skip


class ZeroEngine(Engine):
    """A model that is whole on each process, with gradients and optimizer in shards (DeepSpeed's ZeRO).

    What DeepSpeed does after a forward, one part at a time: accelerate's own wrapper steps within the last
    backward, before anyone has looked at losses and gradients.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        accumulation_steps: int,
        max_grad_norm: float,
    ):
        config = accelerator.deepspeed_plugin.deepspeed_config
        rounded = accelerator.mixed_precision == "bf16"
        config.pop("train_batch_size", None)  # follows from the others
        config["train_micro_batch_size_per_gpu"] = batch_size
        # accelerate launch tells another number, if it was not asked for this one.
        config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps = accumulation_steps
        config["gradient_clipping"] = max_grad_norm
        # Weights and gradients stay float32, as under DDP: autocast rounds for the products alone.
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {
            "enabled": rounded, "dtype": "bfloat16", "lower_precision_safe_modules": []
        }  # fmt: skip
        super().__init__(accelerator, model, optimizer)
        config["bf16"] = {"enabled": rounded}  # where accelerate looks up the precision
        accelerator.deepspeed_engine_wrapped = SimpleNamespace(backward=self._backward)
        self.zero = self.prepared.optimizer
        self.optimizer = self.zero.optimizer  # torch's, of this process's part of all parameters, end to end

    def _backward(self, loss: Tensor, sync_gradients: bool = True) -> None:
        """What `accelerator.backward` calls."""
        self.prepared.set_gradient_accumulation_boundary(sync_gradients)
        self.prepared.backward(loss)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The gradient of a parameter, if it has one."""
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter) if hasattr(parameter, "_hp_mapping") else None  # a trained one

    @property
    def looks_at_once(self) -> bool:
        return True

    def gradient_norm(self) -> tuple[Tensor, dict[str, Tensor] | None]:
        parts = [part for group in self.zero.averaged_gradients.values() for part in group]
        square = torch.nn.utils.get_total_norm(parts) ** 2
        torch.distributed.all_reduce(square)
        return square.sqrt(), None

    def step(self, norm: Tensor, max_norm: float, failed: Tensor | None = None) -> None:
        self.prepared.step()  # DeepSpeed clips

    def _gather(self, options: StateDictOptions) -> tuple[dict, dict]:
        from deepspeed.utils import safe_get_full_optimizer_state

        main, state = PartialState().is_main_process, {}
        step = next(iter(self.optimizer.state.values()))["step"].cpu()
        for name, parameter in self._trained().items():
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
            if main:
                state[name] = {"step": step.clone()} | {key: moment.cpu() for key, moment in moments.items()}
        groups = [group | {"params": list(self._trained())} for group in self.optimizer.param_groups]
        weights = get_model_state_dict(self.model, options=options)
        return weights, {"state": state, "param_groups": groups}  # as torch's `get_state_dict` gives them

    def _scatter(self, weights: dict, moments: dict) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self.model.load_state_dict(weights)
        (group,) = self.optimizer.param_groups
        (part,), step = group["params"], next(iter(moments["state"].values()))["step"]
        # What Adam's first step would make, for the moments to be written into.
        zeros = {key: torch.zeros_like(part) for key in _MOMENTS}
        self.optimizer.state[part] = {"step": step.clone().to(part.device)} | zeros
        self.zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._trained().items():
            safe_set_full_fp32_param(parameter, parameter.data)
            for key in _MOMENTS:
                moment = moments["state"][name][key].to(parameter.device)
                safe_set_full_optimizer_state(parameter, moment, key)

    def _trained(self) -> dict[str, Tensor]:
        return {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    accumulation_steps: int,
    max_grad_norm: float,
) -> Engine:
    """The engine that accelerate was asked for; `batch_size` is that of a micro-batch of one process."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return Engine(accelerator, model, optimizer)
    return ZeroEngine(accelerator, model, optimizer, batch_size, accumulation_steps, max_grad_norm)


def whole(tensor: Tensor) -> Tensor:
    """The tensor that a shard is part of; all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: nn.Module, tensors: list[Tensor]) -> dict[str, Tensor]:
    """A state dict of `tensors`, which stand for the parameters of `model` in their order."""
    return {name: whole(tensor) for (name, _), tensor in zip(model.named_parameters(), tensors, strict=True)}
