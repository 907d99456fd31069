"""Weights read where a checkpoint keeps them: initializers over its files' bytes, and nodes for what changes on the way.

A row range of a tensor, such as one expert of many, is a range of bytes. Stacking, transposing, reordering rows for rotary
positions, casting and scaling are nodes at the head of the graph: Concat, Transpose, Reshape, Cast, Mul.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from gatework.export.checkpoint import Checkpoint
from gatework.export.ckpt import ScaledTensor
from gatework.export.lower.graph import Builder, replace
from gatework.export.packing import clear_pack, is_weight, static_shape
from gatework.export.stored import Shards, Stored, StoredTensor
from gatework.export.weights import Piece, Weight

_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int8": ir.DataType.INT8,
}
Locate = Callable[[Path], str]


@dataclass(slots=True)
class References:
    """What graphs read from a checkpoint's files.

    how: the files got their second names (`gatework.export.sharing`), or "in place", or why all was copied in the end.
    starts: each file with its first byte that is read. places: file, offset and size of each range that is read. written:
    weights that are not read there, by reason.
    """

    how: str
    starts: dict[Path, int] = field(default_factory=dict)
    places: set[tuple[Path, int, int]] = field(default_factory=set)
    written: dict[str, list[str]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes read in all; those that two graphs read count once."""
        return sum(nbytes for _, _, nbytes in self.places)


def refer(models: Sequence[ir.Model], checkpoint: Checkpoint, how: str, locate: Locate) -> References:
    """Let every weight that lies plainly in the checkpoint's files be read from there.

    Pre: canonical graphs, a decoder's and its encoder's. Post: such weights have no pack any more; one that lies in its file
    just as the graph wants it is an initializer still, of the others nodes make values of their names. The rest is as it was,
    for `write_model`.

    Args:
        how: for the result.
        locate: the ONNX location, relative to the model's folder, that a file of the checkpoint will have.
    """
    found = References(how)
    builds = [_Build(model, locate, found) for model in models]
    for build, value in [(each, value) for each in builds for value in each.weights()]:
        assert value.name is not None
        weight = checkpoint.weights[value.name]
        tensors = {piece.name: checkpoint.source.tensors[piece.name] for piece in weight.pieces}
        reasons = [reason for reason in (why_not(piece, tensors[piece.name]) for piece in weight.pieces) if reason]
        if not reasons:
            build.weight(value, weight, tensors)
        elif value.name not in (names := found.written.setdefault(reasons[0], [])):
            names.append(value.name)
    return found


def why_not(piece: Piece, stored: Stored) -> str | None:
    """Why a piece's bytes cannot be read as they lie, or None."""
    match stored:
        case StoredTensor():
            item = _TYPES[stored.dtype].bitwidth // 8
            return f"it begins at no multiple of {item} bytes in its file" if stored.offset % item else None
        case Shards():
            return next((reason for part in stored.parts if (reason := why_not(piece, part))), None)
        case ScaledTensor():
            first, last = piece.rows or (0, piece.shape[0])
            size = stored.shape[0] // stored.scales.shape[0]
            return "its rows and its blocks of scales end in different places" if first % size or last % size else None
    return "its file holds it in pieces or compressed"


