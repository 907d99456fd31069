"""Schema and function body of `gatework::MoE`, the latter run by stock ONNX Runtime and onnx.reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe import onnx_op, reference
from gatework.plugins.moe.spec import ATTRIBUTE_KINDS, INPUTS, MoEAttributes
from tests.plugins.moe_cases import TOKENS, Array, assert_close, attribute_grid, gshard_grid, label, random_inputs

# Everything in float32, sums of up to 50 terms in another order; errors of meaning show at 1e-3 and more.
FLOAT32 = 3e-6
# y is rounded once to 8 (bfloat16) or 11 (float16) bits; half a unit in the last place, plus the float32 error.
NARROW = {"bfloat16": 2**-8, "float16": 2**-11}
QUANTISED = [
    MoEAttributes(top_k=3, weight_format=weight_format, group_size=group_size, glu=glu)
    for weight_format in ("fp8_e4m3", "int8", "int4")
    for group_size in (0, 8)
    for glu in ("none", "two_way", "three_way")
]


def build(
    attributes: MoEAttributes, inputs: dict[str, Array], *, opset: int = 24, dtype: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    """One MoE node with its function body. x and y are float32 at the model's edge and `dtype` at the node."""
    onnx_op.register_schema()
    has_bias = "b_in" in inputs
    names = [name if name in inputs else "" for name in onnx_op.node_inputs(attributes, has_bias=has_bias)]
    node = helper.make_node("MoE", ["x_cast", *names[1:]], ["y_cast"], domain="gatework", **attributes.to_onnx())
    casts = [helper.make_node("Cast", ["x"], ["x_cast"], to=dtype), helper.make_node("Cast", ["y_cast"], ["y"], to=1)]
    types = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in inputs.items()}
    shapes = {name: list(value.shape) for name, value in inputs.items()}
    shapes["x"][0] = shapes["router_logits"][0] = "T"
    graph = helper.make_graph(
        [casts[0], node, casts[1]],
        "moe",
        [helper.make_tensor_value_info(name, types[name], shapes[name]) for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes["x"])],
    )
    body = onnx_op.function_proto(attributes, opset=opset, has_bias=has_bias)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("gatework", 1)]
    model = helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return model


def run_onnxruntime(model: onnx.ModelProto, inputs: dict[str, Array]) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            value if value.dtype.kind != "V" else value.view(f"u{value.itemsize}"),
            helper.np_dtype_to_tensor_dtype(value.dtype),
        )
        for name, value in inputs.items()
    }
    return session.run_with_ort_values(["y"], feeds)[0].numpy()


def run_onnx_reference(model: onnx.ModelProto, inputs: dict[str, Array]) -> Array:
    return ReferenceEvaluator(model).run(["y"], inputs)[0]


RUNTIMES = [pytest.param(run_onnxruntime, id="onnxruntime"), pytest.param(run_onnx_reference, id="onnx.reference")]


@pytest.mark.parametrize("run", RUNTIMES)
@pytest.mark.parametrize("attributes", [*attribute_grid(), *gshard_grid()], ids=label)
def test_function_body(attributes: MoEAttributes, run: Any) -> None:
    model = build(attributes, random_inputs(attributes, 7))
    for T in TOKENS:
        inputs = random_inputs(attributes, T)
        y = run(model, inputs)
        assert y.shape == (T, 24)
        if T:
            assert_close(y, reference.moe(attributes=attributes, **inputs), FLOAT32)


