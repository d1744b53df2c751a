"""Memory of a training step: what the backward pass keeps, and how much a step takes before it is run."""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..data.order import Batch
from ..models.attention_cpu import attention  # noqa: F401  (registers torch.ops.sddit.attention)
from .configuration import CHECKPOINTING, RunConfig
from .engines import Alone
from .step import train_step

_aten = torch.ops.aten
# What takes long to compute: matrix products and attention.
_PRODUCTS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.sddit.attention.default,
]


def keep_products(function: Callable, *args) -> Tensor:
    """Runs a block of which the backward pass keeps the products' results, and computes the rest again."""
    contexts = partial(create_selective_checkpoint_contexts, _PRODUCTS)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


@dataclass
class StepMemory:
    """Bytes that a training step takes on one device."""

    weights: int  # of student and head
    teacher: int  # and what else takes no gradient, such as a frozen encoder
    averages: int  # of the weights that sample
    gradients: int
    optimizer: int
    activations: int  # the largest sum of all other tensors, at any moment of the step

    @property
    def fixed(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.teacher + self.averages + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.fixed + self.activations


class _Unfilled(FakeTensorMode):
    """Makes tensors without memory, also of those that have some."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    def __deepcopy__(self, memo):
        return self  # a copied module is of the same mode


class _Alive(TorchDispatchMode):
    """Bytes of the tensors that are alive, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name not in self._known:
            self._known.add(name)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, name, size)

    def _forget(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


def step_memory(
    build: Callable[[], nn.Module],
    batch_size: int,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> StepMemory:
    """What a step takes, from the tensors that it makes; none of them is filled, so any size can be asked.

    Not counted are the libraries' own workspaces and what an allocator loses between blocks.

    Args:
        build: makes the objective.
        batch_size: images.
        device: its type, for its kernels keep other tensors than those of another.
        dtype: of autocast; None without.
    """
    with _Unfilled(), _Alive() as alive, torch.device(device):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a copied tensor without memory has no address
            objective = build()
        network = objective.transformer.config
        size = (batch_size, network.in_channels, network.sample_size, network.sample_size)
        x0, labels = torch.zeros(size), torch.zeros(batch_size, dtype=torch.long)
        frozen = [network for loss in objective.auxiliaries.values() for network in loss.frozen]
        of_frozen = sum(_bytes(network.parameters()) for network in frozen)
        pictures = torch.zeros(batch_size, 3, *size[2:], dtype=torch.uint8) if frozen else None
        trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        ema = EMAModel(objective.transformer.parameters(), foreach=True)
        optimizer = torch.optim.AdamW(trained, fused=True)
        engine, gradients = Alone(objective, optimizer, device, dtype), []
        for _ in range(2):  # the first makes the optimizer's state
            alive.most = alive.now
            train_step(
                engine, ema, [(Batch(x0, labels, pictures), None)],
                judge=lambda _: gradients.append(_bytes(parameter.grad for parameter in trained)),
            )  # fmt: skip
        memory = StepMemory(
            weights=_bytes(trained),
            teacher=_bytes(parameter for parameter in objective.parameters() if not parameter.requires_grad)
            + of_frozen,
            averages=_bytes(ema.shadow_params),
            gradients=gradients[-1],
            optimizer=_bytes(value for state in optimizer.state.values() for value in state.values()),
            activations=0,
        )
        memory.activations = alive.most + of_frozen - memory.fixed  # frozen networks are filled, so not seen
    return memory


def dry_run(config: RunConfig, title: str, build: Callable[[RunConfig, dict, str], nn.Module]) -> None:
    """Prints the memory that a step of a run takes.

    Args:
        title: of what is trained.
        build: makes the objective, of the configuration, the network's arguments and the type of the device.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision or None)
    device, dtype = accelerator.device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}
    network = config.network()

    def build_with(checkpointing: str) -> nn.Module:
        changed = copy.copy(config)
        changed.gradient_checkpointing = checkpointing
        return build(changed, network, device)

    accelerator.print(
        f"{title}, {network['sample_size']} x {network['sample_size']}, "
        f"mixed precision {accelerator.mixed_precision}, on one {device}"
    )
    if accelerator.is_main_process:
        precision = dtype.get(accelerator.mixed_precision)
        for line in memory_lines(build_with, config.train_batch_size, device, precision, CHECKPOINTING):
            print(line, flush=True)


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_lines(
    build: Callable[[str], nn.Module],
    batch_size: int,
    device: str,
    dtype: torch.dtype | None,
    checkpointing: Sequence[str],
    devices: Sequence[int] = (24, 40, 80),
) -> Iterator[str]:
    """A table, line by line: what a step of a batch takes with each kind of checkpointing, and what fits.

    Args:
        build: makes the objective with a kind of checkpointing.
        devices: their GiB, of which a tenth is left to allocator, workspaces and the driver.
    """
    for kind in checkpointing:
        # At batches so large that activations alone set the peak, it grows by the image.
        small, large, wanted = (
            step_memory(partial(build, kind), b, device, dtype) for b in (64, 128, batch_size)
        )
        image = (large.total - small.total) / 64
        if kind == checkpointing[0]:
            parts = ("weights", "teacher", "averages", "gradients", "optimizer")
            shown = " + ".join(f"{name} {getattr(wanted, name) / 2**30:.2f}" for name in parts)
            yield f"GiB: {shown} = {wanted.fixed / 2**30:.2f}, and activations:"
            yield (
                f"{'checkpointing':<15}{'an image':>10}{f'batch {batch_size}':>12}{'in all':>9}"
                + "".join(f"{f'fits {size} GiB':>14}" for size in devices)
            )
        fits = (max(0, int(64 + (0.9 * size * 2**30 - small.total) / image)) for size in devices)
        yield (
            f"{kind:<15}{image / 2**30:>10.4f}{wanted.activations / 2**30:>12.2f}"
            f"{wanted.total / 2**30:>9.2f}" + "".join(f"{batch:>14}" for batch in fits)
        )
