"""Qwen's first generation: biases where q, k and v are made, and two ways of going beyond the length it was trained on.

Beyond it a prompt rotates by a base that grows with its length (dynamic NTK), and queries grow with the logarithm of their
position.
"""

from __future__ import annotations

from typing import Any

from gatework.export.config import ModelConfig
from gatework.export.families import hf, layouts
from gatework.export.families.fields import Fields
from gatework.export.weights import WeightMap

# Names of August 2023, and those that took their place.
RENAMED = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "padded_vocab_size": "vocab_size",
}
INERT: dict[str, tuple[Any, ...]] = {
    "no_bias": (True,),
    "rotary_pct": (1,),
    "pos_emb": ("rotary",),
    "activation": ("swiglu",),
    "scale_attn_weights": (True,),
    "quantization_config": (),
}


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of the `config.json` of a repository with its own code, whose model_type is "qwen".

    Raises GateworkError naming the field that is missing, wrong, or asks for a feature that Gatework does not have.
    """
    fields = with_new_names(raw)
    hf.refuse_architecture(fields, ("QWenLMHeadModel",))
    for key, allowed in INERT.items():
        fields.refuse_unless(key, *allowed)
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    trained = fields.integer("seq_length")
    return ModelConfig(
        family="qwen",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=half(fields, "intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim(fields, hidden_size, num_heads),
        max_position_embeddings=fields.integer("max_position_embeddings", trained),
        norm_eps=fields.number("layer_norm_epsilon", 1e-6),
        rope_theta=fields.number("rotary_emb_base", 1e4),
        ntk_length=trained if fields.flag("use_dynamic_ntk", True) else None,
        logn_length=trained if fields.flag("use_logn_attn", True) else None,
        bias="qkv",
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=hf.dtype(fields),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def with_new_names(raw: dict[str, Any]) -> Fields:
    """The fields under the names of later files; where a file has both, they have to agree."""
    renamed = {new: raw[old] for old, new in RENAMED.items() if raw.get(old) is not None}
    for name, value in renamed.items():
        if raw.get(name) not in (None, value):
            raise Fields(raw).error(name, raw[name], f"{value}, as under its older name")
    return Fields(raw | renamed)


def half(fields: Fields, key: str) -> int:
    """The file gives the sum of the widths of two branches."""
    width: int = fields.integer(key)
    if width % 2:
        raise fields.error(key, width, "an even number: the widths of gate and up together")
    return width // 2


def head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    """Head width, which `kv_channels` says again."""
    width = hf.head_dim(fields, hidden_size, num_heads)
    channels = fields.integer("kv_channels", width)
    if channels != width:
        raise fields.unsupported("kv_channels", f"hidden_size {hidden_size} / {num_heads} heads")
    return width


def weight_map(config: ModelConfig) -> WeightMap:
    """Where a Qwen checkpoint keeps every canonical weight: QKV fused, w2 the gate and w1 what it multiplies."""
    shapes = config.tensor_shapes()
    names = layouts.ends(config, "transformer.wte.weight", "transformer.ln_f.weight")
    weights: WeightMap = {}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        names |= {
            f"{ours}.attn_norm.weight": f"{theirs}.ln_1.weight",
            f"{ours}.attn.o.weight": f"{theirs}.attn.c_proj.weight",
            f"{ours}.ffn_norm.weight": f"{theirs}.ln_2.weight",
        }
        weights |= layouts.fused_qkv(config, ours, f"{theirs}.attn.c_attn")
        weights |= layouts.mlp(config, ours, *(f"{theirs}.mlp.{part}.weight" for part in ("w2", "w1", "c_proj")))
    return weights | {ours: layouts.whole(shapes[ours], theirs) for ours, theirs in names.items()}
