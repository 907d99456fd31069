"""The passes to TensorRT's graph: each leaves what its docstring promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from gatework.export.config import ModelConfig, MoEConfig
from gatework.export.lower import lower_to_tensorrt
from gatework.export.lower.experts import attributes_of, experts_to_inputs, moe_nodes
from gatework.export.lower.graph import producer
from gatework.export.onnx_export import trace
from gatework.export.packing import is_weight, pack_of
from gatework.export.quantize import quantize_fp8, quantize_int8_rows
from gatework.export.weight_facts import weight_facts
from gatework.plugins.moe.spec import DOMAIN, INPUTS
from gatework.plugins.moe.tensorrt import NODE_ATTRIBUTES, input_names

DENSE = ModelConfig(
    family="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=40,  # no group size divides it
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=32,
)
TIED = replace(DENSE, tie_embeddings=True)
MOE = replace(DENSE, family="mixtral", moe=MoEConfig(num_experts=4, top_k=2))
QUANTISED = ("fp8", "int8", "int4")


@dataclass(frozen=True)
class FixedScales:
    """Scales that name what they were asked for."""

    smooth: Mapping[str, Sequence[float]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def activation(self, product: str, largest: float) -> float:
        self.asked.append(product)
        return 1 / largest

    def weight_absmax(self, weight: str, factors: Sequence[float] | None) -> float:
        return 2.0


@cache
def traced(config: ModelConfig) -> ir.Model:
    return trace(config, 32, dtype="bfloat16")


def lowered(config: ModelConfig, precision: Any, scales: FixedScales | None = None) -> ir.Model:
    group = 128 if precision == "int4" else 0
    return lower_to_tensorrt(traced(config).clone(), precision, group=group, scales=scales or FixedScales())


def products(model: ir.Model) -> dict[str, ir.Node]:
    """MatMul nodes with a weight behind them, by its name without `.codes`."""
    found = {}
    for node in model.graph:
        transpose = producer(node.inputs[1], "Transpose") if node.op_type == "MatMul" else None
        if transpose is not None:
            dequantise = producer(transpose.inputs[0], "DequantizeLinear")
            weight = dequantise.inputs[0] if dequantise is not None else transpose.inputs[0]
            assert weight is not None
            found[(weight.name or "").removesuffix(".codes")] = node
    return found


def weight_of(node: ir.Node) -> ir.Node:
    """The DequantizeLinear behind a product's weight."""
    transpose = producer(node.inputs[1], "Transpose")
    dequantise = producer(transpose.inputs[0], "DequantizeLinear") if transpose is not None else None
    assert dequantise is not None, node
    return dequantise


def dtypes(node: ir.Node) -> list[ir.DataType | None]:
    return [value.dtype for value in node.inputs[:2] if value is not None]


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_every_product_but_the_routers(config: ModelConfig, precision: str) -> None:
    model = lowered(config, precision)
    routers = [node for node in model.graph if node.op_type == "Gemm"]
    assert len(routers) == (3 if config.moe else 0)
    for i, router in enumerate(routers):
        assert [value.name for value in router.inputs if value][1:] == [f"layers.{i}.moe.router.weight"]
        assert dtypes(router) == [ir.DataType.FLOAT] * 2
        assert is_weight(router.inputs[1])
    dense = products(model)
    assert len(dense) == 3 * (4 if config.moe else 6) + 1
    for name, node in dense.items():
        if precision == "fp8" and (name == "lm_head.weight" or (config.moe and ".attn." in name)):
            assert dtypes(node) == [ir.DataType.BFLOAT16] * 2, name
        else:
            assert dtypes(weight_of(node))[1] == ir.DataType.BFLOAT16, name  # the activations' type


@pytest.mark.parametrize(("precision", "code"), [("fp8", ir.DataType.FLOAT8E4M3FN), ("int8", ir.DataType.INT8)])
def test_static_activations(precision: str, code: ir.DataType) -> None:
    """One Q/DQ pair for q, k and v, whose scale is asked for once; codes and scales of the right types and shapes."""
    scales = FixedScales()
    model = lowered(DENSE, precision, scales)
    found = products(model)
    assert Counter(node.op_type for node in model.graph)["QuantizeLinear"] == 3 * 4 + (precision == "int8")
    inner = ("attn.q.weight", "attn.o.weight", "mlp.w_in", "mlp.w_out")
    head = ["lm_head.weight"] if precision == "int8" else []
    assert scales.asked == [f"layers.{i}.{name}" for i in range(3) for name in inner] + head
    q, k, v = (found[f"layers.1.attn.{name}.weight"].inputs[0] for name in "qkv")
    assert q is k is v
    for name, node in found.items():
        if name not in [*scales.asked, *(f"layers.{i}.attn.{part}.weight" for i in range(3) for part in "kv")]:
            continue
        dequantise = producer(node.inputs[0], "DequantizeLinear")
        assert dequantise is not None
        quantise = producer(dequantise.inputs[0], "QuantizeLinear")
        assert quantise is not None
        assert quantise.inputs[1:] == dequantise.inputs[1:]
        assert [value.dtype for value in quantise.inputs[1:] if value] == [ir.DataType.BFLOAT16, code]
        weight = weight_of(node)
        assert dtypes(weight) == [code, ir.DataType.BFLOAT16], name
        N = DENSE.tensor_shapes()[name][0]
        assert weight.inputs[1] is not None
        assert weight.inputs[1].shape == ((N,) if precision == "int8" else ()), name
        assert "block_size" not in weight.attributes


