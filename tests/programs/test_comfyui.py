"""The ComfyUI nodes, on stand-ins for ComfyUI: what they make is what the pipeline makes."""

import asyncio
import importlib.util
import json
import os
import re
import socket
import sys
import time
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import comfy_stand_ins
import loopback_hub
import numpy as np
import pytest
import torch
from comfy_stand_ins import InterruptProcessingException, node_info, run
from conftest import TINY, Touch, make_latent_pipe, randomize
from diffusers import (
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
)
from packaging.version import Version
from PIL import Image

import sddit_diffusers
from sddit_diffusers import EDMHeunScheduler, InterpolantScheduler, SDDiTPipeline, SDDiTTransformer2DModel
from sddit_diffusers.pipelines.loading import load_pipeline

PACK = Path(__file__).parents[2] / "pipelines/comfyui"
WORKFLOW = json.loads((PACK / "example_workflows/sddit_digits.json").read_text())
EMBEDDED, HUB = "digits (embedded)", "(from the Hub)"
SAMPLE = {
    "images_per_class": 1, "seed": 5, "sampler": "heun", "steps": 4, "guidance_scale": 1.5,
    "guidance_sigma_min": 0.1, "guidance_sigma_max": 10.0,
}  # fmt: skip


@pytest.fixture
def comfy(tmp_path, monkeypatch):
    """The pack, found behind a link and imported by its path as ComfyUI does; `models` is for pipelines."""
    models = tmp_path / "models/diffusers"
    models.mkdir(parents=True)
    modules = comfy_stand_ins.modules([tmp_path / "missing", models])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "sddit").symlink_to(PACK)
    name = str(tmp_path / "sddit").replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, tmp_path / "sddit/__init__.py")
    pack = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, pack)
    spec.loader.exec_module(pack)
    for part in ("nodes", "classes", "samplers", "sources"):
        del sys.modules[f"{name}.{part}"]
    extension = asyncio.run(pack.comfy_entrypoint())
    nodes = {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}
    load, class_name, sample, decode, encode = nodes.values()
    return SimpleNamespace(
        pack=pack, nodes=nodes, load=load, class_name=class_name, sample=sample, decode=decode,
        encode=encode, models=models, management=modules["comfy.model_management"],
        bars=modules["comfy.utils"].ProgressBar.bars,
    )  # fmt: skip


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def load(comfy, folder, **inputs):
    return run(comfy.load, **{"folder": folder, "hub_name": "", "dtype": "fp32", "device": "cpu"} | inputs)[0]


def sample(comfy, pipe, classes="1", **inputs):
    image, latent = run(comfy.sample, pipeline=pipe, classes=classes, **SAMPLE | inputs)
    return image, latent["samples"]


def made_by(pipe, labels, seeds, **arguments):
    """The pipeline's own images, `[b, H, W, channels]`."""
    arguments = {"num_inference_steps": 4, "guidance_scale": 1.5, "guidance_interval": (0.1, 10)} | arguments
    images = pipe(labels, generator=generators(*seeds), output_type="pt", **arguments).images
    return images.permute(0, 2, 3, 1)


def test_the_browser_can_be_told_of_all_nodes(comfy):
    assert not hasattr(comfy.pack, "NODE_CLASS_MAPPINGS")  # with it the V3 nodes would be left out
    assert len(comfy.nodes) == 5
    for node in comfy.nodes.values():
        assert "SD-DiT" in node_info(node)
        schema = node.define_schema()
        names = [each.id for each in schema.inputs]
        assert len(set(names)) == len(names)
        assert schema.description.endswith(".")
        for each in (*schema.inputs, *schema.outputs):
            assert (each.tooltip or "").endswith("."), each


@pytest.fixture(params=["rgb", "grey", "kl", "tiny"])
def any_pipe(request, pipe):
    if request.param in ("kl", "tiny"):
        return make_latent_pipe(request.param)
    if request.param == "grey":
        pipe.register_modules(transformer=randomize(SDDiTTransformer2DModel(**TINY | {"in_channels": 1})))
    return pipe


