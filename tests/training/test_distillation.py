"""Self-distillation: the losses against the paper's algorithms, written out image by image."""

import copy
from functools import partial
from itertools import product

import pytest
import torch
from conftest import NETWORKS, randomize, thorough

from sddit_diffusers import EDMHeunScheduler, InterpolantScheduler
from sddit_diffusers.models.transformer_sddit import SDDiTBlock
from sddit_diffusers.training.distillation import (
    ExplicitSelfDistillation,
    ImplicitSelfDistillation,
    ProgressiveDistillation,
)
from sddit_diffusers.training.methods import METHODS

PROCESSES = {
    "edm": lambda: EDMHeunScheduler(solver="euler", num_inference_steps=5, sigma_min=0.02, sigma_max=10.0),
    "linear": lambda: InterpolantScheduler(solver="euler", num_inference_steps=5),
    "edm, Heun": lambda: EDMHeunScheduler(num_inference_steps=5, sigma_min=0.02, sigma_max=10.0),
    "gvp, Heun": lambda: InterpolantScheduler(path="gvp", num_inference_steps=5),
    "vp noise": lambda: InterpolantScheduler(
        path="vp", prediction_type="epsilon", solver="euler", num_inference_steps=5
    ),
}


def make(kind=ExplicitSelfDistillation, method="sddit", process="linear", **arguments):
    student = randomize(METHODS[method].transformer(**NETWORKS[method])).double()
    if kind is not ProgressiveDistillation:
        arguments = {"fusion_weight": 0.3} | arguments
    objective = kind(student, PROCESSES[process](), **arguments)
    randomize(objective.teacher, seed=1)
    return objective


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([0, 3, 1])


def draw(objective):
    draws = objective.draw((3, 3, 8, 8), torch.Generator().manual_seed(0))
    wide = lambda tensor: tensor.double() if tensor.is_floating_point() else tensor  # noqa: E731
    step = draws.auxiliaries["step"]
    return draws._replace(
        t=wide(draws.t), noise=wide(draws.noise), auxiliaries={"step": type(step)(*map(wide, step))}
    )


def velocity(process, network, x, t, label, scale=None):
    """dx/dt of one image, by the definitions of the processes."""

    def once(label):
        if isinstance(process, EDMHeunScheduler):
            f = network(x[None] / (t**2 + 0.25) ** 0.5, t.log() / 4, torch.tensor([label])).sample[0]
            denoised = 0.25 / (t**2 + 0.25) * x + 0.5 * t / (t**2 + 0.25) ** 0.5 * f
            return (x - denoised) / t
        output = network(x[None], 1000 * t, torch.tensor([label])).sample[0]
        if process.config.prediction_type == "epsilon":
            alpha, sigma, d_alpha, d_sigma = process.path.at(t)
            output = d_alpha * (x - sigma * output) / alpha + d_sigma * output
        return output

    return once(label) if scale is None else once(4) + scale * (once(label) - once(4))


def stepped(process, x, s, t, velocity):
    """One step of the solver from s to t, of a function of x and time."""
    if isinstance(process, EDMHeunScheduler):
        slope = velocity(x, s)
        end = x + (t - s) * slope
        return end if process.order == 1 else x + (t - s) * (slope + velocity(end, t)) / 2

    def parts(x, t):
        """Data and noise of which x and its velocity are made."""
        mixing = torch.stack([part.flatten()[0] for part in process.path.at(t)]).view(2, 2)
        return torch.linalg.solve(mixing, torch.stack([x, velocity(x, t)]).flatten(1)).view(2, *x.shape)

    (alpha, sigma, *_), (alpha_t, sigma_t, *_) = process.path.at(s), process.path.at(t)
    found = parts(x, s)

    def moved(found):  # dx = x0 dalpha + eps dsigma
        return x + (alpha_t - alpha) * found[0] + (sigma_t - sigma) * found[1]

    return moved(found) if process.order == 1 else moved((found + parts(moved(found), t)) / 2)


TRIOS = [*product(METHODS, PROCESSES, [None, "of the step", "learnt"])]
QUICK = [(m, p, g) for m, p, g in TRIOS if m == "sddit" or (p, g) == ("linear", None)]


