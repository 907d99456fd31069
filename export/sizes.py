"""How much memory a model takes in each precision, from its description alone: no weights, no graph, no torch."""

from __future__ import annotations

import math
from typing import Literal

from gatework.export.config import ModelConfig
from gatework.export.groups import DEFAULT_GROUPS, HEAD_BITS, HEAD_GROUP, PADDED_GROUP, fit_group

Precision = Literal["fp32", "bf16", "fp8", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp8", "int8", "int4")

# Bytes of one cached key or value: CPU engines, quantised or not, compute in float32; the rest are GPU formats.
KV_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp8": 2, "int8": 4, "int4": 4}
_BITS: dict[Precision, int] = {"int8": 8, "int4": 4}
_SCALE = 4  # bytes: float32


def weight_bytes(config: ModelConfig, precision: Precision, group: int | None = None) -> int | None:
    """Bytes of all weights; None where the model cannot be stored so.

    int8 and int4 are what `build_engine` writes, scales and padding included. fp8 has one byte per matrix weight, one scale
    per dense matrix and per output channel of an expert; norms are bfloat16 and routers float32.

    Args:
        group: weights that share a scale, for int8 and int4; default: the builder's.
    """
    shapes = config.tensor_shapes()
    if precision in ("fp32", "bf16"):
        return config.num_parameters() * (4 if precision == "fp32" else 2)
    if precision == "fp8":
        return sum(_fp8_bytes(name, shape) for name, shape in shapes.items())
    bits, group = _BITS[precision], group or DEFAULT_GROUPS[precision]
    if config.moe is not None and fit_group(config.hidden_size, group) is None:
        return None
    total = sum(_grouped_bytes(name, shape, bits, group, config) for name, shape in shapes.items())
    if config.tie_embeddings:  # looked up row by row and multiplied with: two layouts
        total += _head_bytes(shapes["embed.weight"], bits, group)
    return total


def kv_bytes(config: ModelConfig, precision: Precision, positions: int) -> int:
    """Bytes of the keys and values of `positions` cache positions. A sliding window does not make the cache shorter."""
    return positions * config.kv_bytes_per_token(KV_BYTES[precision])


def _fp8_bytes(name: str, shape: tuple[int, ...]) -> int:
    if len(shape) == 1:
        return 2 * shape[0]
    if ".router." in name:
        return 4 * math.prod(shape)
    return math.prod(shape) + _SCALE * (math.prod(shape[:-1]) if len(shape) == 3 else 1)


def _grouped_bytes(name: str, shape: tuple[int, ...], bits: int, group: int, config: ModelConfig) -> int:
    size = fit_group(config.hidden_size, group)
    is_embedding = name.startswith("embed.")
    if len(shape) == 1 or ".router." in name or (is_embedding and size is None):
        return 4 * math.prod(shape)
    if name == "lm_head.weight":
        return _head_bytes(shape, bits, group)
    if len(shape) == 2 and not is_embedding:
        return _matrix_bytes(shape, bits, group)
    assert size is not None, name
    rows, columns = math.prod(shape[:-1]), shape[-1]
    padding = -config.intermediate_size % size  # an expert's width comes in whole groups
    if name.endswith("moe.w_in"):
        rows += 2 * padding * shape[0]
    elif name.endswith("moe.w_out"):
        columns += padding
    return rows * (columns * bits // 8 + columns // size * _SCALE)


def _head_bytes(shape: tuple[int, ...], bits: int, group: int) -> int:
    """The output head has 8 bits at least, and then groups of 256."""
    return _matrix_bytes(shape, bits, group) if bits >= HEAD_BITS else _matrix_bytes(shape, HEAD_BITS, HEAD_GROUP)


def _matrix_bytes(shape: tuple[int, ...], bits: int, group: int) -> int:
    N, K = shape
    size = fit_group(K, group) or min(group, PADDED_GROUP)
    return N * -(-K // size) * (size * bits // 8 + _SCALE)
