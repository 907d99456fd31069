"""The identity of `gatework::MoE` and what its settings and tensor shapes may be; no framework needed.

Letters: T tokens, D hidden, E experts, K experts per token, I expert width, G = 1, 2 or 3 matrices that an expert
applies to its input (`glu` none, two_way, three_way).

    x              [T, D]        float32, float16 or bfloat16
    router_logits  [T, E]        float32
    w_in           [E, G*I, D]   x's dtype, or int8, uint8 (two int4), float8_e4m3fn
    w_out          [E, D, I]     same dtype as w_in
    b_in, b_out    [E, G*I], [E, D]   optional, x's dtype
    w_in_scale     [E, G*I, groups of D]   float32, only with quantised weights
    w_out_scale    [E, D, groups of I]     float32, only with quantised weights
    y              [T, D]        x's dtype
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

from gatework.plugins.errors import GateworkError

DOMAIN = "gatework"
OP_TYPE = "MoE"
VERSION = 1

Scoring = Literal["softmax", "sigmoid"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Glu = Literal["none", "two_way", "three_way"]
WeightFormat = Literal["dense", "fp8_e4m3", "int8", "int4"]
CapacityRule = Literal["choices", "gshard"]

CHOICES: dict[str, tuple[str, ...]] = {
    "scoring": get_args(Scoring),
    "activation": get_args(Activation),
    "glu": get_args(Glu),
    "weight_format": get_args(WeightFormat),
    "capacity_rule": get_args(CapacityRule),
}
GLU_MATRICES: dict[str, int] = {"none": 1, "two_way": 2, "three_way": 3}
ATTRIBUTE_KINDS: dict[str, Literal["INT", "FLOAT", "STRING"]] = {
    "top_k": "INT",
    "scoring": "STRING",
    "renormalize": "INT",
    "activation": "STRING",
    "glu": "STRING",
    "weight_format": "STRING",
    "group_size": "INT",
    "capacity_factor": "FLOAT",
    "min_capacity": "INT",
    "alpha": "FLOAT",
    "beta": "FLOAT",
    "limit": "FLOAT",
    "capacity_rule": "STRING",
    "second_threshold": "FLOAT",
    "keep_activations": "INT",
}
FLAGS = ("renormalize", "keep_activations")
EIGHT_BITS = ("fp8_e4m3", "int8")
INPUTS = ("x", "router_logits", "w_in", "w_out", "b_in", "b_out", "w_in_scale", "w_out_scale")
REQUIRED_INPUTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEAttributes:
    """Settings of one MoE node.

    top_k: experts per token, K.
    scoring: how router logits become scores, over all E experts.
    renormalize: the K chosen scores are divided by their sum.
    activation: silu, gelu (with erf), gelu_tanh or relu.
    glu: none: h = act(p); two_way: h = act(gate) * up; three_way: h = a * act(b) * up, with gate = a | b twice as wide.
    weight_format: how w_in and w_out are stored.
    group_size: weights along the contraction axis that share one scale (the last group may be short); 0: the whole row.
    capacity_factor: 0: no token is dropped; else an expert serves at most `capacity(T, E)` choices. Kept as a float32.
    min_capacity: lower bound of that number; unused when capacity_factor is 0.
    alpha, beta, limit: of two_way silu gates alone: h = g sigmoid(alpha g) * (u + beta), with g = min(gate, limit) and
        u = up between -limit and limit; limit 0: as they are. Kept as float32.
    capacity_rule: choices: slots are counted over all choices, dropped or not; gshard: see `reference.kept_gshard`.
    second_threshold: for gshard: a second choice counts where its weight is above it; below 0 always, from 1 on never. Kept as
        a float32.
    keep_activations: for weights of 8 bits with one scale per row: their products take activations in x's type however many
        tokens there are. Otherwise kernels may round activations to 8 bits, which the definition never does.
    """

    top_k: int
    scoring: Scoring = "softmax"
    renormalize: bool = True
    activation: Activation = "silu"
    glu: Glu = "two_way"
    weight_format: WeightFormat = "dense"
    group_size: int = 0
    capacity_factor: float = 0.0
    min_capacity: int = 0
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = 0.0
    capacity_rule: CapacityRule = "choices"
    second_threshold: float = -1.0
    keep_activations: bool = False

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("group_size", 0), ("min_capacity", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise GateworkError(f"MoE {name} is out of range", got=repr(value), expected=f"an integer >= {least}")
        for name in FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise GateworkError(f"MoE {name} is not a bool", got=repr(value), expected="True or False")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise GateworkError(f"unknown MoE {name}", got=repr(getattr(self, name)), expected=" or ".join(known))
        if self.weight_format == "dense" and self.group_size:
            raise GateworkError("MoE group_size needs quantised weights", got=self.group_size, expected="0 if dense")
        if self.keep_activations and (self.weight_format not in EIGHT_BITS or self.group_size):
            got = self.weight_format + (f" in groups of {self.group_size}" if self.group_size else "")
            raise GateworkError("MoE keep_activations is for rows of 8 bits", got=got, expected=" or ".join(EIGHT_BITS))
        factor = self.capacity_factor
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < 1e6:
            raise GateworkError("MoE capacity_factor is out of range", got=repr(factor), expected="0 (dropless) to 1e6")
        object.__setattr__(self, "capacity_factor", _as_float32(factor))
        self._check_gates()
        self._check_rule()

    def _check_gates(self) -> None:
        for name in ("alpha", "beta", "limit"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
                raise GateworkError(f"MoE {name} is out of range", got=repr(value), expected="0 to 1e6")
            object.__setattr__(self, name, _as_float32(value))
        if self.has_own_gates and (self.activation, self.glu) != ("silu", "two_way"):
            got = f"{self.glu} {self.activation} gates"
            raise GateworkError("MoE alpha, beta and limit are of two_way silu gates", got=got)

    def _check_rule(self) -> None:
        threshold = self.second_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not -1 <= threshold <= 1:
            expected = "-1 (all second choices) to 1 (none)"
            raise GateworkError("MoE second_threshold is out of range", got=repr(threshold), expected=expected)
        object.__setattr__(self, "second_threshold", _as_float32(threshold))
        if self.capacity_rule == "gshard" and (self.top_k != 2 or self.capacity_factor == 0):
            got, expected = f"top {self.top_k}, capacity_factor {self.capacity_factor}", "top 2 and a capacity_factor"
            raise GateworkError("MoE capacity_rule gshard does not go with the rest", got=got, expected=expected)
        if self.capacity_rule != "gshard" and threshold != -1:
            raise GateworkError("MoE second_threshold is for capacity_rule gshard", got=threshold, expected="-1")

    @property
    def has_own_gates(self) -> bool:
        """Whether two-way gates are not plainly act(gate) * up."""
        return (self.alpha, self.beta, self.limit) != (1.0, 0.0, 0.0)

    @property
    def matrices(self) -> int:
        """G: how many I-row matrices w_in holds per expert."""
        return GLU_MATRICES[self.glu]

    def w_in_rows(self, expert_width: int) -> int:
        """Rows of w_in per expert: I; 2I, gate then up; or 3I, gate a, gate b, then up."""
        return self.matrices * expert_width

    def groups(self, columns: int) -> int:
        """Scales per weight row whose contraction axis has `columns` elements."""
        return 1 if self.group_size == 0 else -(-columns // self.group_size)

    def stored_columns(self, columns: int) -> int:
        """Elements that a stored weight row of `columns` weights has: int4 keeps two in one byte."""
        return -(-columns // 2) if self.weight_format == "int4" else columns

    def capacity(self, num_tokens: int, num_experts: int) -> int:
        """Choices that one expert serves: floor(K * factor * T / E), plus one if odd, at least min_capacity.

        For gshard floor(factor * T / E), at most T, and then at least min_capacity. In float64 and in this order of
        operations, so that every implementation gets the same number (OpenMoE's PyTorch port; its own setting is K 2, factor
        2.0, min_capacity 4; Mesh TensorFlow's minimum is 4 as well, its factor for evaluation 2.0).
        """
        assert self.capacity_factor > 0
        if self.capacity_rule == "gshard":
            return max(min(num_tokens, math.floor(self.capacity_factor * num_tokens / num_experts)), self.min_capacity)
        slots = math.floor(self.top_k * self.capacity_factor * num_tokens / num_experts)
        return max(slots + slots % 2, self.min_capacity)

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready form, inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoEAttributes:
        """Rebuild from `to_dict`'s form; fields left out take their defaults, unknown ones are a GateworkError."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise GateworkError("unknown MoE attribute", got=", ".join(unknown), expected=", ".join(sorted(known)))
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]:
            raise GateworkError("MoE attribute is missing", expected=", ".join(missing))
        return cls(**values)

    def to_onnx(self) -> dict[str, int | float | str]:
        """Values of the ONNX attributes, of the kinds in ATTRIBUTE_KINDS."""
        return self.to_dict() | {name: int(getattr(self, name)) for name in FLAGS}

    @classmethod
    def from_onnx(cls, values: Mapping[str, Any]) -> MoEAttributes:
        """Rebuild from ONNX attribute values (strings may be bytes); attributes left out take the schema's defaults."""
        plain = {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
        flags = {name: plain[name] for name in FLAGS if name in plain}
        for name, flag in flags.items():
            if flag not in (0, 1):
                raise GateworkError(f"MoE {name} is not a flag", got=repr(flag), expected="0 or 1")
        return cls.from_dict(plain | {name: bool(flag) for name, flag in flags.items()})


class MoESizes(NamedTuple):
    """Sizes of one call: tokens, hidden, experts, expert width."""

    T: int
    D: int
    E: int
    I: int


def check_shapes(attributes: MoEAttributes, shapes: Mapping[str, Sequence[int] | None]) -> MoESizes:
    """Sizes of a call from its inputs' shapes (by INPUTS name; an absent input is None or left out).

    Raises GateworkError, naming the input, when the shapes do not fit together or with the attributes.
    """
    given = {name: tuple(shape) for name, shape in shapes.items() if shape is not None}
    for name, rank in zip(INPUTS[:REQUIRED_INPUTS], (2, 2, 3, 3), strict=True):
        if len(given.get(name, ())) != rank:
            raise GateworkError(f"MoE input {name} has the wrong rank", got=given.get(name), expected=f"rank {rank}")
    T, D = given["x"]
    E, rows, _ = given["w_in"]
    if min(D, E, rows) < 1 or rows % attributes.matrices:
        raise GateworkError(
            "MoE input w_in has the wrong shape",
            got=given["w_in"],
            expected=f"[E, {attributes.matrices}*I, D] with glu {attributes.glu}",
        )
    I = rows // attributes.matrices
    if attributes.top_k > E:
        raise GateworkError("MoE top_k exceeds the number of experts", got=attributes.top_k, expected=f"1 to {E}")
    for name, expected in _expected_shapes(attributes, MoESizes(T, D, E, I)).items():
        if name in given and given[name] != expected:
            raise GateworkError(f"MoE input {name} has the wrong shape", got=given[name], expected=expected)
    quantised = attributes.weight_format != "dense"
    for name in ("w_in_scale", "w_out_scale"):
        if (name in given) != quantised:
            raise GateworkError(
                f"MoE input {name} does not go with weight_format {attributes.weight_format}",
                got="it" if name in given else "none",
                expected="a scale" if quantised else "none",
            )
    return MoESizes(T, D, E, I)


def _expected_shapes(attributes: MoEAttributes, sizes: MoESizes) -> dict[str, tuple[int, ...]]:
    T, D, E, I = sizes
    rows = attributes.w_in_rows(I)
    return {
        "router_logits": (T, E),
        "w_in": (E, rows, attributes.stored_columns(D)),
        "w_out": (E, D, attributes.stored_columns(I)),
        "b_in": (E, rows),
        "b_out": (E, D),
        "w_in_scale": (E, rows, attributes.groups(D)),
        "w_out_scale": (E, D, attributes.groups(I)),
    }


def _as_float32(value: float) -> float:
    """The value that an ONNX FLOAT attribute would hold."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
