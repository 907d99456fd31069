"""The lowered graph: each pass leaves what it promises, and nothing of what it replaces."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from gatework.export.build import build_engine
from gatework.export.config import ModelConfig, MoEConfig
from gatework.export.lower import lower_to_cpu
from gatework.export.lower.experts import attributes_of, moe_nodes
from gatework.export.lower.fused import fuse_into_kernels
from gatework.export.lower.last_position import hoist_last_position
from gatework.export.lower.packed import to_contrib
from gatework.export.onnx_export import trace
from gatework.export.sizes import kv_bytes
from gatework.plugins.engine_format import graph_taps
from gatework.plugins.errors import GateworkError
from tests.checkpoints import make_checkpoint

CONFIG = ModelConfig(
    family="mixtral",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=32,
    moe=MoEConfig(num_experts=4, top_k=2),
)


def operators(config: ModelConfig, precision: str) -> Counter[str]:
    model = lower_to_cpu(trace(config, 32), config, precision, 32)  # type: ignore[arg-type]
    return Counter(node.op_type for node in model.graph)


def with_changes(**changes: object) -> ModelConfig:
    return ModelConfig.from_dict(CONFIG.to_dict() | changes)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_nothing_large_stays_in_float(precision: str) -> None:
    ops = operators(CONFIG, precision)
    assert ops["PackedMoE"] == ops["CachedAttention"] == 3
    assert ops["PackedMatMul"] == 2 * 3 + 1  # q|k|v and o of each layer, and the head
    assert ops["GatherBlockQuantized"] == 1
    assert ops["Gemm"] == 3  # routers
    for gone in (
        "MoE",
        "Attention",
        "TensorScatter",
        "RotaryEmbedding",
        "MatMul",
        "FusedMatMul",
        "Transpose",
        "Gather",
        "LessOrEqual",
        "GroupQueryAttention",
        "ReduceMax",  # of the lengths that it wants
    ):
        assert ops[gone] == 0, gone


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms_and_routers_become_part_of_the_kernels(norm: str) -> None:
    config = with_changes(norm=norm)
    model = lower_to_cpu(trace(config, 32), config, "int8", 32)
    model, modified = fuse_into_kernels(model)
    assert modified
    ops = Counter(node.op_type for node in model.graph)
    assert (
        sum(ops.values()) == 1 + 4 * 3 + 1 + 2
    )  # embedding; q|k|v, attention, o, experts; head; the last position's sum
    assert all(ops[gone] == 0 for gone in ("Gemm", "Reshape", "RMSNormalization", "LayerNormalization"))
    made = {value.name for node in model.graph for value in node.outputs}
    assert set(graph_taps(config.to_dict())) <= made


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"parallel": True}, CONFIG.num_layers),  # read by attention and MLP; that before the head is the head's alone
        ({"bias": "all", "norm": "layer"}, 2 * CONFIG.num_layers + 1),  # they have biases
    ],
)
def test_other_norms_stay(changes: dict[str, object], left: int) -> None:
    config = with_changes(moe=None, **changes)
    model, _ = fuse_into_kernels(lower_to_cpu(trace(config, 32), config, "int8", 32))
    assert sum("Normalization" in node.op_type for node in model.graph) == left


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_fallback_has_no_operator_of_ours(precision: str) -> None:
    model = lower_to_cpu(trace(CONFIG, 32), CONFIG, precision, 32)  # type: ignore[arg-type]
    model, modified = to_contrib(model)
    ops = Counter(node.op_type for node in model.graph)
    assert modified
    assert (ops["QMoE"], ops["MatMulNBits"], ops["GroupQueryAttention"]) == (3, 2 * 3 + 1, 3)
    assert not any(node.domain == "gatework" for node in model.graph)


def cache_types(model: ir.Model) -> set[ir.DataType | None]:
    values = (*model.graph.inputs, *model.graph.outputs)
    return {value.dtype for value in values if str(value.name).startswith(("past.", "present."))}


@pytest.mark.parametrize(
    ("changes", "value_bytes"),
    [({}, 2), ({"alibi_bias_max": 8.0}, 2), ({"head_dim": 24}, 4), ({"ntk_length": 16}, 4)],
    ids=str,
)
def test_only_our_attention_has_a_cache_of_halves(changes: dict[str, object], value_bytes: int) -> None:
    config = with_changes(moe=None, **changes)
    model = lower_to_cpu(trace(config, 32), config, "int8", 32)
    assert kv_bytes(config, "int8", 32) == 32 * config.kv_bytes_per_token(value_bytes)
    own = {ir.DataType.FLOAT16 if value_bytes == 2 else ir.DataType.FLOAT}
    assert cache_types(model) == own
    assert cache_types(to_contrib(model.clone())[0]) == {ir.DataType.FLOAT}
    assert cache_types(model) == own  # a clone shares nothing with it


def test_float32() -> None:
    ops = operators(CONFIG, "fp32")
    assert ops["MoE"] == ops["GroupQueryAttention"] == 3
    assert ops["FusedMatMul"] == 2 * 3 + 1
    assert (
        ops["SkipSimplifiedLayerNormalization"] == 2 * 3 - 1
    )  # all norms but the first, and the one behind the last Slice
    assert ops["Transpose"] == 0


def test_dense_mlp() -> None:
    ops = operators(with_changes(moe=None), "int8")
    assert ops["PackedMatMul"] == 4 * 3 + 1
    assert ops["PackedMoE"] == 0


def test_odd_head_width_keeps_standard_attention() -> None:
    ops = operators(with_changes(head_dim=24), "int8")
    assert ops["GroupQueryAttention"] == 0
    assert ops["Attention"] == 3
    assert ops["TensorScatter"] == 6
    assert ops["PackedMatMul"] == 4 * 3 + 1


@pytest.mark.parametrize("qk_norm", ["head", "width"])
def test_normalised_q_and_k_take_one_product_and_three_inputs(qk_norm: str) -> None:
    config = with_changes(qk_norm=qk_norm)
    model = lower_to_cpu(trace(config, 32), config, "int8", 32)
    ops = Counter(node.op_type for node in model.graph)
    assert (ops["CachedAttention"], ops["Split"], ops["PackedMatMul"]) == (3, 3, 2 * 3 + 1)
    assert (ops["Attention"], ops["RotaryEmbedding"], ops["Transpose"], ops["MatMul"]) == (0, 0, 0, 0)
    assert ops["RMSNormalization"] == 2 * 3 + 2  # of q and k; the first, and the one behind the last Slice
    assert all(len(node.inputs) == 8 for node in model.graph if node.op_type == "CachedAttention")
    model, _ = to_contrib(model)
    assert all(None not in node.inputs[:3] for node in model.graph if node.op_type == "GroupQueryAttention")


def test_experts_with_the_rule_of_gshard_stay_what_they_are() -> None:
    """In float32 the operator's definition runs; the kernels for quantised experts do not know the rule."""
    rule: dict[str, Any] = {"capacity_rule": "gshard", "capacity_factor": 2.0}
    models = [trace(CONFIG, 32) for _ in range(2)]
    for node in [node for model in models for node in moe_nodes(model)]:
        for attribute in ir.convenience.convert_attributes(replace(attributes_of(node), **rule).to_onnx()):
            node.attributes.add(attribute)
    kept = moe_nodes(lower_to_cpu(models[0], CONFIG, "fp32", 0))
    assert [attributes_of(node).capacity_rule for node in kept] == ["gshard"] * CONFIG.num_layers
    with pytest.raises(GateworkError, match="quantised experts drop no choices by this rule; got gshard"):
        lower_to_cpu(models[1], CONFIG, "int8", 32)