@pytest.mark.parametrize(
    ("method", "process", "guidance"), [*QUICK, *thorough(*(trio for trio in TRIOS if trio not in QUICK))]
)
def test_ssd_is_algorithm_1(method, process, guidance, batch):
    arguments = {} if guidance is None else {"guidance_scales": (1.5, 3.0)}
    objective = make(method=method, process=process, distil_guidance=guidance == "learnt", **arguments)
    process, teacher, (x0, labels), draws = objective.scheduler, objective.teacher, batch, draw(objective)
    losses = []
    with torch.no_grad():
        for i in range(3):
            s, t = draws.t[i].flatten()[0], draws.auxiliaries["step"].t[i].flatten()[0]
            w = draws.auxiliaries["step"].guidance_scale[i].item() if guidance else None
            label = 4 if draws.label_dropped[i] else labels[i].item()
            x_s = process.noised(x0[i], draws.noise[i], s)
            v_s, guided = (velocity(process, teacher, x_s, s, label, scale) for scale in (None, w))
            x_t = stepped(process, x_s, s, t, partial(velocity, process, teacher, label=label, scale=w))
            learnt = w if guidance == "learnt" else None
            v_t = velocity(process, teacher, x_t, t, label, learnt)
            target = 0.7 * (guided if guidance == "learnt" else v_s) + 0.3 * v_t
            losses.append((velocity(process, objective.transformer, x_s, s, label) - target).square().mean())
    actual = objective(x0, labels, draws)["loss"]
    torch.testing.assert_close(actual.double(), torch.stack(losses).mean(), rtol=2e-4, atol=0)
    assert draws.label_dropped.any() or objective.label_dropout < 0.5


@pytest.mark.parametrize("process", ["edm", "linear"])
def test_with_and_without_a_label_are_learnt_apart(process, batch):
    """A.2: both predictions at s and at t, where x_t is one guided step away."""
    objective = make(process=process, apart=True, guidance_scales=(5.0, 15.0))
    process, teacher, (x0, labels), draws = objective.scheduler, objective.teacher, batch, draw(objective)
    losses = []
    with torch.no_grad():
        for i in range(3):
            s, step = draws.t[i].flatten()[0], draws.auxiliaries["step"]
            t, w = step.t[i].flatten()[0], step.guidance_scale[i].item()
            assert 5 <= w <= 15
            x_s = process.noised(x0[i], draws.noise[i], s)
            x_t = stepped(
                process, x_s, s, t, partial(velocity, process, teacher, label=labels[i].item(), scale=w)
            )
            for label in (labels[i].item(), 4):
                at_s, at_t = (velocity(process, teacher, *point, label) for point in ((x_s, s), (x_t, t)))
                student = velocity(process, objective.transformer, x_s, s, label)
                losses.append((student - 0.7 * at_s - 0.3 * at_t).square().mean())
    actual = objective(x0, labels, draws)["loss"]
    torch.testing.assert_close(actual.double(), torch.stack(losses).mean(), rtol=2e-4, atol=0)
    assert not draws.label_dropped.any()


@pytest.mark.parametrize("process", ["edm", "linear"])
@pytest.mark.parametrize("method", METHODS)
def test_issd_is_algorithm_2(method, process, batch):
    objective = make(ImplicitSelfDistillation, method=method, process=process)
    process, (x0, labels), draws = objective.scheduler, batch, draw(objective)
    student = copy.deepcopy(objective.teacher)
    student.load_state_dict(objective.transformer.state_dict())
    blocks = [module for module in student.modules() if isinstance(module, SDDiTBlock)]
    forwards = {block: block.forward for block in blocks}
    losses, added = [], {}

    def first(block):
        def forward(h, temb):
            added[block] = forwards[block](h, temb) - h
            return h + added[block]

        return forward

    def second(block):
        return lambda h, temb: h + 0.7 * (forwards[block](h, temb) - h) + 0.3 * added[block]

    with torch.no_grad():
        for i in range(3):
            s, t = draws.t[i].flatten()[0], draws.auxiliaries["step"].t[i].flatten()[0]
            label = 4 if draws.label_dropped[i] else labels[i].item()
            x_s = process.noised(x0[i], draws.noise[i], s)
            x_t = stepped(process, x_s, s, t, partial(velocity, process, objective.teacher, label=label))
            found = []
            for kind, (x, time) in ((first, (x_s, s)), (second, (x_t, t))):
                for block in blocks:
                    block.forward = kind(block)
                found.append(velocity(process, student, x, time, label))
            for block in blocks:
                block.forward = forwards[block]
            target = velocity(process, objective.teacher, x_t, t, label)
            losses.append((found[1] - target).square().mean())
    actual = objective(x0, labels, draws)["loss"]
    torch.testing.assert_close(actual.double(), torch.stack(losses).mean(), rtol=2e-4, atol=0)


def test_without_a_mix_the_start_is_no_loss(batch):
    """The target is the teacher's own output, and the fused pass the plain one."""
    for kind in (ExplicitSelfDistillation, ImplicitSelfDistillation):
        objective = make(kind, fusion_weight=0.0)
        objective.teacher.load_state_dict(objective.transformer.state_dict())
        assert objective(*batch, draw(objective))["loss"] < 1e-10
        objective = make(kind, fusion_weight=0.3)
        objective.teacher.load_state_dict(objective.transformer.state_dict())
        assert objective(*batch, draw(objective))["loss"] > 1e-6


