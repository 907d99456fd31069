"""Dense products of a TensorRT graph in quantised form: DequantizeLinear on weights, Q/DQ on activations.

    int8  weights int8, a scale per output channel; activations int8, one static scale (W8A8)
    fp8   weights float8_e4m3fn, one scale; activations float8_e4m3fn, one static scale
    int4  weights int4, a scale per group along the contraction axis; activations as they are (weight-only)

Pre: canonical MatMul nodes, x W^T. Post: the same products of dequantised values, which TensorRT fuses; routers, norms and the
embedding table keep their type. Under int4 the output head, attention beside experts, and a matrix whose rows no group
divides, have 8 bits and a scale per output channel. Under fp8 the head, and attention beside experts, stay as they are.
Scales have the activations' type: TensorRT's int4 demands it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from gatework.export.groups import common_block, fine, fit_group
from gatework.export.lower.experts import moe_nodes
from gatework.export.lower.graph import Builder, linear_users, linear_weight, producer, replace
from gatework.export.packing import TORCH_DTYPES, Keep, Pack, TensorSpec, add_packed, pack_of, set_pack, static_shape
from gatework.export.quantize import FP8_LARGEST, one_for_zero, quantize_fp8, quantize_int8_rows, quantize_rows
from gatework.export.smoothing import balance_columns, balance_norm
from gatework.plugins.errors import GateworkError

HEAD = "lm_head.weight"
QuantizedPrecision = Literal["fp8", "int8", "int4"]
LARGEST = {"fp8": FP8_LARGEST, "int8": 127.0}  # codes of a full range
Factors = Sequence[float]
Encode = Callable[[Tensor], tuple[Tensor, ...]]
_ZERO = {"fp8": np.zeros((), ml_dtypes.float8_e4m3fn), "int8": np.zeros((), np.int8)}


class Scales(Protocol):
    """Where static scales come from.

    smooth: by norm weight, factors [D] that divide the norm's output and multiply the columns of the weights behind it.
    """

    @property
    def smooth(self) -> Mapping[str, Factors]: ...
    def activation(self, product: str, largest: float) -> float:
        """Scale of the (smoothed) input of the product with the weight of that name: its range over `largest`."""

    def weight_absmax(self, weight: str, factors: Factors | None) -> float:
        """Largest magnitude of a checkpoint weight, its columns multiplied by `factors`."""


def quantize_products(
    model: ir.Model,
    precision: QuantizedPrecision,
    *,
    group: int = 0,
    scales: Scales | None = None,
    blocks: Mapping[str, int],
) -> tuple[ir.Model, bool]:
    """Rewrite every product with a weight but the routers' and what stays as it is.

    Args:
        group: weights that share a scale, for int4.
        scales: for int8 and fp8.
        blocks: weights stored as codes, with the neighbours that share a scale; whole rows of int8 stay what they are, unless
            smoothing changes them.
    """
    quantised: dict[ir.Value, ir.Value] = {}  # q, k and v read one input
    experts = bool(moe_nodes(model))
    modified = False
    for node in list(model.graph):
        weight, x = linear_weight(node), node.inputs[0]
        if weight is None or ".router." in (weight.name or ""):
            continue
        assert x is not None and x.dtype is not None
        spared = fine(_name(weight), experts=experts)
        if spared and precision == "fp8":
            continue
        build = Builder(model.graph, node)
        product = _Product(build, weight, _name(weight), x.dtype, _smoothing(x, scales), blocks)
        if precision == "int4":
            w = product.int8() if spared else product.int4(group)
        else:
            assert scales is not None
            w = product.int8() if precision == "int8" else product.fp8(scales)
            if x not in quantised:
                scale = scales.activation(product.name, LARGEST[precision])
                quantised[x] = _quantize_dequantize(build, x, scale, precision)
            x = quantised[x]
        (transposed,) = build.op("Transpose", w, perm=[1, 0])
        (y,) = build.op("MatMul", x, transposed)
        replace(node.outputs[0], y)
        modified = True
    return model, modified


def _name(weight: ir.Value) -> str:
    """The weight's name; an output head that is tied to the embedding table goes by its own."""
    return (weight.name or "") if linear_users(weight) == len(weight.uses()) else HEAD


def _smoothing(x: ir.Value, scales: Scales | None) -> Factors | None:
    """Factors for the columns of a product's weight; the norm before it is divided by them, once."""
    slice_ = producer(x, "Slice")  # of the last position
    norm = producer(x if slice_ is None else slice_.inputs[0], "RMSNormalization", "LayerNormalization")
    weight = norm.inputs[1] if norm is not None else None
    factors = scales.smooth.get(weight.name or "") if scales is not None and weight is not None else None
    if norm is not None and factors is not None:
        for part in norm.inputs[1:]:  # its bias as well
            assert part is not None
            pack = pack_of(part)
            divide = partial(_divide, factors=factors, dtype=pack.outputs[0].dtype)
            set_pack([part], Pack(pack.sources, pack.outputs, divide))
    return factors


