"""phi-1, phi-1.5 and phi-2: part of a head rotates, everything has a bias, and attention and MLP stand side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gatework.export.config import ModelConfig
from gatework.export.families import hf, layouts
from gatework.export.families.fields import Fields
from gatework.export.weights import WeightMap

DEFAULTS = hf.Defaults(
    architectures=("PhiForCausalLM",),
    norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=2048,
    num_kv_heads=None,
)
ROTATES = 0.5  # of a head, where the config is silent
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose model_type is "phi"."""
    fields = Fields(raw | {"rms_norm_eps": raw.get("layer_norm_eps")}, labels={"rms_norm_eps": "layer_norm_eps"})
    fields.refuse_unless("hidden_act", *TANH_GELU)
    fields.refuse_unless("qk_layernorm", False)
    config = hf.read_config("phi", fields, DEFAULTS, own=("hidden_act", "partial_rotary_factor"))
    return replace(
        config,
        norm="layer",
        rope_dim=int(config.head_dim * hf.rotary_part(fields, ROTATES)),
        bias="all",
        parallel=True,
        activation="gelu_tanh",
        glu="none",
    )


def weight_map(config: ModelConfig) -> WeightMap:
    """Where a phi checkpoint keeps every canonical weight."""
    shapes = config.tensor_shapes()
    names = {"embed.weight": "model.embed_tokens.weight"}
    for kind in ("weight", "bias"):
        names |= {f"norm.{kind}": f"model.final_layernorm.{kind}", f"lm_head.{kind}": f"lm_head.{kind}"}
        for i in range(config.num_layers):
            ours, theirs = f"layers.{i}", f"model.layers.{i}"
            names |= {f"{ours}.attn.{part}.{kind}": f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"}
            names |= {
                f"{ours}.attn_norm.{kind}": f"{theirs}.input_layernorm.{kind}",
                f"{ours}.attn.o.{kind}": f"{theirs}.self_attn.dense.{kind}",
                f"{ours}.mlp.{kind[0]}_in": f"{theirs}.mlp.fc1.{kind}",
                f"{ours}.mlp.{kind[0]}_out": f"{theirs}.mlp.fc2.{kind}",
            }
    return {ours: layouts.whole(shapes[ours], theirs) for ours, theirs in names.items()}
