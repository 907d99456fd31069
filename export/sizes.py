"""How much memory a model takes in each precision, from its description alone: no weights, no graph, no torch."""

from __future__ import annotations

import math
from typing import Literal

from gatework.export.config import ModelConfig
from gatework.export.groups import DEFAULT_GROUPS, PADDED_GROUP, DenseFormat, fine, fit_group
from gatework.plugins.moe.cpu_ops import BLOCK_ROWS

Precision = Literal["fp32", "bf16", "fp8", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp8", "int8", "int4")

_BITS: dict[Precision, int] = {"int8": 8, "int4": 4}
GPU_VALUE = 2  # bytes of an activation, a cached key or value: bfloat16 or float16
_EXPERTS, _EXPERT_BIASES = ".moe.w_", ".moe.b_"  # in the names of their weights
_SCALE = 2  # bytes: bfloat16; of the embedding table float32


def weight_bytes(config: ModelConfig, precision: Precision, group: int | None = None) -> int | None:
    """Bytes of all weights; None where the model cannot be stored so.

    int8 and int4 are what `build_engine` writes for CPUs, bf16 and fp8 what it writes for GPUs, scales and padding included.

    Args:
        group: weights that share a scale, for int8 and int4; default: the builder's.
    """
    sizes = tensor_bytes(config, precision, group)
    if sizes is None:
        return None
    tied = config.tie_embeddings and precision in ("fp32", "bf16")
    return sum(sizes.values()) - (sizes["lm_head.weight"] if tied else 0)


def devices_needed(config: ModelConfig, precision: Precision, positions: int, memory: int) -> int | None:
    """How many devices of `memory` bytes hold the model, whole layers each, with a cache of so many positions.

    Embedding and encoder are where the first layer is, and the head where the last is, as in stages. None where one layer, with
    what goes with it, is too large for a device, or the precision cannot be had.
    """
    sizes = tensor_bytes(config, precision)
    if sizes is None:
        return None
    parts = [kv_bytes(config, precision, positions) // config.num_layers] * config.num_layers
    for name, nbytes in sizes.items():
        kind, _, rest = name.partition(".")
        parts[int(rest.split(".")[0]) if kind == "layers" else 0 if kind in ("embed", "encoder") else -1] += nbytes
    devices, room = 0, 0
    for needed in parts:
        if needed > memory:
            return None
        if needed > room:
            devices, room = devices + 1, memory
        room -= needed
    return devices


def tensor_bytes(config: ModelConfig, precision: Precision, group: int | None = None) -> dict[str, int] | None:
    """Bytes of every weight, by name; arguments and None as of `weight_bytes`.

    A tied embedding has an entry as the head, too: the same table in floats, a layout of its own where quantised.
    """
    shapes = config.tensor_shapes()
    if config.tie_embeddings:
        shapes["lm_head.weight"] = shapes["embed.weight"]
    if precision == "fp32":
        return {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    if precision == "bf16":  # but for routers
        return {name: (4 if ".router." in name else 2) * math.prod(shape) for name, shape in shapes.items()}
    if precision == "fp8":
        return _gpu_tensor_bytes(config, "fp8", 0)
    bits, group = _BITS[precision], group or DEFAULT_GROUPS[precision]
    if config.moe is not None and fit_group(config.hidden_size, group) is None:
        return None
    return {name: _grouped_bytes(name, shape, bits, group, config) for name, shape in shapes.items()}


def kv_bytes(config: ModelConfig, precision: Precision, positions: int) -> int:
    """Bytes of the keys and values of `positions` cache positions, and of a prompt as long where an encoder reads it.

    A sliding window does not make the cache shorter. Values have 16 bits but in fp32, and in int8 and int4, which are for CPUs,
    where ONNX Runtime's attention runs instead of this package's.
    """
    on_cpu = precision in ("int8", "int4")
    wide = precision == "fp32" or (on_cpu and not _has_cached_attention(config.within(positions)))
    return caches(config) * positions * config.kv_bytes_per_token(4 if wide else 2)


def _has_cached_attention(config: ModelConfig) -> bool:
    """Whether `lower.cached_attention` takes the model's attention; each of the rest is an operator of ONNX Runtime's."""
    odd = config.head_dim % 16 or config.rotary_dim % 16
    return not odd and config.ntk_length is None and config.relative_buckets is None


def caches(config: ModelConfig) -> int:
    """How many caches a sequence has: the decoder's own, and that of what the encoder made of the prompt."""
    return 2 if config.encoder_layers else 1


def gpu_weight_bytes(config: ModelConfig, precision: str, group: int, *, weight_only: bool = False) -> tuple[int, int]:
    """Bytes of (dense weights, expert weights) as a GPU engine of that precision stores them, scales included.

    weight_only: of fp8, see BuildOptions.
    """
    tensors = _gpu_tensor_bytes(config, precision, group, dense="bf16" if weight_only else precision)
    experts = sum(nbytes for name, nbytes in tensors.items() if _EXPERTS in name or _EXPERT_BIASES in name)
    return sum(tensors.values()) - experts, experts


def _gpu_tensor_bytes(config: ModelConfig, precision: str, group: int, *, dense: str | None = None) -> dict[str, int]:
    """dense: precision of what is no expert's, where it is another."""
    shapes = config.tensor_shapes()
    if config.tie_embeddings and precision in ("int8", "int4"):
        shapes["lm_head.weight"] = shapes["embed.weight"]  # a quantised copy
    return {
        name: _gpu_expert_bytes(shape, precision, group)
        if _EXPERTS in name
        else _gpu_dense_bytes(name, shape, dense or precision, group, experts=config.moe is not None)
        for name, shape in shapes.items()
    }


def _gpu_expert_bytes(shape: tuple[int, ...], precision: str, group: int) -> int:
    rows, columns = math.prod(shape[:-1]), shape[-1]
    match precision:
        case "fp8" | "int8":
            return rows * (columns + 4)
        case "int4":
            return rows * (-(-columns // 2) + 4 * -(-columns // group))
    return 2 * rows * columns


def _gpu_dense_bytes(name: str, shape: tuple[int, ...], precision: str, group: int, *, experts: bool) -> int:
    if ".router." in name:
        return 4 * math.prod(shape)
    spared = fine(name, experts=experts)
    as_it_is = (
        "relative_bias." in name
        or name.startswith("embed.")
        or precision in ("bf16", "fp16")
        or (spared and precision == "fp8")
    )
    if len(shape) == 1 or _EXPERT_BIASES in name or as_it_is:
        return GPU_VALUE * math.prod(shape)
    rows, columns = shape
    size = fit_group(columns, group) if precision == "int4" and not spared else None
    if size is not None:
        return rows * (columns // 2 + GPU_VALUE * columns // size)
    return rows * (columns + (GPU_VALUE if precision != "fp8" else 0))


def _grouped_bytes(name: str, shape: tuple[int, ...], bits: int, group: int, config: ModelConfig) -> int:
    is_embedding = name.startswith("embed.")
    if name.endswith(".weight"):
        bits, group = DenseFormat(bits, group, config.moe is not None).of(name)
    size = fit_group(config.hidden_size, group)
    if _EXPERT_BIASES in name and size is not None:
        padded = config.matrices * (-config.intermediate_size % size) if name.endswith("moe.b_in") else 0
        return 4 * shape[0] * (shape[1] + padded)
    if len(shape) == 1 or ".router." in name or "relative_bias." in name or (is_embedding and size is None):
        return 4 * math.prod(shape)
    if len(shape) == 2 and not is_embedding:
        return _matrix_bytes(shape, bits, group)
    assert size is not None, name
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if is_embedding:
        return rows * (columns * bits // 8 + columns // size * 4)
    padding = -config.intermediate_size % size  # an expert's width comes in whole groups
    if name.endswith("moe.w_in"):
        rows += config.matrices * padding * shape[0]
    elif name.endswith("moe.w_out"):
        columns += padding
    return rows * (columns * bits // 8 + columns // size * _SCALE)


def _matrix_bytes(shape: tuple[int, ...], bits: int, group: int) -> int:
    N, K = shape
    size = fit_group(K, group) or min(group, PADDED_GROUP)
    return (N + -N % BLOCK_ROWS) * -(-K // size) * (size * bits // 8 + _SCALE)
