"""Samplers by name, as schedulers of EDM's and of interpolants' pipelines, and their inputs."""

from comfy_api.latest import io
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    SchedulerMixin,
)

from sddit_diffusers import EDMHeunScheduler, InterpolantScheduler, SDDiTPipeline
from sddit_diffusers.pipelines.pipeline_sddit import check_scheduler
from sddit_diffusers.schedulers.scheduling_interpolant import DIFFUSIONS

AUTO = "auto"  # the pipeline's own scheduler as it is
# By name: schedulers of EDM's pipelines, and of interpolants'.
SAMPLERS = {
    "heun": (EDMHeunScheduler, InterpolantScheduler),
    "euler": (EDMEulerScheduler, InterpolantScheduler),
    "dpmpp_2m": (EDMDPMSolverMultistepScheduler, DPMSolverMultistepScheduler),
}


def number(
    name: str, default: float, most: float, tooltip: str, step: float = 0.1, round: float = 0.001, **options
):
    """An input from 0 to `most`."""
    return io.Float.Input(
        name, default=float(default), min=0.0, max=float(most), step=step, round=round, tooltip=tooltip,
        **options,
    )  # fmt: skip


def scheduler_of(pipe: SDDiTPipeline, sampler: str, diffusion: str, diffusion_norm: float) -> SchedulerMixin:
    """The scheduler of a sampler's name for a pipeline, apart from the pipeline's own.

    Raises:
        ValueError: the pipeline has no such sampler.
    """
    config, kind, settings = pipe.scheduler.config, type(pipe.scheduler), {}
    is_edm, is_sde = "path" not in config, diffusion != "none"
    if is_sde and is_edm:
        raise ValueError(f"diffusion is {diffusion!r}; this pipeline is EDM's, whose noise is s_churn.")
    if sampler != AUTO:
        kind = SAMPLERS[sampler][0 if is_edm else 1]
        if kind in (EDMHeunScheduler, InterpolantScheduler):
            settings["solver"] = sampler
    if is_sde and kind is not InterpolantScheduler:
        raise ValueError(
            f"diffusion is {diffusion!r}; the samplers heun and euler have it, {sampler} has not."
        )
    if kind is InterpolantScheduler and (is_sde or sampler != AUTO):
        settings |= {"diffusion": diffusion, "diffusion_norm": diffusion_norm}
    scheduler = kind.from_config(config, **settings)
    check_scheduler(scheduler)
    return scheduler


def sampler_inputs() -> list:
    """Sampler, steps and guidance."""
    return [
        io.Combo.Input(
            "sampler",
            options=[AUTO, *SAMPLERS],
            default=AUTO,
            tooltip="auto: the pipeline's own, as it was trained or distilled for. dpmpp_2m needs "
            "fewer steps, such as 15; 8 for a first look.",
        ),
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=1000,
            tooltip="0: the pipeline's own steps, mostly 40; of a distilled pipeline, its few. heun "
            "evaluates the network 2 steps - 1 times, the others once a step.",
        ),
        number(
            "guidance_scale",
            1.5,
            100,
            "Classifier-free guidance: higher is more of the class and less various. 1 is off, and "
            "takes half the time.",
            round=0.01,
        ),
        number("guidance_sigma_min", 0, 1000, "The lowest noise level that is guided."),
        number(
            "guidance_sigma_max",
            1000,
            1000,
            "The highest noise level that is guided; EDM's sampling begins at 80.",
        ),  # fmt: skip
    ]


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
