"""Makes the benchmark model: Mixtral's architecture with 1.15 billion random parameters, 2.3 GB of bfloat16 in HF layout.

python benchmarks/random_mixtral.py build/bench/random-mixtral
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from gatework.export.families import FAMILIES
from gatework.export.packing import TensorSpec
from gatework.export.safetensors_writer import SafetensorsWriter

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(directory: Path, seed: int = 0) -> None:
    """Write config.json and model.safetensors; weights are normal with the variance that keeps activations in range."""
    directory.mkdir(parents=True, exist_ok=True)
    family = FAMILIES["mixtral"]
    weights = family.weight_map(family.read_config(CONFIG))
    shapes = {piece.name: piece.shape for weight in weights.values() for piece in weight.pieces}
    generator = torch.Generator().manual_seed(seed)
    path = directory / "model.safetensors"
    path.unlink(missing_ok=True)
    with SafetensorsWriter(
        path, [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()], align=8
    ) as file:
        for name, shape in shapes.items():
            if len(shape) == 1:
                tensor = torch.ones(shape)
            else:
                tensor = torch.empty(shape).normal_(generator=generator).mul_(1 / math.sqrt(shape[1]))
            file.append(name, tensor.bfloat16())
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.directory / "config.json").exists():
        print(f"{args.directory} is there already")
        return
    make(args.directory, args.seed)
    print(f"wrote {args.directory}")


if __name__ == "__main__":
    main()
