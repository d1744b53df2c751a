"""The nodes inside a real ComfyUI: its HTTP API gives the pipeline's images.

    COMFYUI_DIR=/path/to/ComfyUI pytest -n 0 tests/programs/test_comfyui_served.py

`COMFYUI_PYTHON` is the interpreter that has ComfyUI's requirements and this package's, this one if it is not
set. The models and the output of that ComfyUI are not touched. With `COMFYUI_PICTURES=1` the pictures of the
pack are drawn anew from what is seen.
"""

import copy
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_latent_pipe
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from sddit_diffusers import EDMHeunScheduler, InterpolantScheduler
from sddit_diffusers.pipelines.loading import load_pipeline

if "COMFYUI_DIR" not in os.environ:
    pytest.skip("COMFYUI_DIR names no ComfyUI", allow_module_level=True)

ROOT = Path(__file__).parents[2]
PACK = ROOT / "pipelines/comfyui"
WORKFLOW = json.loads((PACK / "example_workflows/sddit_digits.json").read_text())
DRAW = "COMFYUI_PICTURES" in os.environ


class Server:
    """A ComfyUI that runs, by its address, and its folder of models."""

    def __init__(self, address: str, models: Path):
        self.address, self.models = address, models

    def get(self, path: str, **query) -> bytes:
        path = f"{self.address}{path}?{urllib.parse.urlencode(query)}"
        return urllib.request.urlopen(path, timeout=60).read()

    def nodes(self) -> dict:
        return json.loads(self.get("/object_info"))

    def start(self, prompt: dict) -> str:
        body = json.dumps({"prompt": prompt}).encode()
        request = urllib.request.Request(f"{self.address}/prompt", body)
        return json.loads(urllib.request.urlopen(request, timeout=60).read())["prompt_id"]

    def run(self, prompt: dict) -> dict:
        """What the history has of a prompt when it is done: `outputs` and `status`."""
        return self.result(self.start(prompt))

    def result(self, number: str, seconds: float = 240) -> dict:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            history = json.loads(self.get(f"/history/{number}"))
            if number in history and history[number]["status"]["status_str"] in ("success", "error"):
                return history[number]
            time.sleep(0.1)
        raise TimeoutError(number)

    def images(self, prompt: dict, node: str) -> list[Image.Image]:
        """The images that a node of a prompt saved."""
        done = self.run(prompt)
        assert done["status"]["status_str"] == "success", done["status"]["messages"]
        return [Image.open(io.BytesIO(self.get("/view", **each))) for each in done["outputs"][node]["images"]]

    def stop(self) -> None:
        urllib.request.urlopen(urllib.request.Request(f"{self.address}/interrupt", b"{}"), timeout=60)

    def error(self, prompt: dict) -> str:
        """The message that a prompt ends in."""
        messages = dict(self.run(prompt)["status"]["messages"])
        return messages["execution_error"]["exception_message"].strip()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """ComfyUI on the CPU, with this pack alone, and folders of its own for models and output."""
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "models/diffusers", "input", "output", "user"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes/sddit").symlink_to(PACK)
    (base / "user/default").mkdir()
    (base / "user/default/comfy.settings.json").write_text(json.dumps(SETTINGS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    options = ["--cpu", "--port", str(port), "--base-directory", str(base), "--disable-auto-launch"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"
    }  # fmt: skip
    with open(base / "log", "w") as log:
        process = subprocess.Popen(
            [python, "main.py", *options],
            cwd=os.environ["COMFYUI_DIR"],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        running, deadline = (
            Server(f"http://127.0.0.1:{port}", base / "models/diffusers"),
            time.monotonic() + 240,
        )
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (base / "log").read_text()
            try:
                running.get("/system_stats")
                break
            except OSError:
                time.sleep(0.3)
        yield running
    finally:
        process.terminate()
        process.wait(30)


def prompt_of(workflow: dict, nodes: dict) -> dict:
    """A saved workflow as the browser sends it, by the inputs that the server tells of."""
    links = {number: [str(start), slot] for number, start, slot, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        values, inputs = list(node["widgets_values"]), {}
        linked = {each["name"]: links[each["link"]] for each in node.get("inputs", [])}
        for group in nodes[node["type"]]["input"].values():
            for name, (kind, *options) in group.items():
                settings = options[0] if options else {}
                is_widget = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "COMBO")
                if name in linked or not is_widget or settings.get("forceInput"):
                    continue
                inputs[name] = values.pop(0)
                if settings.get("control_after_generate"):
                    values.pop(0)
        assert not values, f"{node['type']} has {len(values)} values too many"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs | linked}
    return prompt


@pytest.fixture(scope="module")
def example(server):
    return prompt_of(WORKFLOW, server.nodes())


def with_inputs(prompt: dict, **changes) -> dict:
    """A prompt whose SD-DiT nodes have other inputs, where they have them."""
    ours = {number for number, node in prompt.items() if node["class_type"].startswith("SDDiT")}
    return {
        number: copy.deepcopy(node) if number not in ours else node
        | {"inputs": {name: changes.get(name, value) for name, value in node["inputs"].items()}}
        for number, node in prompt.items()
    }  # fmt: skip


def saved(images: torch.Tensor) -> torch.Tensor:
    """Images `[b, c, h, w]` in 0..1 as ComfyUI saves them, which cuts the fractions off."""
    return (images.expand(-1, 3, -1, -1) * 255).clamp(0, 255).to(torch.uint8)


def pixels(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.tensor(np.asarray(i.convert("RGB"))) for i in images]).permute(0, 3, 1, 2)


def made_by(labels, seeds, pipe=None, **arguments) -> torch.Tensor:
    pipe = pipe or load_pipeline("digits")
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(labels, guidance_scale=1.5, generator=generators, output_type="pt", **arguments).images


def close(images: list[Image.Image], expected: torch.Tensor) -> None:
    """Equal but for one of 255 steps, as the processor's kernels depend on the number of threads."""
    difference = pixels(images).int() - saved(expected).int()
    assert difference.abs().max() <= 1 and (difference == 0).float().mean() > 0.99


def test_the_example_workflow_makes_the_pipelines_images(server, example):
    images = server.images(example, "4")
    assert [image.size for image in images] == [(256, 256)] * 10
    expected = made_by(range(10), range(10))
    close(images, torch.nn.functional.interpolate(expected, size=(256, 256), mode="bicubic"))
    if DRAW:
        card = Image.new("RGB", (3 * 136, 3 * 136), "#202020")
        for i, image in enumerate(images[1:]):
            card.paste(image.resize((128, 128), Image.Resampling.BOX), (i % 3 * 136 + 4, i // 3 * 136 + 4))
        card.save(PACK / "example_workflows/sddit_digits.jpg", quality=85)


def test_classes_by_name_and_all_nodes_in_a_chain(server):
    """Two names, then the latents decoded, encoded and decoded again: pixels pass unchanged."""
    prompt = {
        "load": {
            "class_type": "SDDiTLoadPipeline",
            "inputs": {"folder": "digits (embedded)", "hub_name": "", "dtype": "fp32", "device": "cpu"},
        },
        "three": {"class_type": "SDDiTClass", "inputs": {"name": "3"}},
        "eight": {"class_type": "SDDiTClass", "inputs": {"name": "8", "before": ["three", 0]}},
        "sample": {
            "class_type": "SDDiTSample",
            "inputs": {
                "pipeline": ["load", 0], "classes": ["eight", 0], "images_per_class": 2, "seed": 2**63,
                "sampler": "heun", "steps": 6, "guidance_scale": 1.5, "guidance_sigma_min": 0.0,
                "guidance_sigma_max": 1000.0,
            },
        },
        "decode": {
            "class_type": "SDDiTDecode", "inputs": {"pipeline": ["load", 0], "samples": ["sample", 1]}
        },
        "encode": {
            "class_type": "SDDiTEncode", "inputs": {"pipeline": ["load", 0], "image": ["decode", 0]}
        },
        "again": {
            "class_type": "SDDiTDecode", "inputs": {"pipeline": ["load", 0], "samples": ["encode", 0]}
        },
        "save": {"class_type": "SaveImage", "inputs": {"images": ["again", 0], "filename_prefix": "chain"}},
    }  # fmt: skip
    seeds = range(2**63, 2**63 + 4)
    close(server.images(prompt, "save"), made_by([3, 3, 8, 8], seeds, num_inference_steps=6))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"folder": "(from the Hub)", "hub_name": "owner/name"}, "The Hub does not answer for 'owner/name'"),
        (
            {"folder": "(from the Hub)", "hub_name": "../x"},
            "hub_name is '../x'; it must be a name on the Hub",
        ),
        ({"classes": "ten"}, "Unknown class name 'ten'"),
        ({"diffusion": "kl"}, "diffusion is 'kl'; this pipeline is EDM's"),
    ],
)
def test_mistakes_are_told_in_one_line(server, example, inputs, message):
    start = time.monotonic()
    error = server.error(with_inputs(example, **inputs))
    assert message in error and "\n" not in error and time.monotonic() - start < 30


