"""The parts of ComfyUI that nodes use, with the signatures of its V3 API: all else is refused."""

import inspect
import json
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace

import torch

_INPUT = ("id", "display_name", "optional", "tooltip", "lazy")
_WIDGET = (*_INPUT, "default", "socketless")
_RANGE = ("min", "max", "step")
_INPUTS = {
    "IMAGE": _INPUT,
    "LATENT": _INPUT,
    "STRING": (*_WIDGET, "multiline", "placeholder", "dynamic_prompts", "force_input"),
    "INT": (*_WIDGET, *_RANGE, "control_after_generate", "display_mode", "force_input"),
    "FLOAT": (*_WIDGET, *_RANGE, "round", "display_mode", "force_input"),
    "COMBO": (*_WIDGET, "options", "control_after_generate", "upload", "image_folder", "remote"),
}
_SCHEMA = (
    *("node_id", "display_name", "category", "inputs", "outputs", "hidden", "description", "is_input_list"),
    *("is_output_node", "is_deprecated", "is_experimental", "is_api_node", "not_idempotent", "enable_expand"),
)


def _record(names: tuple[str, ...], **constants):
    """A class whose objects hold arguments of these names; only the first is also taken by position."""
    first, *others = (inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names)
    first = first.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.Signature([first, *others])

    def __init__(self, *args, **arguments):
        self.__dict__ = dict.fromkeys(names) | signature.bind(*args, **arguments).arguments

    return type("Record", (), {"__init__": __init__} | constants)


def _type(io_type: str):
    inputs, outputs = _INPUTS.get(io_type, _INPUT), ("id", "display_name", "tooltip", "is_output_list")
    return SimpleNamespace(Input=_record(inputs, io_type=io_type), Output=_record(outputs, io_type=io_type))


class ComfyNode(ABC):
    @classmethod
    @abstractmethod
    def define_schema(cls): ...

    @classmethod
    @abstractmethod
    def execute(cls, **inputs): ...


class NodeOutput:
    def __init__(self, *args, ui=None, expand=None, block_execution=None):
        self.args = args


class ComfyExtension(ABC):
    @abstractmethod
    async def get_node_list(self): ...


class ProgressBar:
    bars: list  # all that were made

    def __init__(self, total, node_id=None):
        self.total, self.current, self.shown = total, 0, []
        self.bars.append(self)

    def update_absolute(self, value, total=None, preview=None):
        self.total = self.total if total is None else total
        self.current = min(value, self.total)
        self.shown.append((self.current, self.total))

    def update(self, value):
        self.update_absolute(self.current + value)


class InterruptProcessingException(Exception):
    pass


class ModelManagement(ModuleType):
    """`comfy.model_management` of a machine; `interrupt_at`: the check at which the user has pressed stop."""

    def __init__(self):
        super().__init__("comfy.model_management")
        self.bf16, self.interrupt_at = False, None

    def get_torch_device(self):
        return torch.device("cpu")

    def should_use_bf16(self, device=None, model_params=0, prioritize_performance=True, manual_cast=False):
        return self.bf16 and device is not None

    def throw_exception_if_processing_interrupted(self):
        if self.interrupt_at is not None:
            self.interrupt_at -= 1
            if self.interrupt_at == 0:
                self.interrupt_at = None
                raise InterruptProcessingException


def modules(models: list) -> dict[str, ModuleType]:
    """What a node pack imports, by name; `models`: the folders of diffusers models."""
    names = ("comfy", "comfy.utils", "comfy_api", "comfy_api.latest", "folder_paths")
    found = {name: ModuleType(name) for name in names} | {"comfy.model_management": ModelManagement()}
    for name in ("utils", "model_management"):
        setattr(found["comfy"], name, found[f"comfy.{name}"])
    found["comfy.utils"].ProgressBar = type("ProgressBar", (ProgressBar,), {"bars": []})
    found["folder_paths"].get_folder_paths = lambda name: {"diffusers": [str(path) for path in models]}[name]
    types = {name: _type(name.upper()) for name in ("Image", "Latent", "String", "Int", "Float", "Combo")}
    found["comfy_api.latest"].io = SimpleNamespace(
        Schema=_record(_SCHEMA), ComfyNode=ComfyNode, NodeOutput=NodeOutput, Custom=_type, **types
    )
    found["comfy_api.latest"].ComfyExtension = ComfyExtension
    return found


def run(node: type[ComfyNode], **inputs) -> tuple:
    """A node's outputs, after the checks that ComfyUI makes, without gradients as there."""
    schema = node.define_schema()
    assert list(inspect.signature(node.execute).parameters) == [each.id for each in schema.inputs]
    assert set(inputs) <= {each.id for each in schema.inputs}
    for each in schema.inputs:
        if each.id not in inputs:  # as of a workflow from before there was this input
            assert each.optional, each.id
            continue
        value = inputs[each.id]
        if each.io_type in ("INT", "FLOAT"):
            assert each.min <= value <= each.max, each.id
        if each.io_type == "COMBO" and each.id != "folder":  # wrong folders are the node's to name
            assert value in each.options, each.id
    with torch.inference_mode():
        outputs = node.execute(**inputs).args
    assert len(outputs) == len(schema.outputs)
    for output, value in zip(schema.outputs, outputs, strict=True):
        tensor = {"IMAGE": lambda v: v, "LATENT": lambda v: v["samples"]}.get(output.io_type)
        if tensor:
            assert tensor(value).device.type == "cpu" and tensor(value).dtype == torch.float32
    return outputs


def node_info(node: type[ComfyNode]) -> str:
    """The schema as the browser gets it: JSON, which has no infinity."""
    schema = vars(node.define_schema())
    parts = {name: [vars(each) for each in schema[name]] for name in ("inputs", "outputs")}
    return json.dumps(schema | parts, allow_nan=False)
