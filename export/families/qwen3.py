"""Qwen3: LLaMA with every head of q and k normalised, and a head width of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gatework.export.config import ModelConfig
from gatework.export.families import hf
from gatework.export.families.fields import Fields

DEFAULTS = hf.Defaults(
    architectures=("Qwen3ForCausalLM",),
    norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=32_768,
    num_kv_heads=32,
)
HEAD_DIM = 128  # where the config is silent


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose model_type is "qwen3"."""
    fields = Fields(without_window({"head_dim": HEAD_DIM} | raw))
    return replace(hf.read_config("qwen3", fields, DEFAULTS), qk_norm="head")


def without_window(raw: dict[str, Any]) -> dict[str, Any]:
    """The config without its `sliding_window`, which means nothing unless `use_sliding_window` is true; that is refused."""
    Fields(raw).refuse_unless("use_sliding_window", False)
    return raw | {"sliding_window": None}


weight_map = hf.weight_map