def test_the_chain_makes_the_pipelines_images_to_the_bit(comfy, any_pipe):
    any_pipe.save_pretrained(comfy.models / "mine/digits")
    loaded = load(comfy, "mine/digits")
    image, latent = sample(comfy, loaded, "3; 1", images_per_class=2)
    expected = made_by(any_pipe, [3, 3, 1, 1], [5, 6, 7, 8])
    assert image.shape[-1] == 3 and torch.equal(image, expected.expand(-1, -1, -1, 3))
    assert image.flatten(1).std(1).min() > 0.02
    assert torch.equal(run(comfy.decode, pipeline=loaded, samples={"samples": latent})[0], image)


def test_latents_are_those_of_comfys_own_vae_nodes(comfy, latent_pipe):
    """VAE Decode gives the latents to the VAE as they are, and VAE Encode takes them from it so."""
    vae, images = latent_pipe.vae, torch.rand(2, 16, 20, 4)
    (latent,) = run(comfy.encode, pipeline=latent_pipe, image=images)
    with torch.no_grad():
        encoded = vae.encode(images[..., :3].permute(0, 3, 1, 2) * 2 - 1)
        own = encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mean
        torch.testing.assert_close(latent["samples"], own)
        decoded = vae.decode(own).sample / 2 + 0.5
        sampled = vae.decode(sample(comfy, latent_pipe)[1]).sample / 2 + 0.5
    (image,) = run(comfy.decode, pipeline=latent_pipe, samples=latent)
    torch.testing.assert_close(image.permute(0, 3, 1, 2), decoded.clamp(0, 1))
    torch.testing.assert_close(sample(comfy, latent_pipe)[0].permute(0, 3, 1, 2), sampled.clamp(0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_pass_unchanged_where_there_is_no_vae(comfy, pipe, channels):
    pipe.register_modules(transformer=SDDiTTransformer2DModel(**TINY | {"in_channels": channels}))
    images = torch.rand(2, 6, 10, 3)
    (latent,) = run(comfy.encode, pipeline=pipe, image=images)
    assert latent["samples"].shape == (2, channels, 6, 10)
    (back,) = run(comfy.decode, pipeline=pipe, samples=latent)
    if channels == 1:  # grey as PIL makes it, to its rounding to bytes
        rgb = [Image.fromarray((image * 255).round().byte().numpy()) for image in images]
        images = torch.stack([torch.tensor(np.asarray(each.convert("L"))) for each in rgb])[..., None] / 255
        torch.testing.assert_close(back, images.expand(-1, -1, -1, 3), atol=1 / 255, rtol=0)
    else:
        torch.testing.assert_close(back, images)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "evaluations"),
    [
        ("heun", EDMHeunScheduler, 7),
        ("euler", EDMEulerScheduler, 4),
        ("dpmpp_2m", EDMDPMSolverMultistepScheduler, 4),
    ],
)
def test_samplers_swap_in_and_progress_counts_evaluations(comfy, pipe, sampler, scheduler, evaluations):
    own, calls = pipe.scheduler, []
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(len(comfy.bars[0].shown)))
    image, _ = sample(comfy, pipe, sampler=sampler)
    hook.remove()
    assert calls == list(range(evaluations))  # shown after each evaluation, before the next
    assert comfy.bars[0].shown == [(i + 1, evaluations) for i in range(evaluations)]
    assert pipe.scheduler is own and len(comfy.bars) == 1
    pipe.scheduler = scheduler.from_config(own.config)
    assert torch.equal(image, made_by(pipe, [1], [5]))


