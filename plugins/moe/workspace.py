"""The scratch memory of one call on a GPU: what it holds and where. The plugin asks for it, the kernels fill it.

    topk_ids        [T, K]   int32        chosen experts, best first
    topk_weights    [T, K]   float32      their weights, 0 where the choice was dropped
    expert_offsets  [E+1]    int32        expert e serves rows expert_offsets[e] to expert_offsets[e+1]
    token_order     [T*K]    int32        the choice t*K + j of each row: choices sorted by expert, in token order
    hidden          [T*K, I] activation   h of each row
    expert_out      [T*K, D] float32      the expert's unweighted output, in row t*K + j

and where matrices are multiplied in 8 bits (weight_format fp8_e4m3, int8, but for keep_activations), with x = code * scale:

    x_codes         [T, D]       1 byte   x_scale       [T]    float32
    hidden_codes    [T*K, P, I]  1 byte   hidden_scale  [T*K]  float32

P is 2: a second code holds what the first one left, hidden = (code + rest) * scale, in int8 rest / FINER. In fp8 four bits of
significand are 2.6 % off, and twice in a row, in x and in hidden, make 4.6 % of y; with the rest it is 3.8 %. In int8 the
scale is that of the largest number, and among thousands of hidden ones, products of two, the largest is so far from the rest
that it made y 4 % off (Mixtral's sizes, normal weights).

expert_out is stored per choice, not added up in place, so that y sums each token's choices in their order and is the
same in every run; in float32, so that y is rounded once, as the definition has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gatework.plugins.moe.spec import MoEAttributes, MoESizes

ALIGNMENT = 256  # bytes; what cudaMalloc guarantees
HIDDEN_CODES = {"fp8_e4m3": 2, "int8": 2}  # P, by weight format
FINER = 254.0  # half a step of an int8 code is 127 of its second one's


@dataclass(frozen=True, slots=True)
class Workspace:
    """Byte offsets of the buffers, each a multiple of ALIGNMENT, and the total size in bytes."""

    offsets: Mapping[str, int]
    total: int


def buffers(sizes: MoESizes, attributes: MoEAttributes, itemsize: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes per element of each buffer, in the order in which they lie; `itemsize` is the activations'."""
    T, D, E, I = sizes
    K = attributes.top_k
    table: dict[str, tuple[tuple[int, ...], int]] = {
        "topk_ids": ((T, K), 4),
        "topk_weights": ((T, K), 4),
        "expert_offsets": ((E + 1,), 4),
        "token_order": ((T * K,), 4),
        "hidden": ((T * K, I), itemsize),
        "expert_out": ((T * K, D), 4),
    }
    parts = HIDDEN_CODES.get(attributes.weight_format)
    if parts is not None and not attributes.keep_activations:
        table |= {
            "x_codes": ((T, D), 1),
            "x_scale": ((T,), 4),
            "hidden_codes": ((T * K, parts, I), 1),
            "hidden_scale": ((T * K,), 4),
        }
    return table


def layout(sizes: MoESizes, attributes: MoEAttributes, itemsize: int) -> Workspace:
    """Where each buffer of a call of `sizes` lies. It grows with T: what suffices for the most tokens suffices for fewer."""
    offsets, end = {}, 0
    for name, (shape, bytes_each) in buffers(sizes, attributes, itemsize).items():
        offsets[name] = end
        end += -(-math.prod(shape) * bytes_each // ALIGNMENT) * ALIGNMENT
    return Workspace(offsets, end)
