"""Samplers of a pipeline for somebody who does not know them: fast, balanced, best."""

from typing import NamedTuple

from diffusers import SchedulerMixin

from .loading import scheduler_of, swappable
from .pipeline_sddit import SDDiTPipeline, default_steps

PAPERS_STEPS = 40  # of a scheduler that was not told another number
_DPM = "EDMDPMSolverMultistepScheduler"


class Preset(NamedTuple):
    """A scheduler and how many steps of it.

    Attributes:
        title: for people.
        scheduler: the name of its class, one of [`samplers`].
        steps: of a call.
    """

    title: str
    scheduler: str
    steps: int


# What is nearly as good and faster, by the class of the pipeline's own scheduler, the fastest first. On the
# digits the Fréchet distances are 0.379 and 0.324, and 0.324 with Heun's 40 steps (docs/sampling.md). Flows
# have no row, since none has been measured.
FASTER = {"EDMHeunScheduler": (Preset("Fast", _DPM, 8), Preset("Balanced", _DPM, 15))}
_TITLES = {
    "EDMDPMSolverMultistepScheduler": "DPM-Solver++", "DPMSolverMultistepScheduler": "DPM-Solver++",
    "EDMEulerScheduler": "Euler", "FlowMatchEulerDiscreteScheduler": "Euler",
}  # fmt: skip


def knows_its_sampler(scheduler: SchedulerMixin) -> bool:
    """Whether a pipeline was distilled for the sampler that its scheduler's config has."""
    return default_steps(scheduler) < PAPERS_STEPS or scheduler.config.get("solver") == "euler"


def samplers(pipe: SDDiTPipeline) -> dict[str, SDDiTPipeline]:
    """The pipeline with each scheduler that fits it, by the name of its class; first its own.

    They share their parts. A distilled pipeline has its own alone.
    """
    own = pipe.scheduler
    found = {type(own).__name__: pipe}
    others = [] if knows_its_sampler(own) else swappable(own)
    for name in [name for name in others if name not in found]:
        try:
            scheduler = scheduler_of(own, name, {})
        except ValueError:  # on this path, or for this prediction
            continue
        found[name] = SDDiTPipeline(pipe.transformer, scheduler, pipe.vae, pipe.id2label)
    return found


def presets(pipe: SDDiTPipeline, max_steps: int) -> list[Preset]:
    """What a page offers with `max_steps` at most, the fastest first; the last is the pipeline's own."""
    own, known = type(pipe.scheduler).__name__, samplers(pipe)
    steps = min(default_steps(pipe.scheduler), max_steps)
    faster = [row for row in FASTER.get(own, ()) if row.scheduler in known and row.steps <= max_steps]
    return [*faster, Preset("Best", own, steps)]


def title_of(scheduler: SchedulerMixin) -> str:
    """Its sampler's name, for people."""
    name = type(scheduler).__name__
    if name in _TITLES:
        return f"{_TITLES[name]} (diffusers)"
    return str(scheduler.config.get("solver", name)).capitalize()


def steps_of(presets: list[Preset]) -> str:
    """Their steps, for people: 8, 15 or 40 steps."""
    *others, last = (str(preset.steps) for preset in presets)
    return f"{', '.join(others)}{' or ' * bool(others)}{last} steps"
