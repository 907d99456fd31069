"""Weights that a checkpoint stores as 8-bit codes times scales, read as codes and scales: an engine that has such numbers keeps
them, and nothing is rounded twice.

Of a canonical weight's rows, w = code * scale:

    codes   [rows, columns]   int8, any of -128 to 127
    scales  [rows, blocks]    bfloat16, each for a block of neighbours along the contraction axis
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gatework.export.checkpoint import PART_BYTES, Checkpoint, check_finite, piece_rows, read_piece
from gatework.export.ckpt import ScaledTensor
from gatework.export.groups import fit_group
from gatework.export.mxfp4 import MxTensor
from gatework.export.stored import Stored
from gatework.export.weights import Piece

Blocks = dict[str, int]


def stored_blocks(checkpoint: Checkpoint, group_size: int | None = None) -> Blocks:
    """Every weight stored so that its rows can be kept, with the columns that share a scale.

    Args:
        group_size: asked for by the user; weights whose blocks such groups, or the widest that fit their rows, do not divide
            are left out. Both matrices of experts have the groups that fit the hidden size.
    """
    found: Blocks = {}
    for name, weight in checkpoint.weights.items():
        block = _common_block(checkpoint, name)
        columns = weight.shape[-1] if len(weight.shape) == 2 else checkpoint.config.hidden_size
        size = None if group_size is None else fit_group(columns, group_size)
        if block and (size is None or block % size == 0):
            found[name] = block
    return found


def _common_block(checkpoint: Checkpoint, name: str) -> int:
    """Of all pieces of a weight, or 0."""
    blocks = [_block(piece, checkpoint.source.tensors[piece.name]) for piece in checkpoint.weights[name].pieces]
    return 0 if 0 in blocks else math.gcd(*blocks)


def _block(piece: Piece, stored: Stored) -> int:
    """Columns of the piece's rows that share a scale; 0 where it has no codes, or scales that go another way."""
    if not isinstance(stored, ScaledTensor | MxTensor):
        return 0
    steps = _steps(stored)
    *others, rows, columns = (*steps[:-2], *reversed(steps[-2:])) if piece.transpose else steps
    whole = all(row % steps[0] == 0 for row in piece.rows or ())
    moved = piece.interleaved and len(piece.shape) != 3
    return columns if {rows, *others} == {1} and whole and not moved else 0


def _steps(stored: ScaledTensor | MxTensor) -> list[int]:
    """How many codes share a scale along every axis."""
    return [size // count for size, count in zip(stored.codes.shape, stored.scales.shape, strict=True)]


def coded_parts(checkpoint: Checkpoint, name: str, *, max_bytes: int = PART_BYTES) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes and scales of a weight of `stored_blocks`, in the parts of `Checkpoint.parts`, which see.

    A weight that is no number, or infinite, is a GateworkError that names the checkpoint's tensor.
    """
    block = _common_block(checkpoint, name)
    for start, stop in checkpoint.spans(name, max_bytes=max_bytes):
        yield _read(checkpoint, name, start, stop, block)


def _read(checkpoint: Checkpoint, name: str, start: int, stop: int, block: int) -> tuple[Tensor, Tensor]:
    weight = checkpoint.weights[name]
    columns = weight.shape[-1]
    codes = torch.empty((stop - start, columns), dtype=torch.int8)
    scales = torch.empty((stop - start, columns // block), dtype=torch.bfloat16)
    position = 0  # of the piece's first row
    for piece in weight.pieces:
        stored, size = checkpoint.source.tensors[piece.name], piece_rows(piece)
        assert isinstance(stored, ScaledTensor | MxTensor)
        first, last = max(start, position), min(stop, position + size)
        if first < last:
            rows, of_piece = slice(first - start, last - start), _block(piece, stored)
            own = torch.empty((last - first, columns // of_piece), dtype=torch.bfloat16)
            read_piece(piece, stored.codes, codes[rows], first - position)
            read_piece(_of_scales(piece, stored), stored.scales, own, first - position)
            check_finite(_extremes(codes[rows], own), piece.name, checkpoint.path)
            scales[rows] = own.repeat_interleave(of_piece // block, 1)
        position += size
    return codes, scales


def _of_scales(piece: Piece, stored: ScaledTensor | MxTensor) -> Piece:
    """The scales that belong to a piece of the codes."""
    step = _steps(stored)[0]
    rows = None if piece.rows is None else (piece.rows[0] // step, piece.rows[1] // step)
    return replace(piece, shape=stored.scales.shape, rows=rows)


def _extremes(codes: Tensor, scales: Tensor) -> Tensor:
    """The least and the largest weight of every block, with the sign that its scale gives them."""
    ends = codes.unflatten(1, (scales.shape[1], -1)).aminmax(dim=-1)
    return torch.stack(ends) * scales.float()
