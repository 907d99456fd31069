"""Mistral's and Meta's own release format: `params.json` beside `consolidated.*` files.

Three vocabularies share it: Meta's (`dim`, `multiple_of`), Mistral's (`dim`, `hidden_dim`, `moe`), and the one of
Mixtral's stacked files, which has Hugging Face's field names. Query and key rows are stored for rotation of adjacent
pairs, and are brought to halves here.
"""

from __future__ import annotations

from typing import Any

from gatework.export.config import MAX_SIZE, ModelConfig, MoEConfig
from gatework.export.families import hf, layouts
from gatework.export.families.fields import Fields
from gatework.export.weights import WeightMap

# Names of this format -> names of a Hugging Face config.
HF_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}
SAME_NAMES = {
    *("vocab_size", "head_dim", "rope_theta", "sliding_window", "num_local_experts", "num_experts_per_tok"),
    *("bos_token_id", "eos_token_id", "torch_dtype", "dtype", "hidden_act"),
}
META_NAMES = {"multiple_of", "ffn_dim_multiplier"}
IGNORED = {"max_batch_size", "model_type", "architectures", "router_aux_loss_coef", "output_router_logits", "use_cache"}
IGNORED |= {"transformers_version", "initializer_range", "attention_dropout", "pad_token_id", "_name_or_path"}
INERT: dict[str, tuple[Any, ...]] = {"use_biases": (False,), "use_scaled_rope": (False,), "causal": (True,)}


def read_config(raw: dict[str, Any], vocab_rows: int | None = None) -> ModelConfig:
    """ModelConfig of a `params.json`.

    vocab_rows: rows of the stored embedding, for Meta's files whose vocab_size is -1.

    The file states neither the token ids of the SentencePiece tokenizer that all these models share (bos 1, eos 2) nor
    the trained length: 32768 for Mistral's, 16384 for Code Llama (theta 1e6), 2048 for LLaMA 1 (eps 1e-6), else 4096.
    Raises GateworkError naming the field that is missing, wrong, unknown or not supported.
    """
    fields = Fields(raw)
    refuse_unknown(fields)
    theirs = {name: raw[name] for name in SAME_NAMES if name in raw}
    theirs |= {hf_name: raw[name] for name, hf_name in HF_NAMES.items() if name in raw}
    theirs |= {hf_name: raw[hf_name] for hf_name in HF_NAMES.values() if hf_name in raw}
    meta = "intermediate_size" not in theirs
    theirs["vocab_size"] = vocabulary(fields, vocab_rows)
    if meta:
        theirs["intermediate_size"] = meta_intermediate_size(fields)
    theirs["sliding_window"] = sliding_window(fields)
    family, moe = ("llama" if meta else "mistral"), read_moe(fields)
    if moe is not None:
        family = "mixtral"
    # Mistral's rule at Mixtral's release: without a window the base is 1e6. Meta's is 1e4 wherever the file is silent.
    theta = 1e6 if not meta and theirs["sliding_window"] is None else 1e4
    length = trained_length(meta, fields.number("rope_theta", theta), fields.number("norm_eps", 1e-5))
    defaults = hf.Defaults(
        architectures=(), norm_eps=1e-5, rope_theta=theta, max_position_embeddings=length, num_kv_heads=None
    )
    theirs = {"bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16"} | theirs
    labels = {hf_name: name for name, hf_name in HF_NAMES.items() if hf_name not in raw}
    return hf.read_config(family, Fields(theirs, labels=labels), defaults, moe)


def refuse_unknown(fields: Fields) -> None:
    """Raise for a field that this reader does not know: it may be a feature."""
    known = {*HF_NAMES, *HF_NAMES.values(), *SAME_NAMES, *META_NAMES, *IGNORED, *INERT, "moe"}
    for name in fields.raw:
        if name not in known:
            raise fields.unsupported(name, "no such field")
    for name, allowed in INERT.items():
        fields.refuse_unless(name, *allowed)


def vocabulary(fields: Fields, rows: int | None) -> int:
    """vocab_size, or the embedding's rows where the file says -1."""
    size: int = fields.integer("vocab_size")
    if size == -1 and rows is None:
        raise fields.error("vocab_size", -1, "a size: give the checkpoint folder, whose embedding tells it")
    return rows if size == -1 and rows is not None else size


