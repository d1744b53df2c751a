"""Sharing: what is pushed loads elsewhere, with the package and without it, to the same images."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import NETWORKS, Touch, randomize
from diffusers import (
    AutoencoderKL,
    AutoModel,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
)
from loopback_hub import serve

import sddit_diffusers
from sddit_diffusers import EDMHeunScheduler, InterpolantScheduler, SDDiTPipeline
from sddit_diffusers.training.methods import METHODS

PACKAGE = Path(sddit_diffusers.__file__).parent
CODE = {
    "pipeline_sddit.py": "pipelines/pipeline_sddit.py",
    "transformer/transformer_sddit.py": "models/transformer_sddit.py",
    "scheduler/scheduling_edm_heun.py": "schedulers/scheduling_edm_heun.py",
}
# A process in which the package cannot be imported: site-packages without what installs put on the path.
WITHOUT = (
    f"import sys; sys.path.append({sysconfig.get_path('purelib')!r}); sys.modules['sddit_diffusers'] = None\n"
)


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe([1, "truck"], 1.5, num_inference_steps=3, generator=generator, output_type="pt").images


def run(code, *arguments, without=False, **environment):
    """A Python program in a process of its own."""
    command = [sys.executable, *(["-S"] if without else []), "-c", WITHOUT * without + code, *arguments]
    threads = {"OMP_NUM_THREADS": torch.get_num_threads()}  # with others, sums are rounded otherwise
    environment = os.environ | threads | environment
    environment = {name: str(value) for name, value in environment.items()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


IMAGES = """
import sys, torch
from diffusers import DiffusionPipeline

def save_images(pipe, package, target):
    assert type(pipe).__module__.startswith(package) and type(pipe.transformer).__module__.startswith(package)
    generator = torch.Generator().manual_seed(0)
    made = pipe([1, "truck"], 1.5, num_inference_steps=3, generator=generator, output_type="pt").images
    torch.save(made, target)

"""
WITH_THE_PACKAGE = """
from sddit_diffusers import SDDiTPipeline
saved, *targets = sys.argv[1:]
SDDiTPipeline.from_pretrained(saved).push_to_hub("user/sd-dit")
for kind, target in zip((SDDiTPipeline, DiffusionPipeline), targets, strict=True):
    save_images(kind.from_pretrained("user/sd-dit"), "sddit_diffusers", target)
