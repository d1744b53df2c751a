"""The page: what a browser sends becomes a call of the pipeline or a message, and the code on it is true."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bad_input import refusal
from diffusers import EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from page_values import CALL, VALUES, changed, changed_call, pixels

from sddit_diffusers import DIGITS, EDMHeunScheduler, InterpolantScheduler
from sddit_diffusers.pipelines.calls import WrongValue, call_of, code_of, highest_level, make
from sddit_diffusers.pipelines.loading import load_pipeline
from sddit_diffusers.pipelines.samplers import FASTER, presets, samplers, title_of

gr = pytest.importorskip("gradio")
from sddit_diffusers import app  # noqa: E402
from sddit_diffusers.app import AppConfig  # noqa: E402
from sddit_diffusers.page.actions import FIELDS, Page, columns_of, get_upload_folder  # noqa: E402
from sddit_diffusers.page.layout import build  # noqa: E402

ROOT = Path(__file__).parents[2]


def goes_on(done, total):
    return False


def test_values_become_a_call(pipe):
    assert call_of(pipe, AppConfig(), *CALL) == (
        {"class_labels": [1, 3], "num_images_per_label": 2, "num_inference_steps": 4, "guidance_scale": 1.5},
        range(7, 11),
    )
    arguments, seeds = call_of(pipe, AppConfig(), *changed_call(classes=[], low=0.3, high=5))
    assert arguments["class_labels"] == [None] and arguments["guidance_interval"] == (0.3, 5)
    assert seeds == range(7, 9)
    assert call_of(pipe, AppConfig(), *changed_call(classes=["goldfish"]))[0]["class_labels"] == [2]


REFUSED = [
    ({"classes": [4]}, "Class label 4 is out of range; allowed are integers from 0 to 3."),
    ({"classes": ["gold fish"]}, "Nearest names: goldfish"),
    ({"classes": [[1]]}, "Class label [1] is out of range"),
    ({"classes": {"path": "/etc/passwd"}}, "Unknown class name 'path'"),
    ({"classes": [0, 1, 2], "images": 6}, "3 classes x 6 images are 18 images; at most 16 are made at once."),
    ({"images": 0}, "Images per class: 0 is not a whole number from 1 to 16."),
    ({"steps": 101}, "Steps: 101 is not a whole number from 1 to 100."),
    ({"steps": "40"}, "Steps: '40' is not a whole number from 1 to 100."),
    ({"steps": 2.5}, "Steps: 2.5 is not a whole number from 1 to 100."),
    ({"steps": True}, "Steps: True is not a whole number from 1 to 100."),
    ({"guidance": float("nan")}, "Guidance scale: nan is not a number from 0 to 20."),
    ({"guidance": None}, "Guidance scale: None is not a number from 0 to 20."),
    ({"low": -1}, "Lowest sigma: -1 is not a number from 0 to 80."),
    ({"low": 5, "high": 4}, "Highest sigma: 4 is not a number from 5 to 80."),
    ({"seed": 10**30}, "Seed: 1000000000000000000000000000000 is not a whole number from 0 to 4294967295."),
    ({"seed": "x" * 10**6}, "Seed: 'xxxxx"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_other_values_are_refused(pipe, changes, message):
    with pytest.raises(WrongValue, match=re.escape(message)) as refusal:
        call_of(pipe, AppConfig(), *changed_call(**changes))
    assert len(str(refusal.value)) < 200 and {*refusal.value.fields} == {*changes}


def test_limits_are_options(pipe):
    config = AppConfig(max_images=20, max_steps=200)
    arguments, seeds = call_of(pipe, config, *changed_call(classes=[0, 1], images=10, steps=200))
    assert len(seeds) == 20 and arguments["num_inference_steps"] == 200


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {}),
        (torch.float32, {"classes": [], "low": 0.1, "high": 10.0}),
        (torch.bfloat16, {"guidance": 1}),
    ],
)
def test_the_code_makes_the_images_to_the_bit(pipe, tmp_path, dtype, changes):
    pipe.save_pretrained(tmp_path / "it's")
    pipe.transformer.to(dtype)
    arguments, seeds = call_of(pipe, AppConfig(), *changed_call(**changes))
    made = make(pipe, arguments, seeds, goes_on)
    variables = {}
    code = code_of(str(tmp_path / "it's"), pipe, arguments, seeds)
    exec(code, variables)
    np.testing.assert_array_equal(pixels(variables["images"]), pixels(made.images))
    assert variables["pipe"].transformer.dtype == dtype and pixels(made.images).std() > 5
    assert len(code.split("\n\n")[1].splitlines()) == 3


def test_each_image_has_a_seed_of_its_own(pipe):
    arguments, seeds = call_of(pipe, AppConfig(), *CALL)
    made = make(pipe, arguments, seeds, goes_on)
    assert made.captions == [
        "golden retriever, retriever, seed 7", "golden retriever, retriever, seed 8", "truck, seed 9",
        "truck, seed 10",
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(9)
    alone = pipe("truck", generator=generator, num_inference_steps=4, guidance_scale=1.5).images
    assert np.abs(pixels(alone) - pixels(made.images[2:3])).max() <= 1  # a batch of one rounds otherwise


def test_the_path_is_d_at_each_level(pipe):
    """D(x; sigma_k) is what a sampler ends with whose last level is sigma_k: Euler's step from there to 0."""
    arguments, seeds = call_of(pipe, AppConfig(), *changed_call(guidance=1))
    made = make(pipe, arguments, seeds, goes_on)
    levels = EDMHeunScheduler()._schedule(4).tolist()
    assert list(made.denoised) == pytest.approx(levels) and made.positions == 4
    for position in (1, 2, 3, 4):
        shown, about = made.at(pipe, position)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        expected = pipe([1, 1, 3, 3], sigmas=levels[:position], generator=generators).images
        assert np.abs(pixels([image for image, _ in shown]) - pixels(expected)).max() <= 1
        assert position == 4 or about.endswith(f"σ = {levels[position - 1]:.3g}, step {position} of 4")
    assert [caption for _, caption in shown] == made.captions
    np.testing.assert_array_equal(pixels([image for image, _ in shown]), pixels(made.images))
    with pytest.raises(ValueError, match="Step: 5 is not a whole number from 1 to 4"):
        made.at(pipe, 5)


