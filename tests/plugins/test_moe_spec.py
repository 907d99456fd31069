"""Settings and shapes of `gatework::MoE`: what is accepted, what is refused and how, and the forms of settings."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.spec import ATTRIBUTE_KINDS, INPUTS, MoEAttributes, MoESizes, check_shapes
from tests.plugins.moe_cases import attribute_grid

FULL = MoEAttributes(
    top_k=4,
    scoring="sigmoid",
    renormalize=False,
    activation="gelu_tanh",
    glu="three_way",
    weight_format="int4",
    group_size=32,
    capacity_factor=1.25,
    min_capacity=4,
)
SHAPES: dict[str, tuple[int, ...]] = {"x": (7, 24), "router_logits": (7, 5), "w_in": (5, 34, 24), "w_out": (5, 24, 17)}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_k": 2.0}, "top_k"),
        ({"scoring": "topk"}, "softmax or sigmoid"),
        ({"renormalize": 1}, "renormalize"),
        ({"keep_activations": 1, "weight_format": "int8"}, "keep_activations is not a bool"),
        ({"keep_activations": True}, "keep_activations is for rows of 8 bits; got dense; expected fp8_e4m3 or int8"),
        ({"keep_activations": True, "weight_format": "int8", "group_size": 32}, "got int8 in groups of 32"),
        ({"activation": "swish"}, "silu or gelu or gelu_tanh or relu"),
        ({"glu": "gated"}, "none or two_way or three_way"),
        ({"weight_format": "int2"}, "dense or fp8_e4m3 or int8 or int4"),
        ({"group_size": 32}, "group_size"),
        ({"weight_format": "int8", "group_size": -1}, "group_size"),
        ({"capacity_factor": -1.0}, "capacity_factor"),
        ({"capacity_factor": float("nan")}, "capacity_factor"),
        ({"capacity_factor": float("inf")}, "capacity_factor"),
        ({"min_capacity": -1}, "min_capacity"),
        ({"capacity_rule": "top2"}, "choices or gshard"),
        ({"capacity_rule": "gshard"}, "a capacity_factor"),
        ({"capacity_rule": "gshard", "capacity_factor": 1.0, "top_k": 3}, "top 2"),
        ({"second_threshold": 0.2}, "gshard"),
        ({"capacity_rule": "gshard", "capacity_factor": 1.0, "second_threshold": 2.0}, "second_threshold"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(GateworkError) as error:
        MoEAttributes(**{"top_k": 2} | values)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_is_frozen_and_slotted() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.top_k = 2  # type: ignore[misc]
    assert not hasattr(FULL, "__dict__")


KEPT = MoEAttributes(top_k=2, weight_format="fp8_e4m3", keep_activations=True)


@pytest.mark.parametrize("attributes", [FULL, KEPT, MoEAttributes(top_k=1), *attribute_grid()[::7]])
def test_round_trips(attributes: MoEAttributes) -> None:
    assert MoEAttributes.from_dict(json.loads(json.dumps(attributes.to_dict()))) == attributes
    assert MoEAttributes.from_onnx(attributes.to_onnx()) == attributes
    as_bytes = {k: v.encode() if isinstance(v, str) else v for k, v in attributes.to_onnx().items()}
    assert MoEAttributes.from_onnx(as_bytes) == attributes


def test_onnx_kinds() -> None:
    python = {"INT": int, "FLOAT": float, "STRING": str}
    values = FULL.to_onnx()
    assert list(values) == list(ATTRIBUTE_KINDS)
    assert all(type(values[name]) is python[kind] for name, kind in ATTRIBUTE_KINDS.items())
    assert values["renormalize"] == values["keep_activations"] == 0


def test_unknown_and_missing_names_are_refused() -> None:
    with pytest.raises(GateworkError, match=r"unknown MoE attribute; got topk; expected activation, .*top_k"):
        MoEAttributes.from_dict({"top_k": 2, "topk": 2})
    with pytest.raises(GateworkError, match="missing; expected top_k"):
        MoEAttributes.from_dict({})
    with pytest.raises(GateworkError, match="renormalize"):
        MoEAttributes.from_onnx({"top_k": 2, "renormalize": 2})
    with pytest.raises(GateworkError, match="keep_activations is not a flag; got 2; expected 0 or 1"):
        MoEAttributes.from_onnx(KEPT.to_onnx() | {"keep_activations": 2})


def test_capacity_factor_is_a_float32() -> None:
    """An ONNX attribute holds no more, so settings compare equal after a trip through a model."""
    assert MoEAttributes(top_k=1, capacity_factor=1.1).capacity_factor == pytest.approx(1.1, rel=1e-7)
    assert MoEAttributes(top_k=1, capacity_factor=1.1).capacity_factor != 1.1


@pytest.mark.parametrize(
    ("T", "E", "K", "factor", "least", "capacity"),
    [
        (0, 8, 2, 2.0, 4, 4),
        (12, 8, 2, 2.0, 4, 6),  # 2 * 2 * 12 / 8 = 6
        (13, 8, 2, 2.0, 4, 6),  # 6.5
        (14, 8, 2, 2.0, 4, 8),  # 7, made even
        (3, 32, 2, 2.0, 4, 4),  # 0.375
        (100, 5, 3, 1.25, 0, 76),  # 75, made even
        (3, 32, 1, 1.0, 0, 0),
    ],
)
def test_capacity(T: int, E: int, K: int, factor: float, least: int, capacity: int) -> None:
    attributes = MoEAttributes(top_k=K, capacity_factor=factor, min_capacity=least)
    assert attributes.capacity(T, E) == capacity


@pytest.mark.parametrize(
    ("T", "E", "factor", "capacity"), [(7, 5, 1.0, 4), (40, 5, 1.0, 8), (33, 4, 1.25, 10), (9, 2, 4.0, 9)]
)
def test_capacity_of_gshard(T: int, E: int, factor: float, capacity: int) -> None:
    attributes = MoEAttributes(top_k=2, capacity_factor=factor, min_capacity=4, capacity_rule="gshard")
    assert attributes.capacity(T, E) == capacity


def test_sizes() -> None:
    assert [MoEAttributes(top_k=1, glu=glu).w_in_rows(7) for glu in ("none", "two_way", "three_way")] == [7, 14, 21]
    assert [FULL.groups(n) for n in (1, 32, 33)] == [1, 1, 2]
    assert [FULL.stored_columns(n) for n in (31, 32)] == [16, 16]
    per_row = dataclasses.replace(FULL, weight_format="int8", group_size=0)
    assert (per_row.groups(1000), per_row.stored_columns(31)) == (1, 31)
    assert check_shapes(MoEAttributes(top_k=3), SHAPES) == MoESizes(T=7, D=24, E=5, I=17)


@pytest.mark.parametrize(
    ("attributes", "changed", "name"),
    [
        (MoEAttributes(top_k=6), {}, "top_k"),
        (MoEAttributes(top_k=1), {"x": (7, 25)}, "w_in"),
        (MoEAttributes(top_k=1), {"x": (7, 1, 24)}, "x"),
        (MoEAttributes(top_k=1), {"router_logits": (6, 5)}, "router_logits"),
        (MoEAttributes(top_k=1), {"router_logits": (7, 4)}, "router_logits"),
        (MoEAttributes(top_k=1), {"w_in": (5, 33, 24)}, "w_in"),
        (MoEAttributes(top_k=1, glu="none"), {}, "w_out"),
        (MoEAttributes(top_k=1), {"w_out": (5, 17, 24)}, "w_out"),
        (MoEAttributes(top_k=1), {"w_out": None}, "w_out"),
        (MoEAttributes(top_k=1), {"b_in": (5, 17)}, "b_in"),
        (MoEAttributes(top_k=1), {"b_out": (24,)}, "b_out"),
        (MoEAttributes(top_k=1), {"w_in_scale": (5, 34, 1)}, "w_in_scale"),
        (MoEAttributes(top_k=1, weight_format="int8"), {"w_in_scale": (5, 34, 1)}, "w_out_scale"),
        (MoEAttributes(top_k=1, weight_format="int8", group_size=8), {"w_in_scale": (5, 34, 2)}, "w_in_scale"),
        (MoEAttributes(top_k=1, weight_format="int4"), {}, "w_in"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(attributes: MoEAttributes, changed: dict[str, Any], name: str) -> None:
    with pytest.raises(GateworkError, match=rf"\b{name}\b") as error:
        check_shapes(attributes, SHAPES | changed)
    assert "\n" not in str(error.value)


def test_definition_needs_numpy_only() -> None:
    code = "import sys, gatework.plugins.moe.reference; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "onnxruntime", "ml_dtypes", "transformers"} & set(done.stdout.split())


def test_every_input_is_described() -> None:
    assert set(SHAPES) < set(INPUTS)
    assert len(set(INPUTS)) == 8
