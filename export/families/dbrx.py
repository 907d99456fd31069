"""DBRX: LayerNorm without bias, clipped QKV, and sixteen experts of which four are taken."""

from __future__ import annotations

from typing import Any

from gatework.export.config import ModelConfig, MoEConfig
from gatework.export.families import hf, layouts
from gatework.export.families.fields import Fields
from gatework.export.weights import WeightMap
from gatework.plugins.errors import GateworkError


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose model_type is "dbrx".

    Raises GateworkError naming the field that is missing, wrong, or asks for a feature that Gatework does not have.
    """
    fields = Fields(raw)
    hf.refuse_architecture(fields, ("DbrxForCausalLM",))
    fields.refuse_unless("quantization_config")
    attention = fields.nested("attn_config")
    num_heads, hidden_size = fields.integer("n_heads"), fields.integer("d_model")
    moe, intermediate_size = read_experts(fields.nested("ffn_config"))
    return ModelConfig(
        family="dbrx",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=fields.integer("n_layers"),
        num_heads=num_heads,
        num_kv_heads=attention.integer("kv_n_heads", 1),
        head_dim=hf.head_dim(fields, hidden_size, num_heads),
        max_position_embeddings=fields.integer("max_seq_len"),
        norm="layer",
        norm_eps=1e-5,
        rope_theta=rope_theta(fields, attention),
        qkv_clip=attention.number("clip_qkv", None),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        moe=moe,
        dtype=hf.dtype(fields),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def read_experts(ffn: Fields) -> tuple[MoEConfig, int]:
    """Routing and expert width. `moe_normalize_expert_weights` is the p of the norm that scores are divided by."""
    ffn.nested("ffn_act_fn").refuse_unless("name", "silu")
    ffn.refuse_unless("uniform_expert_assignment", False)
    ffn.refuse_unless("moe_normalize_expert_weights", 1)
    renormalize = ffn.raw.get("moe_normalize_expert_weights", 1) is not None  # missing means 1
    moe = MoEConfig(num_experts=ffn.integer("moe_num_experts"), top_k=ffn.integer("moe_top_k"), renormalize=renormalize)
    return moe, ffn.integer("ffn_hidden_size")


def rope_theta(fields: Fields, attention: Fields) -> float:
    """RoPE base from `attn_config`. transformers 5 reads `rope_parameters` instead: the two have to agree."""
    theta: float | None = attention.number("rope_theta", None)
    other = hf.rope_theta(fields, 1e4 if theta is None else theta)
    if theta is None or other == theta:
        return other
    ours = attention.label("rope_theta")
    theirs = "rope_theta" if fields.raw.get("rope_theta") is not None else "rope_parameters.rope_theta"
    raise GateworkError(
        f"config fields {ours} and {theirs} differ",
        got=f"{theta} and {other}",
        expected="one base",
        fix="write the one that the model was trained with into both: "
        f"{theta} for DBRX as released and for what transformers 4 made of it, {other} for a model trained by "
        f"transformers 5, which reads {theirs} alone and takes 10000.0 where a config has none there",
    )


def weight_map(config: ModelConfig) -> WeightMap:
    """Where a DBRX checkpoint keeps every canonical weight: QKV fused, all experts of a layer stacked."""
    shapes = config.tensor_shapes()
    names = layouts.ends(config, "transformer.wte.weight", "transformer.norm_f.weight")
    weights: WeightMap = {}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.blocks.{i}"
        names |= {
            f"{ours}.attn_norm.weight": f"{theirs}.norm_attn_norm.norm_1.weight",
            f"{ours}.attn.o.weight": f"{theirs}.norm_attn_norm.attn.out_proj.weight",
            f"{ours}.ffn_norm.weight": f"{theirs}.norm_attn_norm.norm_2.weight",
            f"{ours}.moe.router.weight": f"{theirs}.ffn.router.layer.weight",
        }
        weights |= layouts.fused_qkv(config, ours, f"{theirs}.norm_attn_norm.attn.Wqkv")
        experts = (f"{theirs}.ffn.experts.mlp.{part}" for part in ("w1", "v1", "w2"))
        weights |= layouts.stacked_experts(config, ours, *experts)
    return weights | {ours: layouts.whole(shapes[ours], theirs) for ours, theirs in names.items()}
