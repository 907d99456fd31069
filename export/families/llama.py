"""LLaMA 1 and 2, Code Llama and Orca 2."""

from __future__ import annotations

from typing import Any

from gatework.export.config import ModelConfig
from gatework.export.families import hf
from gatework.export.families.fields import Fields

DEFAULTS = hf.Defaults(
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),  # the second in files of early 2023
    norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=2048,
    num_kv_heads=None,
)


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose model_type is "llama"."""
    return hf.read_config("llama", Fields(raw), DEFAULTS)


weight_map = hf.weight_map
