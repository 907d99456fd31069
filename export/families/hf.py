"""What Hugging Face checkpoints in LLaMA's vocabulary have in common: config fields and tensor names."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from gatework.export.config import Dtype, ModelConfig, MoEConfig
from gatework.export.families import layouts
from gatework.export.families.fields import Fields
from gatework.export.weights import WeightMap
from gatework.export.yarn import YarnConfig
from gatework.plugins.errors import GateworkError

# Features of other models that share these config files, with the values under which they do nothing.
INERT: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
    "use_qk_norm": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "embedding_multiplier": (1,),
    "attention_multiplier": (),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
}

_ROPE_FIELDS = ("rope_type", "type", "partial_rotary_factor")
_YARN_FIELDS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What transformers assumes of a family where its config file is silent."""

    architectures: tuple[str, ...]
    norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    num_kv_heads: int | None  # None: as many as query heads
    sliding_window: int | None = None


def read_config(
    family: str, fields: Fields, defaults: Defaults, moe: MoEConfig | None = None, *, own: tuple[str, ...] = ()
) -> ModelConfig:
    """ModelConfig of a config in LLaMA's vocabulary. own: fields of `INERT` that the family reads itself.

    Raises GateworkError naming the field that is missing, wrong, or asks for a feature that Gatework does not have.
    """
    refuse_architecture(fields, defaults.architectures)
    for key, allowed in INERT.items():
        if key not in own:
            fields.refuse_unless(key, *allowed)
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    silent_kv_heads = num_heads if "num_key_value_heads" in fields else defaults.num_kv_heads or num_heads
    window = fields.integer("sliding_window", None if "sliding_window" in fields else defaults.sliding_window)
    return ModelConfig(
        family=family,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", silent_kv_heads),
        head_dim=head_dim(fields, hidden_size, num_heads),
        max_position_embeddings=fields.integer(
            "max_position_embeddings", fields.integer("max_sequence_length", defaults.max_position_embeddings)
        ),
        norm_eps=fields.number("rms_norm_eps", defaults.norm_eps),
        rope_theta=rope_theta(fields, defaults.rope_theta, partial="partial_rotary_factor" in own),
        sliding_window=layer_window(fields, window),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        moe=moe,
        dtype=dtype(fields),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def read_experts(fields: Fields) -> MoEConfig:
    """Routing of Qwen3-MoE and OLMoE. The number of experts has two names: files of transformers 5 may have the second."""
    given = {fields.integer(name, None) for name in ("num_experts", "num_local_experts")} - {None}
    if len(given) > 1:
        both = " and ".join(map(str, sorted(given)))
        raise fields.error("num_experts", both, "the same number in num_local_experts")
    num_experts = given.pop() if given else fields.integer("num_experts")
    renormalize = fields.flag("norm_topk_prob", False)
    return MoEConfig(num_experts=num_experts, top_k=fields.integer("num_experts_per_tok"), renormalize=renormalize)


def with_dense_layers(config: ModelConfig, raw: dict[str, Any]) -> ModelConfig:
    """With those layers of Qwen's that have no experts, whose width is the file's `intermediate_size`."""
    fields = Fields(raw)
    listed = raw.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(i) is int for i in listed):
        raise fields.error("mlp_only_layers", listed, "a list of numbers of layers")
    found = replace(
        config, moe_interval=fields.integer("decoder_sparse_step", 1), dense_layers=tuple(sorted(set(listed)))
    )
    if found.moe_layers == found.num_layers:
        return found
    return replace(found, dense_width=fields.integer("intermediate_size"))


def refuse_architecture(fields: Fields, known: tuple[str, ...]) -> None:
    """Raise where `architectures` names another class: OpenMoE, for one, calls its model_type "llama"."""
    names = fields.raw.get("architectures") or []
    if not isinstance(names, list) or any(name not in known for name in names):
        raise fields.unsupported("architectures", " or ".join(known))


def head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    """Head width: `head_dim`, or hidden_size / num_heads where the config leaves it to that."""
    width: int | None = fields.integer("head_dim", None)
    if width is not None:
        return width
    if num_heads < 1:
        raise GateworkError(
            "the config's number of attention heads is wrong",
            got=num_heads,
            expected="at least 1",
            fix="check the checkpoint's config",
        )
    if hidden_size % num_heads:
        raise fields.error("head_dim", None, f"a value: hidden_size {hidden_size} is no multiple of {num_heads} heads")
    return hidden_size // num_heads


def rope_theta(fields: Fields, default: float, *, partial: bool = False) -> float:
    """RoPE base from `rope_parameters` (transformers 5) or from the top level (before); scaled kinds are refused.

    partial: heads may rotate in part, see `rotary_part`.
    """
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.nested(key)
        for kind in ("rope_type", "type"):
            rope.refuse_unless(kind, "default")
        if not partial:
            rope.refuse_unless("partial_rotary_factor", 1)
        for name in rope.raw:
            if name not in ("rope_type", "type", "rope_theta", "partial_rotary_factor"):
                raise rope.unsupported(name, "unscaled rotary embedding")
    return _of_rope(fields, "rope_theta", default)


