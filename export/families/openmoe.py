"""OpenMoE: T5-style attention without a scale, three-way gates, and experts in every n-th layer, with a dense MLP after them.

Two layouts: that of OrionZheng's repositories, whose configs call the model "llama", and T5X's.

The published code drops what is beyond an expert's capacity, counted over all tokens of a step, so that a token's result
depends on its company in the batch. ModelConfig says by how much, and drops none unless its `drop_tokens` is set.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gatework.export.config import ModelConfig, MoEConfig
from gatework.export.families import hf, layouts
from gatework.export.families.fields import Fields
from gatework.export.weights import Piece, Weight, WeightMap

ARCHITECTURES = ("OpenMoeForCausalLM",)
DEFAULTS = hf.Defaults(
    architectures=ARCHITECTURES,
    norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=2048,
    num_kv_heads=None,
)


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose architecture is OpenMoeForCausalLM.

    Raises GateworkError naming the field that is missing, wrong, or asks for a feature that Gatework does not have.
    """
    fields = Fields(raw)
    fields.refuse_unless("hidden_act", "swiglu")
    fields.refuse_unless("mlp_gated", True)
    fields.refuse_unless("sliding_window")
    moe = MoEConfig(
        num_experts=fields.integer("num_experts"), top_k=fields.integer("router_topk", 2), renormalize=False
    )
    config = hf.read_config("openmoe", Fields(raw | {"hidden_act": None}), DEFAULTS, moe)
    drops = fields.flag("router_drop_tks", True)
    return replace(
        config,
        attn_scale=1.0,
        glu="three_way",
        moe_interval=fields.integer("moe_layer_interval"),
        extra_mlp=True,
        expert_capacity=fields.number("router_capacity_factor_eval", 2.0) if drops else 0.0,
        min_expert_capacity=fields.integer("router_min_capacity", 4) if drops else 0,
    )


def weight_map(config: ModelConfig) -> WeightMap:
    """Where the checkpoint keeps every canonical weight: dense matrices (out, in), those of experts stacked and (in, out)."""
    shapes = config.tensor_shapes()
    names = layouts.ends(config, "model.embed_tokens.weight", "model.norm.weight")
    weights: WeightMap = {}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        names[f"{ours}.attn_norm.weight"] = f"{theirs}.input_layernorm.weight"
        names |= {f"{ours}.attn.{part}.weight": f"{theirs}.self_attn.{part}_proj.weight" for part in "qkvo"}
        names[f"{ours}.ffn_norm.weight"] = f"{theirs}.post_attention_layernorm.weight"
        if not config.has_experts(i):
            weights |= _mlp(config, f"{ours}.mlp", f"{theirs}.mlp")
            continue
        names[f"{ours}.moe.router.weight"] = f"{theirs}.mlp.gate_weight"
        names[f"{ours}.extra_norm.weight"] = f"{theirs}.pre_extra_mlp_layernorm.weight"
        weights |= _experts(config, f"{ours}.moe", f"{theirs}.mlp.experts")
        weights |= _mlp(config, f"{ours}.extra_mlp", f"{theirs}.extra_mlp")
    return weights | {ours: layouts.whole(shapes[ours], theirs) for ours, theirs in names.items()}


def _mlp(config: ModelConfig, ours: str, theirs: str) -> WeightMap:
    """Dense feed-forward weights: both halves of the gate [2I, D], up [I, D], down [D, I]."""
    D, I = config.hidden_size, config.intermediate_size
    gate, up = f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"
    w_in = (Piece(name=gate, shape=(2 * I, D)), Piece(name=up, shape=(I, D)))
    return {
        f"{ours}.w_in": Weight((3 * I, D), w_in),
        f"{ours}.w_out": layouts.whole((D, I), f"{theirs}.down_proj.weight"),
    }


def _experts(config: ModelConfig, ours: str, theirs: str) -> WeightMap:
    """All experts of a layer: gates [E, D, 2I], up [E, D, I], down [E, I, D]."""
    assert config.moe is not None
    E, D, I = config.moe.num_experts, config.hidden_size, config.intermediate_size

    def expert(part: str, e: int, rows: int, columns: int) -> Piece:
        return Piece(name=f"{theirs}.{part}", shape=(E, rows, columns), rows=(e, e + 1), transpose=True)

    gate_up = {"wi_gate": 2 * I, "wi_up": I}
    w_in = tuple(expert(part, e, D, width) for e in range(E) for part, width in gate_up.items())
    w_out = tuple(expert("wo", e, I, D) for e in range(E))
    return {f"{ours}.w_in": Weight((E, 3 * I, D), w_in), f"{ours}.w_out": Weight((E, D, I), w_out)}


_T5X_NORMS = {"attn_norm": "pre_self_attention_layer_norm", "ffn_norm": "pre_mlp_layer_norm"}
_T5X_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}


def t5x_weight_map(config: ModelConfig) -> WeightMap:
    """Where T5X keeps every canonical weight: all matrices (in, out), those of experts stacked."""
    assert config.moe is not None
    shapes = config.tensor_shapes()
    E, D, I = config.moe.num_experts, config.hidden_size, config.intermediate_size
    names = {"embed.weight": "target.token_embedder.embedding", "norm.weight": "target.decoder.decoder_norm.scale"}
    turned = {} if config.tie_embeddings else {"lm_head.weight": "target.decoder.logits_dense.kernel"}
    weights: WeightMap = {}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"target.decoder.layers_{i}"
        names |= {f"{ours}.{norm}.weight": f"{theirs}.{name}.scale" for norm, name in _T5X_NORMS.items()}
        attention = {f"{ours}.attn.{part}.weight": name for part, name in _T5X_ATTENTION.items()}
        turned |= {weight: f"{theirs}.self_attention.{name}.kernel" for weight, name in attention.items()}
        if config.has_experts(i):
            turned[f"{ours}.moe.router.weight"] = f"{theirs}.mlp.router.router_weights.w.kernel"
            names[f"{ours}.extra_norm.weight"] = f"{theirs}.pre_extra_mlp_layer_norm.scale"
            weights |= _t5x_mlp(f"{ours}.moe", f"{theirs}.mlp.expert", E, D, I)
        dense = "extra_mlp" if config.has_experts(i) else "mlp"
        weights |= _t5x_mlp(f"{ours}.{dense}", f"{theirs}.{dense}", 0, D, I)
    for name, theirs in turned.items():
        rows, columns = shapes[name]
        weights[name] = Weight((rows, columns), (Piece(name=theirs, shape=(columns, rows), transpose=True),))
    return weights | {ours: layouts.whole(shapes[ours], theirs) for ours, theirs in names.items()}


def _t5x_mlp(ours: str, theirs: str, experts: int, D: int, I: int) -> WeightMap:
    """Both halves of the gate, up and down, of one MLP, or of so many experts stacked."""

    def pieces(parts: dict[str, tuple[int, int]]) -> tuple[Piece, ...]:
        stacked = (experts,) if experts else ()
        places: list[tuple[int, int] | None] = [(e, e + 1) for e in range(experts)]
        return tuple(
            Piece(name=f"{theirs}.{part}.kernel", shape=(*stacked, *shape), rows=rows, transpose=True)
            for rows in places or [None]
            for part, shape in parts.items()
        )

    lead = (experts,) if experts else ()
    w_in = pieces({"wi_0": (D, 2 * I), "wi_1": (D, I)})
    return {
        f"{ours}.w_in": Weight((*lead, 3 * I, D), w_in),
        f"{ours}.w_out": Weight((*lead, D, I), pieces({"wo": (I, D)})),
    }
