"""A tiny Grok-1 from a seed, and its `ckpt-0` folder as xAI's release has it; NumPy and ml_dtypes alone.

Eleven layers, so that their lexicographic order (0, 1, 10, 2, ...) is not their numerical one. RandomState's streams are
frozen: every NumPy gives the same weights.
"""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SEED = 1
LAYERS, D, I, V, E, HEADS, KV_HEADS, HEAD_DIM = 11, 64, 88, 256, 8, 4, 2, 16
SHARDS = (
    8  # of the machine that quantised the release: where rows were split over them, every block has scales of its own
)
EMBEDDING_MULTIPLIER, OUTPUT_MULTIPLIER, ATTENTION_MULTIPLIER = 8.0, 0.5773502691896257, 0.25
CONFIG: dict[str, Any] = {  # in the vocabulary of hpcai-tech/grok-1
    "architectures": ["Grok1ModelForCausalLM"],
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": I,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "attn_output_multiplier": ATTENTION_MULTIPLIER,
    "embedding_multiplier_scale": EMBEDDING_MULTIPLIER,
    "output_multiplier_scale": OUTPUT_MULTIPLIER,
    "max_attn_value": 30.0,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "num_experts_per_tok": 2,
    "num_experts": E,
}


@dataclass
class QuantizedWeight8bit:
    """weight: [..., in, out] int8. scales: [..., groups of in, out] bfloat16."""

    weight: np.ndarray
    scales: np.ndarray


def dequantized(tensor: QuantizedWeight8bit) -> np.ndarray:
    """[..., in, out] float32."""
    rows = tensor.weight.shape[-2] // tensor.scales.shape[-2]
    return tensor.weight.astype(np.float32) * tensor.scales.astype(np.float32).repeat(rows, axis=-2)


Tensor = np.ndarray | QuantizedWeight8bit


def tensors(
    seed: int = SEED, layers: int = LAYERS, width: int = I, shards: int = SHARDS
) -> dict[tuple[str, str], Tensor]:
    """Parameters by module and name, in the order of their files. width: of experts."""
    rng = np.random.RandomState(seed)

    def normal(*shape: int, mean: float = 0.0, std: float = 0.1) -> np.ndarray:
        return (mean + std * rng.standard_normal(shape)).astype(np.float32)

    def quantized(*shape: int, groups: int = 1, std: float = 0.15) -> QuantizedWeight8bit:
        weight = rng.randint(-127, 128, shape).astype(np.int8)
        scales = std / 73 * (0.5 + rng.random_sample((*shape[:-2], groups, shape[-1])))
        return QuantizedWeight8bit(weight, scales.astype(ml_dtypes.bfloat16))

    found: dict[tuple[str, str], Tensor] = {
        ("language_model/in_out_embed", "embeddings"): normal(V, D, std=0.5),
        ("language_model/rms_norm", "scale"): normal(D, mean=1.0),
    }
    q_width, kv_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    for layer in sorted(f"decoder_layer_{i}" for i in range(layers)):
        block, attention = f"{layer}/moe", f"{layer}/multi_head_attention"
        prefix = "transformer/"
        found |= {
            (f"{prefix}{block}/linear", "w"): quantized(E, D, width),
            (f"{prefix}{block}/linear_1", "w"): quantized(E, width, D, groups=shards),
            (f"{prefix}{block}/linear_v", "w"): quantized(E, D, width),
            (f"{prefix}{attention}/key", "w"): quantized(D, kv_width, std=0.35),
            (f"{prefix}{attention}/linear", "w"): quantized(q_width, D, groups=shards),
            (f"{prefix}{attention}/query", "w"): quantized(D, q_width, std=0.35),
            (f"{prefix}{attention}/value", "w"): quantized(D, kv_width),
        }
        for norm in ("rms_norm", "rms_norm_1", "rms_norm_2", "rms_norm_3"):
            found[f"{prefix}{layer}/{norm}", "scale"] = normal(D, mean=1.0)
        found[f"{prefix}{layer}/router", "w"] = normal(D, E, std=0.3)
    return found


def dumps(tensor: Tensor) -> bytes:
    """As the release pickled it: the class was the script's own."""
    main, name = sys.modules["__main__"], QuantizedWeight8bit.__qualname__
    before, module = getattr(main, name, None), QuantizedWeight8bit.__module__
    setattr(main, name, QuantizedWeight8bit)
    QuantizedWeight8bit.__module__ = "__main__"
    try:
        return pickle.dumps(tensor, protocol=4)
    finally:
        QuantizedWeight8bit.__module__ = module
        delattr(main, name) if before is None else setattr(main, name, before)


def write_ckpt(folder: Path, parameters: dict[tuple[str, str], Tensor], config: dict[str, Any] | None = CONFIG) -> Path:
    """Write `ckpt-0` into the folder, and a config.json beside it; returns the folder."""
    files = folder / "ckpt-0"
    files.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=1))
    for i, tensor in enumerate(parameters.values()):
        (files / f"tensor{i:05d}_000").write_bytes(dumps(tensor))
    return folder