def test_the_browser_is_told_what_each_socket_is(server):
    ours = {name: node for name, node in server.nodes().items() if name.startswith("SDDiT")}
    assert len(ours) == 5
    for node in ours.values():
        groups = (group.values() for name, group in node["input"].items() if name != "hidden")
        for inputs in groups:
            assert all(each[1]["tooltip"] for each in inputs)
        assert all(node["output_tooltips"]) and len(node["output_tooltips"]) == len(node["output"])


def test_the_template_is_offered_with_its_picture(server):
    assert json.loads(server.get("/workflow_templates"))["sddit"] == ["sddit_digits"]
    folder = "/api/workflow_templates/sddit/sddit_digits"
    assert json.loads(server.get(f"{folder}.json")) == WORKFLOW
    Image.open(io.BytesIO(server.get(f"{folder}.jpg"))).load()


def test_a_pipeline_that_is_put_there_samples_by_itself_in_its_steps(server, example):
    """While ComfyUI runs, and as a distilled one: 3 of Euler's steps. Its classes are listed as well."""
    pipe = load_pipeline("digits")
    pipe.scheduler = EDMHeunScheduler.from_config(
        pipe.scheduler.config, num_inference_steps=3, solver="euler"
    )
    pipe.id2label = {i: f"the {i}" for i in range(10)}
    pipe.register_to_config(id2label=pipe.id2label)
    pipe.save_pretrained(server.models / "mine/distilled")
    nodes = server.nodes()
    assert "mine/distilled" in nodes["SDDiTLoadPipeline"]["input"]["required"]["folder"][1]["options"]
    assert "the 7" in nodes["SDDiTClass"]["input"]["required"]["name"][1]["options"]
    prompt = with_inputs(example, folder="mine/distilled", classes="the 7; the 1", seed=11)
    prompt["4"]["inputs"]["images"] = ["2", 0]  # as they are
    close(server.images(prompt, "4"), made_by([7, 1], [11, 12], pipe))


