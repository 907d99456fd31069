"""The cases and checks of the GPU kernels, for whatever runs them: Triton's interpreter or a GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, pairwise, product
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from gatework.plugins.moe import reference
from gatework.plugins.moe.spec import CHOICES, MoEAttributes
from tests.plugins.moe_cases import OWN_GATES, Array, assert_close, label, random_inputs

Dtype = Literal["float16", "bfloat16"]
# sm, attributes, inputs, dtype -> y and the buffers of the workspace
Run = Callable[..., dict[str, Array]]
NUMPY: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# One rounding to the dtype: half a unit in the last place of a significand of 11 or 8 bits, and as much for float32's order.
ROUNDED = {"float16": 2**-11 + 1e-5, "bfloat16": 2**-8 + 1e-5}


class Tolerances(NamedTuple):
    """Of the largest value, per stage; they depend on what runs the kernels.

    scores: against the definition's, which differ in the order of float32 sums over at most 64 experts and in exp.
    sums: float32 sums of up to 768 products, against float64.
    fp8_sums: those of two 8-bit floats.
    """

    scores: float
    sums: float
    fp8_sums: float


INTERPRETED = Tolerances(1e-6, 1e-5, 1e-5)
# ex2.approx and div.full err by 2 units in the last place each. Hopper's fp8 products add up in 13 bits of significand:
# up to 8e-4 at 75 columns, 2.1e-3 at 768 in two codes, measured on an H100.
ON_DEVICE = Tolerances(4e-6, 1e-5, 4e-3)
# ||y - definition|| / ||definition||: three roundings to the dtype at most. 8-bit x brings an error of its own,
# in int8 of half a step of 1/127 of a row's largest; in fp8 of 2.6 % (4 bits of significand) in x, which a gate feels
# twice: sqrt(2) * 2.6 = 3.7 %, up to 3.9 % with silu's slope. The checks by stage show that the kernels add nothing to them.
NORM = {"float16": 1e-3, "bfloat16": 1e-2, "int8": 2e-2, "fp8_e4m3": 4e-2}


def check(
    run: Run,
    attributes: MoEAttributes,
    inputs: dict[str, Array],
    dtype: Dtype,
    sm: int = 90,
    tolerances: Tolerances = INTERPRETED,
) -> dict[str, Array]:
    """Each stage against NumPy on what the stage before it wrote, then y against the definition."""
    got = run(sm, attributes, inputs, dtype)
    check_routing(got, inputs["router_logits"], attributes, tolerances.scores)
    wide = ("router_logits", "w_in_scale", "w_out_scale")
    narrow = {
        name: value.astype(NUMPY[dtype]) if value.dtype == np.float32 and name not in wide else value
        for name, value in inputs.items()
    }
    coded = attributes.weight_format in ("int8", "fp8_e4m3") and not attributes.group_size and len(inputs["x"]) > 16
    coded = coded and not attributes.keep_activations
    # Weights with a scale for each group may be rounded to the dtype before they are multiplied.
    sums = ROUNDED[dtype] if attributes.group_size else tolerances.sums
    if coded and attributes.weight_format == "fp8_e4m3":
        sums = tolerances.fp8_sums

    x = dequantised(got, "x", narrow["x"], attributes) if coded else narrow["x"].astype(np.float64)
    tokens = got["token_order"] // attributes.top_k
    u = grouped(x[tokens], got["expert_offsets"], narrow, "in", attributes)
    # Every factor of a gate brings the error of its sum.
    tolerance = attributes.matrices * sums + ROUNDED[dtype]
    assert_close(got["hidden"], reference.expert_activation(u, attributes), tolerance)

    hidden = got["hidden"].astype(np.float64)
    if coded:
        hidden = dequantised(got, "hidden", got["hidden"], attributes)
    out = grouped(hidden, got["expert_offsets"], narrow, "out", attributes)
    assert_close(got["expert_out"][got["token_order"]], out, sums)

    choices = got["expert_out"].reshape(*got["topk_ids"].shape, -1)
    y = (got["topk_weights"][..., None] * choices.astype(np.float64)).sum(axis=1)
    assert_close(got["y"], y, ROUNDED[dtype])

    want = reference.moe(attributes=attributes, **narrow)
    error = np.linalg.norm(got["y"].astype(np.float64) - want) / np.linalg.norm(want)
    assert error <= NORM[attributes.weight_format if coded else dtype], error
    return got


def check_routing(
    got: dict[str, Array], logits: Array, attributes: MoEAttributes, tolerance: float = INTERPRETED.scores
) -> None:
    ids, weights = reference.route(logits, attributes)
    np.testing.assert_array_equal(got["topk_ids"], ids)
    np.testing.assert_array_equal(got["topk_weights"] == 0, weights == 0)
    assert_close(got["topk_weights"], weights, tolerance)
    np.testing.assert_array_equal(got["token_order"], np.argsort(ids.ravel(), kind="stable"))
    counts = np.bincount(ids.ravel(), minlength=logits.shape[1])
    np.testing.assert_array_equal(got["expert_offsets"], np.concatenate([[0], np.cumsum(counts)]))


def dequantised(got: dict[str, Array], name: str, values: Array, attributes: MoEAttributes) -> Array:
    """Codes times scale, after a look at both: the largest of a row meets the format's, all are within half a step.

    Of two codes, the second is as near to what the first left, in int8 in steps 254 times finer.
    """
    codes, scale = got[f"{name}_codes"], got[f"{name}_scale"].astype(np.float64)[:, None]
    largest = {"int8": 127, "fp8_e4m3": 448}[attributes.weight_format]
    values = values.astype(np.float64)
    np.testing.assert_allclose(scale[:, 0] * largest, np.abs(values).max(axis=1), rtol=1e-6)
    exact, total = values / scale, np.zeros(values.shape)
    for i, part in enumerate(codes.astype(np.float64).reshape(len(values), -1, values.shape[1]).swapaxes(0, 1)):
        unit = 254.0**-i if largest == 127 else 1.0
        # fp8 has 3 bits behind the point of a normal number, and steps of 2^-9 below 2^-6.
        left = np.maximum(np.abs(exact - total), 2.0**-6)
        step = unit if largest == 127 else np.exp2(np.floor(np.log2(left)) - 3)
        # GPUs divide float32 to 2 units in the last place, which is in the second code too.
        allowed = step / 2 * (1 + 1e-4) + np.abs(exact) * 2.0**-22
        assert (np.abs(part * unit - (exact - total)) <= allowed).all()
        total += part * unit
    return total * scale


def grouped(a: Array, offsets: Array, inputs: dict[str, Array], side: str, attributes: MoEAttributes) -> Array:
    """Each row's product with its expert's w_in or w_out, plus the bias, in float64."""
    w, scale, bias = inputs[f"w_{side}"], inputs.get(f"w_{side}_scale"), inputs.get(f"b_{side}")
    w = reference.dequantize(w, scale, attributes, columns=a.shape[1], dtype=np.float64)
    rows = [a[start:end] @ w[e].T for e, (start, end) in enumerate(pairwise(offsets))]
    if bias is not None:
        rows = [each + bias[e].astype(np.float64) for e, each in enumerate(rows)]
    return np.concatenate(rows)


ROUTINGS = list(product(CHOICES["scoring"], (True, False), (0.0, 0.7)))
ARITHMETIC = [
    MoEAttributes(
        top_k=3, glu=glu, activation=activation, scoring=scoring, renormalize=renormalize, capacity_factor=factor
    )
    for (glu, activation), (scoring, renormalize, factor) in zip(
        product(CHOICES["glu"], CHOICES["activation"]), cycle(ROUTINGS), strict=False
    )
]
ARITHMETIC += [MoEAttributes(top_k=3, **gate) for gate in OWN_GATES]
FORMATS = [
    ("dense", 0),
    ("int8", 0),
    ("int8", 16),
    ("int4", 0),
    ("int4", 32),
    ("int4", 8),
    ("fp8_e4m3", 0),
    ("fp8_e4m3", 64),
]
KEPT = ("fp8_e4m3", "int8")  # formats that can do without 8-bit x and hidden
# A step has a whole group, in int8 above 16 tokens and in int4 above 64 half of one; the last of each row is not full.
GROUPS_OF_128 = list(product([("int4", 128), ("int8", 128)], (1, 33, 65, 130)))
# T, E, K, D, I and whether one expert takes every token: ragged, odd, with more experts than tokens and fewer.
LOADS = [
    (257, 64, 8, 24, 17, False),
    (257, 3, 1, 75, 33, True),
    (100, 64, 2, 33, 40, True),
    (2, 64, 8, 40, 24, False),
]


class Case(NamedTuple):
    """A call on a GPU; `skewed` sends every token to expert 1 among others."""

    attributes: MoEAttributes
    T: int
    E: int
    D: int
    I: int
    dtype: Dtype
    bias: bool = False
    skewed: bool = False

    def inputs(self) -> dict[str, Array]:
        inputs = random_inputs(self.attributes, self.T, D=self.D, E=self.E, I=self.I, bias=self.bias)
        if self.skewed:
            inputs["router_logits"][:, 1] += 40
        return inputs

    def __str__(self) -> str:
        attributes = label(self.attributes)
        return f"{attributes}-T{self.T}-E{self.E}-D{self.D}-I{self.I}-{self.dtype}" + "-skewed" * self.skewed


def _stored(top_k: int, weight_format: Any, group_size: int = 0) -> MoEAttributes:
    return MoEAttributes(top_k=top_k, weight_format=weight_format, group_size=group_size)


def kept(top_k: int, weight_format: Any) -> MoEAttributes:
    """One of KEPT, with x and hidden as they are."""
    return MoEAttributes(top_k=top_k, weight_format=weight_format, keep_activations=True)


_LARGE = (700, 8, 2, 512, 768, False)
_DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16")
_WEIGHTS = ("dense", "fp8_e4m3", "int8", "int4")
# Checked stage by stage on a GPU; replayed by a CUDA graph; through PyTorch's operator. What benchmarks/compile_kernels.py
# compiles beforehand.
CHECKED = [
    *(Case(attributes, 33, 5, 50, 37, "float16", bias=True) for attributes in ARITHMETIC),
    *(Case(_stored(3, *f), T, 3, 75, 70, dtype) for f, T, dtype in product(FORMATS, (1, 16, 33, 65), _DTYPES)),
    *(Case(_stored(3, *f), T, 3, 160, 144, "bfloat16") for f, T in GROUPS_OF_128),
    *(Case(kept(3, f), T, 3, 75, 70, dtype) for f, T, dtype in product(KEPT, (33, 65), _DTYPES)),
    *(Case(kept(2, f), 700, 8, 512, 768, "bfloat16", bias=True) for f in KEPT),
    *(
        Case(_stored(K, weights), T, E, D, I, "bfloat16", bias=True, skewed=skewed)
        for weights, (T, E, K, D, I, skewed) in product(_WEIGHTS, [*LOADS, _LARGE])
    ),
]
REPLAYED = [Case(_stored(2, weights), T, 5, 256, 384, "bfloat16") for weights, T in product(_WEIGHTS, (1, 8, 40, 200))]
THROUGH_PYTORCH = [Case(_stored(2, *f), 40, 5, 64, 48, "bfloat16") for f in FORMATS]
