"""The model of rounding predicts what rounding really does."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn import functional as F

from gatework.export.quantize import fp8_ranges, quantize_fp8, quantize_rows
from gatework.export.rounding import UNITS, Format, Rounding

ROWS, N, K = 32, 192, 256


def rounded(values: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Values [n, K] as the quantiser stores them, or, with 16 bits, as the CPU kernels take activations."""
    if bits == 16:
        groups = values.unflatten(-1, (-1, group))
        steps = groups.abs().amax(-1, keepdim=True) / (127 * 256)
        return ((groups / steps).round() * steps).flatten(-2)
    codes, scales = quantize_rows(values, bits, group)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return ((codes.float() - 2 ** (bits - 1)) * scales[..., None]).flatten(1)[:, : values.shape[1]]


def predicted(form: Format, x: torch.Tensor, w: torch.Tensor) -> float:
    """Expected norm of the error of all rows."""
    exact, off = F.linear(x, w), []
    for seed in range(4):
        with Rounding(form, torch.Generator().manual_seed(seed)):
            off.append((F.linear(x, w) - exact).square().sum())
    return float(torch.stack(off).mean().sqrt())


@pytest.mark.parametrize(
    ("bits", "group", "wide", "least"),
    [(8, 128, False, 0.9), (8, 32, False, 0.9), (8, 128, True, 0.8), (4, 32, False, 0.7), (4, 16, True, 0.7)],
)
@pytest.mark.parametrize("outliers", [False, True])
def test_integer_products(bits: int, group: int, wide: bool, least: float, outliers: bool) -> None:
    """Weights and activations in groups; int4's scales, of least squared error, do better than the model."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(ROWS, K, generator=generator), torch.randn(N, K, generator=generator)
    if outliers:
        x[:, 7] *= 20
        w[::3, 40] *= 10
    got = F.linear(rounded(x, 16 if wide and bits == 8 else 8, group), rounded(w, bits, group)) - F.linear(x, w)
    ratio = float(got.norm()) / predicted(Format(UNITS["float32"], bits, group, dynamic=True, wide=wide), x, w)
    assert least < ratio < 1.1, ratio


@pytest.mark.parametrize("outliers", [False, True])
def test_fp8_weights(outliers: bool) -> None:
    """Rows of e4m3, with the scale that suits a row; activations are not rounded."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(ROWS, K, generator=generator), torch.randn(N, K, generator=generator)
    if outliers:
        w[::3, 40] *= 1000  # beside which the others are subnormal; the largest itself is a code
        x[:, 40] = 0
    codes, scales = quantize_fp8(w, fp8_ranges(w))
    got = F.linear(x, codes.float() * scales) - F.linear(x, w)
    form = Format(UNITS["float32"], experts=True, fp8=True)
    ratio = float(got.norm()) / predicted(form.routed, x, w)
    assert 0.7 < ratio < 1.1, ratio
    for other in (form.attention, form.feed_forward, form.head, form.embedding, form.floats):
        assert predicted(other, x, w) < 1e-3 * float(got.norm())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_products(dtype: str) -> None:
    """Inputs, weights and results rounded; the model counts the roundings of an input that came before, too."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(ROWS, K, generator=generator), torch.randn(N, K, generator=generator)
    kind = getattr(torch, dtype)
    got = F.linear(x.to(kind).double(), w.to(kind).double()).to(kind).double() - F.linear(x.double(), w.double())
    ratio = float(got.norm()) / predicted(Format(UNITS[dtype]), x, w)
    assert 0.25 < ratio < 1.1, ratio


def test_float32_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(ROWS, 2048, generator=generator), torch.randn(N, 2048, generator=generator)
    want = F.linear(x.double(), w.double())
    one_by_one = torch.zeros(ROWS, N)
    for k in range(2048):
        one_by_one += torch.outer(x[:, k], w[:, k])
    ratio = float((one_by_one - want).norm()) / predicted(Format(UNITS["float32"]), x, w)
    assert 0.25 < ratio < 1.1, ratio


def test_cached_values() -> None:
    """float16's roundings of values of one size differ with their place between two powers of 2."""
    values = torch.randn(ROWS, K, generator=torch.Generator().manual_seed(0))
    got = values.half().float() - values
    rounding = Rounding(Format(UNITS["float32"], cache=UNITS["float16"]), torch.Generator().manual_seed(0))
    ratio = float(got.norm() / (rounding.cached(values) - values).norm())
    assert 0.5 < ratio < 1.1, ratio
    exact = Rounding(Format(UNITS["float32"]), torch.Generator().manual_seed(0))
    assert torch.equal(exact.cached(values), values)


def test_sigmoids_near_0() -> None:
    """ONNX Runtime's are as far off as those near 0.5, and not by a relative error."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Sigmoid", ["x"], ["y"])], "sigmoid", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    x = torch.linspace(-12, -4, 10_000)
    (got,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})
    want = x.double().sigmoid()
    rounding = Rounding(Format(UNITS["float32"]), torch.Generator().manual_seed(0))
    ratio = np.linalg.norm(got - want.numpy()) / float((rounding.sigmoid_of(want) - want).norm())
    assert 0.7 < ratio < 1.1, ratio