"""
WITHOUT_IT = """
target, folder = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained("user/sd-dit", trust_remote_code=True)
save_images(pipe, "diffusers_modules", target)
pipe.save_pretrained(folder)
"""


@pytest.mark.thorough
@pytest.mark.process
def test_pushed_and_pulled_with_the_package_and_without(pipe, tmp_path):
    expected = images(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    targets = [tmp_path / name for name in ("own", "native", "trusted")]
    with serve(tmp_path) as (hub, environment):
        environment |= {"HF_HOME": tmp_path / "home"}
        run(IMAGES + WITH_THE_PACKAGE, tmp_path / "saved", *targets[:2], **environment)
        pushed = hub.files("user/sd-dit")
        for name, source in CODE.items():
            assert pushed[name] == (PACKAGE / source).read_bytes()
        assert not [name for name in pushed if name.endswith((".bin", ".pkl", ".pt"))]
        environment |= {"HF_HOME": tmp_path / "home of another"}
        run(IMAGES + WITHOUT_IT, targets[2], tmp_path / "again", without=True, **environment)
    for target in targets:
        assert torch.equal(torch.load(target), expected)
    # What the copies of the code saved has them too, and is the package's own again where there is one.
    assert {name: (tmp_path / "again" / name).read_bytes() for name in CODE} == {n: pushed[n] for n in CODE}
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(loaded) is SDDiTPipeline and torch.equal(images(loaded), expected)


INTERPOLANT = """
folder, target = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert type(pipe.scheduler).__module__.startswith("diffusers_modules")
save_images(pipe, "diffusers_modules", target)
"""


@pytest.mark.thorough
@pytest.mark.process
def test_an_interpolant_needs_no_package_either(pipe, tmp_path):
    pipe.scheduler = InterpolantScheduler(path="vp", diffusion="kl")
    pipe.save_pretrained(tmp_path / "saved")
    environment = {"HF_HOME": tmp_path / "home", "HF_HUB_OFFLINE": 1}
    run(IMAGES + INTERPOLANT, tmp_path / "saved", tmp_path / "made.pt", without=True, **environment)
    assert torch.equal(torch.load(tmp_path / "made.pt"), images(pipe))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", ["pipeline_sddit", "Other"]),
        ("_class_name", ["other", "SDDiTPipeline"]),
        ("transformer", ["other", "SDDiTTransformer2DModel"]),
        ("transformer", ["transformer_sddit", "Other"]),
        ("scheduler", ["../other", "EDMHeunScheduler"]),
    ],
)
def test_other_code_beside_the_weights_is_not_taken_for_ours(pipe, tmp_path, key, value):
    pipe.save_pretrained(tmp_path)
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Other: pass"
    for path in ("other.py", "transformer/other.py", "pipeline_sddit.py", "transformer/transformer_sddit.py"):
        (tmp_path / path).write_text(evil)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {key: value}))
    with pytest.raises((ValueError, AttributeError)):
        DiffusionPipeline.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_pickles_are_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(Touch(tmp_path / "ran"), weights)  # a pickle by another name
    with pytest.raises(OSError):
        SDDiTPipeline.from_pretrained(tmp_path)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(OSError, match="safetensors"):
        DiffusionPipeline.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_forms_of_weights(pipe, tmp_path):
    expected = images(pipe)
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards/transformer").glob("*.safetensors"))) > 2
    assert torch.equal(images(DiffusionPipeline.from_pretrained(tmp_path / "shards")), expected)
    assert torch.equal(images(SDDiTPipeline.from_pretrained(tmp_path / "shards", device_map="cpu")), expected)

    pipe.save_pretrained(tmp_path / "both")
    pipe.to(torch.bfloat16).save_pretrained(tmp_path / "both", variant="bf16")
    half = DiffusionPipeline.from_pretrained(tmp_path / "both", variant="bf16", dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16 and torch.equal(images(half), images(pipe))
    assert torch.equal(images(DiffusionPipeline.from_pretrained(tmp_path / "both")), expected)


@pytest.mark.thorough
@pytest.mark.process
def test_revisions(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    with serve(tmp_path) as (hub, environment):
        shutil.copytree(tmp_path / "saved", hub.folder / "user/sd-dit")
        first = hub.commit("user/sd-dit")
        code = (
            "import sys; from sddit_diffusers import SDDiTPipeline\n"
            "SDDiTPipeline.from_pretrained('user/sd-dit', revision=sys.argv[1])"
        )
        run(code, first, **environment)
        assert any(f"/resolve/{first}/" in request for request in hub.requests)


def test_parts_may_be_passed_and_swapped(pipe, tmp_path):
    vae = randomize(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3), 1)
    SDDiTPipeline(pipe.transformer, EDMHeunScheduler(rho=5), vae, pipe.id2label).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    passed = DiffusionPipeline.from_pretrained(tmp_path, transformer=pipe.transformer)
    assert passed.transformer is pipe.transformer and type(passed.vae) is AutoencoderKL
    passed = SDDiTPipeline.from_pretrained(tmp_path, transformer=pipe.transformer, vae=None)
    assert passed.transformer is pipe.transformer and passed.vae is None and passed.id2label == pipe.id2label
    assert passed.scheduler.config.rho == 5
    passed.scheduler = EDMEulerScheduler.from_config(passed.scheduler.config)
    passed.save_pretrained(tmp_path / "euler")
    assert type(SDDiTPipeline.from_pretrained(tmp_path / "euler").scheduler) is EDMEulerScheduler
    assert not list((tmp_path / "euler/scheduler").glob("*.py"))


REFUSED = """
import sys
from diffusers import DiffusionPipeline
ours, *baselines = sys.argv[1:]
for name, options in ((ours, {}), *((baseline, {"trust_remote_code": True}) for baseline in baselines)):
    try: DiffusionPipeline.from_pretrained(name, **options)
    except (ValueError, ImportError) as error: print(type(error).__name__, error)