def test_int4_is_weight_only() -> None:
    """Groups as wide as rows allow; rows that none divides, and the head, have 8 bits."""
    model = lowered(DENSE, "int4")
    assert not any(node.op_type == "QuantizeLinear" for node in model.graph)
    for name, node in products(model).items():
        weight, (N, K) = weight_of(node), DENSE.tensor_shapes()[name]
        codes, scales = weight.inputs[:2]
        assert codes is not None
        assert scales is not None
        assert codes.shape == (N, K)
        if name == "lm_head.weight" or name.endswith("w_out"):
            assert codes.dtype == ir.DataType.INT8
            assert scales.shape == (N,)
        else:
            assert codes.dtype == ir.DataType.INT4
            assert scales.shape == (N, 1)
            assert {key: value.as_int() for key, value in weight.attributes.items()} == {"axis": 1, "block_size": 64}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_tied_head_is_a_copy(precision: str) -> None:
    """The embedding table stays as it is; the head's codes are made from it and go by their own name."""
    model = lowered(TIED, precision)
    table = model.graph.initializers["embed.weight"]
    assert table.dtype == ir.DataType.BFLOAT16
    assert [user.op_type for user, _ in table.uses()] == ["Gather"]
    codes = model.graph.initializers["lm_head.weight.codes"]
    assert codes.dtype == ir.DataType.INT8
    assert pack_of(codes).sources == ("embed.weight",)


def test_smoothing_divides_each_norm_once() -> None:
    factors = torch.linspace(0.5, 2, 64)
    model = lowered(DENSE, "int8", FixedScales({"layers.1.attn_norm.weight": factors.tolist()}))
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))

    def written(name: str) -> tuple[Tensor, ...]:
        return pack_of(model.graph.initializers[name]).encode(row if name.endswith("codes") else row[0])

    assert torch.equal(written("layers.1.attn_norm.weight")[0], (row[0] / factors).bfloat16())
    assert torch.equal(written("layers.0.attn_norm.weight")[0], row[0].bfloat16())
    for name in "qkv":
        codes, scales = written(f"layers.1.attn.{name}.weight.codes")
        assert torch.equal(codes, quantize_int8_rows(row * factors, torch.bfloat16)[0])
        assert scales.dtype == torch.bfloat16
    assert torch.equal(written("layers.1.attn.o.weight.codes")[0], quantize_int8_rows(row, torch.bfloat16)[0])


@pytest.mark.parametrize(
    ("precision", "weight_format", "dtype", "columns", "groups"),
    [
        ("bf16", "dense", ir.DataType.BFLOAT16, (64, 40), None),
        ("fp8", "fp8_e4m3", ir.DataType.FLOAT8E4M3FN, (64, 40), (1, 1)),
        ("int8", "int8", ir.DataType.INT8, (64, 40), (1, 1)),
        ("int4", "int4", ir.DataType.UINT8, (32, 20), (1, 1)),  # a row is shorter than a group
    ],
)
def test_experts(
    precision: str, weight_format: str, dtype: ir.DataType, columns: tuple[int, int], groups: tuple[int, int] | None
) -> None:
    """Formats, types, shapes; then as graph inputs, for the plugin."""
    model = lowered(MOE, precision)
    nodes = moe_nodes(model)
    assert len(nodes) == 3
    for node in nodes:
        attributes = attributes_of(node)
        assert (attributes.weight_format, attributes.group_size) == (weight_format, 128 if precision == "int4" else 0)
        given = dict(zip(INPUTS, node.inputs, strict=False))
        shapes = {name: value.shape for name, value in given.items() if value is not None and name.startswith("w_")}
        want: dict[str, tuple[int, ...]] = {"w_in": (4, 80, columns[0]), "w_out": (4, 64, columns[1])}
        if groups is not None:
            want |= {"w_in_scale": (4, 80, groups[0]), "w_out_scale": (4, 64, groups[1])}
        assert shapes == want
        assert {given[name].dtype for name in ("w_in", "w_out")} == {dtype}
    before = {value.name for value in model.graph.initializers.values() if ".moe.w_" in (value.name or "")}
    names = input_names(attributes_of(nodes[0]), has_bias=False)

    model, packs = experts_to_inputs(model)
    assert {spec.name for pack in packs for spec in pack.outputs} == before
    assert before <= {value.name for value in model.graph.inputs}
    assert not before & set(model.graph.initializers)
    for i, node in enumerate(nodes):
        assert len(node.inputs) == len(names)
        assert all(value is not None and not value.is_initializer() for value in node.inputs)
        assert [value.name for value in node.inputs if value][2:] == [f"layers.{i}.moe.{name}" for name in names[2:]]
        expected = ir.DataType.INT8 if precision == "int4" else dtype
        assert dtypes_of(node, 2, 4) == {expected}
        assert dtypes_of(node, 4, 6) <= {ir.DataType.FLOAT}
        assert {name: node.attributes[name].value for name in NODE_ATTRIBUTES} == NODE_ATTRIBUTES


