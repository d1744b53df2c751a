"""The SD-DiT pipeline: class labels to images, by EDM or a flow, with classifier-free guidance.

This file imports only torch, numpy and diffusers: its copy in a saved pipeline is all that others need of it.
"""

import difflib
import inspect
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL, AutoencoderTiny, ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Label = int | str | None
Generators = torch.Generator | list[torch.Generator] | None
_MOST = 10**6  # of steps, and of images of a label
_NO_CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}


class SDDiTPipeline(DiffusionPipeline):
    """Generates images of given classes.

    Args:
        transformer: an `SDDiTTransformer2DModel`, the raw network F.
        scheduler: an `EDMHeunScheduler` or an `InterpolantScheduler`, or one of diffusers' made from its
            config: an EDM scheduler of the first, a flow scheduler of a linear path.
        vae: decodes latents into images; None if the transformer works on pixels in -1..1.
        id2label: names of the classes by number; commas separate synonyms.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        # JSON has no integer keys, so the saved table has strings.
        id2label = {int(number): name for number, name in (id2label or {}).items()}
        self.register_to_config(id2label={str(number): name for number, name in id2label.items()} or None)
        self.id2label = id2label
        self.label2ids: dict[str, list[int]] = {}  # whole names and synonyms; a few stand for several classes
        for number, name in id2label.items():
            for synonym in dict.fromkeys(part.strip().lower() for part in (name, *name.split(","))):
                self.label2ids.setdefault(synonym, []).append(number)
        self.vae_scale_factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._current_timestep = None

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "SDDiTPipeline":
        """As in `DiffusionPipeline`, which takes no network over whose class is not the hint's itself."""
        if isinstance(pipeline, SDDiTPipeline):
            kwargs = {"transformer": pipeline.transformer} | kwargs
        return super().from_pipe(pipeline, **kwargs)

    @property
    def guidance_scale(self) -> float:
        """Guidance of the call in progress; 1 is off."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Network evaluations of the call in progress."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The timestep that is being evaluated, None outside a call."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the call in progress stops after this evaluation; callbacks set `_interrupt` for it."""
        return self._interrupt

    def get_label_ids(self, class_labels: Label | Sequence[Label] | Tensor) -> list[int]:
        """Class numbers of labels given as numbers, names or None, which is the null class.

        Raises:
            ValueError: a number out of range, a name of several classes, or an unknown one, with the nearest.
        """
        if isinstance(class_labels, (Tensor, np.ndarray)):
            class_labels = class_labels.flatten().tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Iterable):
            class_labels = [class_labels]
        return [self._label_id(label) for label in class_labels]

    def _label_id(self, label: Label) -> int:
        num_classes = self.transformer.config.num_classes
        if label is None:
            return num_classes
        if isinstance(label, str):
            return self._named_id(label)
        if isinstance(label, bool) or not isinstance(label, Integral) or not 0 <= label < num_classes:
            allowed = (
                f"integers from 0 to {num_classes - 1}" if num_classes else "none: the model has no classes"
            )
            raise ValueError(f"Class label {label!r:.80} is out of range; allowed are {allowed}.")
        return int(label)

    def _named_id(self, name: str) -> int:
        numbers = self.label2ids.get(name.strip().lower(), [])
        if len(numbers) > 1:
            choices = ", ".join(f"{number} ({self.id2label[number]})" for number in numbers)
            raise ValueError(f"Class name {name!r:.80} stands for several classes; give a number: {choices}.")
        if not numbers:
            raise ValueError(f"Unknown class name {name!r:.80}; {self._known_names(name)}")
        return numbers[0]

    def _known_names(self, name: str) -> str:
        """What a message says of the names that there are: all of up to 20, else the nearest."""
        text, known = name.strip().lower(), [synonym for synonym in self.label2ids if "," not in synonym]
        nearest = difflib.get_close_matches(text, known, n=5, cutoff=0.5)
        hint = f"{len(known)} names are known"
        if 0 < len(known) <= 20:
            hint += f": {', '.join(known)}."
        else:
            hint += f". Nearest names: {', '.join(nearest)}." if nearest else "."
        parts = [part.strip() for part in re.split(r"[,;\n]", text)]
        parts = parts if len(parts) > 1 else text.split()
        if len(parts) > 1 and any(part in self.label2ids or part.isdecimal() for part in parts):
            hint += (
                " Several classes are several labels: a list in Python, words of their own on a command "
                "line, parts between semicolons in ComfyUI."
            )
        return hint

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, float("inf")),
        num_images_per_label: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SDDiTPipeline", int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> ImagePipelineOutput | Any:  # a tuple: as one of the two, each caller would be asked which it is
        """Generates one image, or `num_images_per_label`, for every label.

        Args:
            class_labels: numbers, names, or a tensor of numbers; None is the null class (an unconditional
                image).
            guidance_scale: w of D_null + w (D_class - D_null); 1 is off, and costs half.
            guidance_interval: the range of the noise-to-signal ratio, ends included, in which guidance acts
                (Kynkäänniemi et al. 2024); it is EDM's sigma, and t / (1 - t) on a linear path.
            num_images_per_label: images of each label, side by side in the result.
            height, width: size of the images in pixels; by default that of the training samples.
            num_inference_steps: N, by default that of the scheduler's config, else the paper's 40. Heun's
                method evaluates the network 2N - 1 times.
            sigmas: the scheduler's noise levels themselves, decreasing, in place of `num_inference_steps`.
            generator: one for all images, or a list with one for each image, which then depends on its own
                alone.
            latents: the initial noise of unit variance, `[images, in_channels, h, w]`, instead of drawing it.
            output_type: "pil", "np" `[images, H, W, channels]`, "pt" `[images, channels, H, W]`, both in
                0..1, or "latent", the samples as the transformer makes them.
            return_dict: False for a plain tuple.
            callback_on_step_end: called with the pipeline, the evaluation's number, its timestep and a dict
                of tensors, after each evaluation; what it returns replaces the `latents`.
            callback_on_step_end_tensor_inputs: names of the tensors it gets: "latents", and the denoised
                "pred_original_sample" where the scheduler tells it.
            s_churn, s_tmin, s_tmax, s_noise: stochasticity of EDM's Algorithm 2, if the scheduler has it: a
                sigma in s_tmin..s_tmax is raised to 1 + s_churn / N of itself, by noise of deviation s_noise.

        Raises:
            ValueError: a label that does not exist, or any other argument out of its range; the message says
                which.
            FloatingPointError: samples or images that are not finite; the message has their places in the
                call, from 0, and the seeds of their generators.
        """
        check_number("num_images_per_label", num_images_per_label, 1, _MOST, Integral)
        if num_inference_steps is None:
            num_inference_steps = default_steps(self.scheduler)
        check_number("num_inference_steps", num_inference_steps, 1, _MOST, Integral)
        check_number("guidance_scale", guidance_scale)
        check_range("guidance_interval", guidance_interval)
        ids = [i for i in self.get_label_ids(class_labels) for _ in range(num_images_per_label)]
        if not ids:
            raise ValueError("There is nothing to make: class_labels is empty.")
        default_size = self.transformer.config.sample_size * self.vae_scale_factor
        height, width = (default_size if side is None else side for side in (height, width))
        self._check_size(height, width)
        check_generator(generator, len(ids))
        self._check_outputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        churn = self._churn(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
        self._guidance_scale = guidance_scale
        self._interrupt = False
        self._context: str | None = None  # of the last evaluation
        device = self._execution_device

        labels = torch.tensor(ids, device=device)
        null = torch.full_like(labels, self.transformer.config.num_classes)
        check_scheduler(self.scheduler)
        self._set_timesteps(num_inference_steps, sigmas, device)
        latents = self._prepare_latents(len(labels), height, width, generator, latents, device)

        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                self._current_timestep = t
                model_input = self._model_input(latents, t).to(self.transformer.dtype)
                is_guided = guidance_interval[0] <= noise_level(self.scheduler, i) <= guidance_interval[1]
                if guidance_scale != 1 and is_guided:
                    output = self._evaluate(
                        "guided", torch.cat([model_input] * 2), t, torch.cat([labels, null])
                    )
                    conditional, unconditional = output.to(latents.dtype).chunk(2)
                    # D is linear in the output, be it F, a velocity or noise: guiding it guides D.
                    output = unconditional + guidance_scale * (conditional - unconditional)
                else:
                    output = self._evaluate("conditional", model_input, t, labels).to(latents.dtype)
                step = self.scheduler.step(output, t, latents, generator=generator, **churn)
                latents = step.prev_sample

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "pred_original_sample": step.get("pred_original_sample")}
                    tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
                progress_bar.update()

        self._current_timestep = None
        images = self.decode(latents, output_type, generator=generator)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _evaluate(self, context: str, model_input: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        # Not every cache of diffusers keeps its contexts apart, and guidance doubles the batch.
        if self.transformer.is_cache_enabled and self._context not in (None, context):
            self.transformer._reset_stateful_cache()
        self._context = context
        with self.transformer.cache_context(context):
            return self.transformer(model_input, timestep, labels, return_dict=False)[0]

    def _prepare_latents(self, batch: int, height: int, width: int, generator, latents, device) -> Tensor:
        """Noise as the scheduler begins with, in float32 whatever the transformer's dtype."""
        f = self.vae_scale_factor
        shape = (batch, self.transformer.config.in_channels, height // f, width // f)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif not isinstance(latents, Tensor) or latents.shape != shape:
            given = tuple(getattr(latents, "shape", ()))
            raise ValueError(f"latents have shape {given}; this call needs a tensor of {shape}.")
        elif not latents.isfinite().all():
            raise ValueError("latents has values that are not finite; it must be noise of unit variance.")
        latents = latents.to(device=device, dtype=torch.promote_types(latents.dtype, torch.float32))
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)  # diffusers' flows have none

    def _model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        if hasattr(self.scheduler, "scale_model_input"):
            return self.scheduler.scale_model_input(latents, timestep)
        return latents

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Samples as the transformer takes them, `[b, c, h, w]` in float32; of a posterior, the mean.

        Args:
            images: `[b, channels, H, W]` in -1..1. Without a VAE they are the samples.

        Raises:
            ValueError: wrong channels, or a size that is no multiple of `vae_scale_factor`.
        """
        channels, f = (self.vae or self.transformer).config.in_channels, self.vae_scale_factor
        if images.shape[1] != channels or images.shape[2] % f or images.shape[3] % f:
            raise ValueError(
                f"The images have shape {tuple(images.shape)}; it must be "
                f"(images, {channels}, a multiple of {f}, a multiple of {f})."
            )
        if self.vae is None:
            return images.float()
        encoded = self.vae.encode(images.to(self._execution_device, self.vae.dtype))
        latents = encoded.latents if isinstance(self.vae, AutoencoderTiny) else encoded.latent_dist.mean
        return scale_latents(latents.float(), self.vae.config)

    def unscale_latents(self, latents: Tensor) -> Tensor:
        """The VAE's own latents, of samples as the transformer makes them; without a VAE the samples."""
        return latents if self.vae is None else unscale_latents(latents, self.vae.config)

    @torch.no_grad()
    def decode(
        self, latents: Tensor, output_type: str = "pil", scaled: bool = True, generator: Generators = None
    ):
        """Images of samples as the transformer makes them, `[b, c, h, w]`; `output_type` as in a call.

        With `scaled=False` the latents are the VAE's own.

        Raises:
            FloatingPointError: samples or images that are not finite; the message has the seeds of
                `generator`, what the samples were made with.
        """
        check_finite(latents, generator)
        if output_type == "latent":
            return latents
        if scaled:
            latents = self.unscale_latents(latents)
        if self.vae is not None:
            latents = latents.to(self._execution_device, self.vae.dtype)
            latents = self.vae.decode(latents, return_dict=False)[0]
            check_finite(
                latents, generator, " once decoded; the VAE overflows. Load it with dtype=torch.float32"
            )
        return self.image_processor.postprocess(latents.float(), output_type=output_type)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes model_index.json, and beside it the code of the pipeline and of its parts.

        With these copies, `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` loads the folder
        where the package is not installed. `save_pretrained` and `push_to_hub` end here.
        """
        for folder, file in {".": Path(inspect.getfile(type(self))), **self._files_of_parts()}.items():
            target = Path(save_directory, folder)
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / file.name)
        super().save_config(save_directory, push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """model_index.json: classes from outside diffusers are named by their file, without a package."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = [Path(inspect.getfile(type(self))).stem, index["_class_name"]]
        for name, file in self._files_of_parts().items():
            index[name][0] = file.stem
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _files_of_parts(self) -> dict[str, Path]:
        """Names of the parts that are of no library which loads its own, and the files of their classes."""
        kinds = {name: type(part) for name, part in self.components.items() if part is not None}
        return {
            name: Path(inspect.getfile(kind))
            for name, kind in kinds.items()
            if kind.__module__.split(".")[0] not in ("diffusers", "transformers")
        }

    def _set_timesteps(self, num_inference_steps: int, sigmas: Sequence[float] | None, device) -> None:
        if sigmas is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            name = type(self.scheduler).__name__
            is_ramp = name.startswith("EDM") and name != "EDMHeunScheduler"  # of diffusers' EDM schedulers
            if is_ramp or "sigmas" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(f"{name} takes no sigmas; EDMHeunScheduler and InterpolantScheduler do.")
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        self.scheduler.set_begin_index(0)

    def _churn(self, **churn: float) -> dict[str, float]:
        """What the scheduler's `step` gets of Algorithm 2's stochasticity."""
        check_number("s_churn", churn["s_churn"], 0)
        check_range("s_tmin, s_tmax", (churn["s_tmin"], churn["s_tmax"]))
        check_number("s_noise", churn["s_noise"], 0)
        if churn == _NO_CHURN:
            return {}
        if "s_churn" not in inspect.signature(self.scheduler.step).parameters:
            is_interpolant = "path" in self.scheduler.config
            instead = "sample with a diffusion in its config" if is_interpolant else "take EDMHeunScheduler"
            raise ValueError(
                f"{type(self.scheduler).__name__} has no churn; leave out s_churn, s_tmin, s_tmax and "
                f"s_noise, or {instead}."
            )
        return churn

    def _check_size(self, height: int, width: int) -> None:
        unit = self.vae_scale_factor * self.transformer.config.patch_size
        for name, side in (("height", height), ("width", width)):
            check_number(name, side, 1, kind=Integral)
        if height % unit or width % unit:
            raise ValueError(f"height x width is {height} x {width}; both must be multiples of {unit}.")

    def _check_outputs(self, output_type: str, callback: Callable | None, names: Sequence[str]) -> None:
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r:.80}; it must be 'pil', 'np', 'pt' or 'latent'.")
        if callback is not None and not callable(callback):
            raise ValueError(f"callback_on_step_end is {callback!r:.80}; it must be a function.")
        known = self._callback_tensor_inputs
        if not isinstance(names, (list, tuple)) or any(name not in known for name in names):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs is {names!r:.80}; it must be a list of some of {known}."
            )


