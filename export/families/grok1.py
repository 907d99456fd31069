"""Grok-1: sandwich norms, capped attention logits, multipliers around a tied embedding, and experts gated by GELU.

Two layouts: that of `hpcai-tech/grok-1` (Hugging Face), and xAI's own `ckpt-0`, which see in `gatework.export.ckpt`.
The semantics are those of xAI's JAX code: scores are the softmax over all experts, not renormalised and not capped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gatework.export.config import ModelConfig, MoEConfig
from gatework.export.families import hf, layouts
from gatework.export.families.fields import Fields
from gatework.export.weights import Piece, Weight, WeightMap
from gatework.plugins.errors import GateworkError

ARCHITECTURES = ("Grok1ModelForCausalLM", "Grok1ForCausalLM")
PUBLISHED: dict[str, Any] = {  # xAI's run.py, in hpcai's vocabulary; ckpt-0 comes without a config
    "vocab_size": 131_072,
    "hidden_size": 6144,
    "intermediate_size": 32_768,
    "num_hidden_layers": 64,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "attn_output_multiplier": 0.08838834764831845,
    "max_attn_value": 30.0,
    "embedding_multiplier_scale": 78.38367176906169,
    "output_multiplier_scale": 0.5773502691896257,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
_NORMS = {"attn_norm": "pre_attn_norm", "attn_post_norm": "post_attn_norm"}
_NORMS |= {"ffn_norm": "pre_moe_norm", "ffn_post_norm": "post_moe_norm"}
_CKPT_NORMS = {"attn_norm": "rms_norm", "attn_post_norm": "rms_norm_1"}
_CKPT_NORMS |= {"ffn_norm": "rms_norm_2", "ffn_post_norm": "rms_norm_3"}
_EMBEDDINGS, _NORM = "language_model/in_out_embed/embeddings", "language_model/rms_norm/scale"
_CKPT_LAYER = (
    *("moe/linear/w", "moe/linear_1/w", "moe/linear_v/w"),
    *(f"multi_head_attention/{part}/w" for part in ("key", "linear", "query", "value")),
    *(f"{norm}/scale" for norm in _CKPT_NORMS.values()),
    "router/w",
)


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose model_type is "grok-1", or of one without, as hpcai's is.

    Raises GateworkError naming the field that is missing, wrong, or asks for a feature that Gatework does not have.
    """
    fields = Fields(raw)
    hf.refuse_architecture(fields, ARCHITECTURES)
    fields.refuse_unless("quantization_config")
    fields.refuse_unless("sliding_window")
    fields.refuse_unless("tie_word_embeddings", True)
    fields.refuse_unless("hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh")
    num_heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    moe = MoEConfig(
        num_experts=fields.integer("num_experts", fields.integer("num_local_experts", None)),
        top_k=fields.integer("num_experts_per_tok"),
        renormalize=False,
    )
    return ModelConfig(
        family="grok-1",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=hf.head_dim(fields, hidden_size, num_heads),
        max_position_embeddings=fields.integer("max_position_embeddings", PUBLISHED["max_position_embeddings"]),
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        rope_theta=hf.rope_theta(fields, 1e4),
        attn_scale=fields.number("attn_output_multiplier", None),
        attn_softcap=fields.number("max_attn_value", 30.0),
        post_norms=True,
        activation="gelu_tanh",
        embed_multiplier=fields.number("embedding_multiplier_scale", 1.0),
        logit_multiplier=fields.number("output_multiplier_scale", 1.0),
        tie_embeddings=True,
        moe=moe,
        dtype=hf.dtype(fields),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def weight_map(config: ModelConfig) -> WeightMap:
    """Where hpcai's port keeps every canonical weight."""
    shapes = config.tensor_shapes()
    names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.scale"}
    weights: WeightMap = {}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        names |= {f"{ours}.{norm}.weight": f"{theirs}.{name}.scale" for norm, name in _NORMS.items()}
        names |= {f"{ours}.attn.{part}.weight": f"{theirs}.attn.{part}_proj.weight" for part in "qkvo"}
        names[f"{ours}.moe.router.weight"] = f"{theirs}.moe_block.gate.weight"
        parts = ("linear", "linear_v", "linear_1")
        weights |= layouts.experts(config, ours, f"{theirs}.moe_block.experts", parts)
    return weights | {ours: layouts.whole(shapes[ours], theirs) for ours, theirs in names.items()}


def tensor_names(layers: int) -> list[str]:
    """What the files of `ckpt-0` hold, in their order: layers are sorted by name, 0, 1, 10, ..., 19, 2, 20, ..."""
    names = sorted(f"decoder_layer_{i}" for i in range(layers))
    return [_EMBEDDINGS, _NORM, *(f"{layer}/{name}" for layer in names for name in _CKPT_LAYER)]


def ckpt_config(raw: dict[str, Any] | None, names: Sequence[str]) -> ModelConfig:
    """ModelConfig of `ckpt-0` files, from a `config.json` beside them or as published; names: of the tensors there are."""
    config = read_config(PUBLISHED if raw is None else raw)
    if list(names) != tensor_names(config.num_layers):
        got, fix = f"files of {(len(names) - 2) // 12}", "put the config.json of another size beside them"
        raise GateworkError("ckpt-0 has another number of layers", got=got, expected=config.num_layers, fix=fix)
    return config


def ckpt_weight_map(config: ModelConfig) -> WeightMap:
    """Where `ckpt-0` keeps every canonical weight: matrices transposed, experts stacked."""
    assert config.moe is not None
    shapes = config.tensor_shapes()
    E, D, I = config.moe.num_experts, config.hidden_size, config.intermediate_size
    names = {"embed.weight": _EMBEDDINGS, "norm.weight": _NORM}
    weights: WeightMap = {}

    def transposed(name: str, rows: int, columns: int) -> Weight:
        return Weight((columns, rows), (Piece(name=name, shape=(rows, columns), transpose=True),))

    def expert(name: str, e: int, rows: int, columns: int) -> Piece:
        return Piece(name=name, shape=(E * rows, columns), rows=(e * rows, (e + 1) * rows), transpose=True)

    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"decoder_layer_{i}"
        names |= {f"{ours}.{norm}.weight": f"{theirs}/{name}/scale" for norm, name in _CKPT_NORMS.items()}
        for part, name in {"q": "query", "k": "key", "v": "value", "o": "linear"}.items():
            columns, rows = shapes[f"{ours}.attn.{part}.weight"]
            weights[f"{ours}.attn.{part}.weight"] = transposed(f"{theirs}/multi_head_attention/{name}/w", rows, columns)
        weights[f"{ours}.moe.router.weight"] = transposed(f"{theirs}/router/w", D, E)
        gate_up = (f"{theirs}/moe/linear/w", f"{theirs}/moe/linear_v/w")
        w_in = tuple(expert(name, e, D, I) for e in range(E) for name in gate_up)
        w_out = tuple(expert(f"{theirs}/moe/linear_1/w", e, I, D) for e in range(E))
        weights |= {f"{ours}.moe.w_in": Weight((E, 2 * I, D), w_in), f"{ours}.moe.w_out": Weight((E, D, I), w_out)}
    return weights | {ours: layouts.whole(shapes[ours], theirs) for ours, theirs in names.items()}
