"""Lets diffusers find this package's classes in saved pipelines, in place of the copies of their code.

A saved pipeline names its classes by the files that were copied along: `["pipeline_sddit", "SDDiTPipeline"]`.
diffusers takes such names for code to be trusted and run. Where this package is imported its own classes are
meant, so `DiffusionPipeline` and `AutoModel`, which offer no other way, are told to read them as such. All
other names mean what they meant before.

Copies of version 0.1.0 import from `sddit_diffusers.FILE`, where these files were; that address leads to them
still.
"""

import sys

import diffusers
from diffusers import AutoModel, DiffusionPipeline

_modules: dict[tuple[str, str], str] = {}  # (file, class) to module


def register(*classes: type) -> None:
    """Makes `from_pretrained` of pipelines and `AutoModel` find these classes, in folders and on the Hub."""
    for cls in classes:
        file = cls.__module__.split(".")[-1]
        _modules[file, cls.__name__] = cls.__module__
        sys.modules[f"{__package__}.{file}"] = sys.modules[cls.__module__]
        setattr(diffusers, cls.__name__, cls)  # where a pipeline's or a single model's own name is looked up
    DiffusionPipeline._dict_from_json_file = classmethod(_dict_from_json_file)
    for loader in (DiffusionPipeline, AutoModel):
        loader.load_config = classmethod(_load_config)


def _dict_from_json_file(cls, *args, **kwargs) -> dict:
    """A model_index.json in which a pipeline of this package is one of diffusers."""
    index = super(DiffusionPipeline, cls)._dict_from_json_file(*args, **kwargs)
    if _is_known(index.get("_class_name")):
        index["_class_name"] = index["_class_name"][1]
    return index


def _load_config(cls, *args, **kwargs) -> dict | tuple:
    """The same, with the modules of this package's parts; a repository's files have names without them."""
    loader = DiffusionPipeline if issubclass(cls, DiffusionPipeline) else AutoModel
    loaded = super(loader, cls).load_config(*args, **kwargs)
    index = loaded[0] if isinstance(loaded, tuple) else loaded
    for name, value in index.items():
        if _is_known(value):
            index[name] = [_modules[tuple(value)], value[1]]
    return loaded


def _is_known(value) -> bool:
    return isinstance(value, list) and tuple(map(str, value)) in _modules
