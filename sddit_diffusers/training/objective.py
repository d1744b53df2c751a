"""What trains a network: the noised view, the generative loss, and the auxiliary losses beside it.

Shapes: b batch, c channels, h x w pixels of the sample, n patches, k visible patches.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.order import Batch
from ..models.transformer_sddit import PLAIN_TIME, PatchTransformer2DModel, check_number
from ..pipelines.pipeline_sddit import SDDiTPipeline
from .auxiliary import AuxiliaryLoss, Pass, Process, Tokens, View, by_patch, network_inputs, part_of
from .discrimination import Discrimination

MASK_SCHEDULES = ("constant", "cosine")


class Draws(NamedTuple):
    """All that is random in one step, a row for each image."""

    t: Tensor  # [b, 1, 1, 1], time of the noised view
    noise: Tensor  # [b, c, h, w], of unit variance
    patch_order: Tensor  # [b, n], all patches at random
    visible_ids: Tensor | None  # [b, k], the first of these, which the mask leaves visible; None: all
    label_dropped: Tensor  # [b], bool
    second_noise: Tensor | None  # as `noise`, of a method with a second view
    auxiliaries: dict[str, tuple | None]  # by the losses' names

    def rows(self, rows: slice) -> "Draws":
        """The draws of some of the images."""
        return _rows(self, rows)


def _rows(draws, rows: slice):
    if isinstance(draws, Tensor):
        return draws[rows]
    if isinstance(draws, dict):
        return {name: _rows(part, rows) for name, part in draws.items()}
    return None if draws is None else type(draws)(*(_rows(part, rows) for part in draws))


class Objective(nn.Module):
    """A network, and what trains it: the generative loss, here DiT's, and auxiliary losses.

    Args:
        transformer: the network, trained in place.
        scheduler: the process: how samples are noised, and what the network is to give.
        auxiliaries: losses by name, in the order of their draws.
        mask_ratio: share of the patches hidden from the encoder, or that skip its routed blocks, in [0, 1).
        mask_ratio_schedule: "constant", or "cosine", which lets the ratio fall to 0 ([`mask_ratio_at`]).
        label_dropout: probability that an image's label becomes the null class, for guidance.

    Raises:
        ValueError: a mask ratio outside [0, 1), an unknown schedule of it, a label dropout outside 0..1, or a
            transformer without decoder or with other channels going out than in.
    """

    _no_split_modules = ["SDDiTBlock"]  # what FSDP shards and gathers as one
    has_second_view = False

    def __init__(
        self,
        transformer: PatchTransformer2DModel,
        scheduler: Process,
        auxiliaries: Mapping[str, AuxiliaryLoss] | None = None,
        *,
        mask_ratio: float = 0.0,
        mask_ratio_schedule: str = "constant",
        label_dropout: float = 0.1,
    ):
        super().__init__()
        config = transformer.config
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio is {mask_ratio}; it must be at least 0 and below 1.")
        if mask_ratio_schedule not in MASK_SCHEDULES:
            raise ValueError(
                f"mask_ratio_schedule is {mask_ratio_schedule!r}; it must be 'constant' or 'cosine'."
            )
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout is {label_dropout}; it must be in 0..1.")
        if (config.out_channels or config.in_channels) != config.in_channels:
            raise ValueError(
                f"The transformer takes {config.in_channels} channels and returns {config.out_channels}; "
                "both must be equal."
            )
        if config.get("num_decoder_layers") == 0:
            raise ValueError(
                "The transformer has no decoder (num_decoder_layers is 0); the objective needs one."
            )
        self.transformer = transformer
        self.scheduler = scheduler
        self.auxiliaries = nn.ModuleDict(auxiliaries)
        self.kept: dict[int, Tensor] | None = None  # tokens of layers, while the network is evaluated
        for layer in {layer for loss in self.auxiliaries.values() for layer in loss.layers}:
            transformer.transformer_blocks[layer - 1].register_forward_hook(partial(self.keep, layer))
        self.mask_ratio = self.first_mask_ratio = mask_ratio
        self.mask_ratio_schedule = mask_ratio_schedule
        self.label_dropout = label_dropout

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None, device=None) -> Draws:
        """Draws times, noises, masks and dropped labels for images of `shape` `[b, c, h, w]`.

        The order of the draws does not depend on any setting, and auxiliary losses draw last: runs of one
        seed differ by their settings alone.
        """
        b, _, h, w = shape
        options = dict(generator=generator, device=device)
        n = (h // self.transformer.config.patch_size) * (w // self.transformer.config.patch_size)
        k = part_of(n, 1 - self.mask_ratio)
        t = self.scheduler.training_times(torch.randn(b, 1, 1, 1, **options))
        noise = torch.randn(shape, **options)
        patch_order = torch.rand(b, n, **options).argsort(dim=1)
        label_dropped = torch.rand(b, **options) < self.label_dropout
        second_noise = torch.randn(shape, **options) if self.has_second_view else None
        auxiliaries = {
            name: loss.draw(shape, self.scheduler, generator, device)
            for name, loss in self.auxiliaries.items()
        }
        visible_ids = patch_order[:, :k] if k < n else None
        return Draws(t, noise, patch_order, visible_ids, label_dropped, second_noise, auxiliaries)

    def forward(
        self,
        x0: Tensor,
        class_labels: Tensor | None = None,
        draws: Draws | None = None,
        pictures: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            x0: clean samples, `[b, c, h, w]`, of the standard deviation that the process expects.
            class_labels: integers `[b]`; None for a model without classes.
            draws: what is random in this step; None draws it here.
            pictures: what the samples are of, as bytes `[b, 3, h', w']`, for an auxiliary loss that looks at
                them.

        Returns:
            Scalars: `loss` = the generative loss + weight x each auxiliary loss, `loss_generative`, and what
            the method and the auxiliary losses tell beside them.
        """
        if draws is None:
            draws = self.draw(x0.shape, device=x0.device)
        losses, view = self.denoise(Batch(x0, self.drop_labels(class_labels, draws), pictures), draws)
        for name, auxiliary in self.auxiliaries.items():
            found = auxiliary(view, self.scheduler, draws.auxiliaries[name])
            losses["loss"] = losses["loss"] + auxiliary.weight * found[f"loss_{auxiliary.name}"]
            losses |= found
        return losses

    def denoise(self, batch: Batch, draws: Draws) -> tuple[dict[str, Tensor], View]:
        """The generative loss, and what the auxiliary losses see; other methods have theirs.

        Args:
            batch: its labels are those that dropping has left.
        """
        loss, made = self.generative_loss(batch, draws.t, draws.noise, draws.visible_ids)
        return {"loss": loss, "loss_generative": loss}, self.view(batch, draws, made)

    def generative_loss(
        self, batch: Batch, t: Tensor, noise: Tensor, visible_ids: Tensor | None
    ) -> tuple[Tensor, Pass]:
        """L_G (Eq. 9), the mean over all patches, of a view with this noise and mask; and its pass."""
        sample = self.scheduler.noised(batch.x0, noise, t)
        made = self.evaluate(sample, t, batch.labels, visible_ids)
        return self.scheduler.error(made.output, sample, batch.x0, noise, t).mean(), made

    def evaluate(
        self, sample: Tensor, t: Tensor, class_labels: Tensor | None, visible_ids: Tensor | None
    ) -> Pass:
        """What the network makes of a noised sample `[b, c, h, w]`."""
        seen = () if visible_ids is None else (visible_ids,)
        self.kept = {}
        output = self.transformer(*network_inputs(self.scheduler, sample, t), class_labels, *seen)
        kept, self.kept = self.kept, None
        layers = {}
        for layer, tokens in kept.items():
            sees_part = visible_ids is not None and self.transformer.sees_part(layer)
            layers[layer] = Tokens(tokens[:, self.has_cls :], visible_ids if sees_part else None)
        return Pass(sample, output.sample, output.encoder_hidden_states, layers)

    @property
    def has_cls(self) -> bool:
        """Whether the encoder's first token is [CLS]."""
        return hasattr(self.transformer, "cls_token")

    def keep(self, layer: int, block: nn.Module, inputs: tuple, tokens: Tensor) -> None:
        """Keeps what a block makes in `evaluate`; activation checkpoints come by again later."""
        if self.kept is not None:
            self.kept[layer] = tokens

    def view(self, batch: Batch, draws: Draws, made: Pass) -> View:
        """What the auxiliary losses see."""
        network, visible_ids = self.transformer, draws.visible_ids
        if visible_ids is not None and not network.sees_part(len(network.transformer_blocks)):
            visible_ids = None  # the last tokens are of all patches
        order = draws.patch_order
        return View(
            batch, batch.labels, draws.t, draws.noise, visible_ids, order, self.has_cls, **made._asdict()
        )

    def pipeline(
        self, weights: dict[str, Tensor], vae: nn.Module | None, id2label: dict | None
    ) -> SDDiTPipeline:
        """What samples, with other weights of the network, such as their averages."""
        transformer = blank(self.transformer)
        transformer.load_state_dict(weights)
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        return SDDiTPipeline(transformer, scheduler, vae=vae, id2label=id2label)

    def drop_labels(self, class_labels: Tensor | None, draws: Draws) -> Tensor | None:
        """Labels `[b]`, of which some are the null class now."""
        if class_labels is None:
            return None
        return class_labels.masked_fill(draws.label_dropped, self.transformer.config.num_classes)

    def follow(self, step: int, steps: int, steps_per_epoch: int) -> dict[str, float]:
        """Sets what changes from step to step of a run; returns it for the metrics."""
        schedule = {}
        if self.mask_ratio_schedule != "constant":
            self.mask_ratio = mask_ratio_at(step, steps, self.first_mask_ratio)
            schedule["mask_ratio"] = self.mask_ratio
        for auxiliary in self.auxiliaries.values():
            schedule |= auxiliary.follow(step, steps, steps_per_epoch)
        return schedule

    def tell(self, metrics: bool) -> None:
        """Says whether the next step's metrics are wanted, beside the losses."""
        for auxiliary in self.auxiliaries.values():
            auxiliary.tells = metrics

    def after_step(self, reduce: Callable[[Tensor], Tensor] = torch.clone, moved: bool = True) -> None:
        """What follows an optimizer step, such as the updates of a teacher.

        Args:
            reduce: averages a tensor over the processes.
            moved: whether weights were moved; fp16 leaves out steps whose gradients overflow.
        """
        for auxiliary in self.auxiliaries.values():
            auxiliary.after_step(self.transformer, reduce, moved)

    def identity(self) -> dict:
        """What a resumed run must have in common with the one that it goes on with."""
        network = {name: value for name, value in self.transformer.config.items() if not name.startswith("_")}
        for name, plain in PLAIN_TIME.items():
            if network.get(name) == plain:
                del network[name]
        for auxiliary in self.auxiliaries.values():
            network |= auxiliary.identity()
        return network

    def compile_blocks(self) -> None:
        """Compiles all blocks in place; shapes and names of the weights stay.

        Once for any number of tokens, where it changes from step to step.
        """
        for module in self.modules():
            if type(module).__name__ in self._no_split_modules:
                module.compile(dynamic=self.mask_ratio_schedule != "constant")


