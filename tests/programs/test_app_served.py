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
