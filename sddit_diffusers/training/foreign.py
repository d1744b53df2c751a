"""diffusers' own pipelines through the same objectives: DiTPipeline and StableDiffusionPipeline.

[`ForeignNetwork`] gives their networks the face of ours, and [`DDIMProcess`] their process. A child is its
parent's folder with other weights and a DDIM scheduler, and needs nothing of this package.

Shapes: b batch, c channels, h x w pixels of the sample, n tokens of a caption of width d, T steps of
noising.
"""

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from ..cli import one_line
from ..files import read_json
from ..models.transformer_sddit import SDDiTTransformer2DOutput
from ..pipelines.loading import settings_of
from .publishing import python_text

PREDICTIONS = "epsilon", "v_prediction", "sample"


class DDIMProcess(DDIMScheduler):
    """A discrete process with DDIM's steps, as the objectives ask for it.

    A time t is the share of the T steps of noising that are done: the network's timestep is T t - 1, and at 0
    sampling ends. What is learnt of a prediction is the noise that it stands for.
    """

    @classmethod
    def from_config(
        cls, config: dict, num_inference_steps: int | None = None, solver: str = "euler"
    ) -> "DDIMProcess":
        """Of the config of any discrete scheduler, without its clipping.

        Args:
            num_inference_steps: of the sampler; those of the config, if it tells them, where not given.

        Raises:
            ValueError: the config is of no such scheduler, the solver is another than Euler's, or there are
                more steps than those of noising.
        """
        config = dict(config)
        told = config.pop("num_inference_steps", None)
        steps = num_inference_steps or told
        if "beta_schedule" not in config:
            raise ValueError("it has no betas, which DDIM needs.")
        if (kind := config.get("prediction_type", "epsilon")) not in PREDICTIONS:
            raise ValueError(f"prediction_type is {kind!r}; it must be one of {', '.join(PREDICTIONS)}.")
        if solver != "euler":
            raise ValueError(f"solver is {solver!r}; DDIM's steps are 'euler'.")
        made = super().from_config(config, clip_sample=False, thresholding=False)
        if steps:
            made.set_timesteps(steps)
            made.register_to_config(num_inference_steps=steps)
        return made

    def plain(self) -> DDIMScheduler:
        """diffusers' own scheduler of these settings."""
        own = settings_of(self)
        own.pop("num_inference_steps", None)
        return DDIMScheduler.from_config(own)

    # The process

    @property
    def interval(self) -> tuple[float, float]:
        """The lowest and the highest time that the network knows."""
        return 1 / self.config.num_train_timesteps, 1.0

    def mixing(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of data and noise at times, of the same shape (DDPM, Eq. 4)."""
        known = torch.cat([self.final_alpha_cumprod.view(1), self.alphas_cumprod.cpu()]).to(t.device)
        alpha = known[(self.config.num_train_timesteps * t).round().long()]
        return alpha**0.5, (1 - alpha) ** 0.5

    def training_times(self, normal: Tensor) -> Tensor:
        """Times of standard normal draws, of the same shape: all timesteps alike likely."""
        most = self.config.num_train_timesteps
        return (torch.special.ndtr(normal) * most).ceil().clamp(1, most) / most

    def time_of(self, ratio: float | Tensor) -> float | Tensor:
        """The first time at which the noise is at least `ratio` times as large as the signal, else 1.

        Of a tensor, one of its shape.
        """
        levels = (1 / self.alphas_cumprod - 1) ** 0.5
        if isinstance(ratio, Tensor):
            below = torch.searchsorted(levels.to(ratio), ratio)
            return ((below + 1).clamp(max=len(levels)) / len(levels)).to(ratio)
        return min((levels < ratio).sum().item() + 1, len(levels)) / len(levels)

    def ratio_of(self, t: Tensor) -> Tensor:
        """The noise-to-signal ratio at times, of the same shape."""
        alpha, sigma = self.mixing(t)
        return sigma / alpha

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, `[b, c, h, w]`, of noise of unit variance and t `[b, 1, 1, 1]`."""
        alpha, sigma = self.mixing(t)
        return alpha * x0 + sigma * noise

    def solve(self, model_output: Tensor, sample: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The data and the noise that the output stands for, both `[b, c, h, w]`."""
        alpha, sigma = self.mixing(t)
        if self.config.prediction_type == "v_prediction":
            return alpha * sample - sigma * model_output, alpha * model_output + sigma * sample
        if self.config.prediction_type == "sample":
            return model_output, (sample - alpha * model_output) / sigma
        return (sample - sigma * model_output) / alpha, model_output

    def velocity(self, model_output: Tensor, sample: Tensor, t: Tensor) -> Tensor:
        """What is learnt: the noise, `[b, c, h, w]` ("Diffusion Model is Effectively Its
        Own Teacher", Algorithm 1)."""
        return self.solve(model_output, sample, t)[1]

    def moved(self, sample: Tensor, x0: Tensor, noise: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """The sample at another time, as far as data and noise stay what they are (DDIM, Eq. 12)."""
        (alpha, sigma), (alpha_end, sigma_end) = self.mixing(t), self.mixing(end)
        return sample + (alpha_end - alpha) * x0 + (sigma_end - sigma) * noise

    def error(self, model_output: Tensor, sample: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The squared error of the noise, `[b, c, h, w]`, in float32 (DDPM, Eq. 14)."""
        return (self.velocity(model_output.float(), sample, t) - noise) ** 2

    def precondition_inputs(self, sample: Tensor, t: Tensor) -> Tensor:
        """The sample as it is."""
        return sample

    def precondition_noise(self, t: Tensor) -> Tensor:
        """The network's timestep."""
        return (self.config.num_train_timesteps * t).round() - 1

    def precondition_outputs(self, sample: Tensor, model_output: Tensor, t: Tensor) -> Tensor:
        """The denoised D(x; t)."""
        return self.solve(model_output, sample, t)[0]

    # The sampler

    @property
    def times(self) -> Tensor:
        """Times of the evaluations, float64."""
        return (self.timesteps.cpu().double() + 1) / self.config.num_train_timesteps

    @property
    def noise_levels(self) -> Tensor:
        """Noise-to-signal ratios of the evaluations."""
        return self.ratio_of(self.times)

    def refined(self, parts: int) -> Tensor:
        """Times `[N, parts + 1]` of the steps, in even parts, float64.

        Ends are DDIM's: T // N timesteps below, and 0 where that is below the lowest. With the spacing
        "linspace" they are not the beginnings of the steps that follow.
        """
        most = self.config.num_train_timesteps
        begins = most * self.times[:, None]
        ends = (begins - most // self.num_inference_steps).clamp(min=0)
        shares = torch.linspace(0, 1, parts + 1, dtype=torch.float64)
        return (begins + shares * (ends - begins)).round() / most

    def set_begin_index(self, begin_index: int = 0) -> None:
        """DDIM knows its place by the timestep."""


@dataclass
class Kept:
    """What all copies of a network share.

    Args:
        folder: the parent's.
        pipe: its pipeline without network and VAE.
        captions: names of the classes.
        prompts: embeddings `[n, d]` of the captions of the last batch.
    """

    folder: Path
    pipe: DiffusionPipeline
    captions: tuple[str, ...] = ()
    prompts: dict[str, Tensor] = field(default_factory=dict)

    def __deepcopy__(self, memo) -> "Kept":
        return self


class ForeignNetwork(nn.Module):
    """A network of diffusers, called as ours are.

    Args:
        model: the network, whose weights are all that is trained and averaged.
        kept: the rest of its pipeline.
    """

    kind: str  # of the pipeline
    part: str  # name of the network in it
    title: str
    task: str  # on the Hub
    defaults: dict = {}  # of a distillation
    is_cache_enabled = False

    def __init__(self, model: nn.Module, kept: Kept):
        super().__init__()
        self.model, self.kept = model, kept

    @property
    def config(self) -> FrozenDict:
        """The network's own settings, with those that ours have."""
        return FrozenDict(settings_of(self.model) | {"out_channels": None} | self.sizes())

    def sizes(self) -> dict[str, int]:
        """`patch_size`, which divides height and width, and `num_classes`."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> SDDiTTransformer2DOutput | tuple:
        """The prediction `[b, c, h, w]` for samples, a timestep or `[b]`, and class numbers `[b]`.

        A learnt variance, in channels beyond c, is left out.
        """
        timestep = timestep.expand(len(hidden_states))
        sample = self.predict(hidden_states, timestep, class_labels)[:, : hidden_states.shape[1]]
        return SDDiTTransformer2DOutput(sample, None) if return_dict else (sample,)

    def predict(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """What the network gives, as its pipeline calls it."""
        raise NotImplementedError

    def call(self, number: int) -> str:
        """Python of the arguments of its pipeline's call for an image of a class."""
        raise NotImplementedError

    def takes_guidance(self) -> bool:
        """Whether its pipeline can guide it."""
        return True

    def snippet(self, name: str, steps: int, number: int, guided: bool = True) -> str:
        """Python that makes an image of a class with the child of a name."""
        call = self.call(number) + ", guidance_scale=1.0" * (not guided or not self.takes_guidance())
        return (
            f"from diffusers import {self.kind}\n\npipe = {self.kind}.from_pretrained({python_text(name)})\n"
            f'pipe({call}, num_inference_steps={steps}).images[0].save("sample.png")'
        )

    def fresh(self) -> "ForeignNetwork":
        """One of the same kind, whose weights come later."""
        return type(self)(type(self.model).from_config(self.model.config), self.kept)

    def cache_context(self, name: str) -> nullcontext:
        return nullcontext()

    def enable_gradient_checkpointing(self, function=None) -> None:
        """As of diffusers' models."""
        self.model.enable_gradient_checkpointing(function)

    def save_pipeline(self, folder: Path, scheduler: DDIMProcess) -> None:
        """Saves the pipeline that it belongs to; all other parts are the parent's files.

        Raises:
            OSError: the disk is full.
        """
        index = read_json(self.kept.folder / "model_index.json", dict, "pipeline")
        ours = {self.part: self.model, "scheduler": scheduler.plain()}
        for name, part in ours.items():
            part.save_pretrained(folder / name)
            index[name] = ["diffusers", type(part).__name__]
        for name in index.keys() - ours:
            if (self.kept.folder / name).is_dir():
                shutil.copytree(self.kept.folder / name, folder / name)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


class ForeignDiT(ForeignNetwork):
    """The network of a DiTPipeline."""

    kind, part, title, task = "DiTPipeline", "transformer", "DiT", "unconditional-image-generation"
    _no_split_modules = stream_blocks = ["BasicTransformerBlock"]

    def __init__(self, model: nn.Module, kept: Kept):
        super().__init__(model, kept)
        for module in model.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # the objective drops labels, for all blocks alike

    def sizes(self) -> dict[str, int]:
        return {"num_classes": self.model.config.num_embeds_ada_norm}

    def predict(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        return self.model(sample, timestep=timestep, class_labels=labels).sample

    def call(self, number: int) -> str:
        return f"class_labels=[{number}]"

    def takes_guidance(self) -> bool:
        """Whether it has a thousand classes: DiTPipeline takes 1000 for the null class in any case."""
        return self.model.config.num_embeds_ada_norm == 1000


class ForeignUNet(ForeignNetwork):
    """The network of a StableDiffusionPipeline: its classes are captions, and the null class is "".

    The defaults are those of "Diffusion Model is Effectively Its Own Teacher" (A.2), where what is
    predicted with and without a caption is learnt apart.
    """

    kind, part, title, task = "StableDiffusionPipeline", "unet", "Stable Diffusion", "text-to-image"
    _no_split_modules, stream_blocks = ["BasicTransformerBlock", "ResnetBlock2D"], []
    defaults = {
        "apart": True, "guidance_scale": [5.0, 15.0], "learning_rate": 1e-6, "max_train_steps": 4000,
        "train_batch_size": 96,
    }  # fmt: skip

    def sizes(self) -> dict[str, int]:
        halvings = len(self.model.config.block_out_channels) - 1
        return {"patch_size": 2**halvings, "num_classes": len(self.kept.captions)}

    def predict(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        return self.model(sample, timestep, encoder_hidden_states=self.embedded(labels).to(sample)).sample

    @torch.no_grad()
    def embedded(self, labels: Tensor) -> Tensor:
        """Embeddings `[b, n, d]` of captions by number, as the pipeline makes them."""
        kept = self.kept
        captions = [kept.captions[i] if i < len(kept.captions) else "" for i in labels.tolist()]
        if not kept.prompts.keys() >= {*captions}:
            texts = sorted({*captions})
            kept.pipe.text_encoder.to(labels.device)
            found, _ = kept.pipe.encode_prompt(texts, labels.device, 1, False)
            kept.prompts = dict(zip(texts, found, strict=True))
        return torch.stack([kept.prompts[caption] for caption in captions])

    def call(self, number: int) -> str:
        return python_text(self.kept.captions[number])


FOREIGN = {network.kind: network for network in (ForeignDiT, ForeignUNet)}


def pipeline_class(name: str) -> str:
    """Name of the class of a pipeline, by folder or name on the Hub; empty where it cannot be read."""
    try:
        found = DiffusionPipeline.load_config(name)["_class_name"]
    except Exception:  # whatever the Hub, the network and the reader raise
        return ""
    return found if isinstance(found, str) else found[-1]


def load_foreign(name: str, kind: str) -> tuple[ForeignNetwork, DDIMProcess]:
    """Network and process of a pipeline of a class of `FOREIGN`.

    Raises:
        ValueError: it cannot be loaded, or its scheduler is of another kind.
    """
    foreign = FOREIGN[kind]
    try:
        folder = Path(name if Path(name).is_dir() else DiffusionPipeline.download(name))
        index = read_json(folder / "model_index.json", dict, "pipeline")
        others = {"vae", "safety_checker", "feature_extractor", "image_encoder"} & index.keys()
        settings = {"requires_safety_checker": False} if "safety_checker" in index else {}
        pipe = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(others), **settings)
    except Exception as error:  # whatever the Hub, the network and the readers raise
        raise ValueError(f"The pipeline {name!r} cannot be loaded: {one_line(error)}") from None
    model = pipe.components[foreign.part].float()
    pipe.register_modules(**{foreign.part: None})
    try:
        scheduler = DDIMProcess.from_config(pipe.scheduler.config)
    except ValueError as error:
        raise ValueError(
            f"The scheduler of {name} is {type(pipe.scheduler).__name__}; {one_line(error)}"
        ) from None
    return foreign(model, Kept(folder, pipe)), scheduler
