"""SD-DiT's nodes for ComfyUI."""

from comfy_api.latest import ComfyExtension

from .nodes import ClassName, Decode, Encode, LoadPipeline, Sample


class SDDiTExtension(ComfyExtension):
    async def get_node_list(self):
        return [LoadPipeline, ClassName, Sample, Decode, Encode]


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI calls for the nodes of its V3 API."""
    return SDDiTExtension()