def read_yarn(fields: Fields, silent: dict[str, Any], default: float) -> tuple[YarnConfig | None, float]:
    """YaRN, or none where rotation is plain, and the base; what holds where nothing is said: `silent`, and `default`."""
    given = [key for key in ("rope_scaling", "rope_parameters") if fields.raw.get(key) is not None]
    if len(given) > 1:
        raise fields.error("rope_scaling", "it and rope_parameters", "one of the two")
    rope = fields.nested(given[0]) if given else Fields(silent)
    kind = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    if kind == "default":
        return None, rope_theta(fields, default)
    if kind != "yarn":
        raise rope.unsupported("rope_type", "yarn or default")
    rope.refuse_unless("partial_rotary_factor", 1)
    base = ("rope_theta",) if given == ["rope_parameters"] else ()
    for name, value in rope.raw.items():
        if name not in (*_ROPE_FIELDS, *_YARN_FIELDS, *base) and value is not None:
            raise rope.unsupported(name, "none")
    factor = rope.number("factor")
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    yarn = YarnConfig(
        factor=factor,
        original_length=rope.integer("original_max_position_embeddings"),
        fast=rope.number("beta_fast", 32.0),
        slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.number("attention_factor", usual),
        truncate=rope.flag("truncate", True),
    )
    return yarn, _of_rope(fields, "rope_theta", default)


def rotary_part(fields: Fields, default: float) -> float:
    """The share of a head that rotates, under either name as well."""
    part = _of_rope(fields, "partial_rotary_factor", default)
    if not 0 < part <= 1:
        raise fields.error("partial_rotary_factor", part, "above 0, at most 1")
    return part


def _of_rope(fields: Fields, name: str, default: float) -> float:
    given = {fields.number(name, None), fields.nested("rope_parameters").number(name, None)} - {None}
    if len(given) > 1:
        both = " and ".join(map(str, sorted(given)))
        raise fields.error(name, both, "one value at the top level and in rope_parameters")
    return given.pop() if given else default


def layer_window(fields: Fields, window: int | None) -> int | None:
    """The sliding window, checked against `layer_types` where newer files carry it; every layer has to be the same."""
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        return window
    if isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds):
        return None
    if window is not None and isinstance(kinds, list) and all(kind == "sliding_attention" for kind in kinds):
        return window
    raise fields.unsupported("layer_types", "the same attention in every layer")


def dtype(fields: Fields) -> Dtype:
    """dtype of the stored weights: `dtype` (transformers 5) or `torch_dtype` (before); else float32."""
    key = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    name = str(fields.raw.get(key) or "float32").removeprefix("torch.")
    if name not in get_args(Dtype):
        raise fields.unsupported(key, " or ".join(get_args(Dtype)))
    return cast(Dtype, name)


def weight_map(config: ModelConfig) -> WeightMap:
    """Where a Hugging Face checkpoint, dense or like Mixtral, keeps every canonical weight."""
    return _weight_map(config, "block_sparse_moe", ("w1", "w3", "w2"))


def projections_weight_map(config: ModelConfig) -> WeightMap:
    """The same where experts are named like a dense MLP: `mlp.experts.{e}.gate_proj`, `.up_proj` and `.down_proj`."""
    return _weight_map(config, "mlp", ("gate_proj", "up_proj", "down_proj"))


def _weight_map(config: ModelConfig, moe: str, expert_parts: tuple[str, str, str]) -> WeightMap:
    shapes = config.tensor_shapes()
    names = layouts.ends(config, "model.embed_tokens.weight", "model.norm.weight")
    weights: WeightMap = {}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        names[f"{ours}.attn_norm.weight"] = f"{theirs}.input_layernorm.weight"
        names |= {f"{ours}.attn.{part}.weight": f"{theirs}.self_attn.{part}_proj.weight" for part in "qkvo"}
        if config.bias is not None:
            names |= {f"{ours}.attn.{part}.bias": f"{theirs}.self_attn.{part}_proj.bias" for part in "qkv"}
        if config.qk_norm is not None:
            names |= {f"{ours}.attn.{part}_norm.weight": f"{theirs}.self_attn.{part}_norm.weight" for part in "qk"}
        names[f"{ours}.ffn_norm.weight"] = f"{theirs}.post_attention_layernorm.weight"
        if config.moe is None or not config.has_experts(i):
            parts = (f"{theirs}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
            weights |= layouts.mlp(config, ours, *parts)
        else:
            names[f"{ours}.moe.router.weight"] = f"{theirs}.{moe}.gate.weight"
            weights |= layouts.experts(config, ours, f"{theirs}.{moe}.experts", expert_parts)
            if config.moe.shared_width is not None:
                names[f"{ours}.moe.shared.router.weight"] = f"{theirs}.{moe}.shared_expert_gate.weight"
                parts = (f"{theirs}.{moe}.shared_expert.{part}.weight" for part in expert_parts)
                weights |= layouts.gated(f"{ours}.moe.shared", config.hidden_size, config.moe.shared_width, *parts)
    return weights | {ours: layouts.whole(shapes[ours], theirs) for ours, theirs in names.items()}