def meta_intermediate_size(fields: Fields) -> int:
    """Feed-forward width by Meta's formula: 2/3 of 4D, times a multiplier, rounded up to a multiple."""
    multiple: int = fields.integer("multiple_of")
    if multiple < 1:
        raise fields.error("multiple_of", multiple, "at least 1")
    dim: int = fields.integer("dim")
    if not 1 <= dim <= MAX_SIZE:
        raise fields.error("dim", dim, f"1 to {MAX_SIZE}")
    width = int(2 * 4 * dim / 3)
    multiplier = fields.number("ffn_dim_multiplier", 1.0)
    if not 0 < multiplier < 1e6:
        raise fields.error("ffn_dim_multiplier", multiplier, "a positive number")
    return -(-int(width * multiplier) // multiple) * multiple


def sliding_window(fields: Fields) -> int | None:
    """The window as an int, a string, null, or a list with one entry per layer, which all have to be the same."""
    window = fields.raw.get("sliding_window")
    if isinstance(window, list):
        if not window or any(entry != window[0] for entry in window):
            raise fields.unsupported("sliding_window", "the same window in every layer")
        window = window[0]
    if isinstance(window, str) and window.isascii() and window.isdigit():
        window = int(window)
    return Fields({"sliding_window": window}).integer("sliding_window", None)


def read_moe(fields: Fields) -> MoEConfig | None:
    """Routing: a nested `moe` object (Mistral), or Hugging Face's two fields at the top level."""
    if fields.raw.get("moe") is not None:
        moe = fields.nested("moe")
        for name in moe.raw:
            if name not in ("num_experts", "num_experts_per_tok"):
                raise moe.unsupported(name, "no such field")
        return MoEConfig(num_experts=moe.integer("num_experts"), top_k=moe.integer("num_experts_per_tok"))
    if "num_local_experts" in fields:
        return MoEConfig(num_experts=fields.integer("num_local_experts"), top_k=fields.integer("num_experts_per_tok"))
    return None


def trained_length(meta: bool, theta: float, norm_eps: float) -> int:
    """Context length, which params.json leaves out."""
    if not meta:
        return 32_768
    if theta == 1e6:
        return 16_384
    return 2048 if norm_eps == 1e-6 else 4096


def weight_map(config: ModelConfig, *, stacked_experts: bool) -> WeightMap:
    """Where `consolidated.*` files keep every canonical weight, their model-parallel shards already joined.

    stacked_experts: the layout with all experts of a layer in one matrix, instead of one matrix per expert.
    """
    shapes = config.tensor_shapes()
    names = {"embed.weight": "tok_embeddings.weight", "norm.weight": "norm.weight"}
    if not config.tie_embeddings:
        names["lm_head.weight"] = "output.weight"
    weights: WeightMap = {}
    for layer in (f"layers.{i}" for i in range(config.num_layers)):
        names[f"{layer}.attn_norm.weight"] = f"{layer}.attention_norm.weight"
        names |= {f"{layer}.attn.{part}.weight": f"{layer}.attention.w{part}.weight" for part in "vo"}
        names[f"{layer}.ffn_norm.weight"] = f"{layer}.ffn_norm.weight"
        for part, heads in {"q": config.num_heads, "k": config.num_kv_heads}.items():
            ours = f"{layer}.attn.{part}.weight"
            weights[ours] = layouts.whole(shapes[ours], f"{layer}.attention.w{part}.weight", heads)
        if config.moe is None:
            parts = (f"{layer}.feed_forward.{part}.weight" for part in ("w1", "w3", "w2"))
            weights |= layouts.mlp(config, layer, *parts)
        elif stacked_experts:
            names[f"{layer}.moe.router.weight"] = f"{layer}.block_sparse_moe.gate.weight"
            parts = (f"{layer}.block_sparse_moe.{part}" for part in ("w1", "w3", "w2"))
            weights |= layouts.stacked_experts(config, layer, *parts)
        else:
            names[f"{layer}.moe.router.weight"] = f"{layer}.feed_forward.gate.weight"
            weights |= layouts.experts(config, layer, f"{layer}.feed_forward.experts")
    return weights | {ours: layouts.whole(shapes[ours], theirs) for ours, theirs in names.items()}