@pytest.mark.parametrize("kind", ["kl", "tiny", "flow", "sde"])
def test_pipelines_of_other_kinds(server, example, pipe, kind):
    """With a VAE; and an interpolant's, by diffusers' sampler and by an SDE."""
    if kind in ("kl", "tiny"):
        pipe, inputs = make_latent_pipe(kind), {}
    else:
        pipe.scheduler = InterpolantScheduler()
        inputs = {"sampler": "dpmpp_2m"} if kind == "flow" else {"sampler": "euler", "diffusion": "sigma"}
    pipe.save_pretrained(server.models / kind)
    prompt = with_inputs(example, folder=kind, classes="1; 3", seed=11, steps=4, **inputs)
    prompt["4"]["inputs"]["images"] = ["2", 0]
    images = server.images(prompt, "4")
    if kind == "flow":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    elif kind == "sde":
        pipe.scheduler = InterpolantScheduler(solver="euler", diffusion="sigma")
    close(images, made_by([1, 3], [11, 12], pipe, num_inference_steps=4))


def test_stopping_takes_effect_between_evaluations(server, example):
    number = server.start(with_inputs(example, steps=1000, seed=12))
    time.sleep(1)
    server.stop()
    messages = dict(server.result(number, seconds=20)["status"]["messages"])
    assert messages["execution_interrupted"]["node_type"] == "SDDiTSample"


SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}
BOXES = "() => app.graph.nodes.map(node => [...node.getBounding()])"
# Puts a place of the graph at another of the window, in its own size.
SHOW = "at => { Object.assign(app.canvas.ds, {scale: 1, offset: at}); app.canvas.setDirty(true, true); }"


@pytest.fixture
def page(server):
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no browser is installed")
    options = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=options)
        page = browser.new_page(viewport={"width": 1800, "height": 900})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def test_in_the_browser_the_workflow_runs_and_no_node_covers_another(server, page):
    page.goto(server.address)
    page.wait_for_function("() => window.app?.graph && window.LiteGraph?.registered_node_types.SDDiTSample")
    page.evaluate("workflow => app.loadGraphData(workflow)", WORKFLOW)
    page.evaluate("() => app.queuePrompt(0)")
    page.wait_for_function("() => app.graph.nodes.some(node => node.imgs?.length === 10)")
    boxes = page.evaluate(BOXES)
    assert len(boxes) == 4
    for (x, y, width, height), (other_x, other_y, other_width, other_height) in combinations(boxes, 2):
        aside = x + width <= other_x or other_x + other_width <= x
        assert aside or y + height <= other_y or other_y + other_height <= y
    if DRAW:
        page.evaluate(SHOW, [80 - boxes[0][0], 230 - boxes[0][1]])
        page.wait_for_timeout(2000)
        width = max(x + width for x, _, width, _ in boxes) - boxes[0][0]
        height = max(y + height for _, y, _, height in boxes) - boxes[0][1]
        clip = {"x": 60, "y": 205, "width": width + 40, "height": height + 40}
        page.screenshot(path=PACK / "graph.png", clip=clip)
