"""ComfyUI nodes (V3 API): load a pipeline, sample, decode, encode.

A LATENT holds what ComfyUI's own VAE nodes take and make: the VAE's latents, not scaled for the transformer,
`[b, c, h, w]` in float32. Of a pipeline without a VAE it holds the pixels, in -1..1. An IMAGE is
`[b, H, W, 3]` in 0..1, also of grey pictures.
"""

import math
import os
import re
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    SchedulerMixin,
)

from sddit_diffusers import EDMHeunScheduler, InterpolantScheduler, SDDiTPipeline
from sddit_diffusers.pipelines.calls import MAX_LEVEL
from sddit_diffusers.pipelines.loading import SHORT_DTYPES, load_pipeline
from sddit_diffusers.pipelines.pipeline_sddit import check_scheduler
from sddit_diffusers.pipelines.sampling import generators
from sddit_diffusers.schedulers.scheduling_interpolant import DIFFUSIONS

Pipeline = io.Custom("SDDIT_PIPELINE")
FROM_HUB = "(from the Hub)"
# By name: schedulers of EDM's pipelines; of interpolants', and their settings.
SAMPLERS = {
    "heun": (EDMHeunScheduler, InterpolantScheduler, {"solver": "heun"}),
    "euler": (EDMEulerScheduler, InterpolantScheduler, {"solver": "euler"}),
    "dpmpp_2m": (EDMDPMSolverMultistepScheduler, DPMSolverMultistepScheduler, {}),
}
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL makes pictures grey


def pipeline_folders() -> dict[str, Path]:
    """SD-DiT pipelines in ComfyUI's folders of `diffusers` models, by their names below these."""
    found = {}
    for root in folder_paths.get_folder_paths("diffusers"):
        for folder, subfolders, files in os.walk(root, followlinks=True):
            if leads_back(Path(folder), Path(root)):
                subfolders.clear()
                continue
            index = Path(folder, "model_index.json")
            if index.name in files:
                subfolders.clear()
                if b"SDDiTPipeline" in index.read_bytes():
                    found.setdefault(index.parent.relative_to(root).as_posix(), index.parent)
    return dict(sorted(found.items()))


def leads_back(folder: Path, root: Path) -> bool:
    """Whether a folder is, by a link, one of those above it up to `root`."""
    above = [parent for parent in folder.parents if parent.is_relative_to(root)]
    return os.path.realpath(folder) in map(os.path.realpath, above)


def source(folder: str, hub_name: str) -> str:
    """What `from_pretrained` takes: a folder of models that was found, or a name on the Hub.

    Raises:
        ValueError: there is no such folder of models, or the name may be a path.
    """
    if folder == FROM_HUB:
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", hub_name) or os.path.exists(hub_name):
            raise ValueError(
                f"hub_name is {hub_name!r}; it must be a name on the Hub, as 'owner/name', and no path."
            )
        return hub_name
    if hub_name:
        raise ValueError(
            f"Both the folder {folder!r} and hub_name {hub_name!r} are given; "
            f"choose the folder {FROM_HUB!r}, or empty hub_name."
        )
    folders = pipeline_folders()
    if folder not in folders:
        raise ValueError(
            f"There is no SD-DiT pipeline {folder!r} in ComfyUI's folders of diffusers models; "
            f"there are: {', '.join(folders) or 'none'}."
        )
    return str(folders[folder])


def parse_classes(text: str) -> list[int | str | None]:
    """Labels by a text: names and numbers, split at semicolons and line ends; numbers at commas as well.

    Commas do not split names, which have some ("crane, bird"). An empty text is the null class.
    """
    labels = []
    for part in map(str.strip, re.split(r"[;\n]", text)):
        numbers = [number.strip() for number in part.split(",")]
        if all(number.isdecimal() for number in numbers):
            labels += [int(number) for number in numbers]
        elif part:
            labels.append(part)
    return labels or [None]


def decode(
    pipe: SDDiTPipeline, latents: torch.Tensor, generator: list[torch.Generator] | None = None
) -> torch.Tensor:
    """IMAGE of a LATENT's samples, and what they were made with, if that is known."""
    images = pipe.decode(latents, "pt", scaled=False, generator=generator)
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu()


def number(
    name: str, default: float, most: float, tooltip: str, step: float = 0.1, round: float = 0.001, **options
):
    """An input from 0 to `most`."""
    return io.Float.Input(
        name, default=float(default), min=0.0, max=float(most), step=step, round=round, tooltip=tooltip,
        **options,
    )  # fmt: skip


