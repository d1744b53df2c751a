"""The pipeline on interpolants: sampling, guidance, schedulers that swap in, saving."""

import math

import pytest
import torch
from conftest import NETWORKS, TINY, randomize
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    configuration_utils,
)

from sddit_diffusers import EDMHeunScheduler, InterpolantScheduler, SDDiTPipeline, SDDiTTransformer2DModel
from sddit_diffusers.pipelines.loading import scheduler_of
from sddit_diffusers.pipelines.pipeline_sddit import noise_level
from sddit_diffusers.pipelines.sampling import path_grid
from sddit_diffusers.training.methods import METHODS


@pytest.fixture
def flow(transformer):
    return flow_of(transformer)


def flow_of(transformer, **settings):
    pipe = SDDiTPipeline(transformer, InterpolantScheduler(**settings), id2label={0: "cat", 1: "dog"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, labels=(1, 2), seed=0, **arguments):
    arguments = {"num_inference_steps": 4, "output_type": "latent", **arguments}
    generator = torch.Generator().manual_seed(seed)
    return pipe(list(labels), generator=generator, **arguments).images


def test_equals_the_sampler_written_out(flow):
    """Heun's method on the velocity in t, with guidance where the noise is 0.3 to 1.5 of the signal."""
    network, w = flow.transformer, 1.5
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def velocity(x, t):
        given, null = (network(x, torch.tensor(1000 * t), torch.tensor(i)).sample for i in ([1, 2], [4, 4]))
        return null + w * (given - null) if 0.3 <= t / max(1 - t, 1e-9) <= 1.5 else given

    for t, following in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)):
        v = velocity(x, t)
        euler = x - (t - following) * v
        x = x - (t - following) * (v + velocity(euler, following)) / 2 if following else euler
    made = generate(flow, guidance_scale=w, guidance_interval=(0.3, 1.5))
    torch.testing.assert_close(made, x, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(made, generate(flow, guidance_scale=w), atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_guiding_the_output_guides_the_denoised(method, path):
    """Of every prediction: D = D_null + w (D_class - D_null), in the first evaluation."""
    network = randomize(METHODS[method].transformer(**NETWORKS[method]))
    for prediction in ("flow_prediction", "score", "epsilon", "sample"):
        pipe = flow_of(network, path=path, prediction_type=prediction, diffusion="sigma", solver="euler")
        kept = {}

        def keep(pipe, i, t, tensors, kept=kept):
            kept.setdefault(pipe.guidance_scale, tensors["pred_original_sample"])
            pipe._interrupt = True
            return {}

        scales = (1.0, 0.0, 3.0)
        options = {
            "callback_on_step_end": keep,
            "callback_on_step_end_tensor_inputs": ["pred_original_sample"],
        }
        for scale in scales:
            generate(pipe, guidance_scale=scale, **options)
        given, null, guided = (kept[scale].double() for scale in scales)
        torch.testing.assert_close(
            guided, null + 3 * (given - null), rtol=1e-3, atol=1e-3 * guided.abs().max()
        )


def test_an_image_depends_on_its_own_seed(flow):
    flow.scheduler = InterpolantScheduler.from_config(flow.scheduler.config, diffusion="kl")
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    options = {"num_inference_steps": 5, "output_type": "latent"}
    together = flow([0, 1, 2], generator=generators, **options).images
    alone = flow([1], generator=[torch.Generator().manual_seed(2)], **options).images
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def distance(samples, others):
    return (samples - others).norm() / others.norm()


def test_flow_schedulers_swap_in_and_out(flow):
    ours, config = generate(flow, num_inference_steps=60), flow.scheduler.config
    flow.scheduler = InterpolantScheduler.from_config(config, solver="euler")
    sigmas = [1.0, 0.7, 0.4, 0.1]
    euler = generate(flow, sigmas=sigmas)
    flow.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    torch.testing.assert_close(generate(flow, sigmas=sigmas), euler, rtol=1e-5, atol=1e-6)
    assert distance(generate(flow, num_inference_steps=300), ours) < 0.05
    assert noise_level(flow.scheduler, 0) == math.inf
    guided = generate(flow, guidance_scale=2.0, guidance_interval=(0.0, 1.0))
    flow.scheduler = DPMSolverMultistepScheduler.from_config(flow.scheduler.config)
    assert distance(generate(flow, num_inference_steps=60), ours) < 0.05
    assert not torch.equal(guided, generate(flow))
    flow.scheduler = InterpolantScheduler.from_config(flow.scheduler.config)
    torch.testing.assert_close(generate(flow, num_inference_steps=60), ours)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"path": "gvp"}, FlowMatchEulerDiscreteScheduler),
        ({"path": "vp"}, DPMSolverMultistepScheduler),
        ({"prediction_type": "epsilon"}, FlowMatchEulerDiscreteScheduler),
        ({"prediction_type": "score"}, DPMSolverMultistepScheduler),
        ({}, EDMEulerScheduler),
        ({}, DDIMScheduler),
    ],
)
def test_what_does_not_sample_the_path_is_refused(transformer, settings, kind, tmp_path):
    flow = flow_of(transformer, **settings)
    flow.scheduler = kind.from_config(flow.scheduler.config)
    with pytest.raises(
        ValueError, match=f"{kind.__name__} does not sample the path .*InterpolantScheduler does"
    ):
        generate(flow)
    flow.save_pretrained(tmp_path)  # the scheduler knows its path from a folder too
    flow.scheduler = kind.from_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match="does not sample the path"):
        generate(flow)