def test_fp8_of_experts_alone() -> None:
    """No activation is rounded, and no scale asked for: what is no expert's stays as it is, a shared expert's too."""
    assert MOE.moe is not None
    config, scales = replace(MOE, moe=replace(MOE.moe, shared_width=48)), FixedScales()
    model = lower_to_tensorrt(traced(config).clone(), "fp8", scales=scales, weight_only=True)
    assert scales.asked == []
    assert not {node.op_type for node in model.graph} & {"QuantizeLinear", "DequantizeLinear"}
    dense = {name: node for name, node in products(model).items() if ".router." not in name}
    assert len(dense) == 3 * (4 + 2) + 1
    assert all(dtypes(node) == [ir.DataType.BFLOAT16] * 2 for node in dense.values())
    kept = [attributes_of(node) for node in moe_nodes(model)]
    assert [(each.weight_format, each.keep_activations) for each in kept] == [("fp8_e4m3", True)] * 3


def dtypes_of(node: ir.Node, start: int, stop: int) -> set[ir.DataType | None]:
    return {value.dtype for value in node.inputs[start:stop] if value is not None}


def test_a_dense_model_has_no_expert_inputs() -> None:
    model = lowered(DENSE, "int8")
    inputs = list(model.graph.inputs)
    model, packs = experts_to_inputs(model)
    assert packs == []
    assert list(model.graph.inputs) == inputs
    assert not any(node.domain == DOMAIN for node in model.graph)


@pytest.mark.parametrize(
    ("precision", "bits", "scale_bytes"), [("bf16", 16, 0), ("fp8", 8, 4), ("int8", 8, 4), ("int4", 4, 4)]
)
def test_weight_facts(precision: str, bits: int, scale_bytes: int) -> None:
    """Bytes in all and per token, counted here by hand."""
    facts = weight_facts(lowered(MOE, precision), MOE)
    D, I, V, E, K, kv = 64, 40, 96, 4, 2, 32
    expert = (2 * I * D + D * I) * bits // 8 + scale_bytes * (2 * I + D)
    rows = {"q": D, "k": kv, "v": kv, "o": D}
    nbytes = 1 if precision in ("int8", "int4") else 2
    dense, head = sum(n * D * nbytes for n in rows.values()), V * D * nbytes
    if nbytes == 1:  # bfloat16 scales, one per row
        dense += 2 * sum(rows.values())
        head += 2 * V
    layer = dense + 4 * E * D + 2 * 2 * D
    rest = head + 2 * D
    assert facts["weight_bytes"]["total"] == 3 * (layer + E * expert) + rest + 2 * V * D
    assert facts["weight_bytes"]["per_token"] == 3 * (layer + K * expert) + rest + 2 * D
    stored = {"bf16": "bfloat16", "fp8": "float8_e4m3fn", "int8": "int8", "int4": "uint8"}[precision]
    assert facts["tensors"]["layers.2.moe.w_in"] == {"dtype": stored, "shape": [4, 80, 32 if bits == 4 else 64]}
    assert facts["tensors"]["layers.0.moe.router.weight"]["dtype"] == "float32"
    assert "embed.weight" in facts["tensors"]


def test_fp8_saturates() -> None:
    """Weights beyond the range take the largest code, never NaN."""
    codes, scales = quantize_fp8(torch.tensor([1e6, -1e6, 448.0, 464.0, 0.0]), torch.tensor(448.0))
    assert scales == 1
    assert codes.float().tolist() == [448, -448, 448, 448, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_rounded_before_the_codes(dtype: torch.dtype) -> None:
    rows = torch.randn(50, 33, generator=torch.Generator().manual_seed(0))
    rows[7] = 0
    absmax = rows.abs().amax(1, keepdim=True)
    for codes, scales, largest in (
        (*quantize_int8_rows(rows, dtype), 127),
        (quantize_fp8(rows, absmax, dtype)[0], quantize_fp8(rows, absmax, dtype)[1][:, 0], 448),
    ):
        assert scales.dtype == dtype
        assert (scales > 0).all()
        assert torch.equal(scales, (torch.where(absmax == 0, 1, absmax)[:, 0] / largest).to(dtype))
        assert (codes[7].float() == 0).all()
        step = scales.float()[:, None]
        half = step / 2 if largest == 127 else torch.maximum(rows.abs() / 16, step / 1024)
        assert ((codes.float() * step - rows).abs() <= half * 1.0001).all()