@pytest.mark.parametrize(
    ("inputs", "kind", "settings"),
    [
        ({"sampler": "heun"}, InterpolantScheduler, {"solver": "heun"}),
        ({"sampler": "euler"}, InterpolantScheduler, {"solver": "euler"}),
        (
            {"sampler": "euler", "diffusion": "sigma", "diffusion_norm": 2.0},
            InterpolantScheduler,
            {"solver": "euler", "diffusion": "sigma", "diffusion_norm": 2.0},
        ),
        ({"sampler": "dpmpp_2m"}, DPMSolverMultistepScheduler, {}),
    ],
)
def test_a_pipeline_of_an_interpolant_has_its_samplers(comfy, pipe, inputs, kind, settings):
    pipe.scheduler = InterpolantScheduler()
    image, _ = sample(comfy, pipe, guidance_sigma_min=0.0, guidance_sigma_max=1000.0, **inputs)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    expected = made_by(pipe, [1], [5], guidance_interval=(0, float("inf")))  # pure noise is guided too
    assert torch.equal(image, expected)


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMHeunScheduler(num_inference_steps=3, solver="euler"),  # as of a distilled pipeline
        EDMDPMSolverMultistepScheduler(sigma_data=0.4),
        InterpolantScheduler(num_inference_steps=3, solver="euler", diffusion="sigma"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_by_itself_a_pipeline_samples_as_it_was_saved(comfy, pipe, scheduler):
    """With its scheduler, and in its steps: 3 evaluations of a distilled one, else 40."""
    pipe.scheduler, state = scheduler, dict(vars(scheduler))
    inputs = {"guidance_sigma_min": 0.0, "guidance_sigma_max": 1000.0, "steps": 0}
    image, _ = sample(comfy, pipe, sampler="auto", **inputs)
    assert pipe.scheduler is scheduler and vars(scheduler) == state
    assert comfy.bars[0].total == scheduler.config.get("num_inference_steps", 40)
    own = {"num_inference_steps": None, "guidance_interval": (0, float("inf"))}
    assert torch.equal(image, made_by(pipe, [1], [5], **own))
    if "path" in scheduler.config:
        other, _ = sample(comfy, pipe, sampler="auto", diffusion="kl", diffusion_norm=2.0, **inputs)
        changes = {"diffusion": "kl", "diffusion_norm": 2.0}
        pipe.scheduler = InterpolantScheduler.from_config(scheduler.config, **changes)
        assert torch.equal(other, made_by(pipe, [1], [5], **own)) and not torch.equal(other, image)


def test_heun_is_heun_of_a_pipeline_that_was_distilled_for_euler(comfy, pipe):
    pipe.scheduler = EDMHeunScheduler(num_inference_steps=3, solver="euler")
    sample(comfy, pipe, sampler="heun", steps=0)
    assert comfy.bars[0].total == 5


def test_samplers_that_a_pipeline_has_not_are_refused(comfy, pipe):
    with pytest.raises(ValueError, match="diffusion is 'kl'; this pipeline is EDM's"):
        sample(comfy, pipe, diffusion="kl")
    pipe.scheduler = InterpolantScheduler(path="gvp")
    with pytest.raises(ValueError, match="diffusion is 'kl'; the samplers heun and euler have it"):
        sample(comfy, pipe, sampler="dpmpp_2m", diffusion="kl")
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler does not sample the path 'gvp'"):
        sample(comfy, pipe, sampler="dpmpp_2m")
    with pytest.raises(ValueError, match="InterpolantScheduler has no churn"):
        sample(comfy, pipe, s_churn=3.0)


def test_stopped_it_raises_and_can_go_on(comfy, pipe):
    whole, _ = sample(comfy, pipe)
    comfy.management.interrupt_at = 4  # between the halves of a Heun step
    with pytest.raises(InterruptProcessingException):
        sample(comfy, pipe)
    assert len(comfy.bars[1].shown) == 3
    assert torch.equal(sample(comfy, pipe)[0], whole)
    assert torch.equal(made_by(pipe, [1], [5]), whole)


def test_an_image_depends_on_its_own_seed_alone(comfy, pipe):
    rounding = {"rtol": 1e-4, "atol": 1e-4}  # other kernels for another batch
    together, latents = sample(comfy, pipe, "0; 1", images_per_class=2, seed=2**64 - 2)
    for i, (label, seed) in enumerate([("0", 2**64 - 2), ("0", 2**64 - 1), ("1", 0), ("1", 1)]):
        alone, latent = sample(comfy, pipe, label, seed=seed)
        torch.testing.assert_close(alone[0], together[i], **rounding)
        torch.testing.assert_close(latent[0], latents[i], **rounding)
    torch.testing.assert_close(made_by(pipe, [0], [2**64 - 1])[0], together[1], **rounding)
    assert len({image.numpy().tobytes() for image in together}) == 4


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("golden retriever; 2, 3\n0", [1, 2, 3, 0]),
        (" Golden retriever, retriever ;;cat\n", [1, 0]),
        ("", [None]),
        (" ;\n", [None]),
        (' "cat" ; "golden retriever"\n"cat";2', [0, 1, 0, 2]),
    ],
)
def test_classes_are_names_and_numbers(comfy, pipe, text, labels):
    image, _ = sample(comfy, pipe, text)
    assert torch.equal(image, made_by(pipe, labels, range(5, 5 + len(labels))))