def scheduler_of(pipe: SDDiTPipeline, sampler: str, diffusion: str, diffusion_norm: float) -> SchedulerMixin:
    """The scheduler of a sampler's name for a pipeline.

    Raises:
        ValueError: the pipeline has no such sampler.
    """
    edm, flow, settings = SAMPLERS[sampler]
    config = pipe.scheduler.config
    if "path" not in config:
        if diffusion != "none":
            raise ValueError(f"diffusion is {diffusion!r}; this pipeline is EDM's, whose noise is s_churn.")
        return edm.from_config(config)
    if flow is InterpolantScheduler:
        settings = settings | {"diffusion": diffusion, "diffusion_norm": diffusion_norm}
    elif diffusion != "none":
        raise ValueError(
            f"diffusion is {diffusion!r}; the samplers heun and euler have it, {sampler} has not."
        )
    scheduler = flow.from_config(config, **settings)
    check_scheduler(scheduler)
    return scheduler


def churn_inputs() -> list:
    """The stochastic samplers, EDM's and the interpolants'."""
    inputs = (
        ("s_churn", 0, 1000, "EDM's S_churn: noise that each step adds, for heun and euler. 0 is off.", 1.0),
        ("s_tmin", 0, 1000, "The lowest noise level at which noise is added.", 0.01),
        ("s_tmax", 1000, 1000, "The highest noise level at which noise is added.", 1.0),
        ("s_noise", 1, 10, "Standard deviation of the noise that is added.", 0.001),
    )
    return [
        *(number(*each, optional=True) for each in inputs),
        io.Combo.Input(
            "diffusion",
            options=list(DIFFUSIONS),
            default="none",
            optional=True,
            tooltip="The SDE's noise, of an interpolant's pipeline, for heun and euler. none: the ODE.",
        ),
        number("diffusion_norm", 1, 100, "What the SDE's noise is multiplied by.", 0.1, optional=True),
    ]


