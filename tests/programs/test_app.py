"""The page: what a browser sends becomes a call of the pipeline or a message, and the code on it is true."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from bad_input import refusal
from conftest import TINY, randomize
from diffusers import EDMDPMSolverMultistepScheduler
from PIL import Image

from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel

gr = pytest.importorskip("gradio")
from sddit_diffusers import app  # noqa: E402
from sddit_diffusers.app import AppConfig, Page, call_of, code_of, make  # noqa: E402

ROOT = Path(__file__).parents[2]
# What the page sends untouched, but for fewer steps: classes, images, steps, guidance, low, high, seed.
VALUES = [[1, 3], 2, 4, 1.5, 0, 80.0, 7]


def changed(**changes):
    names = ("classes", "images", "steps", "guidance", "low", "high", "seed")
    return [changes.get(name, value) for name, value in zip(names, VALUES, strict=True)]


def goes_on(done, total):
    return False


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_values_become_a_call(pipe):
    assert call_of(pipe, AppConfig(), *VALUES) == (
        {"class_labels": [1, 3], "num_images_per_label": 2, "num_inference_steps": 4, "guidance_scale": 1.5},
        range(7, 11),
    )
    arguments, seeds = call_of(pipe, AppConfig(), *changed(classes=[], low=0.3, high=5))
    assert arguments["class_labels"] == [None] and arguments["guidance_interval"] == (0.3, 5)
    assert seeds == range(7, 9)
    assert call_of(pipe, AppConfig(), *changed(classes=["goldfish"]))[0]["class_labels"] == [2]


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
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        call_of(pipe, AppConfig(), *changed(**changes))
    assert len(str(refusal.value)) < 200


def test_limits_are_options(pipe):
    config = AppConfig(max_images=20, max_steps=200)
    arguments, seeds = call_of(pipe, config, *changed(classes=[0, 1], images=10, steps=200))
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
    arguments, seeds = call_of(pipe, AppConfig(), *changed(**changes))
    made = make(pipe, arguments, seeds, goes_on)
    variables = {}
    code = code_of(str(tmp_path / "it's"), pipe, arguments, seeds)
    exec(code, variables)
    np.testing.assert_array_equal(pixels(variables["images"]), pixels(made.images))
    assert variables["pipe"].transformer.dtype == dtype and pixels(made.images).std() > 5
    assert len(code.split("\n\n")[1].splitlines()) == 3


def test_each_image_has_a_seed_of_its_own(pipe):
    arguments, seeds = call_of(pipe, AppConfig(), *VALUES)
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
    arguments, seeds = call_of(pipe, AppConfig(), *changed(guidance=1))
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


def test_without_d_there_is_no_path(pipe):
    pipe.scheduler = EDMDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    arguments, seeds = call_of(pipe, AppConfig(), *VALUES)
    made = make(pipe, arguments, seeds, goes_on)
    assert made.positions == 1 and len(made.at(pipe, 1)[0]) == 4


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

        return page.generate(*VALUES, session("a"), progress)

    gallery, about, slider, code, made = generate("a")
    assert len(evaluations) == 3 and about == "Stopped after 3 of 7 evaluations"
    assert code == "" and made.positions == slider.maximum == 2
    shown = [image for image, _ in made.at(pipe, 2)[0]]
    denoised = pipe.decode(made.denoised[min(made.denoised)])
    np.testing.assert_array_equal(pixels(shown), pixels(denoised))
    about, slider, code = generate("b")[1:4]
    assert len(evaluations) == 7 and about.startswith("Made in") and "range(7, 11)" in code


def test_one_step_and_one_image_are_a_page(pipe):
    """gradio has no sliders of one place."""
    config = AppConfig(max_images=1, max_steps=1)
    app.build(Page(pipe, "model", config))
    values = changed(classes=[1], images=1, steps=1)
    slider = Page(pipe, "model", config).generate(*values, session("a"), lambda *_, **__: None)[2]
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
        lambda: page.generate(*changed(seed="<img src=x>"), session("a")),
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
        ([], "no pipeline; give a folder or a name on the Hub, here or in SDDIT_MODEL."),
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
        Page(pipe, "model", AppConfig()).generate(*VALUES, session("a"), lambda *_, **__: None)
    assert error.value.message == "image 3 (seed 17) is not finite" and not error.value.print_exception


def test_a_space_installs_what_the_package_does():
    space = ROOT / "pipelines/space"
    required = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL).group(1)
    assert (space / "requirements.txt").read_text().split("\n")[:-1] == re.findall(r'"(.+?)"', required)
    front = (space / "README.md").read_text().split("---\n")[1]
    settings = dict(line.split(": ", 1) for line in front.splitlines())
    assert settings["sdk"] == "gradio" and settings["app_file"] == "app.py"
    least = re.search(r"gradio>=([\d.]+)", (ROOT / "setup.py").read_text()).group(1)
    assert settings["sdk_version"].startswith(least)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page of a Space, made as pipelines/README.md tells: its address."""
    folder = tmp_path_factory.mktemp("served")
    names = {0: "cat", 1: "golden retriever, retriever", 2: "goldfish", 3: "truck"}
    transformer = randomize(SDDiTTransformer2DModel(**TINY))
    SDDiTPipeline(transformer, EDMHeunScheduler(), id2label=names).save_pretrained(folder / "model")
    command = re.search(r"^mkdir sddit-space .*$", (ROOT / "pipelines/README.md").read_text(), re.MULTILINE)
    command = command.group().replace("sddit-space", str(folder / "space"))
    subprocess.run(command, shell=True, cwd=ROOT, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "app.py", "--server_port", str(port), "--max_steps", "3000"],
            cwd=folder / "space", stdout=log, stderr=log,
            env=os.environ | {"SDDIT_MODEL": str(folder / "model"), "GRADIO_TEMP_DIR": str(folder / "temp")},
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 300
            while "is at http" not in (folder / "log").read_text():
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()
    assert "Traceback" not in (folder / "log").read_text()


