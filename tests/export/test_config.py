"""ModelConfig: what it refuses, what it counts, and its JSON form."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from gatework.export.config import ModelConfig, MoEConfig
from gatework.export.yarn import YarnConfig
from gatework.plugins.errors import GateworkError

DENSE = ModelConfig(
    family="llama",
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
YARN = YarnConfig(factor=4.0, original_length=16)
OWN_GATES = MoEConfig(num_experts=4, top_k=2, alpha=1.702, beta=1.0, limit=7.0)
SINKS = replace(DENSE, sliding_window=4, full_attention=(1,), attn_sinks=True, yarn=YARN, bias="attn", moe=OWN_GATES)
ROUTED = replace(DENSE, moe=MoEConfig(num_experts=5, top_k=3), eos_token_ids=(2, 7), dtype="bfloat16", qkv_clip=8.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"num_layers": True}, "num_layers"),
        ({"intermediate_size": 96.0}, "intermediate_size"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"norm_eps": math.nan}, "norm_eps"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"rope_theta": -1e4}, "rope_theta"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"qkv_clip": 0.0}, "qkv_clip"),
        ({"qk_norm": "heads"}, "qk_norm"),
        ({"rope_dim": 0}, "rope_dim"),
        ({"rope_dim": 7}, "rope_dim"),
        ({"rope_dim": 18}, "rope_dim"),
        ({"alibi_bias_max": 0.0}, "alibi_bias_max"),
        ({"alibi_bias_max": math.inf}, "alibi_bias_max"),
        ({"alibi_bias_max": 8.0, "rope_dim": 8}, "exclude each other"),
        ({"ntk_length": 1}, "ntk_length"),
        ({"logn_length": 2048.0}, "logn_length"),
        ({"alibi_bias_max": 8.0, "ntk_length": 2048}, "exclude each other"),
        ({"bias": "o"}, "bias"),
        ({"activation": "tanh"}, "activation"),
        ({"glu": "three_way", "parallel": True}, "glu"),
        ({"glu": "three_way", "bias": "all"}, "glu"),
        ({"glu": "one"}, "glu"),
        ({"bias": "all", "moe": MoEConfig(num_experts=4, top_k=2)}, "biases of all products"),
        ({"parallel": True, "moe": MoEConfig(num_experts=4, top_k=2)}, "parallel"),
        ({"bias": "all", "tie_embeddings": True}, "head"),
        ({"attn_softcap": 0.0}, "attn_softcap"),
        ({"attn_scale": -1.0}, "attn_scale"),
        ({"embed_multiplier": math.nan}, "embed_multiplier"),
        ({"logit_multiplier": None}, "logit_multiplier"),
        ({"moe_interval": 0}, "moe_interval"),
        ({"sliding_window": 4, "full_attention": (2,)}, "full_attention"),
        ({"sliding_window": 4, "full_attention": (1, 1)}, "full_attention"),
        ({"sliding_window": 4, "full_attention": (True,)}, "full_attention"),
        ({"full_attention": (1,)}, "full_attention"),
        ({"attn_sinks": True, "alibi_bias_max": 8.0}, "exclude each other"),
        ({"attn_sinks": True, "attn_softcap": 8.0}, "exclude each other"),
        ({"yarn": YARN, "alibi_bias_max": 8.0}, "exclude each other"),
        ({"yarn": YARN, "ntk_length": 32}, "YaRN does not go with this"),
        ({"yarn": YARN, "rope_theta": 1.0}, "YaRN does not go with this"),
        ({"glu": "none", "moe": OWN_GATES}, "gates"),
        ({"activation": "gelu", "moe": OWN_GATES}, "gates"),
        ({"moe_interval": 2, "moe": OWN_GATES}, "experts in every layer"),
        ({"relative_buckets": 3}, "relative_buckets"),
        ({"relative_buckets": 32, "relative_distance": 16}, "relative_distance"),
        ({"relative_buckets": 32, "alibi_bias_max": 8.0}, "exclude each other"),
        ({"relative_buckets": 32, "sliding_window": 8}, "exclude each other"),
        ({"encoder_layers": 2}, "go together"),
        ({"start_token_id": 0}, "go together"),
        ({"encoder_layers": 2, "start_token_id": 0}, "a relative bias"),
        ({"encoder_layers": 2, "start_token_id": 128, "relative_buckets": 32}, "start_token_id"),
        ({"encoder_layers": -1, "start_token_id": 0}, "encoder_layers"),
        ({"sequence_capacity": 64}, "no experts"),
        ({"sequence_capacity": 64, "moe": MoEConfig(num_experts=4, top_k=2)}, "top 2"),
        ({"moe_interval": 3, "moe": MoEConfig(num_experts=4, top_k=2)}, "moe_interval"),
        ({"dense_layers": (2,)}, "dense_layers"),
        ({"dense_layers": (0, 0)}, "dense_layers"),
        ({"dense_layers": (0, 1), "moe": MoEConfig(num_experts=4, top_k=2)}, "dense_layers"),
        ({"dense_width": 0, "moe": MoEConfig(num_experts=4, top_k=2)}, "dense_width"),
        ({"dense_width": 64}, "dense_width"),
        ({"dense_layers": (0,), "moe": OWN_GATES}, "experts in every layer"),
        ({"expert_capacity": -1.0}, "expert_capacity"),
        ({"drop_tokens": True, "moe": MoEConfig(num_experts=4, top_k=1)}, "experts have no capacity beyond which"),
        (
            {"drop_tokens": True, "moe": MoEConfig(num_experts=4, top_k=1), "sequence_capacity": 64},
            "drop tokens already, as its config says: each serves 64 of a prompt; got --drop-tokens",
        ),
        ({"drop_tokens": True}, "no experts that could drop tokens; got --drop-tokens; fix: leave --drop-tokens out"),
    ],
)
def test_impossible_value_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(GateworkError, match=named):
        replace(DENSE, **changes)


@pytest.mark.parametrize(("experts", "top_k", "named"), [(0, 1, "num_experts"), (4, 0, "top_k"), (4, 5, "top_k")])
def test_impossible_routing_is_refused_by_name(experts: int, top_k: int, named: str) -> None:
    with pytest.raises(GateworkError, match=named):
        MoEConfig(num_experts=experts, top_k=top_k)


def test_impossible_shared_expert_is_refused_by_name() -> None:
    with pytest.raises(GateworkError, match="shared_width"):
        MoEConfig(num_experts=4, top_k=2, shared_width=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"alpha": -1.0}, "alpha"), ({"limit": math.inf}, "limit"), ({"limit": 7.0, "shared_width": 8}, "shared expert")],
)
def test_impossible_gates_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(GateworkError, match=named):
        MoEConfig(num_experts=4, top_k=2, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"factor": math.nan}, "factor"),
        ({"factor": 0.5}, "out of range"),
        ({"original_length": 1.5}, "original_length"),
    ],
)
def test_impossible_yarn_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(GateworkError, match=named):
        replace(YARN, **changes)


def test_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        DENSE.vocab_size = 1  # type: ignore[misc]


@pytest.mark.parametrize("config", [DENSE, ROUTED, SINKS], ids=["dense", "routed", "sinks"])
def test_json_round_trip(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("change", [{"rope_scaling": 2}, {"moe": {"num_experts": 4, "top_k": 2, "noise": 1}}])
def test_unknown_field_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(GateworkError, match=r"rope_scaling|noise"):
        ModelConfig.from_dict(DENSE.to_dict() | change)


def test_missing_field_is_refused() -> None:
    fields = DENSE.to_dict()
    del fields["head_dim"]
    with pytest.raises(GateworkError, match="head_dim"):
        ModelConfig.from_dict(fields)


def test_tensor_shapes() -> None:
    config = replace(ROUTED, num_layers=1)
    assert config.tensor_shapes() == {
        "embed.weight": (128, 64),
        "layers.0.attn_norm.weight": (64,),
        "layers.0.attn.q.weight": (64, 64),
        "layers.0.attn.k.weight": (32, 64),
        "layers.0.attn.v.weight": (32, 64),
        "layers.0.attn.o.weight": (64, 64),
        "layers.0.ffn_norm.weight": (64,),
        "layers.0.moe.router.weight": (5, 64),
        "layers.0.moe.w_in": (5, 192, 64),
        "layers.0.moe.w_out": (5, 64, 96),
        "norm.weight": (64,),
        "lm_head.weight": (128, 64),
    }
    assert "lm_head.weight" not in replace(config, tie_embeddings=True).tensor_shapes()


@pytest.mark.parametrize(("qk_norm", "q", "k"), [("head", 16, 16), ("width", 64, 32)])
def test_norms_of_q_and_k(qk_norm: Any, q: int, k: int) -> None:
    shapes = replace(DENSE, qk_norm=qk_norm).tensor_shapes()
    assert (shapes["layers.1.attn.q_norm.weight"], shapes["layers.1.attn.k_norm.weight"]) == ((q,), (k,))
    assert replace(DENSE, qk_norm=qk_norm).num_parameters() == DENSE.num_parameters() + 2 * (q + k)


def test_layers_without_experts() -> None:
    """Experts in the last of each three layers, followed by an MLP of its own; gates twice as wide."""
    config = replace(ROUTED, num_layers=6, moe_interval=3, extra_mlp=True, glu="three_way")
    shapes = config.tensor_shapes()
    assert [i for i in range(6) if f"layers.{i}.moe.w_in" in shapes] == [2, 5]
    assert shapes["layers.2.moe.w_in"] == (5, 3 * 96, 64)
    assert shapes["layers.1.mlp.w_in"] == shapes["layers.2.extra_mlp.w_in"] == (3 * 96, 64)
    assert "layers.1.extra_norm.weight" not in shapes
    assert config.moe_layers == 2
    assert config.num_parameters() - config.num_active_parameters() == 2 * 2 * 4 * 96 * 64  # idle ones


def test_description_from_before_a_field_was_there() -> None:
    fields = DENSE.to_dict()
    del fields["qk_norm"]
    assert ModelConfig.from_dict(fields) == DENSE


def test_counts() -> None:
    layer = 2 * 64 + 64 * 64 * 2 + 32 * 64 * 2
    expert = 3 * 64 * 96
    outside = 2 * 128 * 64 + 64
    assert DENSE.num_parameters() == DENSE.num_active_parameters() == 2 * (layer + expert) + outside
    assert ROUTED.num_parameters() == 2 * (layer + 5 * 64 + 5 * expert) + outside
    assert ROUTED.num_active_parameters() == 2 * (layer + 5 * 64 + 3 * expert) + outside
    assert DENSE.kv_bytes_per_token(2) == 2 * 2 * 2 * 16 * 2
