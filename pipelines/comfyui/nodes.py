"""ComfyUI nodes (V3 API): load a pipeline, sample, decode, encode.

A LATENT holds what ComfyUI's own VAE nodes take and make: the VAE's latents, not scaled for the transformer,
`[b, c, h, w]` in float32. Of a pipeline without a VAE it holds the pixels, in -1..1. An IMAGE is
`[b, H, W, 3]` in 0..1, also of grey pictures.
"""

import math

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from sddit_diffusers import SDDiTPipeline
from sddit_diffusers.pipelines.calls import MAX_LEVEL
from sddit_diffusers.pipelines.loading import SHORT_DTYPES, load_pipeline
from sddit_diffusers.pipelines.sampling import generators

from .classes import class_names, parse_classes, quoted_where_needed
from .samplers import churn_inputs, sampler_inputs, scheduler_of
from .sources import FROM_HUB, pipeline_folders, source

Pipeline = io.Custom("SDDIT_PIPELINE")
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL makes pictures grey


def decode(
    pipe: SDDiTPipeline, latents: torch.Tensor, generator: list[torch.Generator] | None = None
) -> torch.Tensor:
    """IMAGE of a LATENT's samples, and what they were made with, if that is known."""
    images = pipe.decode(latents, "pt", scaled=False, generator=generator)
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu()


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
                    tooltip="A folder in models/diffusers that holds a model_index.json; or the small "
                    "pipeline that comes with the package; or a name on the Hub.",
                ),
                io.String.Input(
                    "hub_name",
                    default="",
                    tooltip=f"owner/name, where the folder is {FROM_HUB}; empty where it is another.",
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
            outputs=[
                Pipeline.Output(
                    display_name="pipeline", tooltip="Network, scheduler, VAE and the names of the classes."
                )
            ],
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


class ClassName(io.ComfyNode):
    """A class by a list of names.

    ComfyUI asks a node for its choices before anything is linked to it, so these are the names of all
    pipelines that are found; which of them the linked one has, the sampling says.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDDiTClass",
            display_name="SD-DiT Class",
            category="SD-DiT",
            description="A class by name, for the classes of SD-DiT Sample. For several, chain these nodes.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=class_names(),
                    tooltip="Names of all pipelines that SD-DiT's loader offers; type to search among them.",
                ),
                io.String.Input(
                    "before",
                    default="",
                    optional=True,
                    force_input=True,
                    tooltip="Classes that come before this one, of another SD-DiT Class.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="classes", tooltip="For the input classes of SD-DiT Sample.")
            ],
        )

    @classmethod
    def execute(cls, name: str, before: str = "") -> io.NodeOutput:
        return io.NodeOutput("; ".join(filter(None, [before, quoted_where_needed(name)])))


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
                Pipeline.Input("pipeline", tooltip="Of Load SD-DiT Pipeline."),
                io.String.Input(
                    "classes",
                    multiline=True,
                    default="0",
                    tooltip="Names or numbers, semicolons or line ends between them: golden retriever; 207. "
                    "A name in quotes is never a number. Empty: images of no class.",
                ),
                io.Int.Input(
                    "images_per_class",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Images of each class, side by side in the batch. All are made at once.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Of the first image; image i of all has the seed + i and depends on it alone.",
                ),
                *sampler_inputs(),
                *churn_inputs(),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The images, those of the first class first."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The same as latents of the VAE, for VAE Decode as well; without a VAE, pixels.",
                ),
            ],
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
            inputs=[
                Pipeline.Input("pipeline", tooltip="The one whose VAE decodes."),
                io.Latent.Input("samples", tooltip="Latents of that VAE, of SD-DiT Sample or VAE Encode."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The decoded images.")],
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
            inputs=[
                Pipeline.Input("pipeline", tooltip="The one whose VAE encodes."),
                io.Image.Input(
                    "image", tooltip="Images whose sides are multiples of the VAE's factor, mostly 8."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The mean of the VAE's posterior; no draw.")
            ],
        )

    @classmethod
    def execute(cls, pipeline: SDDiTPipeline, image: torch.Tensor) -> io.NodeOutput:
        pixels = image[..., :3].permute(0, 3, 1, 2) * 2 - 1  # without alpha, in -1..1
        if (pipeline.vae or pipeline.transformer).config.in_channels == 1:
            pixels = (pixels * pixels.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        latents = pipeline.unscale_latents(pipeline.encode(pixels))
        return io.NodeOutput({"samples": latents.cpu()})
