"""Mixtral 8x7B and 8x22B: Mistral with a routed feed-forward layer, whose top-k scores are renormalised."""

from __future__ import annotations

from typing import Any

from gatework.export.config import ModelConfig, MoEConfig
from gatework.export.families import hf
from gatework.export.families.fields import Fields

DEFAULTS = hf.Defaults(
    architectures=("MixtralForCausalLM",),
    norm_eps=1e-5,
    rope_theta=1e6,
    max_position_embeddings=131_072,
    num_kv_heads=8,
)


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose model_type is "mixtral"."""
    fields = Fields(raw)
    moe = MoEConfig(num_experts=fields.integer("num_local_experts"), top_k=fields.integer("num_experts_per_tok"))
    return hf.read_config("mixtral", fields, DEFAULTS, moe)


weight_map = hf.weight_map
