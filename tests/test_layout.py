"""Imports run down the floors of the house, and the files that travel to the Hub stand alone."""

import ast
import os
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sddit_diffusers"
DEPENDENCIES = {"torch", "numpy", "diffusers", "safetensors"}
HUB_FILES = [
    "models/transformer_sddit",
    "schedulers/scheduling_edm_heun",
    "schedulers/scheduling_interpolant",
    "pipelines/pipeline_sddit",
]
# Wings, and modules that stand by themselves; each imports from the floors below its own and from its wing.
FLOORS = [
    {"cli", "environment", "files", "hub", "launching", "seeds"},
    {"models", "schedulers"},
    {"pipelines"},
    {"data"},
    {"evaluation"},
    {"training"},
    {"page"},
    {"app", "convert", "evaluate", "generate", "plot", "prepare_latents", "reproduce"},
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imports(path):
    """(the module that is imported, whether it is ours); ours without the package's name."""
    wing = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = wing[: len(wing) + 1 - node.level] if node.level else ()
            name = ".".join([*base, *filter(None, [node.module])])
            ours = node.level > 0 or name.split(".")[0] == "sddit_diffusers"
            name = name.removeprefix("sddit_diffusers").removeprefix(".")
            if ours and name not in MODULES:  # a wing, or the face
                yield from ((f"{name}.{alias.name}".removeprefix("."), True) for alias in node.names)
            else:
                yield name, ours


@pytest.mark.parametrize(
    ("given", "loaded", "set_to"),
    [({}, False, "10000"), ({}, True, None), ({"OMP_WAIT_POLICY": "active"}, False, None)],
)
def test_threads_wait_briefly_unless_somebody_chose(monkeypatch, given, loaded, set_to):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "modules", {"torch": None} if loaded else {})
    exec((PACKAGE / "environment.py").read_text(), {"__name__": "environment"})
    assert os.environ.get("GOMP_SPINCOUNT") == set_to
    first = next(node for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
                 if isinstance(node, ast.ImportFrom))  # fmt: skip
    assert first.names[0].name == "environment"


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_need_only_diffusers_and_what_it_needs(name):
    for module, ours in imports(PACKAGE / f"{name}.py"):
        assert not ours
        top = module.split(".")[0]
        assert top in DEPENDENCIES or top in sys.stdlib_module_names, module


def test_every_module_has_its_floor():
    assert {module.split(".")[0] for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_down(module):
    """To lower floors or within the wing; never to the package's face or to a script above it."""
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for imported, ours in imports(MODULES[module]):
        assert ours or imported.split(".")[0] not in scripts, f"{module} imports {imported}"
        if ours:
            assert imported in MODULES, f"{module} imports the face for {imported}"
            here, there = module.split(".")[0], imported.split(".")[0]
            assert FLOOR[there] < FLOOR[here] or (here == there and module != here), (
                f"{module} imports {imported}"
            )


def test_no_modules_import_each_other():
    arrows = {module: {name for name, ours in imports(path) if ours} for module, path in MODULES.items()}
    assert len([*TopologicalSorter(arrows).static_order()]) >= len(MODULES)


# The network and the pipeline travel as one plain copy each.
LONG = {
    "models/transformer_sddit.py",
    "schedulers/scheduling_interpolant.py",
    "pipelines/pipeline_sddit.py",
    "SDDiTPipeline",
    "SDDiTPipeline.__call__",
}


@pytest.mark.parametrize("path", [*MODULES.values(), *ROOT.glob("*.py"), *ROOT.glob("pipelines/*/*.py")])
def test_nothing_is_long(path):
    """At most 400 lines a file, 220 a class, 60 a function."""
    text, tree = path.read_text(), ast.parse(path.read_text())
    name = path.relative_to(PACKAGE).as_posix() if PACKAGE in path.parents else path.name
    found = {} if name in LONG or len(text.splitlines()) <= 400 else {name: len(text.splitlines())}

    def look(node, within=""):
        for each in ast.iter_child_nodes(node):
            if isinstance(each, (ast.FunctionDef, ast.ClassDef)):
                title, lines = f"{within}{each.name}", each.end_lineno - each.lineno + 1
                if title not in LONG and lines > (220 if isinstance(each, ast.ClassDef) else 60):
                    found[title] = lines
                look(each, f"{title}.")

    look(tree)
    assert not found
