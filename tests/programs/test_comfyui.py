"""The ComfyUI nodes, on stand-ins for ComfyUI: what they make is what the pipeline makes."""

import asyncio
import importlib.util
import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import comfy_stand_ins
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

PACK = Path(__file__).parents[2] / "pipelines/comfyui"
WORKFLOW = json.loads((PACK / "example_workflows/sddit_digits.json").read_text())
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
    del sys.modules[f"{name}.nodes"]
    extension = asyncio.run(pack.comfy_entrypoint())
    nodes = {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}
    load, sample, decode, encode = nodes.values()
    return SimpleNamespace(
        pack=pack, nodes=nodes, load=load, sample=sample, decode=decode, encode=encode, models=models,
        management=modules["comfy.model_management"], bars=modules["comfy.utils"].ProgressBar.bars,
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
    assert len(comfy.nodes) == 4
    for node in comfy.nodes.values():
        assert "SD-DiT" in node_info(node)
        names = [each.id for each in node.define_schema().inputs]
        assert len(set(names)) == len(names)


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
    ],
)
def test_classes_are_names_and_numbers(comfy, pipe, text, labels):
    image, _ = sample(comfy, pipe, text)
    assert torch.equal(image, made_by(pipe, labels, range(5, 5 + len(labels))))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"classes": "golden retreiver; 1"}, "Unknown class name 'golden retreiver'.*golden retriever"),
        ({"classes": "1, 4"}, "Class label 4 is out of range; allowed are integers from 0 to 3"),
        ({"classes": "1, cat"}, "Unknown class name '1, cat'"),
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
    assert comfy.load.define_schema().inputs[0].options == ["a", "b/c", "(from the Hub)"]
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
        ("(from the Hub)", "", "hub_name is ''; it must be a name on the Hub, as 'owner/name', and no path"),
        ("(from the Hub)", "../secret", r"hub_name is '\.\./secret'; it must be a name on the Hub"),
        ("(from the Hub)", "models/../secret", "it must be a name on the Hub"),
        ("(from the Hub)", "models/diffusers", "hub_name is 'models/diffusers'; .* and no path"),
        ("(from the Hub)", "{secret}", "it must be a name on the Hub"),
    ],
)
def test_nothing_is_loaded_from_elsewhere(comfy, pipe, monkeypatch, folder, hub_name, message):
    for name in ("b/c", "../secret"):
        pipe.save_pretrained(comfy.models / name)
    monkeypatch.chdir(comfy.models.parents[1])
    with pytest.raises(ValueError, match=message):
        load(comfy, folder, hub_name=hub_name.format(secret=comfy.models.parent / "secret"))


def test_a_name_on_the_hub_is_asked_for_without_trust(comfy, pipe, monkeypatch):
    asked = []

    def from_pretrained(name, **arguments):
        asked.append((name, arguments.pop("dtype")["transformer"], arguments))
        return pipe

    monkeypatch.setattr(SDDiTPipeline, "from_pretrained", from_pretrained)
    assert load(comfy, "(from the Hub)", hub_name="owner/sd-dit.s_2") is pipe
    assert asked == [("owner/sd-dit.s_2", torch.float32, {})]


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
    assert fingerprint("(from the Hub)") is None


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


# The nodes of ComfyUI itself that the workflow ends with: sockets by name, and how many widgets.
CORE = {"SaveImage": ({"images": "IMAGE"}, 1), "PreviewImage": ({"images": "IMAGE"}, 0)}


def test_the_example_workflow_runs(comfy, pipe):
    """It is gone through as ComfyUI does: every node, socket, link and value is looked up in the schemas."""
    digits = SDDiTTransformer2DModel(**TINY | {"num_classes": 10, "in_channels": 1})
    pipe.register_modules(transformer=randomize(digits))
    pipe.save_pretrained(comfy.models / "sddit-digits")
    links = {number: (*ends, kind) for number, *ends, kind in WORKFLOW["links"]}
    assert len(links) == WORKFLOW["last_link_id"] and len(WORKFLOW["nodes"]) == WORKFLOW["last_node_id"]
    outputs, shown = {}, []
    for node in sorted(WORKFLOW["nodes"], key=lambda node: node["order"]):
        values, inputs = node["widgets_values"], {}
        if node["type"] in CORE:
            sockets, count = CORE[node["type"]]
            assert len(values) == count
        else:
            kind = comfy.nodes[node["type"]]
            expected = list(widgets(kind))
            assert all(widget.optional for _, widget in expected[len(values) :])
            for (name, widget), value in zip(expected, values, strict=False):
                types = {"STRING": str, "INT": int, "FLOAT": float, "COMBO": str}
                assert isinstance(value, types[widget.io_type]), name
                assert widget.io_type != "COMBO" or value in widget.options
                inputs[name] = value
            inputs.pop(None, None)
            schema = kind.define_schema()
            sockets = {
                each.id: each.io_type for each in schema.inputs if each.id not in inputs and not each.optional
            }
        assert {each["name"]: each["type"] for each in node.get("inputs", [])} == sockets
        for slot, each in enumerate(node.get("inputs", [])):
            start, start_slot, *end, kind_of_link = links[each["link"]]
            assert end == [node["id"], slot] and kind_of_link == each["type"]
            inputs[each["name"]] = outputs[start, start_slot]
        if node["type"] in CORE:
            shown.append(inputs["images"])
            continue
        named = [(each.display_name, each.io_type) for each in schema.outputs]
        assert [(each["name"], each["type"]) for each in node["outputs"]] == named
        for slot, (each, value) in enumerate(zip(node["outputs"], run(kind, **inputs), strict=True)):
            assert each["links"] == [n for n, link in links.items() if link[:2] == (node["id"], slot)]
            outputs[node["id"], slot] = value
    saved, previewed = shown
    assert saved.shape == (10, 8, 8, 3) and torch.equal(saved, previewed)
    expected = made_by(pipe, range(10), range(10), num_inference_steps=40, guidance_interval=(0, 1000))
    assert torch.equal(saved, expected.expand(-1, -1, -1, 3))


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
    assert comfy.load.define_schema().inputs[0].options == ["alias/one", "real/one", "(from the Hub)"]


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
