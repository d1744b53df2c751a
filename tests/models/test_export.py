"""Exported networks: one graph for all batches and sizes, with the eager outputs."""

import pytest
import torch
from conftest import TINY, randomize, thorough

from sddit_diffusers import (
    MaskDiTTransformer2DModel,
    MDTTransformer2DModel,
    PlainDiTTransformer2DModel,
    SDDiTTransformer2DModel,
)

SMALL = TINY | {"num_layers": 2, "num_decoder_layers": 1}
ENCODER = {name: value for name, value in SMALL.items() if "decoder" not in name}
NETWORKS = {
    "sddit": (SDDiTTransformer2DModel, SMALL),
    "dit": (PlainDiTTransformer2DModel, ENCODER),
    "maskdit": (MaskDiTTransformer2DModel, SMALL),
    "mdt": (MDTTransformer2DModel, ENCODER | {"num_decoder_layers": 1}),
}
SHAPES = [(1, 8, 8), (3, 4, 12), (5, 16, 10)]


def make(method):
    kind, config = NETWORKS[method]
    return randomize(kind(**config)).eval()


def sample_inputs(b, h, w):
    generator = torch.Generator().manual_seed(b)
    return (
        torch.randn(b, 3, h, w, generator=generator),
        torch.randn(b, generator=generator),
        torch.randint(5, (b,), generator=generator),
    )


def dynamic():
    """The batch, and the rows and columns of patches, may all be others."""
    b, rows, columns = map(torch.export.Dim, ("b", "rows", "columns"))
    image = {0: b, 2: 2 * rows, 3: 2 * columns}
    return {"hidden_states": image, "timestep": {0: b}, "class_labels": {0: b}, "return_dict": None}


@pytest.mark.parametrize("method", ["sddit", *thorough(*(name for name in NETWORKS if name != "sddit"))])
def test_exported_for_all_batches_and_sizes(method):
    network = make(method)
    exported = torch.export.export(
        network, sample_inputs(2, 8, 12), {"return_dict": False}, dynamic_shapes=dynamic()
    ).module()
    for shape in SHAPES:
        inputs = sample_inputs(*shape)
        expected = network(*inputs, return_dict=False)
        torch.testing.assert_close(exported(*inputs, return_dict=False), expected)


@pytest.mark.thorough
@pytest.mark.parametrize("method", NETWORKS)
def test_onnx_of_all_batches_and_sizes(method, tmp_path):
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    import onnxruntime

    network = make(method)
    torch.onnx.export(
        network, sample_inputs(2, 8, 12), tmp_path / "network.onnx", kwargs={"return_dict": False},
        dynamic_shapes=dynamic(), dynamo=True, optimize=False, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    for shape in SHAPES:
        inputs = sample_inputs(*shape)
        made = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        expected = network(*inputs, return_dict=False)
        torch.testing.assert_close(tuple(map(torch.from_numpy, made)), expected, rtol=1e-4, atol=1e-5)