def test_classes_are_chosen_by_name(comfy, pipe):
    """Of all pipelines that are found, each name once; numbers among the names stay names."""
    (damaged := comfy.models / "damaged").mkdir()
    (damaged / "model_index.json").write_text('{"_class_name": "SDDiTPipeline", "id2label": {"a": 1}}')
    names = {0: "10", 1: "2", 2: "a; b", 3: "cat, tom", 10: "last"}
    pipe = SDDiTPipeline(pipe.transformer, pipe.scheduler, None, names)
    pipe.save_pretrained(comfy.models / "mine")
    options = comfy.class_name.define_schema().inputs[0].options
    assert options == ["10", "2", "a; b", "cat, tom", "last", "0", "1", "3", "4", "5", "6", "7", "8", "9"]
    classes = None
    for name in options[:4]:
        (classes,) = run(comfy.class_name, name=name, **{"before": classes} if classes else {})
    assert classes == '"10"; "2"; "a; b"; cat, tom'
    image, _ = sample(comfy, pipe, classes)
    assert torch.equal(image, made_by(pipe, range(4), range(5, 9)))


def test_the_pipeline_of_the_package_is_there_without_a_folder(comfy):
    assert comfy.load.define_schema().inputs[0].options == [EMBEDDED, HUB]
    image, _ = sample(comfy, load(comfy, EMBEDDED), "7")
    assert torch.equal(image, made_by(load_pipeline("digits"), [7], [5]).expand(-1, -1, -1, 3))
    inputs = {"hub_name": "", "dtype": "auto", "device": "auto"}
    assert comfy.load.fingerprint_inputs(folder=EMBEDDED, **inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"classes": "golden retreiver; 1"}, "Unknown class name 'golden retreiver'.*golden retriever"),
        ({"classes": "1, 4"}, "Class label 4 is out of range; allowed are integers from 0 to 3"),
        ({"classes": "1, cat"}, "Unknown class name '1, cat'"),
        ({"classes": '"1"'}, "Unknown class name '1'"),
        ({"guidance_sigma_min": 11.0}, r"guidance_interval is \(11.0, 10.0\)"),
    ],
)
def test_wrong_samples_are_named(comfy, pipe, inputs, message):
    with pytest.raises(ValueError, match=message):
        sample(comfy, pipe, **inputs)