@pytest.mark.parametrize("run", RUNTIMES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("attributes", QUANTISED, ids=label)
def test_quantised_weights(attributes: MoEAttributes, bias: bool, run: Any) -> None:
    """17 columns of w_out: an odd number of int4, and a last group of one."""
    inputs = random_inputs(attributes, 7, bias=bias)
    assert_close(run(build(attributes, inputs), inputs), reference.moe(attributes=attributes, **inputs), FLOAT32)


@pytest.mark.parametrize("run", RUNTIMES)
@pytest.mark.parametrize("glu", ["none", "two_way", "three_way"])
def test_biases(glu: Any, run: Any) -> None:
    attributes = MoEAttributes(top_k=3, glu=glu, activation="relu")
    inputs = random_inputs(attributes, 33, bias=True)
    assert_close(run(build(attributes, inputs), inputs), reference.moe(attributes=attributes, **inputs), FLOAT32)


@pytest.mark.parametrize("run", RUNTIMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_activations(dtype: str, run: Any) -> None:
    """bfloat16 and float16 experts and activations: computed in float32, rounded at the end."""
    attributes, numpy_dtype = MoEAttributes(top_k=3), np.dtype(getattr(ml_dtypes, dtype, dtype))
    inputs = random_inputs(attributes, 33, bias=True)
    inputs |= {name: inputs[name].astype(numpy_dtype) for name in ("w_in", "w_out", "b_in", "b_out")}
    inputs["x"] = inputs["x"].astype(numpy_dtype).astype(np.float32)
    model = build(attributes, inputs, dtype=helper.np_dtype_to_tensor_dtype(numpy_dtype))
    y = run(model, inputs)
    np.testing.assert_array_equal(y, y.astype(numpy_dtype).astype(np.float32))
    assert_close(y, reference.moe(attributes=attributes, **inputs), NARROW[dtype])


@pytest.mark.parametrize("run", RUNTIMES)
@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
def test_ties_go_to_the_lowest_index(capacity_factor: float, run: Any) -> None:
    attributes = MoEAttributes(top_k=3, capacity_factor=capacity_factor)
    inputs = random_inputs(attributes, 7)
    inputs["router_logits"] = np.round(inputs["router_logits"] / 2)
    inputs["router_logits"][0] = 0
    assert_close(run(build(attributes, inputs), inputs), reference.moe(attributes=attributes, **inputs), FLOAT32)


@pytest.mark.parametrize("run", RUNTIMES)
def test_saturated_sigmoid(run: Any) -> None:
    """Chosen by logit where the float32 scores tie at 1, and no NaN where they are all 0."""
    attributes = MoEAttributes(top_k=2, scoring="sigmoid")
    inputs = random_inputs(attributes, 2)
    inputs["router_logits"] = np.array([[20, 30, 25, 18, 40], [-300, -200, -250, -400, -150]], np.float32)
    assert_close(run(build(attributes, inputs), inputs), reference.moe(attributes=attributes, **inputs), FLOAT32)


@pytest.mark.parametrize("opset", [19, 24, 25, 26])
def test_other_opsets(opset: int) -> None:
    attributes = MoEAttributes(top_k=3, weight_format="int4", group_size=8, capacity_factor=1.0)
    inputs = random_inputs(attributes, 7)
    model = build(attributes, inputs, opset=opset)
    assert_close(run_onnxruntime(model, inputs), reference.moe(attributes=attributes, **inputs), FLOAT32)


def test_body_uses_standard_operators_only() -> None:
    for attributes in [*attribute_grid(), *QUANTISED]:
        body = onnx_op.function_proto(attributes)
        assert [(opset.domain, opset.version) for opset in body.opset_import] == [("", 24)]
        assert not {node.domain for node in body.node} - {""}
        values = {a.name: helper.get_attribute_value(a) for a in body.attribute_proto}
        assert MoEAttributes.from_onnx(values) == attributes


def test_old_opset_is_refused() -> None:
    with pytest.raises(GateworkError, match="got 18; expected at least 19"):
        onnx_op.function_proto(MoEAttributes(top_k=1), opset=18)


def test_schema() -> None:
    onnx_op.register_schema()
    onnx_op.register_schema()  # once more does no harm
    schema = onnx.defs.get_schema("MoE", 1, "gatework")
    assert tuple(parameter.name for parameter in schema.inputs) == INPUTS
    assert (schema.min_input, schema.max_input) == (4, 8)
    kinds = {name: attribute.type.name for name, attribute in schema.attributes.items()}
    assert kinds == ATTRIBUTE_KINDS
    assert [name for name, attribute in schema.attributes.items() if attribute.required] == ["top_k"]
    defaults = {n: helper.get_attribute_value(a.default_value) for n, a in schema.attributes.items() if not a.required}
    assert MoEAttributes.from_onnx({"top_k": 2} | defaults) == MoEAttributes(top_k=2)


def test_shape_inference_and_checker() -> None:
    """Without a function body, as the graph is when a lowering pass sees it."""
    onnx_op.register_schema()
    value = partial(helper.make_tensor_value_info, elem_type=TensorProto.BFLOAT16)
    logits = helper.make_tensor_value_info("r", TensorProto.FLOAT, ["T", 5])
    inputs = [value("x", shape=["T", 24]), logits, value("a", shape=[5, 34, 24]), value("b", shape=[5, 24, 17])]
    node = helper.make_node("MoE", ["x", "r", "a", "b"], ["h"], domain="gatework", top_k=3)
    tail = helper.make_node("Identity", ["h"], ["y"])
    graph = helper.make_graph([node, tail], "g", inputs, [value("y", shape=["T", 24])])
    imports = [helper.make_opsetid("", 24), helper.make_opsetid("gatework", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=11)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    h = next(info.type.tensor_type for info in inferred.graph.value_info if info.name == "h")
    assert h.elem_type == TensorProto.BFLOAT16
    assert [d.dim_param or d.dim_value for d in h.shape.dim] == ["T", 24]
    node.attribute.append(helper.make_attribute("topk", 2))
    graph = helper.make_graph([node, tail], "g", inputs, [value("y", shape=["T", 24])])
    model = helper.make_model(graph, opset_imports=imports, ir_version=11)
    with pytest.raises(onnx.checker.ValidationError, match="topk"):
        onnx.checker.check_model(model)
