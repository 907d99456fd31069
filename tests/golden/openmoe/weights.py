"""A tiny OpenMoE from a seed, in the layout of OrionZheng's repositories.

NumPy alone, whose RandomState's streams are frozen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SEED = 3
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,  # not heads * head_dim
    "intermediate_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
    "moe_interval": 2,
    "max_position_embeddings": 64,
}


def make(seed: int = SEED, **sizes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and tensors; sizes: those that differ from SIZES."""
    sizes = SIZES | sizes
    rng = np.random.RandomState(seed)
    V, D, I, H, Dh, E = (
        sizes[name]
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "head_dim", "num_experts")
    )

    def matrix(*shape: int, std: float = 0.15) -> np.ndarray:
        return (std * rng.standard_normal(shape)).astype(np.float32)

    def norm() -> np.ndarray:
        return 1 + matrix(D, std=0.1)

    config = {
        "architectures": ["OpenMoeForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": Dh,
        "hidden_act": "swiglu",
        "hidden_size": D,
        "intermediate_size": I,
        "max_position_embeddings": sizes["max_position_embeddings"],
        "mlp_gated": True,
        "model_type": "llama",
        "moe_layer_interval": sizes["moe_interval"],
        "num_attention_heads": H,
        "num_experts": E,
        "num_hidden_layers": sizes["num_layers"],
        "num_key_value_heads": H,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "router_capacity_factor_eval": 2.0,
        "router_min_capacity": 4,
        "router_topk": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": V,
    }
    tensors = {"model.embed_tokens.weight": matrix(V, D, std=1.0)}
    for i in range(sizes["num_layers"]):
        layer = f"model.layers.{i}"
        # no scale divides the products of q and k
        attention = {"q_proj": (H * Dh, D, 0.08), "k_proj": (H * Dh, D, 0.08), "v_proj": (H * Dh, D, 0.15)}
        attention["o_proj"] = (D, H * Dh, 0.15)
        for name, (rows, columns, std) in attention.items():
            tensors[f"{layer}.self_attn.{name}.weight"] = matrix(rows, columns, std=std)
        tensors |= {f"{layer}.{name}.weight": norm() for name in ("input_layernorm", "post_attention_layernorm")}
        has_experts = (i + 1) % sizes["moe_interval"] == 0
        if has_experts:
            tensors[f"{layer}.mlp.gate_weight"] = matrix(E, D, std=0.3)
            tensors[f"{layer}.mlp.experts.wi_gate"] = matrix(E, D, 2 * I)
            tensors[f"{layer}.mlp.experts.wi_up"] = matrix(E, D, I)
            tensors[f"{layer}.mlp.experts.wo"] = matrix(E, I, D)
            tensors[f"{layer}.pre_extra_mlp_layernorm.weight"] = norm()
        dense = f"{layer}.{'extra_mlp' if has_experts else 'mlp'}"
        tensors[f"{dense}.gate_proj.weight"] = matrix(2 * I, D)
        tensors[f"{dense}.up_proj.weight"] = matrix(I, D)
        tensors[f"{dense}.down_proj.weight"] = matrix(D, I)
    tensors |= {"model.norm.weight": norm(), "lm_head.weight": matrix(V, D)}
    return config, tensors
