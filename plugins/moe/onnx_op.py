"""`gatework::MoE` in ONNX: its schema, and its definition as a function body in standard operators.

With the body attached to a model, any ONNX runtime executes the operator with no Gatework code. The body evaluates
every expert for every token and adds up with weights that are 0 for the experts not chosen: correct, static in shape,
and E / K times the necessary work. Engines replace the node by kernels that skip.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceContext

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.reference import TINY
from gatework.plugins.moe.spec import (
    ATTRIBUTE_KINDS,
    CHOICES,
    DOMAIN,
    INPUTS,
    OP_TYPE,
    REQUIRED_INPUTS,
    VERSION,
    MoEAttributes,
)

__all__ = ["DOMAIN", "OP_TYPE", "VERSION", "function_proto", "node_inputs", "register_schema", "schema"]

MIN_OPSET = 19  # Cast from float8
FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
WEIGHTS = [*FLOATS, "tensor(float8e4m3fn)", "tensor(int8)", "tensor(uint8)"]
DOC = """
Mixture of experts: y[t] = sum over the K chosen experts e of weight[t, e] * expert_e(x[t]).
The experts of the K largest router logits are chosen (equal logits: the lower index first) and weighted by their score,
computed over all E experts in float32; with renormalize the K weights are divided by their sum. An expert is
w_out h + b_out with u = w_in x + b_in and, by glu, none: h = act(u); two_way: gate | up = u, h = act(gate) * up;
three_way: a | b | up = u, h = a * act(b) * up. Two-way silu gates are h = g sigmoid(alpha g) * (v + beta), where g is gate,
at most limit, and v is up, between -limit and limit; limit 0: none. Quantised weights are w = q * scale, one scale per
group_size neighbours along the last axis (0: per row); int4 is stored as q + 8, two to a uint8, low nibble first.
capacity_factor > 0 limits an expert to floor(K * capacity_factor * T / E) choices, plus one if odd, at least min_capacity:
first choices in token order, then second choices, and so on; a choice beyond the limit contributes 0. With
capacity_rule gshard the limit is floor(capacity_factor * T / E), at most T and at least min_capacity, second choices whose
weight is at most second_threshold are dropped, and the others stand behind the first choices that were kept.
keep_activations changes nothing here: it forbids kernels to round x and h to 8 bits where the weights have 8 bits.
"""


def schema() -> OpSchema:
    """Schema of version 1, with shape inference: y has the type and shape of x."""
    described = {
        "x": ("T", "[T, D]"),
        "router_logits": ("tensor(float)", "[T, E]"),
        "w_in": ("W", "[E, G*I, D], last axis halved for int4"),
        "w_out": ("W", "[E, D, I], last axis halved for int4"),
        "b_in": ("T", "[E, G*I]"),
        "b_out": ("T", "[E, D]"),
        "w_in_scale": ("tensor(float)", "[E, G*I, groups of D]"),
        "w_out_scale": ("tensor(float)", "[E, D, groups of I]"),
    }
    option = OpSchema.FormalParameterOption
    options = [option.Single] * REQUIRED_INPUTS + [option.Optional] * (len(INPUTS) - REQUIRED_INPUTS)
    parameters = [
        OpSchema.FormalParameter(name, *described[name], param_option=kind)
        for name, kind in zip(INPUTS, options, strict=True)
    ]
    defaults = MoEAttributes(top_k=1).to_onnx()
    attributes = [OpSchema.Attribute("top_k", OpSchema.AttrType.INT, "experts per token", required=True)]
    attributes += [
        OpSchema.Attribute(name, helper.make_attribute(name, defaults[name]), " or ".join(CHOICES.get(name, ())))
        for name in ATTRIBUTE_KINDS
        if name != "top_k"
    ]
    result = OpSchema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        DOC,
        inputs=parameters,
        outputs=[OpSchema.FormalParameter("y", "T", "[T, D]")],
        type_constraints=[("T", FLOATS, "activations and biases"), ("W", WEIGHTS, "stored weights")],
        attributes=attributes,
    )
    result.set_type_and_shape_inference_function(_infer)
    return result


def _infer(context: InferenceContext) -> None:
    if (x := context.get_input_type(0)) is not None:
        context.set_output_type(0, x)


def register_schema() -> None:
    """Make onnx (checker, shape inference, exporter) know the operator; further calls do nothing."""
    if not onnx.defs.has(OP_TYPE, VERSION, DOMAIN):
        onnx.defs.register_schema(schema())


def node_inputs(attributes: MoEAttributes, *, has_bias: bool = False) -> tuple[str, ...]:
    """The inputs that a node has, in order; onnx.reference wants as many on the node as on the function."""
    if attributes.weight_format != "dense":
        return INPUTS
    return INPUTS[: INPUTS.index("w_in_scale" if has_bias else "b_in")]


def function_proto(attributes: MoEAttributes, *, opset: int = 24, has_bias: bool = False) -> onnx.FunctionProto:
    """The operator's definition in standard operators, for nodes that carry exactly these attributes.

    A body cannot branch on strings, so it is specialised: the attributes are declared with these values as defaults and
    the body does not read a node's own. Its inputs are those of `node_inputs`: b_in and b_out both or, without
    `has_bias`, neither. Everything is computed in float32 and y is rounded to x's dtype once.
    """
    if opset < MIN_OPSET:
        raise GateworkError("opset is too old for the MoE function body", got=opset, expected=f"at least {MIN_OPSET}")
    body = _Body()
    gates = _gates(body, attributes)  # [T, E]
    w_in = _weights(body, "w_in", attributes)  # [E, G*I, D]
    w_out = _weights(body, "w_out", attributes)  # [E, D, I]
    # Tokens go last: [rows, D] x [D, T] needs no transposed copy of a weight, only of x and y.
    columns = body("Transpose", body.float32("x"), perm=[1, 0])  # [D, T]
    u = body("MatMul", w_in, columns)  # [E, G*I, T]
    if has_bias:
        u = body("Add", u, body.unsqueeze(body.float32("b_in"), 2))
    y = body("MatMul", w_out, _expert_activation(body, u, attributes))  # [E, D, T]
    if has_bias:
        y = body("Add", y, body.unsqueeze(body.float32("b_out"), 2))
    weighted = body("Mul", y, body.unsqueeze(body("Transpose", gates, perm=[1, 0]), 1))
    total = body("ReduceSum", weighted, body.constant([0]), keepdims=0)  # [D, T]
    body("CastLike", body("Transpose", total, perm=[1, 0]), "x", output="y")
    return helper.make_function(
        DOMAIN,
        OP_TYPE,
        node_inputs(attributes, has_bias=has_bias),
        ["y"],
        body.nodes,
        [helper.make_opsetid("", opset)],
        attribute_protos=[helper.make_attribute(name, value) for name, value in attributes.to_onnx().items()],
        doc_string=DOC,
    )


class _Body:
    """Collects nodes; each call appends one and returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.names = (f"v{i}" for i in itertools.count())

    def __call__(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or next(self.names)
        self.nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def split(self, value: str, count: int, axis: int) -> list[str]:
        outputs = [next(self.names) for _ in range(count)]
        self.nodes.append(helper.make_node("Split", [value], outputs, axis=axis, num_outputs=count))
        return outputs

    def top_k_indices(self, value: str, k: int) -> str:
        """Indices of the k largest along the last axis, largest first; ONNX puts the lower index first among equals."""
        indices = next(self.names)
        self.nodes.append(helper.make_node("TopK", [value, self.constant([k])], [next(self.names), indices]))
        return indices

    def constant(self, value: Any, dtype: type[np.generic] = np.int64) -> str:
        return self("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))

    def float32(self, value: str) -> str:
        return self("Cast", value, to=onnx.TensorProto.FLOAT)

    def unsqueeze(self, value: str, axis: int) -> str:
        return self("Unsqueeze", value, self.constant([axis]))

    def first_columns(self, value: str, columns: str) -> str:
        """[E, rows, blocks, block] to [E, rows, columns]: the blocks side by side, cut to `columns` elements."""
        flat = self("Reshape", value, self.constant([0, 0, -1]))
        return self("Slice", flat, self.constant([0]), columns, self.constant([2]))

    def size(self, value: str, axis: int) -> str:
        """One dimension, as a tensor [1]."""
        return self("Shape", value, start=axis, end=axis + 1)


def _gates(body: _Body, attributes: MoEAttributes) -> str:
    """[T, E] float32: each token's weight for each expert, 0 where not chosen or dropped."""
    scoring = {"softmax": "Softmax", "sigmoid": "Sigmoid"}[attributes.scoring]
    scores = body(scoring, "router_logits")  # [T, E]
    chosen = body.top_k_indices("router_logits", attributes.top_k)  # [T, K]
    off_on = body.constant([0, 1], np.float32)
    E = body("Squeeze", body.size("router_logits", 1))
    hot = body("OneHot", chosen, E, off_on)  # [T, K, E]
    gates = body("Mul", scores, body("ReduceSum", hot, body.constant([1]), keepdims=0))
    if attributes.renormalize:
        total = body("ReduceSum", gates, body.constant([1]))
        gates = body("Div", gates, body("Max", total, body.constant(TINY, np.float32)))
    if attributes.capacity_factor > 0:
        kept = (
            _kept_gshard(body, hot, gates, attributes)
            if attributes.capacity_rule == "gshard"
            else _kept(body, hot, attributes)
        )
        gates = body("Mul", gates, kept)
    return gates


def _kept(body: _Body, hot: str, attributes: MoEAttributes) -> str:
    """[T, E] float32: 1 where a token's choice found a free slot. Slots are numbered as in `reference.kept`."""
    earlier_tokens = body("CumSum", hot, body.constant(0), exclusive=1)  # [T, K, E]
    all_tokens = body("ReduceSum", hot, body.constant([0]))  # [1, K, E]
    earlier_choices = body("CumSum", all_tokens, body.constant(1), exclusive=1)
    slots = body("Add", earlier_tokens, earlier_choices)
    free = body.float32(body("Less", slots, _capacity(body, attributes)))
    return body("ReduceSum", body("Mul", hot, free), body.constant([1]), keepdims=0)


def _kept_gshard(body: _Body, hot: str, gates: str, attributes: MoEAttributes) -> str:
    """The same by `reference.kept_gshard`; gates [T, E]: weights of both choices."""
    capacity, last = _capacity(body, attributes), body.constant([1])
    first, second = (body("Squeeze", choice, last) for choice in body.split(hot, 2, 1))  # [T, E]

    def free(chosen: str, taken: str | None) -> str:
        slots = body("CumSum", chosen, body.constant(0), exclusive=1)
        if taken is not None:
            slots = body("Add", slots, body("ReduceSum", taken, body.constant([0])))
        return body("Mul", chosen, body.float32(body("Less", slots, capacity)))

    first = free(first, None)
    threshold = body.constant(attributes.second_threshold, np.float32)
    second = body("Mul", second, body.float32(body("Greater", gates, threshold)))
    return body("Add", first, free(second, first))


def _capacity(body: _Body, attributes: MoEAttributes) -> str:
    """`MoEAttributes.capacity` as a float32 tensor [1], through the same float64 operations."""
    double, gshard = onnx.TensorProto.DOUBLE, attributes.capacity_rule == "gshard"
    T, E = (body("Cast", body.size("router_logits", axis), to=double) for axis in (0, 1))
    per_token = attributes.capacity_factor * (1 if gshard else attributes.top_k)
    scaled = body("Mul", body.constant(per_token, np.float64), T)
    slots = body("Cast", body("Floor", body("Div", scaled, E)), to=onnx.TensorProto.INT64)
    if gshard:
        slots = body("Min", slots, body.size("router_logits", 0))
        return body.float32(body("Max", slots, body.constant(attributes.min_capacity)))
    even = body("Add", slots, body("Mod", slots, body.constant(2)))
    return body.float32(body("Max", even, body.constant(attributes.min_capacity)))


def _weights(body: _Body, name: str, attributes: MoEAttributes) -> str:
    """w_in [E, G*I, D] or w_out [E, D, I] in float32; see `reference.dequantize`."""
    if attributes.weight_format == "dense":
        return body.float32(name)
    columns = body.size("x", 1)
    if name == "w_out":
        columns = body("Div", body.size("w_in", 1), body.constant([attributes.matrices]))
    w, scale = name, f"{name}_scale"
    if attributes.weight_format == "int4":
        low = body("BitwiseAnd", w, body.constant(15, np.uint8))
        high = body("BitShift", w, body.constant(4, np.uint8), direction="RIGHT")
        pairs = body("Concat", body.unsqueeze(low, 3), body.unsqueeze(high, 3), axis=3)
        w = body("Sub", body.float32(body.first_columns(pairs, columns)), body.constant(8, np.float32))
    else:
        w = body.float32(w)
    if attributes.group_size:
        repeated = body("Expand", body.unsqueeze(scale, 3), body.constant([1, 1, 1, attributes.group_size]))
        scale = body.first_columns(repeated, columns)
    return body("Mul", w, scale)


def _expert_activation(body: _Body, u: str, attributes: MoEAttributes) -> str:
    """h [E, I, T] from u [E, G*I, T]."""
    activation = ACTIVATIONS[attributes.activation]
    if attributes.glu == "none":
        return activation(body, u)
    *a, gate, up = body.split(u, attributes.matrices, axis=1)
    if attributes.has_own_gates:
        return _own_gates(body, gate, up, attributes)
    h = activation(body, gate)
    if a:
        h = body("Mul", a[0], h)
    return body("Mul", h, up)


def _own_gates(body: _Body, gate: str, up: str, attributes: MoEAttributes) -> str:
    """See `reference.clamped_gate`."""
    alpha, beta, limit = (body.constant(getattr(attributes, name), np.float32) for name in ("alpha", "beta", "limit"))
    if attributes.limit:
        gate, up = body("Min", gate, limit), body("Clip", up, body("Neg", limit), limit)
    h = body("Mul", gate, body("Sigmoid", body("Mul", alpha, gate)))
    return body("Mul", h, body("Add", up, beta))


# Swish and Gelu are functions themselves: onnx.reference cannot run Gelu inside a function, nor ONNX Runtime Swish in a
# model of opset 25. Runtimes fuse these patterns.
def _silu(body: _Body, z: str) -> str:
    return body("Mul", z, body("Sigmoid", z))


def _relu(body: _Body, z: str) -> str:
    return body("Relu", z)


def _gelu(body: _Body, z: str) -> str:
    phi = body("Erf", body("Div", z, body.constant(math.sqrt(2), np.float32)))
    return _half_times_one_plus(body, z, phi)


def _gelu_tanh(body: _Body, z: str) -> str:
    cube = body("Mul", body("Pow", z, body.constant(3, np.float32)), body.constant(0.044715, np.float32))
    scaled = body("Mul", body("Add", z, cube), body.constant(math.sqrt(2 / math.pi), np.float32))
    return _half_times_one_plus(body, z, body("Tanh", scaled))


def _half_times_one_plus(body: _Body, z: str, value: str) -> str:
    product = body("Mul", z, body("Add", value, body.constant(1, np.float32)))
    return body("Mul", product, body.constant(0.5, np.float32))


ACTIVATIONS: dict[str, Callable[[_Body, str], str]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
}
