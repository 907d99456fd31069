"""Switch Transformer: T5's encoder and decoder, with one expert per token in every second layer of both, or in every one."""

from __future__ import annotations

from typing import Any

from gatework.export.config import ModelConfig, MoEConfig
from gatework.export.families import hf, layouts
from gatework.export.families.fields import Fields
from gatework.export.weights import Piece, Weight, WeightMap

INERT: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (True,),
    "router_bias": (False,),
    "router_ignore_padding_tokens": (False,),
    "router_dtype": ("float32",),
    "quantization_config": (),
}
CONTEXT = 512  # tokens that the published models were trained on; their files do not tell
_ATTENTION = ("q", "k", "v", "o")


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose model_type is "switch_transformers".

    `expert_capacity` 0 drops no token; what is dropped otherwise adds nothing to the stream, as in transformers 5 and Mesh
    TensorFlow. Raises GateworkError naming the field that is missing, wrong, or asks for a feature that Gatework does not have.
    """
    fields = Fields(raw)
    hf.refuse_architecture(fields, ("SwitchTransformersForConditionalGeneration",))
    for key, allowed in INERT.items():
        fields.refuse_unless(key, *allowed)
    hidden_size, num_heads = fields.integer("d_model"), fields.integer("num_heads")
    gated = activation(fields)
    encoder_layers = fields.integer("num_layers")
    num_layers = fields.integer("num_decoder_layers", encoder_layers)
    tied = fields.flag("tie_word_embeddings", True)
    return ModelConfig(
        family="switch_transformers",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("d_ff"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=fields.integer("d_kv"),
        max_position_embeddings=fields.integer("n_positions", CONTEXT),
        norm_eps=fields.number("layer_norm_epsilon", 1e-6),
        relative_buckets=fields.integer("relative_attention_num_buckets", 32),
        relative_distance=fields.integer("relative_attention_max_distance", 128),
        attn_scale=1.0,
        activation="gelu_tanh" if gated else "relu",
        glu="two_way" if gated else "none",
        tie_embeddings=tied,
        logit_multiplier=hidden_size**-0.5 if tied and hidden_size > 0 else 1.0,
        moe=MoEConfig(num_experts=fields.integer("num_experts"), top_k=1, renormalize=False),
        moe_interval=interval(fields, encoder_layers, num_layers),
        sequence_capacity=fields.integer("expert_capacity", 64),
        encoder_layers=encoder_layers,
        start_token_id=fields.integer("decoder_start_token_id", fields.integer("pad_token_id", 0)),
        dtype=hf.dtype(fields),
        eos_token_ids=fields.token_ids("eos_token_id") if "eos_token_id" in fields else (1,),
    )


def activation(fields: Fields) -> bool:
    """Whether the feed-forward parts are gated."""
    fields.refuse_unless("dense_act_fn", "relu", "gated-gelu")
    return fields.raw.get("dense_act_fn") == "gated-gelu"


def interval(fields: Fields, encoder_layers: int, num_layers: int) -> int:
    """One in so many layers has experts: as many in encoder and decoder."""
    found = {}
    for key, layers in (("num_sparse_encoder_layers", encoder_layers), ("num_sparse_decoder_layers", num_layers)):
        sparse = fields.integer(key, 3)
        if not 1 <= sparse <= layers:
            raise fields.error(key, sparse, f"1 to {layers}, the layers there")
        found[key] = layers // sparse
        if found[key] > 2:
            raise fields.unsupported(key, f"experts in each of {layers} layers, or in every second one")
    if len(set(found.values())) > 1:
        raise fields.unsupported("num_sparse_decoder_layers", "as large a share of layers as in the encoder")
    return found["num_sparse_encoder_layers"]


def weight_map(config: ModelConfig) -> WeightMap:
    """Where a Hugging Face checkpoint keeps every canonical weight."""
    assert config.encoder is not None
    names = layouts.ends(config, "shared.weight", "decoder.final_layer_norm.weight")
    names["encoder.norm.weight"] = "encoder.final_layer_norm.weight"
    weights: WeightMap = {}
    for ours, theirs, stack in (("encoder.", "encoder", config.encoder), ("", "decoder", config)):
        names[f"{ours}relative_bias.weight"] = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        for i in range(stack.num_layers):
            layer, block = f"{ours}layers.{i}", f"{theirs}.block.{i}.layer"
            parts = {"attn": f"{block}.0.SelfAttention"}
            norms = {"attn_norm": f"{block}.0", "ffn_norm": f"{block}.{2 if stack.encoder_layers else 1}"}
            if stack.encoder_layers:
                parts["cross"], norms["cross_norm"] = f"{block}.1.EncDecAttention", f"{block}.1"
            names |= {f"{layer}.{a}.{p}.weight": f"{b}.{p}.weight" for a, b in parts.items() for p in _ATTENTION}
            names |= {f"{layer}.{a}.weight": f"{b}.layer_norm.weight" for a, b in norms.items()}
            weights |= _feed_forward(stack, i, layer, f"{norms['ffn_norm']}.mlp")
    shapes = config.tensor_shapes()
    return weights | {ours: layouts.whole(shapes[ours], theirs) for ours, theirs in names.items()}


def _feed_forward(stack: ModelConfig, i: int, ours: str, theirs: str) -> WeightMap:
    """The weights of a layer's MLP, or of its router and experts."""
    D, I, G = stack.hidden_size, stack.intermediate_size, stack.matrices
    up = ("wi_0", "wi_1") if G == 2 else ("wi",)
    if not stack.has_experts(i):
        w_in = tuple(Piece(name=f"{theirs}.{part}.weight", shape=(I, D)) for part in up)
        return {
            f"{ours}.mlp.w_in": Weight((G * I, D), w_in),
            f"{ours}.mlp.w_out": layouts.whole((D, I), f"{theirs}.wo.weight"),
        }
    assert stack.moe is not None
    E = stack.moe.num_experts
    experts = [f"{theirs}.experts.expert_{e}" for e in range(E)]
    return {
        f"{ours}.moe.router.weight": layouts.whole((E, D), f"{theirs}.router.classifier.weight"),
        f"{ours}.moe.w_in": Weight(
            (E, G * I, D), tuple(Piece(name=f"{e}.{part}.weight", shape=(I, D)) for e in experts for part in up)
        ),
        f"{ours}.moe.w_out": Weight((E, D, I), tuple(Piece(name=f"{e}.wo.weight", shape=(D, I)) for e in experts)),
    }
