"""Makers of tiny random checkpoints: every family, every public file format, any odd size.

The weights come from transformers' own classes, re-drawn so that routing is far from uniform and no error hides behind
small numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.originals import ORIGINALS, OriginalModel, write_original

# Sizes by ModelConfig's names; `make_checkpoint` takes the same names as overrides.
BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": 64,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
}
MOE: dict[str, Any] = {"num_experts": 8, "top_k": 2}
MPT: dict[str, Any] = BASE | {
    "num_kv_heads": 4,
    "intermediate_size": 256,
    "tie_embeddings": True,
    "alibi_bias_max": 8.0,
}
SIX_HEADS: dict[str, Any] = {"hidden_size": 96, "num_heads": 6, "num_kv_heads": 6, "intermediate_size": 384}
TABLE: dict[str, tuple[str, dict[str, Any]]] = {  # model -> (model_type, sizes)
    "llama1": ("llama", BASE | {"intermediate_size": 172, "num_kv_heads": 4, "norm_eps": 1e-6}),
    "llama2": ("llama", BASE),
    "codellama": ("llama", BASE | {"rope_theta": 1e6}),
    "orca2": ("llama", BASE | {"vocab_size": 131}),
    "mistral": ("mistral", BASE | {"sliding_window": 4}),
    "zephyr": ("mistral", BASE | {"sliding_window": 4}),
    "mixtral": ("mixtral", BASE | MOE | {"rope_theta": 1e6, "sliding_window": None}),
    "dbrx": ("dbrx", BASE | {"num_experts": 16, "top_k": 4, "rope_theta": 5e5, "qkv_clip": 8}),
    "qwen3": ("qwen3", BASE | {"head_dim": 32, "norm_eps": 1e-6, "tie_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", BASE | MOE | {"head_dim": 32, "norm_eps": 1e-6, "renormalize": True}),
    "olmoe": ("olmoe", BASE | MOE | {"renormalize": False, "qkv_clip": 2.0}),
    "qwen2": ("qwen2", BASE | {"norm_eps": 1e-6}),
    "qwen2_moe": ("qwen2_moe", BASE | MOE | {"norm_eps": 1e-6, "renormalize": False, "shared_width": 160}),
    "phi": ("phi", BASE | {"hidden_size": 128, "num_kv_heads": 4, "rope_dim": 16}),  # of 32
    "gpt-oss": ("gpt_oss", BASE | MOE | {"head_dim": 32, "rope_theta": 1.5e5, "sliding_window": 4}),
    "mpt": ("mpt", MPT),
    "mpt-clip": ("mpt", MPT | SIX_HEADS | {"qkv_clip": 2.0}),
}

# Of Qwen's two: experts in some layers, in names that transformers has. Two layers and four.
DENSE_FIRST: dict[str, Any] = {"mlp_only_layers": [0]}
EXPERTS_LAST: dict[str, Any] = {"num_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]}

# So that its ramp lies within the few pairs of a tiny head, and within the few positions of a test.
YARN: dict[str, Any] = {
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.1,
    "truncate": False,
    "original_max_position_embeddings": 16,
}

MODELS = (*TABLE, *ORIGINALS)

# Odd sizes that the issue asks for, one table for every test that sweeps them.
ODD: dict[str, dict[str, Any]] = {
    "one layer": {"num_layers": 1},
    "kv heads = heads": {"num_kv_heads": 4},
    "vocab 131": {"vocab_size": 131},
    "head_dim 24": {"head_dim": 24},
    "5 experts top-3": {"num_experts": 5, "top_k": 3},
}

HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "num_experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "renormalize": "norm_topk_prob",
    "shared_width": "shared_expert_intermediate_size",
    "qkv_clip": "clip_qkv",
    "tie_embeddings": "tie_word_embeddings",
}


def odd_sizes(model: str) -> dict[str, dict[str, Any]]:
    """The entries of ODD that this model can take: dense models have no experts."""
    has_experts = "num_experts" in TABLE[model][1]
    return {name: sizes for name, sizes in ODD.items() if has_experts or "num_experts" not in sizes}


def hf_config(model: str, **overrides: Any) -> transformers.PreTrainedConfig:
    """transformers' config of a TABLE entry; `overrides` use ModelConfig's names (num_experts and top_k as well)."""
    model_type, sizes = TABLE[model]
    sizes = sizes | overrides
    if model_type == "dbrx":
        return dbrx_config(sizes)
    if model_type == "mpt":
        return mpt_config(sizes)
    if model_type in ("qwen2_moe", "qwen3_moe"):
        sizes["moe_intermediate_size"] = sizes["intermediate_size"]
        sizes["intermediate_size"] *= 2  # of dense layers, of which there are none unless asked for
    if model_type == "olmoe" and "head_dim" in sizes:
        sizes["hidden_size"] = sizes.pop("head_dim") * sizes["num_heads"]
    tokens = {"eos_token_id": None} if model_type == "olmoe" else {}  # its default is beyond these vocabularies
    if model_type == "phi":
        sizes["layer_norm_eps"] = sizes.pop("norm_eps")
        width = sizes.get("head_dim", sizes["hidden_size"] // sizes["num_heads"])
        sizes["partial_rotary_factor"] = sizes.pop("rope_dim") / width
    theta = sizes.pop("rope_theta")
    names = HF_NAMES | ({"num_experts": "num_experts"} if model_type == "qwen2_moe" else {})
    fields = tokens | {names.get(name, name): value for name, value in sizes.items()}
    rope = {"rope_type": "default", "rope_theta": theta}
    if model_type == "gpt_oss":
        rope = {"rope_type": "yarn", "rope_theta": theta} | YARN
        fields |= {"swiglu_limit": 0.5}  # numbers of a tiny model come nowhere near 7
    return transformers.AutoConfig.for_model(model_type, rope_parameters=rope, **fields)


def dbrx_config(sizes: dict[str, Any]) -> transformers.DbrxConfig:
    """DBRX's nested config. Its head width is d_model / n_heads, so a `head_dim` override sets d_model."""
    sizes = dict(sizes)
    if "head_dim" in sizes:
        sizes["hidden_size"] = sizes.pop("head_dim") * sizes["num_heads"]
    assert sizes.pop("norm_eps") == 1e-5, "DBRX's epsilon is fixed"
    theta = sizes.pop("rope_theta")
    config = transformers.DbrxConfig(
        d_model=sizes.pop("hidden_size"),
        n_heads=sizes.pop("num_heads"),
        n_layers=sizes.pop("num_layers"),
        max_seq_len=sizes.pop("max_position_embeddings"),
        vocab_size=sizes.pop("vocab_size"),
        attn_config={"clip_qkv": sizes.pop("qkv_clip"), "kv_n_heads": sizes.pop("num_kv_heads"), "rope_theta": theta},
        ffn_config={
            "ffn_hidden_size": sizes.pop("intermediate_size"),
            "moe_num_experts": sizes.pop("num_experts"),
            "moe_top_k": sizes.pop("top_k"),
            "moe_normalize_expert_weights": 1.0 if sizes.pop("renormalize", True) else None,
            "moe_jitter_eps": 0,
            "moe_loss_weight": 0.05,
        },
        # transformers 5 builds RoPE from this field alone and would fall back to theta 1e4 without it
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    assert not sizes, f"DBRX has no {sorted(sizes)}"
    return config


def mpt_config(sizes: dict[str, Any]) -> transformers.MptConfig:
    """MPT's nested config. Its MLP is four times as wide as the model, and its heads share the model's width."""
    sizes = dict(sizes)
    if "head_dim" in sizes:
        sizes["hidden_size"] = sizes.pop("head_dim") * sizes["num_heads"]
    del sizes["rope_theta"], sizes["num_kv_heads"], sizes["intermediate_size"]  # they follow from the others, if any
    config = transformers.MptConfig(
        d_model=sizes.pop("hidden_size"),
        n_heads=sizes.pop("num_heads"),
        n_layers=sizes.pop("num_layers"),
        max_seq_len=sizes.pop("max_position_embeddings"),
        vocab_size=sizes.pop("vocab_size"),
        layer_norm_epsilon=sizes.pop("norm_eps"),
        tie_word_embeddings=sizes.pop("tie_embeddings"),
        attn_config={"alibi_bias_max": int(sizes.pop("alibi_bias_max")), "clip_qkv": sizes.pop("qkv_clip", None)},
    )
    assert not sizes, f"MPT has no {sorted(sizes)}"
    return config


def random_model(config: transformers.PreTrainedConfig, seed: int) -> transformers.PreTrainedModel:
    """A float32 model whose matrices are drawn with std 0.15 and whose norms lie around 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and parameter.dim() == 1 and not name.endswith("bias"):
                    parameter.normal_(1.0, 0.1)
                else:
                    parameter.normal_(0.0, 0.15)
    return model.eval()


def make_checkpoint(
    folder: Path, model: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Write a tiny random checkpoint in Hugging Face layout (safetensors) to a new subfolder of `folder`.

    model: one of MODELS. dtype: of the stored weights. overrides: sizes by ModelConfig's names, num_experts and top_k.
    """
    path = new_folder(folder, model)
    if model in ORIGINALS:
        write_original(path, model, seed, dtype, overrides)
        return path
    random_model(hf_config(model, **overrides), seed).to(dtype).save_pretrained(path)
    return path


def new_folder(folder: Path, name: str) -> Path:
    """A subfolder `name-N` that did not exist before."""
    number = 0
    while (path := folder / f"{name}-{number}").exists():
        number += 1
    path.mkdir(parents=True)
    return path


def reference_model(path: Path) -> Any:
    """transformers' float32 model of a checkpoint: eager attention, eager experts, and DBRX's RoPE base set right.

    Of what transformers does not have, the reference decoder.
    """
    if path.name.rpartition("-")[0] in ORIGINALS:
        return OriginalModel(path)
    config = transformers.AutoConfig.from_pretrained(path)
    if config.model_type == "dbrx":
        config.rope_parameters = {"rope_type": "default", "rope_theta": config.attn_config.rope_theta}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()
