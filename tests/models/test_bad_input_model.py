"""What networks, scheduler, objectives and pipeline refuse, each with the value and what it may be."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY, randomize
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sddit_diffusers import (
    EDMHeunScheduler,
    MaskDiTTransformer2DModel,
    MDTTransformer2DModel,
    PlainDiTTransformer2DModel,
    SDDiTObjective,
    SDDiTPipeline,
    SDDiTTransformer2DModel,
    TREADTransformer2DModel,
)
from sddit_diffusers.training.objective import MaskDiTObjective

ENCODER = {name: value for name, value in TINY.items() if "decoder" not in name}
NETWORKS = {
    SDDiTTransformer2DModel: TINY,
    PlainDiTTransformer2DModel: ENCODER,
    MaskDiTTransformer2DModel: TINY,
    MDTTransformer2DModel: ENCODER | {"num_decoder_layers": 1},
    TREADTransformer2DModel: ENCODER | {"route_start": 1},
}
NAN, INF = math.nan, math.inf


def one_clear_line(error, *words):
    message = str(error.value)
    assert "\n" not in message and len(message) < 400, message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("num_layers", -1, "at least 1"),
        ("num_layers", 0, "at least 1"),
        ("num_layers", 2.5, "a whole number"),
        ("num_layers", None, "a whole number"),
        ("num_attention_heads", 0, "at least 1"),
        ("attention_head_dim", -8, "at least 1"),
        ("num_classes", -1, "at least 0"),
        ("num_classes", True, "a whole number"),
        ("patch_size", 0, "at least 1"),
        ("patch_size", "2", "a whole number"),
        ("in_channels", 0, "at least 1"),
        ("out_channels", 0, "at least 1"),
        ("sample_size", 0, "at least 1"),
        ("sample_size", 8.0, "a whole number"),
        ("mlp_ratio", 0.0001, "at least 1 / 16"),
        ("mlp_ratio", 0, "above 0"),
        ("mlp_ratio", NAN, "a finite number"),
        ("mlp_ratio", INF, "a finite number"),
        ("timestep_scale", NAN, "a finite number"),
        ("timestep_scale", "1", "a finite number"),
        ("timestep_shift", -INF, "a finite number"),
        ("timestep_shift", None, "a finite number"),
    ],
)
def test_networks(network, name, value, allowed):
    with pytest.raises(ValueError) as error:
        network(**NETWORKS[network] | {name: value})
    one_clear_line(error, f"{name} is {value!r}", allowed)


@pytest.mark.parametrize("network", [SDDiTTransformer2DModel, MaskDiTTransformer2DModel])
@pytest.mark.parametrize(
    ("name", "value"),
    [("num_decoder_layers", -1), ("num_decoder_layers", 1.0), ("decoder_num_attention_heads", 0)]
    + [("decoder_attention_head_dim", NAN)],
)
def test_decoders(network, name, value):
    with pytest.raises(ValueError) as error:
        network(**TINY | {name: value})
    one_clear_line(error, f"{name} is {value!r}", "a whole number, at least")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("sigma_min", "sigma_max", "sigma_data", "rho")
        for value in (0, -1, NAN, INF, "1", True, None)
    ]
    + [("rho", -7), ("p_std", -1), ("p_std", NAN), ("p_mean", INF), ("num_inference_steps", 0)]
    + [("num_train_timesteps", 0), ("num_train_timesteps", 1.5), ("sigma_min", 80.0)],
)
def test_scheduler(name, value):
    with pytest.raises(ValueError) as error:
        EDMHeunScheduler(**{name: value})
    one_clear_line(error, f"{name} is {value!r}", "it must be")


@pytest.mark.parametrize("steps", [0, -1, 1.5, 10**12, True, "4", NAN])
def test_numbers_of_steps(steps, pipe):
    for call in (EDMHeunScheduler().set_timesteps, lambda steps: pipe(1, num_inference_steps=steps)):
        with pytest.raises(ValueError) as error:
            call(steps)
        one_clear_line(error, f"num_inference_steps is {steps!r}", "a whole number", "1000000")


@pytest.mark.parametrize(
    "sigmas",
    [[], [1.0, 2.0], [1.0, 1.0], [NAN], [INF, 1.0], [1.0, 0.0], [1.0, -1.0], "abc", 3.0, [[2.0, 1.0]]]
    + [["a"], [None], {"a": 1}, list(range(1000))],
)
def test_sigmas(sigmas, pipe):
    for call in (EDMHeunScheduler().set_timesteps, lambda sigmas: pipe(1, sigmas=sigmas)):
        with pytest.raises(ValueError) as error:
            call(sigmas=sigmas)
        one_clear_line(error, "sigmas must be finite, decrease and stay above 0; got", f"{sigmas!r:.200}")


@pytest.mark.parametrize("index", [1, -2, 80, 0.5, NAN, None])
def test_begin_index(index):
    with pytest.raises(ValueError) as error:
        EDMHeunScheduler().set_begin_index(index)
    one_clear_line(error, f"begin_index is {index!r}", "even indices below 79")


@pytest.mark.parametrize("other", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_configs_of_other_schedulers_load(other, tmp_path):
    other(sigma_data=0.7).save_pretrained(tmp_path)
    assert EDMHeunScheduler.from_pretrained(tmp_path).config.sigma_data == 0.7
    assert EDMHeunScheduler.from_config(other().config).config.sigma_max == 80


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("student_temperature", 0, "above 0"),
        ("student_temperature", -0.1, "above 0"),
        ("student_temperature", NAN, "above 0"),
        ("center_momentum", NAN, "at least 0 and at most 1"),
        ("center_momentum", 1.5, "at least 0 and at most 1"),
        ("num_prototypes", 1, "at least 2"),
        ("num_prototypes", 2.5, "a whole number"),
        ("head_hidden_dim", 0, "at least 1"),
        ("head_bottleneck_dim", -1, "at least 1"),
        ("discriminative_weight", NAN, "at least 0"),
        ("discriminative_weight", INF, "a finite number"),
        ("teacher_temperature_start", 0, "above 0"),
        ("teacher_temperature_end", NAN, "above 0"),
        ("teacher_temperature_warmup_epochs", -1, "at least 0"),
        ("teacher_momentum_start", NAN, "at least 0 and at most 1"),
        ("teacher_momentum_end", 1.5, "at least 0 and at most 1"),
        ("mask_ratio", NAN, "below 1"),
        ("label_dropout", NAN, "in 0..1"),
        ("teacher_sigma", NAN, "above 0"),
    ],
)
def test_objective(name, value, allowed):
    with pytest.raises(ValueError) as error:
        SDDiTObjective(SDDiTTransformer2DModel(**TINY), EDMHeunScheduler(), **{name: value})
    one_clear_line(error, f"{name} is {value!r}", allowed)


@pytest.mark.parametrize("weight", [NAN, INF, -0.1, "1"])
def test_mae_weight(weight):
    with pytest.raises(ValueError) as error:
        MaskDiTObjective(MaskDiTTransformer2DModel(**TINY), EDMHeunScheduler(), mae_weight=weight)
    one_clear_line(error, f"mae_weight is {weight!r}", "at least 0")


@pytest.mark.parametrize("value", [NAN, INF, -0.1])
def test_what_moves_from_step_to_step(value):
    objective = SDDiTObjective(
        SDDiTTransformer2DModel(**TINY), EDMHeunScheduler(), num_prototypes=4, head_hidden_dim=4
    )
    objective.discrimination.teacher_momentum = value
    with pytest.raises(ValueError) as error:
        objective.after_step()
    one_clear_line(error, f"teacher_momentum is {value!r}", "at least 0 and at most 1")
    objective.discrimination.teacher_temperature = value
    with pytest.raises(ValueError) as error:
        objective(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))
    one_clear_line(error, f"teacher_temperature is {value!r}", "above 0")


@pytest.mark.parametrize(
    "labels",
    [
        2**31, 10**12, -1, 4, NAN, 1.0, True, "no such", "x" * 10**5, [None, True], [1, "no such"],
        torch.tensor([1.0]), torch.tensor([True]), np.array([NAN]), np.array(7), np.array([False]), [[1]],
        [b"1"], {"a": 1}, [1j], object(),
    ],
)  # fmt: skip
def test_labels(labels, pipe):
    with pytest.raises(ValueError) as error:
        pipe.get_label_ids(labels)
    one_clear_line(error, "lass")


def test_good_labels_of_all_kinds(pipe):
    assert pipe.get_label_ids(np.array(3)) == [3] and pipe.get_label_ids([None, np.int64(2)]) == [4, 2]
    assert pipe.get_label_ids(torch.tensor([[1], [0]])) == [1, 0]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("class_labels", [], "empty"),
        ("class_labels", torch.tensor([], dtype=torch.long), "empty"),
        ("num_images_per_label", 0, "at least 1"),
        ("num_images_per_label", -1, "at least 1"),
        ("num_images_per_label", 1.5, "a whole number"),
        ("num_images_per_label", 10**12, "at most 1000000"),
        ("guidance_scale", NAN, "a finite number"),
        ("guidance_scale", INF, "a finite number"),
        ("guidance_scale", "2", "a finite number"),
        ("guidance_interval", (NAN, 1.0), "highest or inf"),
        ("guidance_interval", (0.0, NAN), "highest or inf"),
        ("guidance_interval", (-INF, 1.0), "highest or inf"),
        ("guidance_interval", (INF, INF), "highest or inf"),
        ("guidance_interval", 5, "highest or inf"),
        ("guidance_interval", (1.0,), "highest or inf"),
        ("guidance_interval", ("a", "b"), "highest or inf"),
        ("height", 0, "at least 1"),
        ("height", -8, "at least 1"),
        ("height", 8.0, "a whole number"),
        ("width", 0, "at least 1"),
        ("width", 9, "multiples of 2"),
        ("generator", 5, "torch.Generator"),
        ("generator", "seed", "torch.Generator"),
        ("generator", [None], "torch.Generator"),
        ("generator", (torch.Generator(),), "torch.Generator"),
        ("generator", [], "0 generators were given for 1 images"),
        ("latents", torch.full((1, 3, 8, 8), NAN), "not finite"),
        ("latents", torch.full((1, 3, 8, 8), INF), "not finite"),
        ("latents", torch.zeros(3, 8, 8), "(1, 3, 8, 8)"),
        ("latents", [[0.0]], "(1, 3, 8, 8)"),
        ("output_type", None, "'pil', 'np', 'pt' or 'latent'"),
        ("output_type", ["pil"], "'pil', 'np', 'pt' or 'latent'"),
        ("callback_on_step_end", 3, "a function"),
        ("callback_on_step_end_tensor_inputs", "latents", "a list of some of"),
        ("callback_on_step_end_tensor_inputs", ["noise"], "a list of some of"),
        ("callback_on_step_end_tensor_inputs", [["latents"]], "a list of some of"),
        ("callback_on_step_end_tensor_inputs", None, "a list of some of"),
        ("s_churn", NAN, "at least 0"),
        ("s_churn", INF, "at least 0"),
        ("s_churn", -1.0, "at least 0"),
        ("s_noise", NAN, "at least 0"),
        ("s_tmin", NAN, "highest or inf"),
        ("s_tmin", INF, "highest or inf"),
        ("s_tmax", NAN, "highest or inf"),
        ("s_tmax", -1.0, "highest or inf"),
    ],
)
def test_calls(name, value, allowed, pipe):
    with pytest.raises(ValueError) as error:
        pipe(**{"class_labels": 1, "num_inference_steps": 1, name: value})
    one_clear_line(error, allowed)


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=3),
    st.lists(st.one_of(st.integers(-1, 5), st.floats(), st.text(max_size=3), st.none()), max_size=3),
)  # fmt: skip
PIPE = SDDiTPipeline(randomize(SDDiTTransformer2DModel(**TINY)), EDMHeunScheduler(), id2label={0: "cat"})


@settings(max_examples=200, deadline=None)
@given(labels=ANYTHING)
def test_any_label_is_a_class_or_refused(labels):
    try:
        ids = PIPE.get_label_ids(labels)
    except ValueError as error:
        assert len(str(error)) < 400
    else:
        assert all(type(i) is int and 0 <= i <= 4 for i in ids)


@settings(max_examples=200, deadline=None)
@given(sigmas=ANYTHING)
def test_any_sigmas_are_a_schedule_or_refused(sigmas):
    scheduler = EDMHeunScheduler()
    try:
        scheduler.set_timesteps(None if sigmas is None else 3, sigmas=sigmas)
    except ValueError as error:
        assert len(str(error)) < 400
    else:
        assert scheduler.timesteps.isfinite().all() and len(scheduler.sigmas) == len(scheduler.timesteps) + 1


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(["sigma_min", "sigma_max", "sigma_data", "rho"]), value=ANYTHING)
def test_any_scheduler_has_a_schedule_or_is_refused(name, value):
    try:
        scheduler = EDMHeunScheduler(**{name: value})
    except ValueError as error:
        assert len(str(error)) < 400
    else:
        assert scheduler.sigmas.isfinite().all() and (scheduler.sigmas.diff() <= 0).all()
