"""Random layers of the MoE operator for the benchmark: shapes of known models, formats, weights and inputs on a device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatework.plugins.moe.spec import MoEAttributes, MoESizes

DEVICE = "cuda"


class Format(NamedTuple):
    """largest_error: of ||y - reference|| / ||reference|| that passes; int8's and fp8's is mostly that of x in 8 bits."""

    weight_format: Any
    group_size: int
    dtype: torch.dtype
    largest_error: float
    keep_activations: bool = False


FORMATS = {
    "bf16": Format("dense", 0, torch.bfloat16, 1e-2),
    "fp16": Format("dense", 0, torch.float16, 1e-2),
    "fp8": Format("fp8_e4m3", 0, torch.bfloat16, 4e-2),
    "fp8-weight-only": Format("fp8_e4m3", 0, torch.bfloat16, 1e-2, keep_activations=True),
    "int8": Format("int8", 0, torch.bfloat16, 2e-2),
    "int4": Format("int4", 128, torch.bfloat16, 1e-2),
}


class Shape(NamedTuple):
    """Of one MoE layer."""

    sizes: MoESizes  # T is 1
    attributes: MoEAttributes


SHAPES = {
    "mixtral": Shape(MoESizes(1, 4096, 8, 14336), MoEAttributes(top_k=2)),
    "dbrx": Shape(MoESizes(1, 6144, 16, 10752), MoEAttributes(top_k=4)),
    "grok-1": Shape(MoESizes(1, 6144, 8, 32768), MoEAttributes(top_k=2, activation="gelu", renormalize=False)),
    "openmoe-8b": Shape(
        MoESizes(1, 2048, 32, 8192),
        MoEAttributes(top_k=2, glu="three_way", renormalize=False, capacity_factor=2.0, min_capacity=4),
    ),
}
# Formats that are measured with one shape: elsewhere they would tell what bf16 tells.
WITH_ONE_SHAPE = {"fp16": "mixtral", "fp8-weight-only": "mixtral"}
TINY = Shape(MoESizes(1, 64, 8, 64), MoEAttributes(top_k=2))


def formats_of(shape: str, asked: Iterable[str]) -> list[str]:
    """Those that are measured with a shape."""
    return [name for name in asked if WITH_ONE_SHAPE.get(name, shape) == shape]


def with_format(attributes: MoEAttributes, name: str) -> MoEAttributes:
    """The same operator on weights of a format of FORMATS."""
    weight_format, group, *_, keep_activations = FORMATS[name]
    stored = {"weight_format": weight_format, "group_size": group, "keep_activations": keep_activations}
    return MoEAttributes.from_dict(attributes.to_dict() | stored)


def random_weights(shape: Shape, attributes: MoEAttributes, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Weights and scales of one layer; products of them keep the order of magnitude of what goes in."""
    _, D, E, I = shape.sizes
    found = {}
    for name, rows, columns in (("w_in", attributes.w_in_rows(I), D), ("w_out", D, I)):
        spread = columns**-0.5
        experts = [_random_expert(rows, columns, spread, attributes.weight_format, dtype) for _ in range(E)]
        found[name] = torch.stack(experts)
        if attributes.weight_format != "dense":
            step = spread / {"fp8_e4m3": 100.0, "int8": 40.0, "int4": 2.5}[attributes.weight_format]
            scales = torch.rand(E, rows, attributes.groups(columns), device=DEVICE)
            found[f"{name}_scale"] = step * (0.5 + scales)
    return found


def _random_expert(rows: int, columns: int, spread: float, weight_format: str, dtype: torch.dtype) -> Tensor:
    if weight_format == "int4":
        return torch.randint(0, 256, (rows, (columns + 1) // 2), device=DEVICE, dtype=torch.uint8)
    w = torch.randn(rows, columns, device=DEVICE, dtype=dtype)
    if weight_format == "fp8_e4m3":
        return (100 * w).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (40 * w).round().clamp(-127, 127).to(torch.int8) if weight_format == "int8" else spread * w


def dequantized(weights: dict[str, Tensor], name: str, attributes: MoEAttributes) -> Tensor:
    """float32 [E, rows, columns]; columns are a multiple of the group's size."""
    w = weights[name]
    if attributes.weight_format == "dense":
        return w.float()
    if attributes.weight_format == "int4":
        w = torch.stack(((w & 15).to(torch.int8) - 8, (w >> 4).to(torch.int8) - 8), dim=-1).flatten(-2)
    scale = weights[f"{name}_scale"]  # [E, rows, groups]
    return w.float().unflatten(-1, (scale.shape[-1], -1)).mul_(scale[..., None]).flatten(-2)


def inputs_of(shape: Shape, T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and router_logits."""
    torch.manual_seed(T)
    x = torch.randn(T, shape.sizes.D, device=DEVICE, dtype=dtype)
    return x, 2 * torch.randn(T, shape.sizes.E, device=DEVICE)