"""


@pytest.mark.process
def test_without_the_package_code_must_be_trusted_and_baselines_need_the_package(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "ours")
    for name in ("maskdit", "tread"):
        transformer = randomize(METHODS[name].transformer(**NETWORKS[name]))
        baseline = SDDiTPipeline(transformer, EDMHeunScheduler(), id2label={3: "truck"})
        baseline.save_pretrained(tmp_path / name)
        assert torch.equal(images(DiffusionPipeline.from_pretrained(tmp_path / name)), images(baseline))
    said = run(REFUSED, tmp_path / "ours", tmp_path / "maskdit", tmp_path / "tread", without=True)
    refusals = "(?s)^ValueError .*trust_remote_code" + 2 * ".*\nModuleNotFoundError [^\n]*sddit_diffusers"
    assert re.search(refusals, said), said


def test_other_pipelines_of_diffusers_are_as_they_were(tmp_path):
    pipe = diffusers.DDIMPipeline(
        diffusers.UNet2DModel(8, 3, 3, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                              down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2),
        diffusers.DDIMScheduler(),
    )  # fmt: skip
    pipe.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is diffusers.DDIMPipeline
    assert diffusers.EDMDPMSolverMultistepScheduler is EDMDPMSolverMultistepScheduler


@pytest.mark.parametrize("network", METHODS)
def test_single_networks_are_found(network, tmp_path):
    transformer = METHODS[network].transformer(**NETWORKS[network])
    SDDiTPipeline(randomize(transformer), EDMHeunScheduler()).save_pretrained(tmp_path / "pipeline")
    transformer.save_pretrained(tmp_path / "alone")
    for found in (
        AutoModel.from_pretrained(f"{tmp_path}/pipeline", subfolder="transformer"),
        AutoModel.from_pretrained(f"{tmp_path}/pipeline/transformer"),
        AutoModel.from_pretrained(f"{tmp_path}/alone"),
    ):
        assert type(found) is type(transformer)
        assert all(
            torch.equal(a, b) for a, b in zip(found.parameters(), transformer.parameters(), strict=True)
        )
    (tmp_path / "pipeline/model_index.json").write_text(json.dumps({"transformer": ["other", "Other"]}))
    with pytest.raises((ValueError, ImportError)):
        AutoModel.from_pretrained(f"{tmp_path}/pipeline", subfolder="transformer")


LATER = """
import importlib.util, sys
import diffusers, torch
import diffusers.hooks._helpers, diffusers.loaders.single_file_utils, diffusers.utils.hub_utils
import diffusers.pipelines.pipeline_loading_utils as loading
import diffusers.pipelines.pipeline_utils
del diffusers.hooks._helpers.TransformerBlockRegistry, diffusers.hooks._helpers.TransformerBlockMetadata
del diffusers.loaders.single_file_utils._extract_repo_id_and_weights_name
del diffusers.utils.hub_utils._get_model_file
loadable = loading.__dict__.pop("LOADABLE_CLASSES")
def load(path):
    spec = importlib.util.spec_from_file_location(path.split("/")[-1][:-3], path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
folder, target = sys.argv[1:]
network = load(folder + "/transformer/transformer_sddit.py").SDDiTTransformer2DModel
scheduler = load(folder + "/scheduler/scheduling_edm_heun.py").EDMHeunScheduler
kind = load(folder + "/pipeline_sddit.py").SDDiTPipeline
loading.LOADABLE_CLASSES = loadable  # of diffusers itself
pipe = kind(network.from_pretrained(folder + "/transformer"), scheduler(), None, {3: "truck"})
generator = torch.Generator().manual_seed(0)
made = pipe([1, "truck"], 1.5, num_inference_steps=3, generator=generator, output_type="pt").images
torch.save(made, target)
pipe.save_pretrained(folder + "/again")
try: network.from_single_file("https://huggingface.co/user/sd-dit/blob/main/one.safetensors")
except ValueError as error: print(error)
"""


@pytest.mark.thorough
@pytest.mark.process
def test_copies_work_with_a_diffusers_that_lost_private_names(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    said = run(LATER, tmp_path, tmp_path / "made.pt", without=True)
    assert "download the file and give its path" in said
    assert torch.equal(torch.load(tmp_path / "made.pt"), images(pipe))
    assert (tmp_path / "again/transformer/transformer_sddit.py").is_file()
