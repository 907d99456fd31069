"""Mistral 7B and Zephyr: LLaMA with grouped-query attention and a sliding window."""

from __future__ import annotations

from typing import Any

from gatework.export.config import ModelConfig
from gatework.export.families import hf
from gatework.export.families.fields import Fields

DEFAULTS = hf.Defaults(
    architectures=("MistralForCausalLM",),
    norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=131_072,
    num_kv_heads=8,
    sliding_window=4096,
)


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose model_type is "mistral"."""
    return hf.read_config("mistral", Fields(raw), DEFAULTS)


weight_map = hf.weight_map