class LoadPipeline(io.ComfyNode):
    """A pipeline by folder or name on the Hub."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        devices = ["auto", "cpu"]
        if accelerator := torch.accelerator.current_accelerator(check_available=True):
            devices += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
        return io.Schema(
            node_id="SDDiTLoadPipeline",
            display_name="Load SD-DiT Pipeline",
            category="SD-DiT",
            description="Loads a pipeline that train_sddit.py or save_pretrained left. Runs no code of it.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=[*pipeline_folders(), FROM_HUB],
                    tooltip="A folder in models/diffusers that holds a model_index.json.",
                ),
                io.String.Input(
                    "hub_name", default="", tooltip=f"owner/name, where the folder is {FROM_HUB}."
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", *SHORT_DTYPES],
                    default="auto",
                    tooltip="Of the transformer. auto: bf16 where ComfyUI finds it fit, else fp32.",
                ),
                io.Combo.Input(
                    "device", options=devices, default="auto", tooltip="auto: the one that ComfyUI uses."
                ),
            ],
            outputs=[Pipeline.Output(display_name="pipeline")],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_) -> list[int] | None:
        """Changes when the weights do, so that a pipeline that was trained on is loaded again."""
        if path := pipeline_folders().get(folder):
            return [file.stat().st_mtime_ns for file in sorted(path.glob("*/*.safetensors"))]

    @classmethod
    def execute(cls, folder: str, hub_name: str, dtype: str, device: str) -> io.NodeOutput:
        name = source(folder, hub_name)
        device = comfy.model_management.get_torch_device() if device == "auto" else torch.device(device)
        if dtype == "auto":
            dtype = "bf16" if comfy.model_management.should_use_bf16(device) else "fp32"
        # ComfyUI runs nodes in inference mode. Weights made in it take other kernels: a VAE's images then
        # differ in their last bits from those made outside.
        with torch.inference_mode(False):
            pipe = load_pipeline(name, SHORT_DTYPES[dtype]).to(device)
        channels = pipe.transformer.config.in_channels
        if pipe.vae is None and channels not in (1, 3):
            raise ValueError(f"The pipeline {name!r} has no VAE for its latents of {channels} channels.")
        return io.NodeOutput(pipe)


class Sample(io.ComfyNode):
    """Images of classes and seeds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDDiTSample",
            display_name="SD-DiT Sample",
            category="SD-DiT",
            description="Images of classes. Image i has the seed + i, and depends on it alone.",
            inputs=[
                Pipeline.Input("pipeline"),
                io.String.Input(
                    "classes",
                    multiline=True,
                    default="0",
                    tooltip="Names or numbers, semicolons or line ends between them: golden retriever; 207. "
                    "Empty: images of no class.",
                ),
                io.Int.Input("images_per_class", default=1, min=1, max=4096),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True),
                io.Combo.Input("sampler", options=list(SAMPLERS), default="heun"),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="heun evaluates the network 2 steps - 1 times, the others once a step. "
                    "0: the pipeline's own steps, mostly 40.",
                ),
                number("guidance_scale", 1.5, 100, "1 is off.", round=0.01),
                number("guidance_sigma_min", 0, 1000, "The lowest noise level that is guided."),
                number(
                    "guidance_sigma_max",
                    1000,
                    1000,
                    "The highest noise level that is guided; EDM's sampling begins at 80.",
                ),  # fmt: skip
                *churn_inputs(),
            ],
            outputs=[io.Image.Output(display_name="image"), io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(
        cls,
        pipeline: SDDiTPipeline,
        classes: str,
        images_per_class: int,
        seed: int,
        sampler: str,
        steps: int,
        guidance_scale: float,
        guidance_sigma_min: float,
        guidance_sigma_max: float,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = 1000.0,
        s_noise: float = 1.0,
        diffusion: str = "none",
        diffusion_norm: float = 1.0,
    ) -> io.NodeOutput:
        # ComfyUI keeps the loaded pipeline for other nodes: this one shares its weights, not its state.
        scheduler = scheduler_of(pipeline, sampler, diffusion, diffusion_norm)
        pipe = SDDiTPipeline(pipeline.transformer, scheduler, pipeline.vae, pipeline.id2label)
        labels = parse_classes(classes)
        generator = generators((seed + i) % 2**64 for i in range(len(labels) * images_per_class))
        churn = dict(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise) if s_churn else {}
        progress = comfy.utils.ProgressBar(1)

        def after_evaluation(pipe: SDDiTPipeline, i: int, timestep: torch.Tensor, tensors: dict) -> dict:
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update_absolute(i + 1, pipe.num_timesteps)
            return tensors

        samples = pipe(
            labels,
            guidance_scale=guidance_scale,
            guidance_interval=(
                guidance_sigma_min,
                guidance_sigma_max if guidance_sigma_max < MAX_LEVEL else math.inf,
            ),
            num_images_per_label=images_per_class,
            num_inference_steps=steps or None,
            generator=generator,
            output_type="latent",
            callback_on_step_end=after_evaluation,
            **churn,
        ).images
        latents = pipe.unscale_latents(samples)
        return io.NodeOutput(decode(pipe, latents, generator), {"samples": latents.cpu()})


class Decode(io.ComfyNode):
    """LATENT to IMAGE by the pipeline's VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDDiTDecode",
            display_name="SD-DiT Decode",
            category="SD-DiT",
            description="Images of latents, by the pipeline's VAE; of a pipeline without one, of pixels.",
            inputs=[Pipeline.Input("pipeline"), io.Latent.Input("samples")],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(cls, pipeline: SDDiTPipeline, samples: dict) -> io.NodeOutput:
        latents, channels = samples["samples"], pipeline.transformer.config.in_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(
                f"The LATENT has shape {tuple(latents.shape)}; this pipeline decodes "
                f"(images, {channels}, height, width)."
            )
        return io.NodeOutput(decode(pipeline, latents))


class Encode(io.ComfyNode):
    """IMAGE to LATENT by the pipeline's VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDDiTEncode",
            display_name="SD-DiT Encode",
            category="SD-DiT",
            description="Latents of images, by the pipeline's VAE; without one, pixels.",
            inputs=[Pipeline.Input("pipeline"), io.Image.Input("image")],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, pipeline: SDDiTPipeline, image: torch.Tensor) -> io.NodeOutput:
        pixels = image[..., :3].permute(0, 3, 1, 2) * 2 - 1  # without alpha, in -1..1
        if (pipeline.vae or pipeline.transformer).config.in_channels == 1:
            pixels = (pixels * pixels.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        latents = pipeline.unscale_latents(pipeline.encode(pixels))
        return io.NodeOutput({"samples": latents.cpu()})
