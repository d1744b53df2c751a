"""The page: what a browser sends becomes a call of the pipeline or a message, and the code on it is true."""

import io
import json
import re
import socket
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bad_input import refusal
from diffusers import FlowMatchEulerDiscreteScheduler
from page_values import CALL, VALUES, changed, changed_call, pixels
from PIL import Image

from sddit_diffusers import EDMHeunScheduler, InterpolantScheduler, SDDiTPipeline
from sddit_diffusers.pipelines.calls import WrongValue, call_of, code_of, highest_level, make
from sddit_diffusers.pipelines.loading import load_pipeline
from sddit_diffusers.pipelines.samplers import FASTER, presets, samplers, title_of

gr = pytest.importorskip("gradio")
from sddit_diffusers import app  # noqa: E402
from sddit_diffusers.app import AppConfig  # noqa: E402
from sddit_diffusers.page.about import about as describe  # noqa: E402
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
    ({"classes": ["gold fish"]}, "5 names are known: cat, golden retriever, retriever, goldfish"),
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
    assert len(str(refusal.value)) < 200 and refusal.value.fields and {*refusal.value.fields} <= {*changes}


def test_limits_are_options(pipe):
    config = AppConfig(max_images=20, max_steps=200)
    arguments, seeds = call_of(pipe, config, *changed_call(classes=[0, 1], images=10, steps=200))
    assert len(seeds) == 20 and arguments["num_inference_steps"] == 200


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {}),
        (torch.float32, {"classes": [], "low": 0.1, "high": 10.0}),
        (torch.float32, {"low": 0.1, "high": 80.0}),
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
    limited, _ = call_of(pipe, AppConfig(), *changed_call(low=0.1, high=1000))
    assert limited["guidance_interval"] == (0.1, float("inf"))  # the first evaluation is at infinity
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


