"""Tiny random checkpoints of models that transformers does not have, in the layouts that their publishers chose.

Written out name by name, sharing no code with the readers under test. That the decoder computes what the publishers' own code
does is shown by tests/export/test_golden.py, so that here it stands in for a model of transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gatework.export.reference import load_decoder
from tests.golden.openmoe import weights as openmoe_weights

Made = tuple[dict[str, Any], dict[str, Tensor]]  # config.json, tensors
GROK1 = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4}
GROK1 |= {"num_kv_heads": 2, "num_experts": 8, "top_k": 2, "max_position_embeddings": 64}


class Random:
    """Draws matrices with std 0.15 and norms around 1, so that routing is far from uniform and no error hides."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, *shape: int, std: float = 0.15) -> Tensor:
        return torch.randn(shape, generator=self.generator) * std

    def norm(self, width: int) -> Tensor:
        return 1 + self.matrix(width, std=0.1)


def grok1(draw: Random, sizes: dict[str, Any]) -> Made:
    """hpcai-tech/grok-1."""
    D, I, V, H, Hkv = (
        sizes[n] for n in ("hidden_size", "intermediate_size", "vocab_size", "num_heads", "num_kv_heads")
    )
    E, Dh = sizes["num_experts"], D // H
    config = {
        "architectures": ["Grok1ModelForCausalLM"],
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": I,
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": H,
        "num_key_value_heads": Hkv,
        "attn_output_multiplier": Dh**-0.5,
        "embedding_multiplier_scale": D**0.5,
        "output_multiplier_scale": 3**-0.5,
        "max_attn_value": 5.0,  # logits of a tiny model come nowhere near 30
        "max_position_embeddings": sizes["max_position_embeddings"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "num_experts_per_tok": sizes["top_k"],
        "num_experts": E,
    }
    tensors = {"model.embed_tokens.weight": draw.matrix(V, D), "model.norm.scale": draw.norm(D)}
    for i in range(sizes["num_layers"]):
        layer = f"model.layers.{i}"
        for name in ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"):
            tensors[f"{layer}.{name}.scale"] = draw.norm(D)
        for part, heads in {"q": H, "k": Hkv, "v": Hkv}.items():
            tensors[f"{layer}.attn.{part}_proj.weight"] = draw.matrix(heads * Dh, D, std=0.25)
        tensors[f"{layer}.attn.o_proj.weight"] = draw.matrix(D, H * Dh)
        tensors[f"{layer}.moe_block.gate.weight"] = draw.matrix(E, D)
        for e in range(E):
            for part, shape in {"linear": (I, D), "linear_v": (I, D), "linear_1": (D, I)}.items():
                tensors[f"{layer}.moe_block.experts.{e}.{part}.weight"] = draw.matrix(*shape)
    return config, tensors


def openmoe(draw: Random, sizes: dict[str, Any]) -> Made:
    """OrionZheng/openmoe-8b."""
    config, tensors = openmoe_weights.make(draw.seed, **sizes)
    return config, {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}


ORIGINALS = {"grok1": (grok1, GROK1), "openmoe": (openmoe, {"hidden_size": 64})}


def write_original(path: Path, model: str, seed: int, dtype: torch.dtype, sizes: dict[str, Any]) -> None:
    """Write config.json and model.safetensors of a key of ORIGINALS."""
    make, defaults = ORIGINALS[model]
    config, tensors = make(Random(seed), defaults | sizes)
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


@dataclass(frozen=True)
class _Output:
    logits: Tensor


class OriginalModel:
    """The reference decoder, called like a model of transformers: token ids [1, S]."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.decoder = load_decoder(path, 96, all_logits=True)
        self.config = self.decoder.config

    def __call__(self, ids: Tensor) -> _Output:
        positions = torch.arange(ids.shape[1])[None]
        logits, *_ = self.decoder(ids, positions, positions[:, 0], self.decoder.empty_cache(1))
        return _Output(logits)