def post(url, body, content_type="application/json"):
    request = urllib.request.Request(url, body, {"Content-Type": content_type})
    return urllib.request.urlopen(request).read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["/etc/passwd"]}, "Unknown class name"),
        ({"steps": "40"}, "is not a whole number from 1 to 3000."),
        ({"guidance": float("nan")}, "Guidance scale: nan is not a number from 0 to 20."),
        ({"seed": 2**63}, "Seed: 9223372036854775808 is not a whole number from 0 to 4294967295."),
    ],
)
def test_what_is_sent_past_the_page_is_refused_with_a_message(served, changes, message):
    url, body = f"{served}/gradio_api/call/generate", json.dumps({"data": changed(**changes)})
    event = json.loads(post(url, body.encode()))["event_id"]
    kind, answer = urllib.request.urlopen(f"{url}/{event}").read().decode().strip().split("\n")
    assert kind == "event: error" and message in json.loads(answer.removeprefix("data: "))["error"]


def test_no_way_around_the_queue_and_no_files(served):
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\na\r\n--b--\r\n'
    for path, body, status in (
        ("run/generate", json.dumps({"data": VALUES}).encode(), 404),
        ("upload", part, 403),
        ("upload/", part, 403),
        ("file=/etc/passwd", None, 403),
        ("file=app.py", None, 403),
        (f"file={ROOT}/setup.py", None, 403),
    ):
        kind = "multipart/form-data; boundary=b" if "upload" in path else "application/json"
        with pytest.raises(urllib.error.HTTPError) as refusal:
            post(f"{served}/gradio_api/{path}", body, kind)
        assert refusal.value.code == status, path


def call(served, **changes):
    """Posts a call, and reads nothing: its answer's address."""
    url = f"{served}/gradio_api/call/generate"
    body = {"data": changed(**changes), "session_hash": os.urandom(8).hex()}
    return f"{url}/{json.loads(post(url, json.dumps(body).encode()))['event_id']}"


def test_one_step_is_a_call(served):
    answer = urllib.request.urlopen(call(served, steps=1, classes=[0], images=1), timeout=60).read().decode()
    assert "event: complete" in answer


def test_a_client_that_reads_nothing_does_not_fill_the_queue(served):
    """Whatever its sessions are called. Its calls end by themselves, so the next one has its turn."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        for _ in range(30):
            call(served, steps=3000, classes=[0, 1], images=8)
    assert refused.value.code == 503 and "calls here" in refused.value.read().decode()
    deadline = time.monotonic() + 60
    while True:
        try:
            address = call(served)
            break
        except urllib.error.HTTPError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    assert "event: complete" in urllib.request.urlopen(address, timeout=60).read().decode()


@pytest.fixture
def browser_page():
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    options = [f"--{name}" for name in ("no-sandbox", "disable-gpu", "disable-quic", *quiet)]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=options)
        page = browser.new_page()
        page.set_default_timeout(15_000)
        yield page
        browser.close()


def shown_images(page):
    sources = page.locator(".images .grid-container img").evaluate_all("all => all.map(image => image.src)")
    return pixels([Image.open(io.BytesIO(page.request.get(source).body())) for source in sources])


def test_in_a_browser(served, browser_page):
    page, url = browser_page, served
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    classes = page.get_by_label("Classes")
    for typed in ("retri", "fish"):
        classes.fill(typed)
        classes.press("Enter")
    classes.press("Escape")

    def enter(label, value):
        page.get_by_role("spinbutton", name=label).fill(str(value))

    enter("Images per class", 2)
    enter("Steps", 3)
    enter("Seed", 5)
    generate, stop = (page.get_by_role("button", name=name, exact=True) for name in ("Generate", "Stop"))
    generate.click()
    page.get_by_text("Made in").wait_for()
    images, code = shown_images(page), page.locator(".cm-content").inner_text()
    variables = {}
    exec(code, variables)
    assert "class_labels=[1, 2]" in code and "range(5, 9)" in code
    np.testing.assert_array_equal(images, pixels(variables["images"]))

    page.get_by_role("slider", name="How the images come about").press("Home")
    page.get_by_text("step 1 of 3").wait_for()
    first = shown_images(page)
    assert first.shape == images.shape and np.abs(first - images).mean() > 5

    enter("Seed", -3)
    generate.click()
    page.get_by_text("Seed: -3 is not a whole number from 0 to 4294967295.").wait_for()
    np.testing.assert_array_equal(shown_images(page), first)

    enter("Seed", 3)
    enter("Steps", 3000)
    generate.click()
    page.get_by_text("Denoising").first.wait_for()
    stop.click()
    page.get_by_text("Stopped after").wait_for()

    hosts = {urlsplit(address).netloc for address in asked if not address.startswith(("data:", "blob:"))}
    assert len(asked) > 10 and hosts == {urlsplit(url).netloc}
