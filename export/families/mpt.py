"""MPT: ALiBi in the place of rotary positions, LayerNorm without bias, fused QKV, and an MLP without a gate."""

from __future__ import annotations

import math
from typing import Any

from gatework.export.config import ModelConfig
from gatework.export.families import hf, layouts
from gatework.export.families.fields import Fields
from gatework.export.weights import WeightMap

# Options of the model and of its attention, with the values under which they do nothing.
INERT: dict[str, tuple[Any, ...]] = {
    "no_bias": (True,),
    "logit_scale": (1,),
    "norm_type": ("low_precision_layernorm", "layernorm"),
    "quantization_config": (),
}
ATTENTION_INERT: dict[str, tuple[Any, ...]] = {
    "attn_type": ("multihead_attention",),
    "alibi": (True,),
    "prefix_lm": (False,),
    "qk_ln": (False,),
    "qk_gn": (False,),
    "rope": (False,),
    "sliding_window_size": (-1,),
    "attn_logit_softcapping": (),
}
EXPANSION = 4  # of the MLP, where the config is silent


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose model_type is "mpt".

    `learned_pos_emb` means nothing beside ALiBi. The MLP's width is `expansion_ratio` times the hidden size, as in MPT's own
    code; transformers' class takes 4 whatever the file says.
    Raises GateworkError naming the field that is missing, wrong, or asks for a feature that Gatework does not have.
    """
    fields = Fields(raw)
    hf.refuse_architecture(fields, ("MPTForCausalLM", "MptForCausalLM"))
    attention = fields.nested("attn_config")
    for part, inert in ((fields, INERT), (attention, ATTENTION_INERT)):
        for key, allowed in inert.items():
            part.refuse_unless(key, *allowed)
    fields.nested("ffn_config").refuse_unless("ffn_type", "mptmlp")
    hidden_size, num_heads = fields.integer("d_model"), fields.integer("n_heads")
    head_dim = hf.head_dim(fields, hidden_size, num_heads)
    refuse_scale(attention, head_dim)
    return ModelConfig(
        family="mpt",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=mlp_width(fields, hidden_size),
        num_layers=fields.integer("n_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.integer("max_seq_len", 2048),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        alibi_bias_max=attention.number("alibi_bias_max", 8.0),
        qkv_clip=attention.number("clip_qkv", None),
        activation="gelu",
        glu="none",
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        dtype=hf.dtype(fields),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def refuse_scale(attention: Fields, head_dim: int) -> None:
    """Raise unless attention's scale is the usual one."""
    scale = attention.number("softmax_scale", None)
    if scale is not None and not math.isclose(scale * math.sqrt(head_dim), 1, rel_tol=1e-6):
        raise attention.unsupported("softmax_scale", f"1 / sqrt({head_dim})")


def mlp_width(fields: Fields, hidden_size: int) -> int:
    """A multiple of the hidden size, which may be a fraction."""
    ratio = fields.number("expansion_ratio", EXPANSION)
    if not 0 < ratio < 1e6:
        raise fields.error("expansion_ratio", ratio, "a positive number")
    return int(hidden_size * ratio)


def weight_map(config: ModelConfig) -> WeightMap:
    """Where an MPT checkpoint keeps every canonical weight."""
    shapes = config.tensor_shapes()
    names = layouts.ends(config, "transformer.wte.weight", "transformer.norm_f.weight")
    weights: WeightMap = {}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.blocks.{i}"
        names |= {
            f"{ours}.attn_norm.weight": f"{theirs}.norm_1.weight",
            f"{ours}.attn.o.weight": f"{theirs}.attn.out_proj.weight",
            f"{ours}.ffn_norm.weight": f"{theirs}.norm_2.weight",
            f"{ours}.mlp.w_in": f"{theirs}.ffn.up_proj.weight",
            f"{ours}.mlp.w_out": f"{theirs}.ffn.down_proj.weight",
        }
        weights |= layouts.fused_qkv(config, ours, f"{theirs}.attn.Wqkv")
    return weights | {ours: layouts.whole(shapes[ours], theirs) for ours, theirs in names.items()}