def default_steps(scheduler: SchedulerMixin) -> int:
    """Steps of a call that names none: those of the scheduler's config, else the paper's 40."""
    return scheduler.config.get("num_inference_steps", 40)


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether it is one of diffusers' flow schedulers, whose sigma is t on the linear path."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return True
    # Other classes keep settings that they do not have.
    knows = "use_flow_sigmas" in inspect.signature(type(scheduler)).parameters
    return knows and bool(scheduler.config.get("use_flow_sigmas"))


def noise_level(scheduler: SchedulerMixin, evaluation: int) -> float:
    """The noise-to-signal ratio sigma / alpha of an evaluation, the ruler of all schedulers."""
    if hasattr(scheduler, "noise_levels"):
        return float(scheduler.noise_levels[evaluation])
    sigma = float(scheduler.sigmas[evaluation])
    if not is_flow(scheduler):
        return sigma
    return sigma / (1 - sigma) if sigma < 1 else math.inf


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raises a ValueError for a scheduler that was made of an interpolant's config and does not sample it."""
    name, config = type(scheduler).__name__, scheduler.config
    if name == "InterpolantScheduler" or "path" not in config:
        return
    path, prediction = config["path"], config["prediction_type"]
    predictions = (
        ["flow_prediction"] if name.startswith("FlowMatch") else ["flow_prediction", "epsilon", "sample"]
    )
    if not is_flow(scheduler) or path != "linear" or prediction not in predictions:
        raise ValueError(
            f"{name} does not sample the path {path!r} with the prediction {prediction!r}; "
            "InterpolantScheduler does. On the linear path FlowMatchEulerDiscreteScheduler takes velocities, "
            "and DPMSolverMultistepScheduler all predictions but the score."
        )


