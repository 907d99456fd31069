"""Switch Transformer in T5X's layout, as first published: all matrices (in, out), those of experts stacked.

Names: flaxformer's, as huggingface/transformers' conversion of the published files lists them.
"""

from __future__ import annotations

from gatework.export.config import ModelConfig
from gatework.export.families import layouts
from gatework.export.weights import Piece, Weight, WeightMap

_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}


def weight_map(config: ModelConfig) -> WeightMap:
    """Where T5X keeps every canonical weight."""
    assert config.encoder is not None
    shapes = config.tensor_shapes()
    names = {"embed.weight": "target.token_embedder.embedding"}
    turned = {} if config.tie_embeddings else {"lm_head.weight": "target.decoder.logits_dense.kernel"}
    weights: WeightMap = {}
    for ours, kind, stack in (("encoder.", "encoder", config.encoder), ("", "decoder", config)):
        theirs = f"target.{kind}"
        names[f"{ours}norm.weight"] = f"{theirs}.{kind}_norm.scale"
        turned[f"{ours}relative_bias.weight"] = f"{theirs}.relpos_bias.rel_embedding"
        has_cross = bool(stack.encoder_layers)
        parts = {"attn": "self_attention" if has_cross else "attention"}
        norms = {"attn_norm": f"pre_{parts['attn']}_layer_norm", "ffn_norm": "pre_mlp_layer_norm"}
        if has_cross:
            parts["cross"], norms["cross_norm"] = "encoder_decoder_attention", "pre_cross_attention_layer_norm"
        for i in range(stack.num_layers):
            layer, block = f"{ours}layers.{i}", f"{theirs}.layers_{i}"
            names |= {f"{layer}.{a}.weight": f"{block}.{b}.scale" for a, b in norms.items()}
            products = ((a, b, *part) for a, b in parts.items() for part in _ATTENTION.items())
            turned |= {f"{layer}.{a}.{p}.weight": f"{block}.{b}.{name}.kernel" for a, b, p, name in products}
            if stack.has_experts(i):
                turned[f"{layer}.moe.router.weight"] = f"{block}.mlp.router.router_weights.w.kernel"
                weights |= _mlp(stack, f"{layer}.moe", f"{block}.mlp.expert", stack.moe.num_experts if stack.moe else 0)
            else:
                weights |= _mlp(stack, f"{layer}.mlp", f"{block}.mlp", 0)
    for name, theirs in turned.items():
        rows, columns = shapes[name]
        weights[name] = Weight((rows, columns), (Piece(name=theirs, shape=(columns, rows), transpose=True),))
    return weights | {ours: layouts.whole(shapes[ours], theirs) for ours, theirs in names.items()}


def _mlp(stack: ModelConfig, ours: str, theirs: str, experts: int) -> WeightMap:
    """One MLP, or so many experts stacked: gate and up, or up alone, and down."""
    D, I, G = stack.hidden_size, stack.intermediate_size, stack.matrices
    lead = (experts,) if experts else ()
    places: list[tuple[int, int] | None] = [(e, e + 1) for e in range(experts)] or [None]

    def pieces(parts: tuple[str, ...], shape: tuple[int, int]) -> tuple[Piece, ...]:
        return tuple(
            Piece(name=f"{theirs}.{part}.kernel", shape=(*lead, *shape), rows=rows, transpose=True)
            for rows in places
            for part in parts
        )

    up = ("wi_0", "wi_1") if G == 2 else ("wi",)
    return {
        f"{ours}.w_in": Weight((*lead, G * I, D), pieces(up, (D, I))),
        f"{ours}.w_out": Weight((*lead, D, I), pieces(("wo",), (I, D))),
    }