def test_the_path_of_dpm_solver_is_d_too(pipe):
    """Its steps do not tell D; that at the first level is what Heun's first evaluation gives."""
    arguments, seeds = call_of(pipe, AppConfig(), *CALL)
    dpm = samplers(pipe)["EDMDPMSolverMultistepScheduler"]
    made, other = (make(each, arguments, seeds, goes_on) for each in (dpm, pipe))
    assert made.positions == 4 and list(made.denoised)[0] == pytest.approx(80)
    first, same = (next(iter(each.denoised.values())) for each in (made, other))
    torch.testing.assert_close(first, same, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(pixels([image for image, _ in made.at(dpm, 4)[0]]), pixels(made.images))


def test_the_pictures_of_a_path_are_one_image(pipe):
    arguments, seeds = call_of(pipe, AppConfig(), *changed_call(steps=9))
    made = make(pipe, arguments, seeds, goes_on)
    path = made.path(pipe, 2, 4)
    assert made.places(4) == [1, 4, 6, 9] and [caption for _, caption in path][::3] == ["σ 80", "σ 0.002"]
    for place, (picture, _) in zip(made.places(4), path, strict=True):
        whole = made.at(pipe, place)[0][2][0]
        assert np.abs(pixels([picture]) - pixels([whole])).max() <= 1
    with pytest.raises(WrongValue, match="Image: 4 is not a whole number from 0 to 3"):
        made.path(pipe, 4, 4)


def session(name):
    return SimpleNamespace(session_hash=name)


@pytest.fixture(scope="module")
def digits():
    return Page(load_pipeline("digits"), "digits", AppConfig())


def quietly(*_, **__):
    return None


@pytest.mark.parametrize("title", ["Fast", "Balanced", "Best"])
def test_the_code_of_each_preset_and_step_is_true(digits, title):
    (preset,) = [each for each in digits.presets if each.title == title]
    values = changed(steps=preset.steps, sampler=preset.scheduler, images=1, classes=[1])
    made = digits.generate(session("a"), quietly, *values)[-1]
    assert made.positions == preset.steps
    for position in (3, made.positions):
        view, variables = digits.view(made, position), {}
        exec(view.code, variables)
        shown = pixels([image for image, _ in view.images])
        np.testing.assert_array_equal(pixels(variables["images"]), shown)
        assert "from_pretrained(DIGITS)" in view.code and view.step in (
            f"step 3 of {preset.steps}",
            "the finished images",
        )
        assert np.abs(shown - pixels(made.images)).max() > 20 or position == made.positions


def test_the_code_of_a_stopped_call_is_true(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    tried = samplers(pipe)
    pipe = SDDiTPipeline(pipe.transformer, InterpolantScheduler(diffusion="sigma"), id2label=pipe.id2label)
    pipe.save_pretrained(tmp_path / "flow")
    tried["InterpolantScheduler"] = pipe
    for sampler, each in tried.items():
        model = str(tmp_path / ("flow" if each is pipe else "model"))
        arguments, seeds = call_of(each, AppConfig(), *CALL)
        made = make(each, arguments, seeds, lambda done, total: done == 3)
        variables = {}
        exec(made.code(model, each, made.positions), variables)
        np.testing.assert_array_equal(pixels(variables["images"]), pixels(made.images))
        assert made.stopped and made.sampler == sampler


def test_samplers_share_the_network(pipe):
    found = samplers(pipe)
    assert [*found] == ["EDMHeunScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"]
    assert found["EDMHeunScheduler"] is pipe
    assert all(
        each.transformer is pipe.transformer and each.id2label == pipe.id2label for each in found.values()
    )
    assert title_of(pipe.scheduler) == "Heun"
    pipe.scheduler = found["EDMEulerScheduler"].scheduler
    assert [*samplers(pipe)] == ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]  # diffusers' alone
    pipe.scheduler = InterpolantScheduler(path="gvp")
    assert [*samplers(pipe)] == ["InterpolantScheduler"]
    pipe.scheduler = InterpolantScheduler()
    assert {*samplers(pipe)} == {
        "InterpolantScheduler",
        "DPMSolverMultistepScheduler",
        "FlowMatchEulerDiscreteScheduler",
    }


def test_presets_are_those_that_fit(pipe):
    titles = [(each.title, each.scheduler, each.steps) for each in presets(pipe, 100)]
    rows = FASTER["EDMHeunScheduler"]
    assert titles == [*(tuple(row) for row in rows), ("Best", "EDMHeunScheduler", 40)]
    assert [each.steps for each in presets(pipe, 10)] == [8, 10]
    page = Page(pipe, "model", AppConfig())
    assert page.choose("Fast") == [rows[0].scheduler, rows[0].steps]
    assert page.preset_of("EDMHeunScheduler", 40) == "Best" and page.preset_of("EDMHeunScheduler", 39) is None
    assert page.choose({"x": 1}) == [gr.skip(), gr.skip()]


@pytest.mark.parametrize(
    "distilled",
    [dict(num_inference_steps=10), dict(solver="euler"), dict(num_inference_steps=5, solver="euler")],
)
def test_a_distilled_pipeline_has_its_own_sampler(pipe, distilled):
    pipe.scheduler = EDMHeunScheduler(**distilled)
    steps = distilled.get("num_inference_steps", 40)
    assert [*samplers(pipe)] == ["EDMHeunScheduler"]
    assert [tuple(each) for each in presets(pipe, 100)] == [("Best", "EDMHeunScheduler", steps)]
    assert Page(pipe, "model", AppConfig()).start()["steps"] == steps


@pytest.mark.parametrize("sampler", ["DDIMScheduler", None, ["EDMHeunScheduler"], {}])
def test_other_samplers_are_refused(pipe, sampler):
    page = Page(pipe, "model", AppConfig())
    with pytest.raises(gr.Error, match="Sampler: .* is not one of EDMHeunScheduler, EDM"):
        page.begin(session("a"), *changed(sampler=sampler))
    assert page.check(*changed(sampler=sampler))[FIELDS.index("sampler")]["elem_classes"] == ["page-wrong"]


def test_the_wrong_field_is_marked(pipe):
    page = Page(pipe, "model", AppConfig())

    def marked(**changes):
        *marks, fold = page.check(*changed(**changes))
        return [name for name, mark in zip(FIELDS, marks, strict=True) if mark["elem_classes"]], fold.get(
            "open"
        )

    assert marked() == ([], None)
    assert marked(seed=-3) == (["seed"], True)
    assert marked(high=-1) == (["high"], True)
    assert marked(classes=["x"]) == (["classes"], None)
    assert marked(classes=[0, 1, 2], images=6) == (["classes", "images"], True)


def test_what_the_page_offers_can_be_made(pipe, digits):
    for num_classes in (4, 1, 0):
        pipe.transformer.register_to_config(num_classes=num_classes)
        for config in (AppConfig(), AppConfig(max_images=1, max_steps=1), AppConfig(max_images=3)):
            page = Page(pipe, "model", config)
            offered = [page.start(), *page.examples().values()]
            for values in offered:
                values = page.start() | values
                assert tuple(values) == FIELDS
                page._call_of([*values.values()])
            assert len(offered) == (1 if num_classes == 0 else 5)
    assert digits.start() == dict(
        zip(FIELDS, ([3, 6], 4, 15, 1.5, 0, 80.0, 0, "EDMDPMSolverMultistepScheduler"), strict=True)
    )
    every = digits.examples()["Every class"]
    assert every["classes"] == [*range(10)] and not {"sampler", "steps"} & {*every}


def test_it_opens_with_images(digits, monkeypatch):
    made = digits.open()
    assert not made.stopped and made.captions[0] == "3, seed 0" and len(made.images) == 8
    monkeypatch.setattr("sddit_diffusers.page.actions._OPENING", -1)
    assert digits.open() is None
    shown = build(digits).config["components"]
    galleries = [each for each in shown if each["type"] == "gallery"]
    assert len(galleries) == 2 and not any(each["props"]["visible"] for each in galleries)


def test_the_archive_has_what_is_shown(digits):
    made = digits.generate(session("a"), quietly, *changed(images=1, steps=3))[-1]
    view = digits.view(made, 2)
    assert Path(get_upload_folder()) in Path(view.archive).parents
    with zipfile.ZipFile(view.archive) as archive:
        assert archive.namelist() == ["00-1-seed-7.png", "01-3-seed-8.png", "images.py"]
        pictures = [Image.open(io.BytesIO(archive.read(name))) for name in archive.namelist()[:2]]
        assert archive.read("images.py").decode() == f"{view.code}\n"
    np.testing.assert_array_equal(pixels(pictures), pixels([image for image, _ in view.images]))


def test_a_click_leads_to_the_place_and_the_image(digits):
    made = digits.generate(session("a"), quietly, *changed(steps=20))[-1]
    clicked = partial(gr.EventData, None)
    gallery, about, code, archive, position = digits.go(made, clicked({"index": 1}))
    assert position == 4 and about.endswith("step 4 of 20") and code.label == "Code of step 4 of 20"
    slider, strip = digits.look(made, clicked({"index": 3}))
    assert slider.label == "How “3, seed 10” came about: step" and len(strip.value) == 8
    for act in (digits.go, digits.look):
        for data in (None, {}, {"index": None}, {"index": -1}, {"index": [1, 2]}, {"index": 99}, "x"):
            with pytest.raises(gr.Error):
                act(made, clicked(data))
        with pytest.raises(gr.Error, match="kept no longer"):
            act(None, clicked({"index": 0}))


@pytest.mark.parametrize(
    ("images", "each", "columns"),
    [(8, 4, 4), (10, 1, 5), (16, 8, 8), (16, 1, 8), (1, 1, 1), (7, 1, 4), (6, 2, 4), (9, 3, 3), (16, 16, 8)],
)
def test_rows_are_full(images, each, columns):
    made = SimpleNamespace(images=[None] * images, arguments={"num_images_per_label": each})
    assert columns_of(made) == columns


def test_about_the_digits(digits):
    about = digits.about
    assert about.sentence == (
        "SD-DiT: a diffusion transformer of 1.1 million weights for grey pictures of 8 × 8 pixels of 10 "
        "classes, trained on scikit-learn's handwritten digits."
    )
    assert (about.title, about.card, about.guided) == ("digits", "", True)
    assert 'href="https://arxiv.org/abs/2403.17004"' in about.html() and "Model card" not in about.html()


def test_about_a_folder_with_a_card(pipe, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("---\nmodel_name: <b>cats</b>\ndatasets:\n- some/cats\n---\n# x\n")
    told = describe(pipe, str(folder))
    assert told.sentence.endswith("colour pictures of 8 × 8 pixels of 4 classes, trained on some/cats.")
    assert "<h1>&lt;b&gt;cats&lt;/b&gt;</h1>" in told.html()
    settings = {"objective": "progressive", "distil_guidance": True, "dataset_name": str(tmp_path / "faces")}
    (folder / "training_config.json").write_text(json.dumps(settings))
    pipe.scheduler = EDMHeunScheduler(num_inference_steps=5)
    told = describe(pipe, str(folder))
    assert told.sentence.endswith("trained on some/cats, distilled to 5 steps.") and not told.guided
    (folder / "README.md").write_text("---\n: [\n---\n")
    assert ", trained on faces, distilled" in describe(pipe, str(folder)).sentence
    (folder / "training_config.json").write_text("[" * 10**5)
    assert describe(pipe, str(folder)).sentence.endswith("of 4 classes.")


def test_about_a_pipeline_on_the_hub(pipe, monkeypatch):
    def download(model, name, **_):
        raise OSError("no Hub")

    monkeypatch.setattr("sddit_diffusers.page.about.hf_hub_download", download)
    told = describe(pipe, "user/cats")
    assert told.title == "user/cats" and 'href="https://huggingface.co/user/cats"' in told.html()


@pytest.mark.parametrize(
    ("arguments", "variable", "model"), [([], "", "digits"), ([], "a/b", "a/b"), (["c"], "a/b", "c")]
)
def test_without_an_argument_it_opens_the_digits(monkeypatch, arguments, variable, model):
    opened = []
    monkeypatch.setenv("SDDIT_MODEL", variable)
    monkeypatch.setattr(app, "serve", lambda *given: opened.append(given))
    app.main(arguments)
    assert opened == [(model, AppConfig())]


def test_progress_is_told_a_few_times_a_second(pipe, monkeypatch):
    told = []
    for refresh, times in ((0.0, 7), (60.0, 1)):
        monkeypatch.setattr("sddit_diffusers.page.actions._REFRESH", refresh)
        told.clear()
        page = Page(pipe, "model", AppConfig())
        page.generate(session("a"), lambda step, **_: told.append(step), *VALUES)
        assert len(told) == times and told[0] == (1, 7)


def test_stop_ends_the_call_of_its_session_alone(pipe, monkeypatch):
    monkeypatch.setattr("sddit_diffusers.page.actions._REFRESH", 0.0)
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
    assert made.positions == slider.maximum == len(strip.value) == 2 and code.label == "Code of step 2 of 2"
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
        (
            ["/none", "--server_name", "192.0.2.1"],
            "server_name is '192.0.2.1'; it must be an address of this",
        ),
        (["/none", "--share"], "unknown option --share"),
    ],
)
def test_mistakes_of_the_command_line(capsys, monkeypatch, arguments, message):
    monkeypatch.delenv("SDDIT_MODEL", raising=False)
    with refusal(capsys, "app: error: ", message):
        app.main(arguments)


def test_a_port_that_is_taken_is_told(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with refusal(capsys, f"server_port is {port}, which cannot be had: Address already in use."):
            app.main(["digits", "--server_port", str(port)])


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
