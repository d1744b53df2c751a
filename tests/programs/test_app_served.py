"""The page of a Space, served as pipelines/README.md tells: what is posted to it, and a browser."""

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
import zipfile
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import TINY, randomize
from page_values import VALUES, changed, pixels
from PIL import Image

from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel

pytest.importorskip("gradio")
pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


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
    with serving(folder / "log", ["app.py", "--max_steps", "3000"], folder / "space", {
        "SDDIT_MODEL": str(folder / "model"), "GRADIO_TEMP_DIR": str(folder / "temp")
    }) as url:  # fmt: skip
        yield url


@contextmanager
def serving(log, arguments, cwd, variables):
    """A page that is served by a process: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments, "--server_port", str(port)],
            cwd=cwd, stdout=file, stderr=file, env=os.environ | variables,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 300
            while "is at http" not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()
    assert "Traceback" not in log.read_text()


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


@pytest.mark.thorough
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


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    options = [f"--{name}" for name in ("no-sandbox", "disable-gpu", "disable-quic", *quiet)]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


def opened(browser, url, **options):
    """The page in a browser, with the images that it opens with."""
    page = browser.new_page(**options)
    page.set_default_timeout(150_000)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(url)
    page.locator(".images .grid-container img").first.wait_for()
    return page


def shown_images(page):
    images = page.locator(".images:not(.page-strip) .grid-container img")
    sources = images.evaluate_all("all => all.map(image => image.src)")
    return pixels([Image.open(io.BytesIO(page.request.get(source).body())) for source in sources])


def made_by_code(page):
    """What the code on the page makes."""
    variables = {}
    exec(page.locator(".cm-content").inner_text(), variables)
    return pixels(variables["images"])


def enter(page, label, value):
    name = re.compile(f"^(number input for )?{label}$")
    page.get_by_role("spinbutton", name=name).fill(str(value))


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def wait_for(page, text):
    """For a text; where it does not come, what is there instead is told."""
    try:
        page.get_by_text(text).first.wait_for()
    except Exception as error:
        raise AssertionError(f"{text!r} is not in: {page.locator('body').inner_text()}") from error


@pytest.mark.thorough
def test_in_a_browser(served, browser):
    page = opened(browser, served)
    np.testing.assert_array_equal(shown_images(page), made_by_code(page))
    classes = page.get_by_label("Classes")
    classes.fill("tru")
    classes.press("Enter")
    classes.press("Escape")
    button(page, "Settings ▼").click()
    enter(page, "Images per class", 2)
    enter(page, "Steps", 3)
    enter(page, "Seed", 5)
    button(page, "Generate").click()
    wait_for(page, "range(5, 11)")
    images, code = shown_images(page), page.locator(".cm-content").inner_text()
    assert "class_labels=[1, 2, 3]" in code and "EDMDPMSolverMultistepScheduler" in code
    np.testing.assert_array_equal(images, made_by_code(page))

    page.get_by_role("slider", name="came about").press("Home")
    wait_for(page, "Code of step 1 of 3")
    first = shown_images(page)
    assert first.shape == images.shape and np.abs(first - images).mean() > 5
    np.testing.assert_array_equal(first, made_by_code(page))
    page.locator(".page-strip button").nth(1).click()
    wait_for(page, "Code of step 2 of 3")
    second = shown_images(page)

    enter(page, "Seed", -3)
    button(page, "Generate").click()
    wait_for(page, "Seed: -3 is not a whole number from 0 to 4294967295.")
    assert "Seed" in page.locator(".page-wrong").inner_text() and page.locator(".page-wrong").count() == 1
    np.testing.assert_array_equal(shown_images(page), second)

    enter(page, "Seed", 3)
    enter(page, "Steps", 3000)
    button(page, "Generate").click()
    wait_for(page, "Denoising")
    button(page, "Stop").click()
    wait_for(page, "Stopped after")
    assert page.locator(".page-wrong").count() == 0

    hosts = {urlsplit(address).netloc for address in page.asked if not address.startswith(("data:", "blob:"))}
    assert len(page.asked) > 10 and hosts == {urlsplit(served).netloc}


def test_one_click_is_an_example(served, browser):
    page = opened(browser, served)
    button(page, "Every class").click()
    wait_for(page, "class_labels=[0, 1, 2, 3]")
    assert len(shown_images(page)) == 4
    seed = page.locator(".cm-content").inner_text().split("range(")[1]
    button(page, "New seed").click()
    page.wait_for_function("s => !document.querySelector('.cm-content').innerText.includes(s)", arg=seed)
    page.get_by_label("Fast").check()
    button(page, "Generate").click()
    wait_for(page, "num_inference_steps=8")
    with page.expect_download() as download:
        page.locator(".page-bar button").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        names = archive.namelist()
    assert len(names) == 5 and names[0].startswith("00-cat-seed-") and names[-1] == "images.py"


def rendering(page):
    image = page.locator(".images .grid-container img").first
    return image.evaluate("image => getComputedStyle(image).imageRendering")


def save(page, path):
    """A screenshot of the whole page, of at most 256 colours."""
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return np.asarray(image)


@pytest.mark.thorough
def test_screenshots(tmp_path, browser):
    """Of the digits, as wide as a desk and as a phone, light and dark; a variable says where to keep them.

    SDDIT_SCREENSHOTS=docs pytest -n 0 tests/programs/test_app_served.py -k screenshots
    """
    folder = Path(os.environ.get("SDDIT_SCREENSHOTS") or tmp_path)
    command = ["-m", "sddit_diffusers.app"]
    with serving(
        tmp_path / "log", command, ROOT, {"SDDIT_MODEL": "", "GRADIO_TEMP_DIR": str(tmp_path)}
    ) as url:
        for suffix, width, height in (("", 1280, 900), ("-phone", 390, 844)):
            for scheme in ("light", "dark"):
                size = {"width": width, "height": height}
                page = opened(browser, url, viewport=size, color_scheme=scheme)
                wait_for(page, "trained on scikit-learn's handwritten digits")
                page.locator(".cm-content").wait_for()
                page.wait_for_timeout(2000)  # until all is where it stays
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                gallery = page.locator(".images").first.bounding_box()
                generate = button(page, "Generate").bounding_box()
                under = gallery["y"] - generate["y"] - generate["height"]
                assert suffix == "" or (0 < under < 40 and gallery["y"] < 700)
                last = page.locator(".images").first.locator(".caption-label").last.bounding_box()
                assert (
                    0 < gallery["y"] + gallery["height"] - last["y"] - last["height"] < 30
                )  # no empty frame
                shade = {"light": "", "dark": "-dark"}[scheme]
                seen = save(page, folder / f"app{suffix}{shade}.png")
                assert (seen[:20, :20].mean() > 200) == (scheme == "light")
                assert rendering(page) == "auto"
                page.get_by_label("Hard pixels").check()
                assert rendering(page) == "pixelated"
                page.close()