def test_schedulers_by_name(flow):
    solver = scheduler_of(
        flow.scheduler, "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}
    )
    assert solver.config.algorithm_type == "sde-dpmsolver++" and solver.config.use_flow_sigmas
    sde = scheduler_of(flow.scheduler, "", {"diffusion": "sigma", "diffusion_norm": 2})
    assert type(sde) is InterpolantScheduler and sde.config.diffusion == "sigma"
    for name, changes, message in (
        ("EDMEulerScheduler", {}, "no flow scheduler 'EDMEulerScheduler'; diffusers has DPMSolver"),
        ("", {"sigma_data": 0.5}, "no setting 'sigma_data'; it has path"),
        ("", {"diffusion": "brown"}, "cannot be used: diffusion is 'brown'"),
        ("", {"diffusion_norm": -1.0}, "diffusion_norm of scheduler_options is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler_of(flow.scheduler, name, changes)
    score = InterpolantScheduler(prediction_type="score")
    with pytest.raises(ValueError, match="does not sample the path 'linear' with the prediction 'score'"):
        scheduler_of(score, "DPMSolverMultistepScheduler", {})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (EDMHeunScheduler(p_mean=-0.4), "EDMDPMSolverMultistepScheduler"),
        (InterpolantScheduler(solver="euler"), "FlowMatchEulerDiscreteScheduler"),
    ],
    ids=["edm", "flow"],
)
def test_a_scheduler_takes_the_place_of_one_that_was_just_made_without_a_warning(ours, name, monkeypatch):
    monkeypatch.setattr(configuration_utils.logger, "warning", lambda message: pytest.fail(message))
    assert type(scheduler_of(ours, name, {})).__name__ == name


def test_edms_churn_is_refused(flow):
    with pytest.raises(ValueError, match="InterpolantScheduler has no churn"):
        generate(flow, s_churn=10.0)


def test_saved_and_loaded_makes_the_same_image_to_the_bit(flow, tmp_path):
    flow.scheduler = InterpolantScheduler.from_config(flow.scheduler.config, path="gvp", diffusion="kl-eta")
    flow.save_pretrained(tmp_path)
    assert (tmp_path / "scheduler/scheduling_interpolant.py").is_file()
    for loader in (SDDiTPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is InterpolantScheduler and loaded.scheduler.config.path == "gvp"
        assert torch.equal(generate(loaded), generate(flow))


def test_the_path_of_an_sde_falls(flow):
    """A step of Heun's SDE looks below its end, where the noise is added: the picture is sorted."""
    flow = flow_of(randomize(SDDiTTransformer2DModel(**TINY | {"in_channels": 3})), diffusion="sigma")
    picture = path_grid(flow, labels=[0, 1], columns=5, num_inference_steps=4)
    assert picture.width > 5 * 64
