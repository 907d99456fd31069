"""How wide the groups are that share a scale; one place for the builder, the kernels' layouts and the size tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

GROUP_SIZES = (256, 128, 64, 32, 16)
DEFAULT_GROUPS = {"int8": 128, "int4": 32}  # of ONNX Runtime; on CPUs activations are rounded in the same groups
GPU_GROUPS = {"int4": 128}  # TensorRT's; the other formats have one scale per row or matrix
FINE_BITS, FINE_GROUP = 8, 128  # at least, of what `fine` names
EMBEDDING = "embed.weight"
ATTENTION = (".attn.", ".cross.")  # in names of its weights
PADDED_GROUP = 32  # of rows that no group size divides; the last group is filled with zeros


def fit_group(columns: int, group: int) -> int | None:
    """The largest group size up to `group` that divides a row of `columns`; None if none does."""
    return next((size for size in GROUP_SIZES if size <= group and columns % size == 0), None)


def common_block(sources: tuple[str, ...], blocks: Mapping[str, int]) -> int:
    """Neighbours that share a scale in all of these weights; 1 where one of them is not stored as codes.

    Args:
        blocks: those that are, each with the columns of a row that share a scale.
    """
    return math.gcd(*(blocks.get(source, 1) for source in sources))


def fine(weight: str, *, experts: bool) -> bool:
    """Whether a dense weight is spared: head, embedding, and attention beside experts.

    In int4 engines these have 8 bits, in fp8 plans 16. A token reads one row of the embedding; and attention is a tenth of
    what it reads of Mixtral's weights, but brings most of the error: tiny-mixtral's KL divergence falls from 0.022 to 0.007 in
    int4, and from 0.006 to 0.001 in fp8.
    """
    return weight in ("lm_head.weight", EMBEDDING) or (experts and any(part in weight for part in ATTENTION))


@dataclass(frozen=True, slots=True)
class DenseFormat:
    """How an engine for ONNX Runtime stores dense weights.

    bits: of those that are not spared. group: neighbours that share a scale, at most. experts: the model has some. pure: of the
    spared weights the embedding alone is.
    """

    bits: int
    group: int
    experts: bool
    pure: bool = False

    def of(self, weight: str) -> tuple[int, int]:
        """Bits of a weight, and how many neighbours at most share a scale."""
        spared = weight == EMBEDDING if self.pure else fine(weight, experts=self.experts)
        return (FINE_BITS, FINE_GROUP) if spared and self.bits < FINE_BITS else (self.bits, self.group)