def test_a_flow_begins_with_noise_alone(pipe):
    pipe.scheduler = InterpolantScheduler(diffusion="sigma")
    assert highest_level(pipe) == 1000
    arguments, seeds = call_of(pipe, AppConfig(), *changed_call(high=1000))
    assert "guidance_interval" not in arguments
    made = make(pipe, arguments, seeds, goes_on)
    levels = list(made.denoised)
    assert levels[0] == float("inf") and levels == sorted(levels, reverse=True)
    assert "σ = inf" in made.at(pipe, 1)[1] and made.at(pipe, made.positions)[0][0][0] is made.images[0]


def test_without_d_there_is_no_path(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(InterpolantScheduler().config)
    arguments, seeds = call_of(pipe, AppConfig(), *changed_call(guidance=1))
    made = make(pipe, arguments, seeds, goes_on)
    assert made.positions == 1 and len(made.at(pipe, 1)[0]) == 4 and made.path(pipe, 0, 8) == []
    made = make(pipe, arguments, seeds, lambda done, total: done == 2)
    assert made.stopped and made.code("model", pipe, 1) == ""


def session(name):
    return SimpleNamespace(session_hash=name)


def test_stop_ends_the_call_of_its_session_alone(pipe):
    page, evaluations = Page(pipe, "model", AppConfig()), []
    pipe.transformer.register_forward_hook(lambda *_: evaluations.append(1))

    def generate(stopping):
        evaluations.clear()
        page.begin(session("a"), *VALUES)

        def progress(step, desc, unit):
            if step == (3, 7):
                for _ in range(2):
                    page.stop(session(stopping))

        return page.generate(session("a"), progress, *VALUES)

    gallery, about, code, archive, slider, strip, made = generate("a")
    assert len(evaluations) == 3 and about == "Stopped after 3 of 7 evaluations"
    assert (
        made.positions == slider.maximum == len(strip.value.root) == 2 and code.label == "Code of step 2 of 2"
    )
    shown = [image for image, _ in made.at(pipe, 2)[0]]
    denoised = pipe.decode(made.denoised[min(made.denoised)])
    np.testing.assert_array_equal(pixels(shown), pixels(denoised))
    about, code = generate("b")[1:3]
    assert len(evaluations) == 7 and about.startswith("Made in") and "range(7, 11)" in code.value
    assert code.label == "Code of the finished images"


def test_one_step_and_one_image_are_a_page(pipe):
    """gradio has no sliders of one place."""
    config = AppConfig(max_images=1, max_steps=1)
    build(Page(pipe, "model", config))
    values = changed(classes=[1], images=1, steps=1)
    slider = Page(pipe, "model", config).generate(session("a"), lambda *_, **__: None, *values)[4]
    assert (slider.maximum, slider.value, slider.interactive) == (2, 1, False)


def test_names_of_several_classes_have_their_number(pipe):
    pipe.id2label = {0: "crane", 1: "cat", 2: "crane"}
    assert Page(pipe, "model", AppConfig()).choices() == [
        ("crane (0)", 0),
        ("cat", 1),
        ("crane (2)", 2),
        ("3", 3),
    ]


def test_a_message_is_no_html(pipe):
    page = Page(pipe, "model", AppConfig())
    for call in (
        lambda: page.begin(session("a"), *changed(seed="<img src=x>")),
        lambda: page.generate(session("a"), None, *changed(seed="<img src=x>")),
    ):
        with pytest.raises(gr.Error) as error:
            call()
        assert (
            error.value.message.startswith("Seed: &#x27;&lt;img src=x&gt;")
            and not error.value.print_exception
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/none"], "The pipeline '/none' cannot be loaded"),
        (["/none", "--dtype", "float8"], "dtype is 'float8'; it must be 'float32', 'bfloat16' or 'float16'."),
        (["/none", "--max_steps", "0"], "max_steps is 0; it must be at least 1."),
        (["/none", "--server_port", "70000"], "server_port is 70000; it must be in 0..65535."),
        (["/none", "--max_images", "1000000000000"], "max_images is 1000000000000; it must be at most"),
        (["/none", "--server_name", "a\0"], "text has no null bytes"),
        (["/none", "--share"], "unknown option --share"),
    ],
)
def test_mistakes_of_the_command_line(capsys, monkeypatch, arguments, message):
    monkeypatch.delenv("SDDIT_MODEL", raising=False)
    with refusal(capsys, "app: error: ", message):
        app.main(arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ["x" * 500_000]}, "Unknown class name"),
        ({"classes": [[1] * 100_000]}, "Class label [1"),
        ({"seed": "x" * 500_000}, "Seed: "),
    ],
)
def test_messages_are_short(pipe, changes, words):
    with pytest.raises(gr.Error) as error:
        Page(pipe, "model", AppConfig()).begin(session("a"), *changed(**changes))
    assert words in error.value.message and len(error.value.message) < 1000


def test_samples_that_are_not_finite_are_a_message(pipe):
    def fail(*_):
        raise FloatingPointError("image 3 (seed 17) is not finite")

    pipe.transformer.register_forward_hook(fail)
    with pytest.raises(gr.Error) as error:
        Page(pipe, "model", AppConfig()).generate(session("a"), lambda *_, **__: None, *VALUES)
    assert error.value.message == "image 3 (seed 17) is not finite" and not error.value.print_exception