class _Build:
    """Makes values for weights."""

    def __init__(self, model: ir.Model, locate: Locate, found: References) -> None:
        self.graph, self.locate, self.found = model.graph, locate, found
        self.nodes = Builder(model.graph, model.graph[0])

    def weights(self) -> list[ir.Value]:
        """Those of the graph."""
        return [value for value in self.graph.initializers.values() if is_weight(value)]

    def weight(self, value: ir.Value, weight: Weight, tensors: dict[str, Stored]) -> None:
        """Make the graph read `value` from the files."""
        assert value.name is not None and value.dtype is not None
        (first, *others), stored = weight.pieces, next(iter(tensors.values()))
        clear_pack(value)
        moved = first.transpose or first.rope_heads or first.interleaved
        plain = not others and not moved and isinstance(stored, StoredTensor)
        if plain and _TYPES[stored.dtype] == value.dtype:
            assert isinstance(stored, StoredTensor)
            value.const_value = self.bytes_of(
                stored, *(first.rows or (0, first.shape[0])), static_shape(value), value.name
            )
            return
        del self.graph.initializers[value.name]
        made = self.stacked([self.piece(piece, tensors[piece.name]) for piece in weight.pieces], axis=0)
        if len(weight.shape) > 2:
            made = self.op("Reshape", made, self.shape(weight.shape), shape=weight.shape)
        if made.dtype != value.dtype:
            made = self.op("Cast", made, shape=weight.shape, dtype=value.dtype, to=value.dtype)
        replace(value, made)

    def piece(self, piece: Piece, stored: Stored) -> ir.Value:
        """The piece's rows, [rows, columns] or [rows]; its steps are those of `read_piece`."""
        made = self.rows(piece.name, stored, *(piece.rows or (0, piece.shape[0])))
        if piece.transpose:
            rows, columns = static_shape(made)
            made = self.op("Transpose", made, shape=(columns, rows), perm=[1, 0])
        rows, columns = (*static_shape(made), 1)[:2]
        if piece.rope_heads:
            made = self.regrouped(made, (piece.rope_heads, rows // piece.rope_heads // 2, 2, columns), [0, 2, 1, 3])
        if piece.interleaved and len(piece.shape) == 3:
            made = self.regrouped(made, (rows // 2, 2, columns), [1, 0, 2])
        elif piece.interleaved:
            made = self.regrouped(made, (rows, columns // 2, 2), [0, 2, 1])
        return made

    def regrouped(self, x: ir.Value, parts: tuple[int, ...], order: list[int]) -> ir.Value:
        """The elements of x seen in so many axes, those axes put in another order, and the shape of x again."""
        split = self.op("Reshape", x, self.shape(parts), shape=parts)
        turned = self.op("Transpose", split, shape=tuple(parts[axis] for axis in order), perm=order)
        return self.op("Reshape", turned, self.shape(static_shape(x)), shape=static_shape(x))

    def rows(self, name: str, stored: Stored, first: int, last: int) -> ir.Value:
        """Rows first to last of a stored tensor; leading axes count as one."""
        match stored:
            case StoredTensor():
                whole = (first, last) == (0, stored.shape[0])
                label = f"checkpoint:{name}" if whole else f"checkpoint:{name}[{first}:{last}]"
                shape = (last - first, *stored.shape[1:])
                shape = shape if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1])
                return self.initializer(self.bytes_of(stored, first, last, shape, label))
            case Shards():
                return self.shards(name, stored, first, last)
            case ScaledTensor():
                return self.scaled(name, stored, first, last)
        raise AssertionError(stored)

    def shards(self, name: str, stored: Shards, first: int, last: int) -> ir.Value:
        parts, position = [], 0  # of the part's first row
        for number, part in enumerate(stored.parts):
            begin, end = (position, position + part.shape[0]) if stored.dim == 0 else (0, part.shape[0])
            position += part.shape[0]
            a, b = max(first, begin) - begin, min(last, end) - begin
            if a < b:
                parts.append(self.rows(f"{name}@{number}", part, a, b))
        return self.stacked(parts, stored.dim)

    def scaled(self, name: str, stored: ScaledTensor, first: int, last: int) -> ir.Value:
        """Codes times scales, in float32, which is exact; the scales, few, are copied.

        DequantizeLinear would say the same, but ONNX Runtime makes products of it whose activations have 8 bits.
        """
        codes = self.rows(name, stored.codes, first, last)
        size = stored.shape[0] // stored.scales.shape[0]
        scales = torch.empty(((last - first) // size, stored.shape[1]), dtype=torch.bfloat16)
        stored.scales.read_into(scales, first // size)
        factors = self.initializer(ir.tensor(scales.float()[:, None], name=f"{codes.name}.scales"))
        shape, blocks = static_shape(codes), (scales.shape[0], size, stored.shape[1])
        wide = self.op("Cast", codes, shape=shape, dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT)
        wide = self.op("Reshape", wide, self.shape(blocks), shape=blocks)
        return self.op("Reshape", self.op("Mul", wide, factors, shape=blocks), self.shape(shape), shape=shape)

    def stacked(self, parts: list[ir.Value], axis: int) -> ir.Value:
        if len(parts) == 1:
            return parts[0]
        shape = list(static_shape(parts[0]))
        shape[axis] = sum(static_shape(part)[axis] for part in parts)
        return self.op("Concat", *parts, shape=tuple(shape), axis=axis)

    def op(
        self, kind: str, *inputs: ir.Value, shape: tuple[int, ...], dtype: ir.DataType | None = None, **settings: Any
    ) -> ir.Value:
        (made,) = self.nodes.op(kind, *inputs, **settings)
        dtype = dtype or inputs[0].dtype
        assert dtype is not None
        made.type, made.shape = ir.TensorType(dtype), ir.Shape(shape)
        return made

    def shape(self, sizes: tuple[int, ...]) -> ir.Value:
        return self.nodes.constant(np.array(sizes, np.int64))

    def bytes_of(
        self, stored: StoredTensor, first: int, last: int, shape: tuple[int, ...], name: str
    ) -> ir.ExternalTensor:
        """Rows first to last, where they lie."""
        kind = _TYPES[stored.dtype]
        row, start = math.prod(stored.shape[1:]) * kind.bitwidth // 8, stored.offset
        nbytes = (last - first) * row
        self.found.starts[stored.path] = min(start, self.found.starts.get(stored.path, start))
        self.found.places.add((stored.path, start + first * row, nbytes))
        place = self.locate(stored.path)
        return ir.ExternalTensor(place, start + first * row, nbytes, kind, shape=ir.Shape(shape), name=name)

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        assert tensor.name is not None
        shape = ir.Shape([int(n) for n in tensor.shape.numpy()])
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.graph.initializers[tensor.name] = value
        return value