def test_folders_of_sd_dit_pipelines_are_found(comfy, pipe):
    """Also behind links; not the checkpoints inside one, nor pipelines of other kinds."""
    trained = comfy.models.parents[1] / "trained"
    for folder in (trained, trained / "checkpoint-10", comfy.models / "b/c"):
        pipe.save_pretrained(folder)
    (comfy.models / "a").symlink_to(trained)
    (comfy.models / "other").mkdir()
    (comfy.models / "other/model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    assert comfy.load.define_schema().inputs[0].options == ["a", "b/c", EMBEDDED, HUB]
    assert torch.equal(sample(comfy, load(comfy, "a"))[0], sample(comfy, pipe)[0])


@pytest.mark.parametrize(
    ("folder", "hub_name", "message"),
    [
        ("a", "", "no SD-DiT pipeline 'a' in ComfyUI's folders of diffusers models; there are: b/c"),
        ("../secret", "", r"no SD-DiT pipeline '\.\./secret' in ComfyUI's folders"),
        ("b/../b/c", "", "no SD-DiT pipeline 'b/../b/c'"),
        (
            "b/c",
            "owner/name",
            r"Both the folder 'b/c' and hub_name 'owner/name' are given; choose .*from the",
        ),
        (HUB, "", "hub_name is ''; it must be a name on the Hub, as 'owner/name', and no path"),
        (HUB, "../secret", r"hub_name is '\.\./secret'; it must be a name on the Hub"),
        (HUB, "models/../secret", "it must be a name on the Hub"),
        (HUB, "models/diffusers", "hub_name is 'models/diffusers'; .* and no path"),
        (HUB, "{secret}", "it must be a name on the Hub"),
        (HUB, "owner/my--model", "hub_name is 'owner/my--model'; it must be a name on the Hub"),
        (HUB, "owner/a..b", "it must be a name on the Hub"),
    ],
)
def test_nothing_is_loaded_from_elsewhere(comfy, pipe, monkeypatch, folder, hub_name, message):
    for name in ("b/c", "../secret"):
        pipe.save_pretrained(comfy.models / name)
    monkeypatch.chdir(comfy.models.parents[1])
    with pytest.raises(ValueError, match=message):
        load(comfy, folder, hub_name=hub_name.format(secret=comfy.models.parent / "secret"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine that holds `owner/digits`, asked by this process with an empty cache."""
    with loopback_hub.serve(tmp_path) as (hub, environment):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", environment["HF_ENDPOINT"])
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def test_a_name_on_the_hub_is_asked_for_without_trust(comfy, pipe, monkeypatch, hub):
    asked = []

    def from_pretrained(name, **arguments):
        asked.append((name, arguments.pop("dtype")["transformer"], arguments))
        return pipe

    (hub.folder / "owner/sd-dit.s_2").mkdir(parents=True)
    (hub.folder / "owner/sd-dit.s_2/model_index.json").write_text("{}")
    monkeypatch.setattr(SDDiTPipeline, "from_pretrained", from_pretrained)
    assert load(comfy, HUB, hub_name="owner/sd-dit.s_2") is pipe
    assert asked == [("owner/sd-dit.s_2", torch.float32, {})]


def test_wrong_names_on_the_hub_end_in_one_line(comfy, hub):
    (hub.folder / "owner/texts").mkdir(parents=True)
    (hub.folder / "owner/texts/config.json").write_text("{}")
    for name, message in (
        ("owner/digit", "There is no model 'owner/digit' on the Hub, or it is private"),
        ("owner/texts", "'owner/texts' on the Hub is no pipeline: it has no model_index.json"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load(comfy, HUB, hub_name=name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("listens", [False, True])
def test_a_hub_out_of_reach_ends_in_one_line(comfy, pipe, tmp_path, monkeypatch, hub, listens):
    """Soon, where it refuses and where it is silent; a copy on this machine is taken."""
    copies = tmp_path / "cache/models--owner--digits"
    pipe.save_pretrained(copies / "snapshots" / ("0" * 40))
    (copies / "refs").mkdir()
    (copies / "refs/main").write_text("0" * 40)
    monkeypatch.setattr(comfy.pack.sources, "HUB_SECONDS", 0.3)
    with socket.socket() as silent:  # bound; what connects to it waits
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        start = time.monotonic()
        with pytest.raises(ValueError, match="The Hub does not answer for 'owner/other', and") as error:
            load(comfy, HUB, hub_name="owner/other")
        assert time.monotonic() - start < 5 and "\n" not in str(error.value)
        assert ("timed out" in str(error.value)) == listens
        copy = load(comfy, HUB, hub_name="owner/digits")
    assert torch.equal(sample(comfy, copy)[0], sample(comfy, pipe)[0])


@pytest.mark.parametrize("place", ["pipeline", "transformer", "pickle"])
def test_code_in_a_pipeline_never_runs(comfy, pipe, place):
    folder, ran = comfy.models / "evil", comfy.models / "ran"
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    code = f"open({str(ran)!r}, 'w')\nfrom sddit_diffusers import *\n"
    if place == "pipeline":
        index["_class_name"] = ["evil", "SDDiTPipeline"]
        (folder / "evil.py").write_text(code)
    elif place == "transformer":
        index["transformer"] = ["evil", "SDDiTTransformer2DModel"]
        (folder / "transformer/evil.py").write_text(code)
    else:
        (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
        torch.save({"weight": Touch(ran)}, folder / "transformer/diffusion_pytorch_model.bin")
    (folder / "model_index.json").write_text(json.dumps(index))
    with suppress(ValueError):
        load(comfy, "evil")
    assert not ran.exists()


def test_precision_and_device(comfy, pipe, monkeypatch):
    pipe.save_pretrained(comfy.models / "mine")
    for chosen, bf16, dtype in (
        ("auto", False, torch.float32), ("auto", True, torch.bfloat16),
        ("fp32", True, torch.float32), ("fp16", False, torch.float16),
    ):  # fmt: skip
        comfy.management.bf16 = bf16
        loaded = load(comfy, "mine", dtype=chosen, device="auto")
        assert loaded.transformer.dtype == dtype and loaded.device.type == "cpu"
        assert sample(comfy, loaded)[1].dtype == torch.float32
    moved = []
    monkeypatch.setattr(SDDiTPipeline, "to", lambda pipe, device: moved.append(device) or pipe)
    comfy.management.get_torch_device = lambda: torch.device("cuda:1")
    load(comfy, "mine", device="auto"), load(comfy, "mine", device="cpu")
    assert moved == [torch.device("cuda:1"), torch.device("cpu")]


def test_a_pipeline_that_was_trained_on_is_loaded_again(comfy, pipe):
    def fingerprint(folder="mine"):
        inputs = {"folder": folder, "hub_name": "", "dtype": "auto", "device": "auto"}
        return comfy.load.fingerprint_inputs(**inputs)

    pipe.save_pretrained(comfy.models / "mine")
    first = fingerprint()
    assert first and fingerprint() == first
    (comfy.models / "mine/metrics.jsonl").touch()
    assert fingerprint() == first
    weights = comfy.models / "mine/transformer/diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns - 1))  # another, older one was put there
    assert fingerprint() != first
    assert fingerprint(HUB) is None


def test_latents_that_do_not_fit_are_refused(comfy, latent_pipe, pipe):
    for shape in ((1, 16, 8, 8), (1, 3, 1, 8, 8)):
        with pytest.raises(
            ValueError, match=re.escape(f"The LATENT has shape {shape}; this pipeline decodes (")
        ):
            run(comfy.decode, pipeline=latent_pipe, samples={"samples": torch.zeros(shape)})
    with pytest.raises(ValueError, match=r"\(1, 3, 17, 16\); it must be \(images, 3, a multiple of 2"):
        run(comfy.encode, pipeline=latent_pipe, image=torch.zeros(1, 17, 16, 3))
    pipe.register_modules(transformer=SDDiTTransformer2DModel(**TINY | {"in_channels": 4}))
    pipe.save_pretrained(comfy.models / "latents")
    with pytest.raises(ValueError, match="latents' has no VAE for its latents of 4 channels"):
        load(comfy, "latents")


def widgets(node):
    """What the browser saves the values of, in its order: a seed is followed by what becomes of it."""
    for each in node.define_schema().inputs:
        if each.io_type in ("STRING", "INT", "FLOAT", "COMBO"):
            yield each.id, each
            if getattr(each, "control_after_generate", None):
                yield None, SimpleNamespace(io_type="COMBO", options=["fixed", "randomize", "increment"])


# The nodes of ComfyUI itself that the workflow has: sockets by name, and how many widgets.
CORE = {"ImageScale": ({"image": "IMAGE"}, 4), "SaveImage": ({"images": "IMAGE"}, 1)}


def test_the_example_workflow_runs(comfy):
    """It is gone through as ComfyUI does: every node, socket, link and value is looked up in the schemas."""
    links = {number: (*ends, kind) for number, *ends, kind in WORKFLOW["links"]}
    assert len(links) == WORKFLOW["last_link_id"] and len(WORKFLOW["nodes"]) == WORKFLOW["last_node_id"]
    outputs, saved = {}, []
    for node in sorted(WORKFLOW["nodes"], key=lambda node: node["order"]):
        values, inputs = node["widgets_values"], {}
        if node["type"] in CORE:
            sockets, count = CORE[node["type"]]
            assert len(values) == count
        else:
            kind = comfy.nodes[node["type"]]
            expected = list(widgets(kind))
            for (name, widget), value in zip(expected, values, strict=True):
                types = {"STRING": str, "INT": int, "FLOAT": float, "COMBO": str}
                assert isinstance(value, types[widget.io_type]), name
                assert widget.io_type != "COMBO" or value in widget.options
                inputs[name] = value
            inputs.pop(None, None)
            if "steps" in inputs:
                assert inputs["steps"] == 0 and inputs["sampler"] == "auto"
                inputs["steps"] = 5  # quicker
            schema = kind.define_schema()
            sockets = {each.id: each.io_type for each in schema.inputs if each.id not in inputs}
        assert {each["name"]: each["type"] for each in node.get("inputs", [])} == sockets
        for slot, each in enumerate(node.get("inputs", [])):
            start, start_slot, *end, kind_of_link = links[each["link"]]
            assert end == [node["id"], slot] and kind_of_link == each["type"]
            inputs[each["name"]] = outputs[start, start_slot]
        if node["type"] == "SaveImage":
            saved.append(inputs["images"])
            continue
        if node["type"] == "ImageScale":
            method, *size, crop = values
            assert method in ("nearest-exact", "bicubic") and size == [256, 256] and crop == "disabled"
            outputs[node["id"], 0] = inputs["image"]
            continue
        named = [(each.display_name, each.io_type) for each in schema.outputs]
        assert [(each["name"], each["type"]) for each in node["outputs"]] == named
        for slot, (each, value) in enumerate(zip(node["outputs"], run(kind, **inputs), strict=True)):
            assert each["links"] == [n for n, link in links.items() if link[:2] == (node["id"], slot)]
            outputs[node["id"], slot] = value
    pipe = load_pipeline("digits")
    expected = made_by(pipe, range(10), range(10), num_inference_steps=5, guidance_interval=(0, 1000))
    assert len(saved) == 1 and torch.equal(saved[0], expected.expand(-1, -1, -1, 3))


def test_nodes_of_the_example_workflow_do_not_cover_one_another():
    """With room for their titles, which are above them, and for what other browsers add."""
    boxes = [(*node["pos"], *node["size"]) for node in WORKFLOW["nodes"]]
    for (x, y, width, height), (other_x, other_y, other_width, other_height) in combinations(boxes, 2):
        aside = x + width + 40 <= other_x or other_x + other_width + 40 <= x
        assert aside or y + height + 70 <= other_y or other_y + other_height + 70 <= y


def test_the_template_has_a_picture():
    picture = PACK / "example_workflows/sddit_digits.jpg"
    assert picture.stat().st_size < 50_000
    with Image.open(picture) as image:
        assert min(image.size) >= 256 and np.asarray(image.convert("L")).std() > 20


def test_the_registry_gets_the_packages_version_and_no_torch():
    text = (PACK / "pyproject.toml").read_text()
    release = Version(sddit_diffusers.__version__).base_version  # the registry takes X.Y.Z alone
    assert f'version = "{release}"' in text
    assert "comfyui" not in re.search(r'^name = "(.+)"', text, re.M).group(1).lower()
    assert re.search(r"^dependencies = \[\]$", text, re.M) and "\n[tool.comfy]\n" in text


def test_links_that_lead_back_up_are_not_followed(comfy, pipe):
    pipe.save_pretrained(comfy.models / "real/one")
    (comfy.models / "alias").symlink_to(comfy.models / "real")
    for i in range(12):  # followed, these would be 12**40 folders
        (comfy.models / f"loop{i}").symlink_to(comfy.models)
    (comfy.models / "real/loop").symlink_to(comfy.models / "real")
    (comfy.models / "broken").symlink_to(comfy.models / "nowhere")
    (comfy.models / "copied").mkdir()  # a snapshot of the Hub's cache without what its links lead to
    (comfy.models / "copied/model_index.json").symlink_to(comfy.models / "nowhere")
    (comfy.models / "deep").mkdir()
    (comfy.models / "deep/model_index.json").write_text(
        '{"_class_name": "SDDiTPipeline", "x": ' + "[" * 10**5
    )
    assert comfy.load.define_schema().inputs[0].options == ["alias/one", "deep", "real/one", EMBEDDED, HUB]
    assert comfy.class_name.define_schema()


def test_churn_is_the_pipelines(comfy, pipe):
    churn = {"s_churn": 20.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
    image, _ = sample(comfy, pipe, "1; 2", **churn)
    assert torch.equal(image, made_by(pipe, [1, 2], [5, 6], **churn))
    plain, _ = sample(comfy, pipe, "1; 2")
    assert torch.equal(plain, made_by(pipe, [1, 2], [5, 6])) and not torch.equal(plain, image)
    with pytest.raises(ValueError, match="EDMDPMSolverMultistepScheduler has no churn"):
        sample(comfy, pipe, sampler="dpmpp_2m", s_churn=1.0)


def test_samples_that_are_not_finite_end_in_a_message(comfy, pipe):
    with torch.no_grad():
        pipe.transformer.label_embed.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"image 1 \(seed 6\) is not finite"):
        sample(comfy, pipe, "1; 3")
    with pytest.raises(FloatingPointError, match="image 0 is not finite"):
        run(comfy.decode, pipeline=pipe, samples={"samples": torch.full((1, 3, 8, 8), torch.inf)})
