"""The PyTorch operator: eager against the NumPy definition, tracing without data, export to one gatework::MoE node."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe import onnx_op, reference, torch_op
from gatework.plugins.moe.spec import ATTRIBUTE_KINDS, MoEAttributes
from tests.plugins.moe_cases import TOKENS, Array, assert_close, attribute_grid, label, random_inputs

# float32 sums of up to 50 terms in another order; errors of meaning show at 1e-3 and more.
FLOAT32 = 3e-6
# The hidden vector and each expert's output are rounded to 8 or 11 bits before the float32 sum, the result once more.
NARROW = {torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}
FORMATS = {"dense": torch.float32, "fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}


def run(attributes: MoEAttributes, inputs: dict[str, Array]) -> Array:
    return torch_op.moe(attributes=attributes, **{k: torch.from_numpy(v) for k, v in inputs.items()}).numpy()


@pytest.mark.parametrize("attributes", attribute_grid(), ids=label)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_eager(attributes: MoEAttributes, bias: bool) -> None:
    for T in TOKENS:
        inputs = random_inputs(attributes, T, bias=bias)
        y = run(attributes, inputs)
        assert y.shape == (T, 24)
        if T:
            assert_close(y, reference.moe(attributes=attributes, **inputs), FLOAT32)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    attributes = MoEAttributes(top_k=3)
    inputs = {k: torch.from_numpy(v) for k, v in random_inputs(attributes, 33, bias=True).items()}
    narrow = {k: v if k == "router_logits" else v.to(dtype) for k, v in inputs.items()}
    y = torch_op.moe(attributes=attributes, **narrow)
    assert y.dtype == dtype
    want = reference.moe(attributes=attributes, **{k: v.float().numpy() for k, v in narrow.items()})
    assert_close(y.float().numpy(), want, NARROW[dtype])


@pytest.mark.parametrize("attributes", attribute_grid(activation="silu", glu="none"), ids=label)
def test_routing_is_exact_with_ties(attributes: MoEAttributes) -> None:
    logits = np.round(random_inputs(attributes, 257, E=64)["router_logits"])
    logits[0] = 0
    indices, weights = torch_op.route(torch.from_numpy(logits), attributes)
    want_indices, want_weights = reference.route(logits, attributes)
    np.testing.assert_array_equal(indices.numpy(), want_indices)
    np.testing.assert_array_equal(weights.numpy() == 0, want_weights == 0)
    assert_close(weights.numpy(), want_weights, FLOAT32)


def test_one_expert_takes_all_and_others_none() -> None:
    attributes = MoEAttributes(top_k=1)
    inputs = random_inputs(attributes, 33)
    inputs["router_logits"][:, 2] = 50
    assert_close(run(attributes, inputs), reference.moe(attributes=attributes, **inputs), FLOAT32)


def test_equal_inputs_give_equal_bits() -> None:
    attributes = MoEAttributes(top_k=3)
    inputs = random_inputs(attributes, 257, E=16)
    np.testing.assert_array_equal(run(attributes, inputs), run(attributes, inputs))


@pytest.mark.parametrize("bias", [False, True])
def test_operator_contract(bias: bool) -> None:
    attributes = MoEAttributes(top_k=3, capacity_factor=1.0)
    inputs = {k: torch.from_numpy(v) for k, v in random_inputs(attributes, 7, bias=bias).items()}
    args = [inputs.get(name) for name in ("x", "router_logits", "w_in", "w_out", "b_in", "b_out")]
    torch.library.opcheck(torch.ops.gatework.moe.default, (*args, None, None), attributes.to_dict())


def test_unfit_inputs_are_refused() -> None:
    attributes = MoEAttributes(top_k=3)
    inputs = random_inputs(attributes, 7)
    with pytest.raises(GateworkError, match="w_out has the wrong shape"):
        run(attributes, inputs | {"w_out": inputs["w_out"].transpose(0, 2, 1)})
    int8 = MoEAttributes(top_k=3, weight_format="int8")
    with pytest.raises(GateworkError, match="dense weights only; got weight_format int8"):
        run(int8, random_inputs(int8, 7))


class Block(nn.Module):
    """A residual MoE layer over [B, S, D], with the parameters that its attributes call for."""

    def __init__(self, attributes: MoEAttributes, *, bias: bool = False) -> None:
        super().__init__()
        E, I, D = 5, 17, 24
        rows, dtype = attributes.w_in_rows(I), FORMATS[attributes.weight_format]
        self.attributes = attributes
        self.router = self.parameter(E, D)
        self.w_in = self.parameter(E, rows, attributes.stored_columns(D), dtype=dtype)
        self.w_out = self.parameter(E, D, attributes.stored_columns(I), dtype=dtype)
        quantised = attributes.weight_format != "dense"
        self.w_in_scale = self.parameter(E, rows, attributes.groups(D)) if quantised else None
        self.w_out_scale = self.parameter(E, D, attributes.groups(I)) if quantised else None
        self.b_in, self.b_out = (self.parameter(E, rows), self.parameter(E, D)) if bias else (None, None)

    @staticmethod
    def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        extra = {name: getattr(self, name) for name in ("b_in", "b_out", "w_in_scale", "w_out_scale")}
        y = torch_op.moe(tokens, tokens @ self.router.T, self.w_in, self.w_out, self.attributes, **extra)
        return x + y.view_as(x)


def export(block: nn.Module, x: Tensor) -> ir.Model:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    batch, seq = torch.export.Dim("batch", max=64), torch.export.Dim("seq", max=64)
    program = torch.onnx.export(
        block,
        (x,),
        dynamo=True,
        opset_version=24,
        optimize=False,
        verbose=False,
        input_names=["x"],
        output_names=["y"],
        dynamic_shapes=({0: batch, 1: seq},),
        custom_translation_table=torch_op.onnx_translation(),
    )
    assert program is not None
    return program.model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_export_without_weights(weight_format: Any, bias: bool) -> None:
    """All on the meta device: one node, its inputs by position, every attribute set, no data needed."""
    attributes = MoEAttributes(
        top_k=3,
        scoring="sigmoid",
        renormalize=False,
        activation="gelu_tanh",
        glu="three_way",
        weight_format=weight_format,
        group_size=0 if weight_format == "dense" else 8,
        capacity_factor=1.1,
        min_capacity=4,
    )
    with torch.device("meta"):
        model = export(Block(attributes, bias=bias), torch.empty(2, 3, 24))
    nodes = [node for node in model.graph if node.domain == "gatework"]
    assert [node.op_type for node in nodes] == ["MoE"]
    values = {name: attribute.value for name, attribute in nodes[0].attributes.items()}
    assert set(values) == set(ATTRIBUTE_KINDS)
    assert {name: attribute.type.name for name, attribute in nodes[0].attributes.items()} == ATTRIBUTE_KINDS
    assert MoEAttributes.from_onnx(values) == attributes
    names = [None if value is None else value.name for value in nodes[0].inputs]
    expected = onnx_op.node_inputs(attributes, has_bias=bias)
    assert len(names) == len(expected)
    assert names[2:] == [None if name.startswith("b_") and not bias else name for name in expected[2:]]
    assert model.opset_imports == {"": 24, "gatework": 1}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_exported_model_runs_on_onnxruntime() -> None:
    attributes = MoEAttributes(top_k=3)
    torch.manual_seed(0)
    block = Block(attributes)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape) / 4
    model = export(block, torch.randn(2, 3, 24))
    body = ir.serde.deserialize_function(onnx_op.function_proto(attributes))
    model.functions[body.identifier()] = body
    session = onnxruntime.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = torch.randn(3, 7, 24)
    assert_close(session.run(["y"], {"x": x.numpy()})[0], block(x).numpy(), FLOAT32)
