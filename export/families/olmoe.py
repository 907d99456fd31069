"""OLMoE: q and k normalised over all heads at once, and many small experts whose scores stay as the softmax gives them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gatework.export.config import ModelConfig
from gatework.export.families import hf
from gatework.export.families.fields import Fields

DEFAULTS = hf.Defaults(
    architectures=("OlmoeForCausalLM",),
    norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=4096,
    num_kv_heads=None,
)


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose model_type is "olmoe"."""
    fields = Fields(raw)
    fields.refuse_unless("sliding_window")
    config = hf.read_config("olmoe", fields, DEFAULTS, hf.read_experts(fields))
    if config.head_dim * config.num_heads != config.hidden_size:
        expected = (
            f"hidden_size {config.hidden_size} / {config.num_heads} heads"  # the norm of q has hidden_size weights
        )
        raise fields.unsupported("head_dim", expected)
    return replace(config, qk_norm="width", qkv_clip=fields.number("clip_qkv", None))


weight_map = hf.projections_weight_map
