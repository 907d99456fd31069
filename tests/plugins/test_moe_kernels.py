"""The GPU kernels of `gatework::MoE` under Triton's interpreter, through their launch table, against the definition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gatework.plugins.moe import reference
from gatework.plugins.moe.spec import MoEAttributes
from tests.plugins.moe_cases import assert_close, label, random_inputs
from tests.plugins.moe_checks import (
    ARITHMETIC,
    FORMATS,
    GROUPS_OF_128,
    INTERPRETED,
    KEPT,
    LOADS,
    ROUTINGS,
    Dtype,
    Run,
    check,
    check_routing,
    kept,
)
from tests.plugins.moe_interpreter import interpret, interpreter


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with interpreter() as executor:
        yield lambda *arguments: executor.submit(interpret, *arguments).result()


@pytest.mark.parametrize("attributes", ARITHMETIC, ids=label)
def test_arithmetic(run: Run, attributes: MoEAttributes) -> None:
    """Every gate and activation, over all ways to route, with biases; sizes that no tile divides."""
    check(run, attributes, random_inputs(attributes, 33, D=50, I=37, bias=True), "float16")


@pytest.mark.parametrize(
    ("dtype", "T"),
    [("bfloat16", 1), ("bfloat16", 16), ("bfloat16", 33), ("bfloat16", 65), ("float16", 5), ("float16", 65)],
)
@pytest.mark.parametrize(("weight_format", "group_size"), FORMATS)
def test_formats(run: Run, dtype: Dtype, weight_format: Any, group_size: int, T: int) -> None:
    """All kinds of tiles: 3 choices among 3 experts make 65 tokens many."""
    attributes = MoEAttributes(top_k=3, weight_format=weight_format, group_size=group_size)
    check(run, attributes, random_inputs(attributes, T, E=3, D=75, I=70), dtype)


@pytest.mark.parametrize(("dtype", "T"), [("bfloat16", 17), ("bfloat16", 65), ("float16", 33)])
@pytest.mark.parametrize("weight_format", KEPT)
def test_kept_activations(run: Run, weight_format: Any, dtype: Dtype, T: int) -> None:
    """In steps of many tokens as in those of few: nothing is off by more than what is rounded to the dtype."""
    attributes = kept(3, weight_format)
    got = check(run, attributes, random_inputs(attributes, T, E=3, D=75, I=70, bias=True), dtype)
    assert "x_codes" not in got


@pytest.mark.parametrize(("format_and_group", "T"), GROUPS_OF_128)
def test_groups_larger_than_a_step(run: Run, format_and_group: Any, T: int) -> None:
    weight_format, group_size = format_and_group
    attributes = MoEAttributes(top_k=3, weight_format=weight_format, group_size=group_size)
    check(run, attributes, random_inputs(attributes, T, E=3, D=160, I=144), "bfloat16")


@pytest.mark.parametrize(("T", "E", "K"), [(1, 20, 20), (16, 16, 8), (33, 3, 1), (5, 7, 7)])
def test_loads(run: Run, T: int, E: int, K: int) -> None:
    """Two bands of row tiles, the second not full; experts without a token; columns that fill their tiles; sm_80."""
    attributes = MoEAttributes(top_k=K)
    inputs = random_inputs(attributes, T, E=E, D=64, I=96)
    inputs["router_logits"][:, 1] += 20
    if K < E:
        inputs["router_logits"][:, 0] -= 40
    offsets = check(run, attributes, inputs, "float16", sm=80)["expert_offsets"]
    loads = np.diff(offsets)
    assert loads[1] == T
    assert (loads == 0).any() == (K < E)


def test_all_tokens_to_one_expert(run: Run) -> None:
    attributes = MoEAttributes(top_k=1, weight_format="int8")
    inputs = random_inputs(attributes, 200, E=3, D=40, I=24, bias=True)
    inputs["router_logits"][:, 2] += 40
    offsets = check(run, attributes, inputs, "bfloat16")["expert_offsets"]
    assert offsets.tolist() == [0, 0, 0, 200]


@pytest.mark.parametrize(
    ("T", "E", "K", "D", "I", "skewed", "weight_format"),
    [
        (*load, each)
        for load, each in zip([*LOADS, LOADS[1]], ["int8", "fp8_e4m3", "dense", "int4", "int8"], strict=True)
    ],
)
def test_many_experts_and_odd_sizes(
    run: Run, T: int, E: int, K: int, D: int, I: int, skewed: bool, weight_format: Any
) -> None:
    attributes = MoEAttributes(top_k=K, weight_format=weight_format)
    inputs = random_inputs(attributes, T, E=E, D=D, I=I, bias=True)
    if skewed:
        inputs["router_logits"][:, 1] += 40
    loads = np.diff(check(run, attributes, inputs, "bfloat16")["expert_offsets"])
    assert not skewed or loads[1] == T


def test_rows_of_zeros(run: Run) -> None:
    attributes = MoEAttributes(top_k=2, weight_format="int8")
    inputs = random_inputs(attributes, 17, D=40, I=24)
    inputs["x"][3] = 0
    got = run(90, attributes, inputs, "float16")
    assert not got["y"][3].any()
    assert np.isfinite(got["y"].astype(np.float32)).all()


SIZES = [(1, 3, 1), (2, 8, 8), (5, 4, 2), (33, 5, 3), (257, 64, 6)]


@pytest.mark.parametrize(
    ("sizes", "routing", "ties"),
    list(zip(SIZES * 4, ROUTINGS * 3, [True] * 10 + [False] * 10, strict=False)),
)
def test_routing(run: Run, sizes: tuple[int, int, int], routing: tuple[Any, bool, float], ties: bool) -> None:
    (T, E, K), (scoring, renormalize, factor) = sizes, routing
    attributes = MoEAttributes(top_k=K, scoring=scoring, renormalize=renormalize, capacity_factor=factor)
    inputs = random_inputs(attributes, T, E=E, D=1, I=1)
    if ties:
        inputs["router_logits"] = np.rint(inputs["router_logits"])
    got = run(90, attributes, inputs, "float16", ("route", "drop", "dispatch"))
    check_routing(got, inputs["router_logits"], attributes)


def test_routing_of_extreme_logits(run: Run) -> None:
    """Infinities rank by index among themselves; a NaN stays in its own token and in range."""
    logits = np.array([[-np.inf, 1, -np.inf, -np.inf], [88, -104, 3e38, -3e38], [np.nan, 1, np.nan, 2]], np.float32)
    attributes = MoEAttributes(top_k=3)
    inputs = random_inputs(attributes, 3, E=4) | {"router_logits": logits}
    got = run(90, attributes, inputs, "float16", ("route",))
    with np.errstate(over="ignore"):
        ids, weights = reference.route(logits, attributes)
    np.testing.assert_array_equal(got["topk_ids"], ids)
    np.testing.assert_array_equal(np.isnan(got["topk_weights"]), np.isnan(weights))
    assert_close(got["topk_weights"][:2], weights[:2], INTERPRETED.scores)
    assert np.isnan(weights[2]).all()
