"""Makes a checkpoint with a public model's true shapes and shards in kilobytes of disk: its weights are holes, read as zeros.

    python -m benchmarks.sparse_checkpoint mixtral-8x7b build/bench/sparse-mixtral

For measuring builds at full size. The configs are those of the public releases; no weights are. grok-1 has the names and shapes
of hpcai-tech's port, whose files are torch's and not safetensors; grok-1-ckpt is xAI's own ckpt-0, 770 files, 9 MB.

gpt-4-rumour is made up, for stress: it has the numbers of parameters that rumours give; no such model is known to exist.

TensorRT stores equal constants once, so a plan of zeros is smaller than a real one: --dense fills all but the experts with
random numbers, which takes gigabytes, and makes the plan as large as that of real weights.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch

from gatework.export.families import FAMILIES
from gatework.export.families.grok1 import PUBLISHED as GROK
from tests.sparse_ckpt import write_sparse_ckpt

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DBRX = {
    "architectures": ["DbrxForCausalLM"],
    "model_type": "dbrx",
    "dtype": "bfloat16",
    "d_model": 6144,
    "n_heads": 48,
    "n_layers": 40,
    "max_seq_len": 32768,
    "vocab_size": 100352,
    "tie_word_embeddings": False,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
}
MIXTRAL_8X22B = MIXTRAL | {
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "max_position_embeddings": 65536,
}
# Made up, for stress: 16 experts of 111 B and 55 B of attention, 1.8 T in all. Rumours speak of MLPs with two matrices, d to
# 4 d and back; three of 8/3 d are as many weights, and a Mixtral.
GPT_4_RUMOUR = MIXTRAL | {
    "hidden_size": 10752,
    "intermediate_size": 28672,
    "num_hidden_layers": 120,
    "num_attention_heads": 84,
    "num_key_value_heads": 84,
    "num_local_experts": 16,
    "vocab_size": 100352,
    "tie_word_embeddings": True,
}
GROK_1 = GROK | {"architectures": ["Grok1ModelForCausalLM"], "model_type": "grok-1", "dtype": "bfloat16"}
CKPT = "grok-1-ckpt"
MODELS: dict[str, tuple[dict[str, Any], int]] = {  # config, shards: of the public release, where it has safetensors
    "mixtral-8x7b": (MIXTRAL, 19),
    "mixtral-8x22b": (MIXTRAL_8X22B, 59),
    "dbrx": (DBRX, 61),
    "grok-1": (GROK_1, 65),
    "gpt-4-rumour": (GPT_4_RUMOUR, 400),
}


def make(model: str, directory: Path, *, dense: bool = False) -> None:
    """Write config.json, the shards and their index; with `dense`, numbers in place of the holes outside the experts.

    CKPT is made of holes alone, and needs no config.
    """
    if model == CKPT:
        (directory / "ckpt-0").mkdir(parents=True, exist_ok=True)
        write_sparse_ckpt(directory / "ckpt-0", linked=False)
        return
    config, count = MODELS[model]
    family = FAMILIES[config["model_type"]]
    weights = family.weight_map(family.read_config(config))
    shapes = {piece.name: piece.shape for weight in weights.values() for piece in weight.pieces}
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(count)]
    done = 0
    for name, shape in shapes.items():
        shards[min(done * count // total, count - 1)][name] = shape
        done += 2 * math.prod(shape)
    numbers = torch.randn(1 << 25, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    index = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        write_sparse(directory / name, shard, numbers if dense else None)
        index |= dict.fromkeys(shard, name)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (directory / "model.safetensors.index.json").write_text(text)


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], numbers: torch.Tensor | None) -> None:
    """A safetensors file of bfloat16 tensors whose data is one hole, or outside the experts made of `numbers`."""
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    blob = json.dumps(header).encode()
    blob += b" " * (-len(blob) % 8)
    with path.open("wb") as file:
        file.write(len(blob).to_bytes(8, "little") + blob)
        file.truncate(8 + len(blob) + end)
        for name, entry in header.items() if numbers is not None else ():
            if "experts" in name:
                continue
            start, stop = entry["data_offsets"]
            shift = zlib.crc32(name.encode()) % len(numbers)  # no two tensors alike
            data = numbers.roll(shift).view(torch.uint8).numpy().tobytes()
            file.seek(8 + len(blob) + start)
            while start < stop:
                start += file.write(data[: stop - start])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=[*MODELS, CKPT])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dense", action="store_true", help="random numbers outside the experts")
    args = parser.parse_args()
    make(args.model, args.directory, dense=args.dense)
    print(f"wrote {args.directory}")


if __name__ == "__main__":
    main()