class SDDiTObjective(Objective):
    """SD-DiT: L_G + L_D (Algorithm A1 of the supplementary).

    The lines of the algorithm, in their order, and where they are:
    - the teacher begins as the student: `Teacher`;
    - views of student and teacher, and the mask: `draw`, here and of `Discrimination`;
    - the student's encoder and decoder, L_G: `denoise`;
    - the teacher's encoder, both heads, L_D of [CLS] and of the patches: `Discrimination.forward`;
    - Loss = L_G + L_D: `forward`;
    - back-propagation and the student's update: `training.step.train_step`;
    - the teacher's and the centers' updates: `Discrimination.after_step`;
    - H(T, S, C): `prototypes.cross_entropy`.

    Args:
        transformer, scheduler, mask_ratio_schedule, label_dropout: as of [`Objective`].
        mask_ratio: the same; the paper's is 0.2.
        discriminative_weight: factor of L_D; 0 trains without L_D, head and teacher (Table 3).
        discrimination: other arguments of `Discrimination`, such as `num_prototypes`.

    Raises:
        ValueError: as of [`Objective`] and of `Discrimination`.
    """

    def __init__(
        self,
        transformer: PatchTransformer2DModel,
        scheduler: Process,
        *,
        mask_ratio: float = 0.2,
        mask_ratio_schedule: str = "constant",
        label_dropout: float = 0.1,
        discriminative_weight: float = 1.0,
        **discrimination: Any,
    ):
        check_number("discriminative_weight", discriminative_weight, low=0)
        auxiliaries = {}
        if discriminative_weight > 0:
            auxiliaries["discrimination"] = Discrimination(
                transformer, weight=discriminative_weight, **discrimination
            )
        super().__init__(
            transformer, scheduler, auxiliaries,
            mask_ratio=mask_ratio, mask_ratio_schedule=mask_ratio_schedule, label_dropout=label_dropout,
        )  # fmt: skip

    @property
    def discrimination(self) -> Discrimination | None:
        """L_D; None where it has no weight."""
        return self.auxiliaries["discrimination"] if "discrimination" in self.auxiliaries else None


