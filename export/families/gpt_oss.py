"""gpt-oss 20B and 120B: learned sinks in attention, every second layer with a window, YaRN, and experts with biases and
clamped gates.

Two layouts: that of transformers, experts in bfloat16 and (in, out), and that of the release, experts in MXFP4 and (out, in).
In both the rows of gate and up projection alternate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gatework.export.config import Bias, ModelConfig, MoEConfig
from gatework.export.families import hf, layouts
from gatework.export.families.fields import Fields
from gatework.export.weights import Piece, Weight, WeightMap
from gatework.plugins.errors import GateworkError

DEFAULTS = hf.Defaults(
    architectures=("GptOssForCausalLM",),
    norm_eps=1e-5,
    rope_theta=150_000.0,
    max_position_embeddings=131_072,
    num_kv_heads=8,
)
HEAD_DIM, WINDOW, ALPHA, LIMIT = 64, 128, 1.702, 7.0
YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json` whose model_type is "gpt_oss".

    Raises GateworkError naming the field that is missing, wrong, or asks for a feature that Gatework does not have.
    """
    fields = Fields(raw)
    fields.nested("quantization_config").refuse_unless("quant_method", "mxfp4")
    if fields.raw.get("quantization_config") == {}:
        raise fields.unsupported("quantization_config", "one of quant_method mxfp4, or none")
    yarn, theta = hf.read_yarn(fields, YARN, DEFAULTS.rope_theta)
    full, window = read_layers(fields)
    plain: dict[str, Any] = {"layer_types": None, "sliding_window": window, "rope_scaling": None, "rope_theta": None}
    plain["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    config = hf.read_config(
        "gpt_oss",
        Fields({"head_dim": HEAD_DIM} | raw | plain),
        DEFAULTS,
        read_experts(fields),
        own=("attention_bias", "quantization_config"),
    )
    bias: Bias | None = "attn" if fields.flag("attention_bias", True) else None
    return replace(config, full_attention=full, attn_sinks=True, yarn=yarn, bias=bias)


def read_experts(fields: Fields) -> MoEConfig:
    """Routing and gates."""
    limit = fields.number("swiglu_limit", LIMIT)
    if not limit > 0:
        raise fields.error("swiglu_limit", limit, "a positive number")
    return MoEConfig(
        num_experts=fields.integer("num_local_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        bias=True,
        alpha=fields.number("swiglu_alpha", ALPHA),
        beta=1.0,
        limit=limit,
    )


def read_layers(fields: Fields) -> tuple[tuple[int, ...], int | None]:
    """The layers without a window, and the window of the others; the first of each two where nothing is said of layers."""
    count = fields.integer("num_hidden_layers")
    window = fields.integer("sliding_window", None if "sliding_window" in fields else WINDOW)
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        full = tuple(range(1, count, 2))
    elif not isinstance(kinds, list) or len(kinds) != count or any(kind not in _LAYER_TYPES for kind in kinds):
        raise fields.error("layer_types", kinds, f"{count} times {' or '.join(_LAYER_TYPES)}")
    else:
        full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    if len(full) == count:
        return (), None
    if window is None:
        raise fields.error("sliding_window", None, "a width, for the layers that have a window")
    return full, window


def weight_map(config: ModelConfig) -> WeightMap:
    """Where transformers keeps every canonical weight: experts stacked and (in, out)."""
    return _weight_map(config, transposed=True)


def mxfp4_weight_map(config: ModelConfig) -> WeightMap:
    """Where the release keeps every canonical weight, its experts unpacked: stacked and (out, in)."""
    if config.family != "gpt_oss":
        raise GateworkError("MXFP4 is read of gpt-oss alone", got=config.family, fix="give weights in floats")
    return _weight_map(config, transposed=False)


def _weight_map(config: ModelConfig, *, transposed: bool) -> WeightMap:
    shapes = config.tensor_shapes()
    names = layouts.ends(config, "model.embed_tokens.weight", "model.norm.weight")
    weights: WeightMap = {}
    kinds = ("weight", "bias") if config.bias is not None else ("weight",)
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        names[f"{ours}.attn_norm.weight"] = f"{theirs}.input_layernorm.weight"
        for kind in kinds:
            names |= {f"{ours}.attn.{part}.{kind}": f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkvo"}
        names[f"{ours}.attn.sinks"] = f"{theirs}.self_attn.sinks"
        names[f"{ours}.ffn_norm.weight"] = f"{theirs}.post_attention_layernorm.weight"
        names |= {f"{ours}.moe.router.{kind}": f"{theirs}.mlp.router.{kind}" for kind in ("weight", "bias")}
        names[f"{ours}.moe.b_out"] = f"{theirs}.mlp.experts.down_proj_bias"
        weights |= _experts(config, f"{ours}.moe", f"{theirs}.mlp.experts", transposed=transposed)
    return weights | {ours: layouts.whole(shapes[ours], theirs) for ours, theirs in names.items()}


def _experts(config: ModelConfig, ours: str, theirs: str, *, transposed: bool) -> WeightMap:
    """Both matrices of all experts of a layer, and the bias of the first."""
    assert config.moe is not None
    E, D, I = config.moe.num_experts, config.hidden_size, config.intermediate_size

    def pieces(name: str, rows: int, columns: int, *, interleaved: bool) -> tuple[Piece, ...]:
        shape = (E, columns, rows) if transposed else (E, rows, columns)
        return tuple(
            Piece(name=name, shape=shape, rows=(e, e + 1), transpose=transposed, interleaved=interleaved)
            for e in range(E)
        )

    w_in = pieces(f"{theirs}.gate_up_proj", 2 * I, D, interleaved=True)
    w_out = pieces(f"{theirs}.down_proj", D, I, interleaved=False)
    b_in = Piece(name=f"{theirs}.gate_up_proj_bias", shape=(E, 2 * I), interleaved=True)
    return {
        f"{ours}.w_in": Weight((E, 2 * I, D), w_in),
        f"{ours}.w_out": Weight((E, D, I), w_out),
        f"{ours}.b_in": Weight((E, 2 * I), (b_in,)),
    }
