"""From checkpoint weights to the tensors that a graph reads: what to write, described before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

_KEY = "gatework.pack"
_DTYPES = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}
_DTYPES |= {torch.uint8: ir.DataType.UINT8, torch.int8: ir.DataType.INT8, torch.int64: ir.DataType.INT64}
_DTYPES |= {torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN}
TORCH_DTYPES = {onnx: dtype for dtype, onnx in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Keep:
    """How codes and scales that the checkpoint has (`gatework.export.coded`) become those of an engine, unchanged.

    group: neighbours that share a scale there; 0: the whole row. encode: of a part's codes and scales.
    """

    group: int
    encode: Callable[[Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """How the weights `sources`, one after the other along axis 0, become the tensors `outputs`.

    `encode` turns one part of a source (an expert's matrix, or a block of rows) into the same part of every output; parts
    are independent, so that a model of any size is packed in the memory of one part. keep: takes its place where the sources
    are stored as codes.
    """

    sources: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    encode: Callable[[Tensor], tuple[Tensor, ...]]
    keep: Keep | None = None


def identity_pack(value: ir.Value) -> Pack:
    """The weight of the value's own name, cast to the value's dtype."""
    assert value.name is not None and value.dtype is not None
    dtype = TORCH_DTYPES[value.dtype]
    spec = TensorSpec(value.name, dtype, static_shape(value))
    return Pack((value.name,), (spec,), lambda part: (part.to(dtype),))


def static_shape(value: ir.Value) -> tuple[int, ...]:
    """The value's shape, all of whose dimensions are known."""
    assert value.shape is not None
    return tuple(int(dim) for dim in value.shape.numpy())


def pack_of(value: ir.Value) -> Pack:
    """The pack that a weight's initializer carries."""
    pack: Any = value.meta[_KEY]
    assert isinstance(pack, Pack)
    return pack


def is_weight(value: ir.Value | None) -> bool:
    """Whether the value is an initializer made from checkpoint weights."""
    return value is not None and _KEY in value.meta


def set_pack(values: Iterable[ir.Value], pack: Pack) -> None:
    """Mark initializers as outputs of `pack`."""
    for value in values:
        value.meta[_KEY] = pack


def clear_pack(value: ir.Value) -> None:
    """The initializer's data is elsewhere: nothing is to be written for it."""
    del value.meta[_KEY]


def retype(value: ir.Value, spec: TensorSpec) -> None:
    """Give a data-free initializer the dtype and shape of `spec`."""
    value.type, value.shape = ir.TensorType(_DTYPES[spec.dtype]), ir.Shape(spec.shape)


def add_packed(graph: ir.Graph, pack: Pack) -> list[ir.Value]:
    """Register the pack's outputs as data-free initializers of the graph."""
    values = []
    for spec in pack.outputs:
        value = ir.Value(name=spec.name)
        retype(value, spec)
        graph.initializers[spec.name] = value
        values.append(value)
    set_pack(values, pack)
    return values