def test_only_the_student_learns_and_the_kept_layers_give_no_gradient(batch):
    objective = make(ImplicitSelfDistillation, fusion_weight=1.0)  # all that a block adds is kept
    objective(*batch, draw(objective))["loss"].backward()
    assert all(weight.grad is None for weight in objective.teacher.parameters())
    inside = objective.transformer.transformer_blocks[1].ff[0].weight
    assert inside.grad is None or not inside.grad.any()
    assert objective.transformer.decoder.proj_out.weight.grad.any()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("process", ["edm", "linear", "vp noise"])
def test_progressive_distillation_leads_where_the_teacher_does(process, guided, batch):
    arguments = {"guidance_scales": (1.5, 3.0), "distil_guidance": True} if guided else {}
    objective = make(ProgressiveDistillation, process=process, teacher_steps=3, **arguments)
    process, (x0, labels), draws = objective.scheduler, batch, draw(objective)
    low, high = process.config.get("sigma_min", 0), process.config.get("sigma_max", process.interval[1])
    if isinstance(process, EDMHeunScheduler):  # five steps, four of them in three parts
        grid = torch.tensor(
            [high ** (1 / 7) + i / 12 * (low ** (1 / 7) - high ** (1 / 7)) for i in range(13)],
            dtype=torch.float64,
        )
        grid = grid**7
    else:
        grid = torch.linspace(high, 0, 16, dtype=torch.float64)
    fine = type(process).from_config(process.config, solver="heun")
    losses = []
    with torch.no_grad():
        for i in range(3):
            s, step = draws.t[i].flatten()[0], draws.auxiliaries["step"]
            ends = step.t[i].flatten()
            place = (grid - s).abs().argmin()
            torch.testing.assert_close(torch.stack([s, *ends]), grid[place : place + 4])
            assert place % 3 == 0
            label = 4 if draws.label_dropped[i] else labels[i].item()
            scale = step.guidance_scale[i].item() if guided else None
            teacher = partial(velocity, process, objective.teacher, label=label, scale=scale)
            x_s = x = process.noised(x0[i], draws.noise[i], s)
            for begin, end in zip([s, *ends], ends, strict=False):
                x = stepped(fine if end > 0 else process, x, begin, end, teacher)
            student = partial(velocity, process, objective.transformer, label=label)
            found = stepped(process, x_s, s, ends[-1], student)
            losses.append(((found - x) / (ends[-1] - s)).square().mean())
    actual = objective(x0, labels, draws)["loss"]
    torch.testing.assert_close(actual.double(), torch.stack(losses).mean(), rtol=2e-4, atol=0)


def test_steps_are_the_samplers():
    objective = make(process="linear")
    draws = objective.draw((400, 3, 8, 8), torch.Generator().manual_seed(0))
    pairs = {
        (round(s.item(), 4), round(t.item(), 4))
        for s, t in zip(draws.t, draws.auxiliaries["step"].t, strict=True)
    }
    assert pairs == {(1.0, 0.8), (0.8, 0.6), (0.6, 0.4), (0.4, 0.2)}


@pytest.mark.parametrize(
    ("process", "arguments", "message"),
    [
        ("edm, Heun", {}, "solver is 'heun'"),
        ("edm", {"apart": True}, "apart is set"),
        ("edm", {"guidance_scales": (2.0, 2.0)}, "needs distil_guidance"),
    ],
)
def test_what_progressive_distillation_cannot_do(process, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(ProgressiveDistillation, process=process, **arguments)


def test_the_teacher_stays_or_follows(batch):
    for momentum in (1.0, 0.9):
        objective = make(teacher_momentum=momentum)
        before = objective.teacher.cls_token.clone()
        objective.after_step()
        student = objective.transformer.cls_token
        torch.testing.assert_close(objective.teacher.cls_token, momentum * before + (1 - momentum) * student)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fusion_weight": 1.5}, "fusion_weight is 1.5"),
        ({"fusion_weight": float("nan")}, "fusion_weight is nan"),
        ({"teacher_momentum": -1}, "-1"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_one_step_is_too_few():
    student = METHODS["dit"].transformer(**NETWORKS["dit"])
    with pytest.raises(ValueError, match="num_inference_steps is 1; self-distillation needs at least 2"):
        ExplicitSelfDistillation(student, InterpolantScheduler(num_inference_steps=1), fusion_weight=0.3)
