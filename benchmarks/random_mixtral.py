"""Makes the benchmark models: 1.1 to 1.2 billion random parameters, 2.2 to 2.3 GB of bfloat16 in HF layout.

    python benchmarks/random_mixtral.py build/bench/random-mixtral
    python benchmarks/random_mixtral.py build/bench/random-dbrx --shape dbrx

mixtral: 8 experts, 2 chosen. dbrx: the same sizes in 16 experts of half the width, 4 chosen. llama: dense, TinyLlama's shape.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from gatework.export.families import FAMILIES
from gatework.export.packing import TensorSpec
from gatework.export.safetensors_writer import SafetensorsWriter

COMMON = {"dtype": "bfloat16", "vocab_size": 32000, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = COMMON | {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": LLAMA
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "mixtral-8gb": LLAMA
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "num_hidden_layers": 12,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "llama": LLAMA
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "dbrx": COMMON
    | {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "d_model": 1024,
        "n_heads": 16,
        "n_layers": 12,
        "max_seq_len": 32768,
        "rope_theta": 5e5,
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8, "rope_theta": 5e5},
        "ffn_config": {"ffn_hidden_size": 1792, "moe_num_experts": 16, "moe_top_k": 4},
    },
}


def make(directory: Path, shape: str, seed: int = 0) -> None:
    """Write config.json and model.safetensors; weights are normal with the variance that keeps activations in range."""
    directory.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape]
    family = FAMILIES[config["model_type"]]
    weights = family.weight_map(family.read_config(config))
    shapes = {piece.name: piece.shape for weight in weights.values() for piece in weight.pieces}
    generator = torch.Generator().manual_seed(seed)
    path = directory / "model.safetensors"
    path.unlink(missing_ok=True)
    with SafetensorsWriter(
        path, [TensorSpec(name, torch.bfloat16, size) for name, size in shapes.items()], align=8
    ) as file:
        for name, size in shapes.items():
            if len(size) == 1:
                tensor = torch.ones(size)
            else:
                tensor = torch.empty(size).normal_(generator=generator).mul_(1 / math.sqrt(size[1]))
            file.append(name, tensor.bfloat16())
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="mixtral")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.directory / "config.json").exists():
        print(f"{args.directory} is there already")
        return
    make(args.directory, args.shape, args.seed)
    print(f"wrote {args.directory}")


if __name__ == "__main__":
    main()
