"""Where a model is cut."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from gatework.export.config import ModelConfig
from gatework.export.sizes import tensor_bytes
from gatework.export.stages import divide

CONFIG = ModelConfig(
    family="llama",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=96,
    num_layers=9,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab_size", [16, 1000, 4000])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_largest_stage_is_as_small_as_can_be(precision: str, stages: int, vocab_size: int, tied: bool) -> None:
    config = replace(CONFIG, vocab_size=vocab_size, tie_embeddings=tied)
    sizes = tensor_bytes(config, "bf16" if precision == "fp16" else precision, 32)
    assert sizes is not None

    def largest(ends: tuple[int, ...]) -> int:
        loads = [0] * stages
        for name, nbytes in sizes.items():
            if name.startswith("layers."):
                layer = int(name.split(".")[1])
                loads[sum(end <= layer for end in ends)] += nbytes
            else:
                loads[0 if name == "embed.weight" else -1] += nbytes
        return max(loads)

    found = divide(config, stages, precision, 32)
    assert [layer for layers in found for layer in layers] == list(range(config.num_layers))
    best = min(map(largest, itertools.combinations(range(1, config.num_layers), stages - 1)))
    assert largest(tuple(layers.stop for layers in found[:-1])) == best