def test_layer_norms_stay() -> None:
    assert operators(with_changes(norm="layer"), "int8")["LayerNormalization"] == 7


def test_last_position_is_taken_before_the_last_feed_forward_layer() -> None:
    model, modified = hoist_last_position(trace(CONFIG, 32))
    assert modified
    order = [node.op_type for node in model.graph]
    assert order.count("Slice") == 1
    last_moe = len(order) - 1 - order[::-1].index("MoE")
    assert order.index("Slice") < last_moe
    assert order.index("Slice") > len(order) - 1 - order[::-1].index("Attention")


def test_all_logits_are_left_alone() -> None:
    _, modified = hoist_last_position(trace(CONFIG, 32, all_logits=True))
    assert not modified


def test_tied_embedding_is_quantised_for_both_uses(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama2", tie_embeddings=True)
    engine = build_engine(path, tmp_path / "engine", precision="int8")
    tensors = json.loads((engine / "manifest.json").read_text())["tensors"]
    assert {"embed.weight.codes", "lm_head.weight.codes"} <= set(tensors)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_expert_files_are_page_aligned(tmp_path: Path, precision: str) -> None:
    engine = build_engine(make_checkpoint(tmp_path, "mixtral"), tmp_path / "engine", precision=precision)
    graph = onnx.load(engine / "model.onnx", load_external_data=False).graph
    seen = 0
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place.get("location") == "experts.safetensors":
            assert int(place["offset"]) % 4096 == 0
            seen += 1
    assert seen == (4 if precision == "fp32" else 8)