def scale_latents(latents: Tensor, vae_config: Mapping) -> Tensor:
    """A VAE's own latents, `[b, c, h, w]`, as the transformer sees them."""
    return (latents - (vae_config.get("shift_factor") or 0.0)) * vae_config["scaling_factor"]


def unscale_latents(latents: Tensor, vae_config: Mapping) -> Tensor:
    """The inverse of [`scale_latents`]."""
    return latents / vae_config["scaling_factor"] + (vae_config.get("shift_factor") or 0.0)


def check_number(
    name: str, value: float, low: float = -math.inf, high: float = math.inf, kind: type = Real
) -> None:
    """Raises a ValueError for what is no finite number of the range; `kind` Integral asks for a whole one."""
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if is_number and low <= value <= high and -math.inf < value < math.inf:
        return
    limits = [f"at least {low}"] * (low > -math.inf) + [f"at most {high}"] * (high < math.inf)
    what = "a whole number" if kind is Integral else "a finite number"
    raise ValueError(f"{name} is {value!r:.80}; it must be {', '.join([what, *limits])}.")


def check_range(name: str, ends: tuple[float, float]) -> None:
    """Raises a ValueError for what is no pair of rising numbers, of which the upper may be infinite."""
    is_pair = (
        isinstance(ends, (tuple, list)) and len(ends) == 2 and all(isinstance(end, Real) for end in ends)
    )
    if not is_pair or not -math.inf < ends[0] <= ends[1] or ends[0] == math.inf:
        raise ValueError(f"{name} is {ends!r:.80}; it must be (lowest noise level, highest or inf).")


def check_generator(generator: Generators, images: int) -> None:
    """Raises a ValueError for what are not the generators of so many images."""
    given = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(each, torch.Generator) for each in given):
        raise ValueError(f"generator is {generator!r:.80}; it must be a torch.Generator, or a list of them.")
    if isinstance(generator, list) and len(generator) != images:
        raise ValueError(f"{len(generator)} generators were given for {images} images.")


def check_finite(samples: Tensor, generator: Generators, when: str = "") -> None:
    """Raises a FloatingPointError that names the samples `[b, ...]` with inf or nan, and their seeds."""
    finite = samples.isfinite().flatten(1).all(dim=1)
    if finite.all():  # waits for a GPU
        return
    broken = (~finite).nonzero().flatten().tolist()
    named = [f"image {i}" for i in broken[:4]]
    if generator is not None:
        generators = generator if isinstance(generator, list) else [generator] * len(samples)
        named = [f"image {i} (seed {generators[i].initial_seed()})" for i in broken[:4]]
    more = f" and {len(broken) - 4} more" if len(broken) > 4 else ""
    verb = "is" if len(broken) == 1 else "are"
    raise FloatingPointError(f"Of {len(samples)} images {', '.join(named)}{more} {verb} not finite{when}.")
