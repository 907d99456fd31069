"""Ways in which checkpoints lay out their weights, shared by the families."""

from __future__ import annotations

from gatework.export.config import ModelConfig
from gatework.export.weights import Piece, Weight, WeightMap


def whole(shape: tuple[int, ...], name: str, rope_heads: int = 0) -> Weight:
    """A weight that is one tensor of the checkpoint, in the same shape."""
    return Weight(shape, (Piece(name=name, shape=shape, rope_heads=rope_heads),))


def ends(config: ModelConfig, embed: str, norm: str) -> dict[str, str]:
    """Names of the embedding, of the norm after the last layer and, unless tied, of the head; those of layers come on top."""
    names = {"embed.weight": embed, "norm.weight": norm}
    return names if config.tie_embeddings else names | {"lm_head.weight": "lm_head.weight"}


def mlp(config: ModelConfig, ours: str, gate: str, up: str, down: str) -> WeightMap:
    """Dense feed-forward weights of layer `ours`: gate and up [I, D], down [D, I], I the width of dense layers."""
    return gated(f"{ours}.mlp", config.hidden_size, config.mlp_width, gate, up, down)


def gated(ours: str, D: int, I: int, gate: str, up: str, down: str) -> WeightMap:
    """`{ours}.w_in` from gate and up [I, D], and `{ours}.w_out` from down [D, I]."""
    w_in = tuple(Piece(name=name, shape=(I, D)) for name in (gate, up))
    return {f"{ours}.w_in": Weight((2 * I, D), w_in), f"{ours}.w_out": whole((D, I), down)}


def fused_qkv(config: ModelConfig, ours: str, name: str) -> WeightMap:
    """q, k and v of layer `ours`: row ranges of the fused matrix `{name}.weight`, in that order, and of its bias."""
    D, q = config.hidden_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    total, columns = q + 2 * kv, {"weight": (D,), "bias": ()} if config.bias else {"weight": (D,)}
    ranges = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, total)}
    return {
        f"{ours}.attn.{part}.{kind}": Weight(
            (b - a, *rest), (Piece(name=f"{name}.{kind}", shape=(total, *rest), rows=(a, b)),)
        )
        for part, (a, b) in ranges.items()
        for kind, rest in columns.items()
    }


def experts(config: ModelConfig, ours: str, theirs: str, parts: tuple[str, str, str] = ("w1", "w3", "w2")) -> WeightMap:
    """Expert weights stored one by one, as `{theirs}.{e}.{part}.weight`; parts: the names of gate, up and down."""
    assert config.moe is not None
    *gate_up, down = parts
    E, D, I = config.moe.num_experts, config.hidden_size, config.intermediate_size
    w_in = [Piece(name=f"{theirs}.{e}.{part}.weight", shape=(I, D)) for e in range(E) for part in gate_up]
    w_out = [Piece(name=f"{theirs}.{e}.{down}.weight", shape=(D, I)) for e in range(E)]
    return {
        f"{ours}.moe.w_in": Weight((E, 2 * I, D), tuple(w_in)),
        f"{ours}.moe.w_out": Weight((E, D, I), tuple(w_out)),
    }


def stacked_experts(config: ModelConfig, ours: str, gate: str, up: str, down: str) -> WeightMap:
    """Expert weights in MegaBlocks' layout: three matrices [E * I, D], the down projections transposed."""
    assert config.moe is not None
    E, D, I = config.moe.num_experts, config.hidden_size, config.intermediate_size

    def expert(name: str, e: int, *, transpose: bool = False) -> Piece:
        return Piece(name=name, shape=(E * I, D), rows=(e * I, (e + 1) * I), transpose=transpose)

    w_in = tuple(expert(name, e) for e in range(E) for name in (gate, up))
    w_out = tuple(expert(down, e, transpose=True) for e in range(E))
    return {f"{ours}.moe.w_in": Weight((E, 2 * I, D), w_in), f"{ours}.moe.w_out": Weight((E, D, I), w_out)}