def _divide(part: Tensor, factors: Factors, dtype: torch.dtype) -> tuple[Tensor]:
    return (balance_norm(part, factors).to(dtype),)


def _quantize_dequantize(build: Builder, x: ir.Value, scale: float, precision: Literal["fp8", "int8"]) -> ir.Value:
    assert x.dtype is not None
    step = build.constant(np.array(scale, x.dtype.numpy()))
    zero = build.constant(_ZERO[precision])
    (codes,) = build.op("QuantizeLinear", x, step, zero)
    (y,) = build.op("DequantizeLinear", codes, step, zero)
    y.dtype, y.shape = x.dtype, x.shape
    return y


@dataclass(frozen=True, slots=True)
class _Product:
    """One weight [N, K] on its way into a quantised product; each method returns the dequantised value [N, K]."""

    build: Builder
    weight: ir.Value
    name: str
    type: ir.DataType  # of activations and scales
    factors: Factors | None
    blocks: Mapping[str, int]

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.type]

    def int8(self) -> ir.Value:
        N, K = static_shape(self.weight)
        encode = partial(_encode_int8, factors=self.factors, dtype=self.dtype)
        fits = common_block(pack_of(self.weight).sources, self.blocks) == K
        exact = self.factors is None and self.dtype != torch.float16
        keep = Keep(0, partial(_keep_int8, name=self.name, dtype=self.dtype)) if fits and exact else None
        codes, scales = self._add(torch.int8, (N, K), (N,), encode, keep)
        return self.build.op("DequantizeLinear", codes, scales, axis=0)[0]

    def fp8(self, scales: Scales) -> ir.Value:
        sources = pack_of(self.weight).sources
        absmax = scales.weight_absmax(sources[0], self.factors) or FP8_LARGEST
        encode = partial(_encode_fp8, factors=self.factors, dtype=self.dtype, absmax=absmax)
        spec = TensorSpec(f"{self.name}.codes", torch.float8_e4m3fn, static_shape(self.weight))
        (codes,) = add_packed(self.build.graph, Pack(sources, (spec,), encode))
        scale = self.build.constant(np.array(absmax / FP8_LARGEST, self.type.numpy()))
        return self.build.op("DequantizeLinear", codes, scale)[0]

    def int4(self, group: int) -> ir.Value:
        N, K = static_shape(self.weight)
        size = fit_group(K, group)
        if size is None:
            return self.int8()
        encode = partial(_encode_int4, group=size, dtype=self.dtype)
        codes, scales = self._add(torch.uint8, (N, K // 2), (N, K // size), encode)
        codes.dtype, codes.shape = ir.DataType.INT4, ir.Shape((N, K))  # the same bytes
        return self.build.op("DequantizeLinear", codes, scales, axis=1, block_size=size)[0]

    def _add(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        scales: tuple[int, ...],
        encode: Encode,
        keep: Keep | None = None,
    ) -> Sequence[ir.Value]:
        outputs = (
            TensorSpec(f"{self.name}.codes", dtype, shape),
            TensorSpec(f"{self.name}.scales", self.dtype, scales),
        )
        return add_packed(self.build.graph, Pack(pack_of(self.weight).sources, outputs, encode, keep))


def _encode_int8(part: Tensor, factors: Factors | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return quantize_int8_rows(part if factors is None else balance_columns(part, factors), dtype)


def _keep_int8(codes: Tensor, scales: Tensor, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Stored codes [N, K] and scales [N, 1], which have to be positive for TensorRT: those of zeros are made so."""
    if bool((scales < 0).any()):
        got, fix = f"{float(scales.min())} in {name}", "use --target cpu"
        raise GateworkError("TensorRT takes no weights with negative scales", got=got, fix=fix)
    return torch.where(scales == 0, 0, codes), one_for_zero(scales[:, 0]).to(dtype)


def _encode_fp8(part: Tensor, factors: Factors | None, dtype: torch.dtype, absmax: float) -> tuple[Tensor]:
    return quantize_fp8(part if factors is None else balance_columns(part, factors), torch.tensor(absmax), dtype)[:1]


def _encode_int4(part: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes, scales = quantize_rows(part, 4, group, dtype, positive=True)  # as TensorRT's parser wants them
    return codes.flatten(1) ^ 0x88, one_for_zero(scales)  # from q + 8 to ONNX's two's complement
