"""Imports run one way, and the files that travel to the Hub stand alone."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sddit_diffusers"
DEPENDENCIES = {"torch", "numpy", "diffusers", "safetensors"}
HUB_FILES = ["transformer_sddit", "scheduling_edm_heun", "pipeline_sddit"]
# Later layers may import earlier ones.
LAYERS = [
    {*HUB_FILES, "cli"},
    {"discrimination", "denoising", "transformer_baselines", "files", "launching", "scores", "sharding"}
    | {"attention_cpu", "hub"},
    {"objective", "baselines", "configuration", "data", "checkpointing", "reporting", "memory", "studies"},
    {"latents", "image_sets", "originals"},
    {"prepare_latents", "generate", "extractors", "sharing"},
    {"features", "probe", "plot", "methods"},
    {"references"},
    {"evaluate", "reproduce", "convert", "app"},
]


def imports(path):
    """(name of the package or of our module, whether it is ours)"""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.module, True
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("sddit_diffusers."):
            yield node.module.split(".")[1], True
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0], False


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_need_only_diffusers_and_what_it_needs(name):
    for module, ours in imports(PACKAGE / f"{name}.py"):
        assert not ours
        assert module in DEPENDENCIES or module in sys.stdlib_module_names, module


def test_every_module_has_its_layer():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set.union(*LAYERS)


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_imports_run_one_way(layer):
    allowed = set().union(*LAYERS[:layer])
    for name in LAYERS[layer]:
        ours = {module for module, is_ours in imports(PACKAGE / f"{name}.py") if is_ours}
        assert ours <= allowed, f"{name} imports {ours - allowed}"
