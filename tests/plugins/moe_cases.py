"""Random inputs for `gatework::MoE` and the comparison that its tests share."""

from __future__ import annotations

from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

from gatework.plugins.moe.reference import pack_int4
from gatework.plugins.moe.spec import CHOICES, MoEAttributes

Array = np.ndarray
TOKENS = (0, 1, 7, 33)
OWN_GATES: list[dict[str, float]] = [{"alpha": 1.702, "beta": 1.0, "limit": 0.7}, {"alpha": 0.5}]
LARGEST = {"fp8_e4m3": 448.0, "int8": 127.0, "int4": 7.0}


def attribute_grid(**fixed: Any) -> list[MoEAttributes]:
    """Every choice of arithmetic, with and without capacity, and gates of their own if none is `fixed`; K 3 (of 5 experts)."""
    grid = product(CHOICES["glu"], CHOICES["activation"], CHOICES["scoring"], (True, False), (0.0, 1.1))
    names = ("glu", "activation", "scoring", "renormalize", "capacity_factor")
    cases = [MoEAttributes(**{"top_k": 3} | dict(zip(names, values, strict=True)) | fixed) for values in grid]
    if not fixed:
        cases += [MoEAttributes(top_k=3, **gate) for gate in OWN_GATES]
    return list(dict.fromkeys(cases))


def gshard_grid() -> list[MoEAttributes]:
    """GShard's rule with all, none and some of the second choices; its experts have no gates."""
    fixed: dict[str, Any] = {
        "top_k": 2,
        "capacity_rule": "gshard",
        "glu": "none",
        "activation": "relu",
        "min_capacity": 4,
    }
    return [
        MoEAttributes(**fixed, capacity_factor=factor, second_threshold=threshold)
        for factor in (0.5, 1.25)
        for threshold in (-1.0, 0.3, 1.0)
    ]


def label(attributes: MoEAttributes) -> str:
    """Short test id: what differs from the defaults."""
    default = MoEAttributes(top_k=3).to_dict()
    different = [
        value if isinstance(value, str) else f"{name}={value:g}"
        for name, value in attributes.to_dict().items()
        if value != default[name]
    ]
    return "-".join(different) or "default"


def quantise(w: Array, attributes: MoEAttributes) -> tuple[Array, Array]:
    """Stored weights and their scale [E, rows, groups]: the largest of each group meets the format's largest."""
    E, rows, columns = w.shape
    groups = attributes.groups(columns)
    size = attributes.group_size or columns
    padded = np.zeros((E, rows, groups * size), np.float32)
    padded[..., :columns] = w
    largest = np.abs(padded).reshape(E, rows, groups, size).max(axis=-1)
    scale = (np.maximum(largest, 1e-6) / LARGEST[attributes.weight_format]).astype(np.float32)
    q = w / np.repeat(scale, size, axis=-1)[..., :columns]
    if attributes.weight_format == "fp8_e4m3":
        return q.astype(ml_dtypes.float8_e4m3fn), scale
    q = np.rint(q).astype(np.int8)
    return (pack_int4(q) if attributes.weight_format == "int4" else q), scale


def random_inputs(
    attributes: MoEAttributes, T: int, *, D: int = 24, E: int = 5, I: int = 17, bias: bool = False, seed: int = 0
) -> dict[str, Array]:
    """Inputs by name, float32 or quantised; outputs are of the order of 1, no two logits of a token are equal."""
    rng = np.random.default_rng([seed, T, D, E, I])
    rows = attributes.w_in_rows(I)
    inputs: dict[str, Array] = {
        "x": rng.standard_normal((T, D), np.float32),
        "router_logits": 2 * rng.standard_normal((T, E), np.float32),
    }
    weights = {
        "w_in": rng.standard_normal((E, rows, D), np.float32) / np.float32(np.sqrt(D)),
        "w_out": rng.standard_normal((E, D, I), np.float32) / np.float32(np.sqrt(I)),
    }
    scales = {}
    if attributes.weight_format != "dense":
        for name, w in weights.items():
            weights[name], scales[f"{name}_scale"] = quantise(w, attributes)
    biases = {"b_in": rng.standard_normal((E, rows), np.float32), "b_out": rng.standard_normal((E, D), np.float32)}
    return inputs | weights | (biases if bias else {}) | scales


def assert_close(got: Array, want: Array, tolerance: float) -> None:
    """max |got - want| <= tolerance * max |want|, over at least one number; a failure names the worst and the first."""
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    assert want.size, "nothing was compared"
    error = np.abs(got.astype(np.float64) - want.astype(np.float64))
    largest = float(np.abs(want.astype(np.float64)).max())
    bad = ~(error <= tolerance * largest)  # NaN is bad
    first = tuple(np.argwhere(bad)[0].tolist()) if bad.any() else None
    assert first is None, (
        f"max error {error.max():.2e}; tolerance {tolerance:.1e} of {largest:.2e}, "
        f"{error.max() / largest:.1e} would pass; {bad.sum()} of {bad.size} bad, "
        f"first at {first}: got {got[first]}, expected {want[first]}"
    )
