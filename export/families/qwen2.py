"""Qwen1.5, Qwen2 and Qwen2.5, dense: LLaMA with biases where q, k and v are made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gatework.export.config import ModelConfig
from gatework.export.families import hf, qwen3
from gatework.export.families.fields import Fields

DEFAULTS = hf.Defaults(
    architectures=("Qwen2ForCausalLM",),
    norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=32_768,
    num_kv_heads=32,
)


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose model_type is "qwen2"."""
    return replace(hf.read_config("qwen2", Fields(qwen3.without_window(raw)), DEFAULTS), bias="qkv")


weight_map = hf.weight_map
