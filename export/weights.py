"""How canonical weights are assembled from a checkpoint's tensors: data, no code."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some rows of one checkpoint tensor.

    The steps apply in this order: take `rows` of axis 0, transpose the last two axes (of three, one row is one matrix), and
    bring RoPE rows from adjacent pairs (2j, 2j+1) to halves (j, j + Dh/2) for `rope_heads` heads.

    interleaved: the rows of a matrix, or the elements of a vector for each of `rows`, alternate between two halves, which are
    put one after the other, in the end.
    """

    name: str
    shape: tuple[int, ...]  # the whole checkpoint tensor's, checked before it is read
    rows: tuple[int, int] | None = None
    transpose: bool = False
    rope_heads: int = 0
    interleaved: bool = False

    @property
    def numel(self) -> int:
        """Elements that this piece contributes."""
        if self.rows is None:
            return math.prod(self.shape)
        return (self.rows[1] - self.rows[0]) * math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Weight:
    """A canonical weight: its pieces stacked along axis 0 in order, then reshaped to `shape`."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        assert sum(piece.numel for piece in self.pieces) == math.prod(self.shape), self


WeightMap = dict[str, Weight]
