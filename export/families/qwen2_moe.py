"""Qwen1.5-MoE and Qwen2-57B-A14B: Qwen2 with routed feed-forward layers, and a shared expert beside each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gatework.export.config import ModelConfig
from gatework.export.families import hf, qwen3
from gatework.export.families.fields import Fields

DEFAULTS = hf.Defaults(
    architectures=("Qwen2MoeForCausalLM",),
    norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=32_768,
    num_kv_heads=16,
)


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose model_type is "qwen2_moe".

    Its `intermediate_size` is the width of dense layers, where there are some.
    """
    width = {"intermediate_size": raw.get("moe_intermediate_size")}
    fields = Fields(qwen3.without_window(raw) | width, labels={"intermediate_size": "moe_intermediate_size"})
    moe = replace(hf.read_experts(fields), shared_width=fields.integer("shared_expert_intermediate_size"))
    config = hf.read_config("qwen2_moe", fields, DEFAULTS, moe, own=("qkv_bias",))
    return hf.with_dense_layers(replace(config, bias="qkv" if fields.flag("qkv_bias", True) else None), raw)


weight_map = hf.projections_weight_map
