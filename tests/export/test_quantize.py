"""Grouped quantisation: ONNX Runtime's own kernels read the codes as we mean them, and no weight moves more than its step."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from gatework.export.quantize import dequantize_rows, quantize_rows


def contrib_session(
    node: object, inputs: dict[str, tuple[int, list]], weights: dict[str, np.ndarray]
) -> ort.InferenceSession:
    """A session around one contrib operator with output y (float)."""
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("columns", [128, 96, 24])
def test_matmul_nbits_reads_the_codes(bits: int, group: int, columns: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(33, columns)
    codes, scales = quantize_rows(rows, bits, group)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        bits=bits,
        block_size=group,
        N=33,
        K=columns,
    )
    x = torch.randn(5, columns)
    weights = {"codes": codes.numpy(), "scales": scales.numpy()}
    got = contrib_session(node, {"x": (TensorProto.FLOAT, ["T", columns])}, weights).run(None, {"x": x.numpy()})[0]
    want = x @ dequantize_rows(codes, scales, bits, columns).T
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=2e-5)  # sums of up to 128 float32 products of order 1


@pytest.mark.parametrize("bits", [8, 4])
def test_gather_block_quantized_reads_the_codes(bits: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(40, 64)
    codes, scales = quantize_rows(rows, bits, 32)
    settings = {"bits": bits, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
    node = helper.make_node(
        "GatherBlockQuantized", ["codes", "ids", "scales"], ["y"], domain="com.microsoft", **settings
    )
    weights = {"codes": codes.flatten(1).numpy(), "scales": scales.numpy()}
    ids = np.array([[3, 39, 0]])
    got = contrib_session(node, {"ids": (TensorProto.INT64, [1, 3])}, weights).run(None, {"ids": ids})[0]
    np.testing.assert_allclose(got[0], dequantize_rows(codes, scales, bits, 64)[ids[0]].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [64, 50])
def test_error_is_bounded_by_the_step(bits: int, columns: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(64, columns)
    codes, scales = quantize_rows(rows, bits, 32)
    error = (dequantize_rows(codes, scales, bits, columns) - rows).abs()
    step = scales.abs().repeat_interleave(32, 1)[:, :columns]
    if bits == 8:
        assert (error <= step * 0.5001).all()
    else:  # a clipped scale may cost an outlier more, never the group as a whole
        plain = rows.abs().amax(1, keepdim=True) / 7 / 12**0.5
        assert (error.square().mean(1).sqrt() <= plain.squeeze()).all()


def test_zeros_stay_zero() -> None:
    for bits in (8, 4):
        codes, scales = quantize_rows(torch.zeros(3, 32), bits, 32)
        assert (dequantize_rows(codes, scales, bits, 32) == 0).all()
        assert torch.isfinite(scales).all()


def test_int4_search_beats_the_largest_weight() -> None:
    """The searched scale is never worse than the plain one, in squared error, and is better over many groups."""
    torch.manual_seed(0)
    rows = torch.randn(2000, 32)
    searched = dequantize_rows(*quantize_rows(rows, 4, 32), 4, 32)
    peak = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    plain = (rows / (peak / -8)).round().clamp(-8, 7) * (peak / -8)
    better, worse = ((x - rows).square().sum(1) for x in (searched, plain))
    assert (better <= worse + 1e-6).all()
    assert better.mean() < 0.95 * worse.mean()


def test_positive_scales_cost_little() -> None:
    rows = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = []
    for positive in (False, True):
        codes, scales = quantize_rows(rows, 4, 32, positive=positive)
        assert bool((scales < 0).any()) is not positive
        errors.append((dequantize_rows(codes, scales, 4, 256) - rows).square().mean().sqrt().item())
    assert errors[0] < errors[1] < 1.06 * errors[0]