class MaskDiTObjective(Objective):
    """MaskDiT: L_DSM on visible patches, and L_MAE on masked ones, of which the noised patch is the target.

    Args:
        mae_weight: factor of L_MAE, at least 0; MaskDiT's 0.1.
        args: `transformer`, `scheduler` and `auxiliaries`, as of [`Objective`].
        kwargs: `mask_ratio`, `mask_ratio_schedule` and `label_dropout`, as there.

    Raises:
        ValueError: an `mae_weight` out of its range, and as of [`Objective`].
    """

    def __init__(self, *args: Any, mae_weight: float = 0.1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_number("mae_weight", mae_weight, low=0)
        self.mae_weight = mae_weight

    def denoise(self, batch: Batch, draws: Draws) -> tuple[dict[str, Tensor], View]:
        """As of [`Objective`]: `loss` = `loss_generative` (L_DSM) + weight x `loss_mae`."""
        t, sample = draws.t, self.scheduler.noised(batch.x0, draws.noise, draws.t)
        made = self.evaluate(sample, t, batch.labels, draws.visible_ids)
        view = self.view(batch, draws, made)._replace(scored_ids=draws.visible_ids)
        denoising = self._by_patch(self.scheduler.error(made.output, sample, batch.x0, draws.noise, t))
        if draws.visible_ids is None:
            unused = 0 * self.transformer.mask_token.sum()  # for DDP, which waits for all gradients
            loss = denoising.mean() + unused
            return {"loss": loss, "loss_generative": loss, "loss_mae": torch.zeros_like(loss)}, view
        denoised = self.scheduler.precondition_outputs(sample, made.output.float(), t)
        reconstruction = self._by_patch((denoised - sample) ** 2)
        masked = torch.ones_like(denoising).scatter(1, draws.visible_ids, 0.0)  # [b, n]
        loss_generative = (denoising * (1 - masked)).sum() / (1 - masked).sum()
        loss_mae = (reconstruction * masked).sum() / masked.sum()
        loss = loss_generative + self.mae_weight * loss_mae
        return {"loss": loss, "loss_generative": loss_generative, "loss_mae": loss_mae}, view

    def _by_patch(self, values: Tensor) -> Tensor:
        return by_patch(values, self.transformer.config.patch_size)


class MDTObjective(Objective):
    """MDT: L_G of all patches twice a step, seen whole and with a mask, of one time and two noises."""

    has_second_view = True

    def denoise(self, batch: Batch, draws: Draws) -> tuple[dict[str, Tensor], View]:
        """As of [`Objective`]: `loss` = `loss_generative`, of the whole view, + `loss_masked`."""
        visible_ids = draws.visible_ids
        if visible_ids is None:  # the side-interpolater has nothing to fill, and its part all the same
            n = batch.x0[0, 0].numel() // self.transformer.config.patch_size**2
            visible_ids = torch.arange(n, device=batch.x0.device).expand(len(batch.x0), -1)
        assert draws.second_noise is not None  # as `has_second_view` asks
        whole, made = self.generative_loss(batch, draws.t, draws.noise, None)
        masked, _ = self.generative_loss(batch, draws.t, draws.second_noise, visible_ids)
        losses = {"loss": whole + masked, "loss_generative": whole, "loss_masked": masked}
        return losses, self.view(batch, draws._replace(visible_ids=None), made)


def mask_ratio_at(step: int, max_steps: int, start: float) -> float:
    """A ratio that falls from `start` to 0 with the fourth power of a cosine: MaskDiT's unmask tuning."""
    return start * math.cos(math.pi / 2 * min(step / max_steps, 1.0)) ** 4


def blank(network: nn.Module) -> nn.Module:
    """A network of the same kind and settings, whose weights come later."""
    is_foreign = hasattr(network, "fresh")
    return network.fresh() if is_foreign else type(network).from_config(network.config)
