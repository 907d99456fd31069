"""The scratch memory of one call: its buffers' places and sizes."""

from __future__ import annotations

import math

import pytest

from gatework.plugins.moe.spec import CHOICES, MoEAttributes, MoESizes
from gatework.plugins.moe.workspace import ALIGNMENT, buffers, layout

FORMATS = CHOICES["weight_format"]


def mixtral(tokens: int) -> MoESizes:
    return MoESizes(T=tokens, D=4096, E=8, I=14336)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("sizes", [mixtral(1), mixtral(513), MoESizes(T=3, D=5, E=7, I=11), MoESizes(0, 8, 4, 8)])
def test_buffers_are_aligned_and_apart(weight_format: str, sizes: MoESizes) -> None:
    attributes = MoEAttributes(top_k=3, weight_format=weight_format)  # type: ignore[arg-type]
    workspace = layout(sizes, attributes, 2)
    assert list(workspace.offsets) == list(buffers(sizes, attributes, 2))
    end = 0
    for name, (shape, itemsize) in buffers(sizes, attributes, 2).items():
        assert workspace.offsets[name] % ALIGNMENT == 0
        assert workspace.offsets[name] >= end
        end = workspace.offsets[name] + math.prod(shape) * itemsize
    assert end <= workspace.total < end + ALIGNMENT


def test_mixtral_by_hand() -> None:
    dense = layout(mixtral(8), MoEAttributes(top_k=2), 2)
    offsets = {
        "topk_ids": 0,  # 16 choices of 4 bytes
        "topk_weights": 256,
        "expert_offsets": 512,  # 9 of 4 bytes
        "token_order": 768,
        "hidden": 1024,  # 16 x 14336 x 2 = 458752
        "expert_out": 459776,  # 16 x 4096 x 4 = 262144
    }
    assert (dense.offsets, dense.total) == (offsets, 721920)
    assert layout(mixtral(8), MoEAttributes(top_k=2, weight_format="int4", group_size=128), 2) == dense
    quantised = {
        "x_codes": 721920,  # 8 x 4096
        "x_scale": 754688,  # 8 x 4
        "hidden_codes": 754944,  # 16 x 14336, two for each number
        "hidden_scale": 1213696,  # 16 x 4
    }
    for weight_format in ("int8", "fp8_e4m3"):
        coded = layout(mixtral(8), MoEAttributes(top_k=2, weight_format=weight_format), 2)  # type: ignore[arg-type]
        assert (coded.offsets, coded.total) == (offsets | quantised, 1213952)
        kept = MoEAttributes(top_k=2, weight_format=weight_format, keep_activations=True)  # type: ignore[arg-type]
        assert layout(mixtral(8), kept, 2) == dense


def test_sizes_beyond_32_bits() -> None:
    workspace = layout(mixtral(2**20), MoEAttributes(top_k=2), 2)
    assert workspace.offsets["expert_out"] - workspace.offsets["hidden"] == 2**21 * 14336 * 2
    assert workspace.total == 3 * 2**23 + 256 + 2**21 * (14336 * 2 + 4096 * 4)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_more_tokens_never_take_less(weight_format: str) -> None:
    attributes = MoEAttributes(top_k=3, weight_format=weight_format)  # type: ignore[arg-type]
    totals = [layout(MoESizes(T=tokens, D=24, E=5, I=17), attributes, 2).total for tokens in range(200)]
    assert totals == sorted(totals)
    assert totals[0] < totals[-1]
