"""Qwen3-MoE: Qwen3 with routed feed-forward layers, and no shared expert."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gatework.export.config import ModelConfig
from gatework.export.families import hf, qwen3
from gatework.export.families.fields import Fields

DEFAULTS = hf.Defaults(
    architectures=("Qwen3MoeForCausalLM",),
    norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=32_768,
    num_kv_heads=4,
)


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose model_type is "qwen3_moe".

    Its `intermediate_size` is the width of dense layers, where there are some.
    """
    width = {"intermediate_size": raw.get("moe_intermediate_size")}
    fields = Fields(qwen3.without_window(raw) | width, labels={"intermediate_size": "moe_intermediate_size"})
    config = hf.read_config("qwen3_moe", fields, DEFAULTS, hf.read_experts(fields))
    return hf.with_dense_layers(replace(config, qk_norm="head"), raw)


weight_map = hf.projections_weight_map
