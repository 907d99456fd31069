"""Writes a checkpoint of benchmarks/random_mixtral.py as GGUF, the file format of llama.cpp.

    build/peers/.venv/bin/python -m benchmarks.peers.gguf_writer build/bench/random-mixtral q8_0 random-mixtral-q8_0.gguf

Every matrix but the router is quantised, the embedding table and the head too; norms and router stay float32. Tensor names and
layouts are those of llama.cpp's convert_hf_to_gguf.py. There is no tokenizer: the benchmark speaks token ids.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

KINDS = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
LLAMA_EXPERT = re.compile(r"(.*\.block_sparse_moe\.experts)\.(\d+)\.(w\d)\.weight")
DBRX_EXPERTS = {"w1": "ffn_gate_exps", "v1": "ffn_up_exps", "w2": "ffn_down_exps"}


class Checkpoint:
    """A model.safetensors of bfloat16 tensors, memory-mapped, and its config."""

    def __init__(self, directory: Path) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        path = directory / "model.safetensors"
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._tensors = json.loads(file.read(size))
        self._tensors.pop("__metadata__", None)
        self._data = np.memmap(path, np.uint8, "r", offset=8 + size)

    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        begin, end = self._tensors[name]["data_offsets"]
        codes = self._data[begin:end].view(np.uint16).astype(np.uint32)
        return (codes << 16).view(np.float32).reshape(self._tensors[name]["shape"])


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * Dh, D] from rotary halves (j, j + Dh/2) to the pairs (2j, 2j + 1) of llama.cpp's "llama"."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def llama_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF names and values of a LLaMA or Mixtral checkpoint; experts stacked as [E, rows, columns]."""
    config = checkpoint.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name in checkpoint.names():
        if match := LLAMA_EXPERT.fullmatch(name):
            stem, expert, part = match.groups()
            if expert == "0":
                layer = stem.split(".")[2]
                pieces = [f"{stem}.{e}.{part}.weight" for e in range(config["num_local_experts"])]
                target = {"w1": "gate", "w2": "down", "w3": "up"}[part]
                yield f"blk.{layer}.ffn_{target}_exps.weight", np.stack([checkpoint.read(piece) for piece in pieces])
            continue
        tensor, kind = checkpoint.read(name), name.split(".")[-2]
        yield (
            names.get_name(name, (".weight",)) or name,
            interleaved(tensor, heads[kind]) if kind in heads else tensor,
        )


def dbrx_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF names and values of a DBRX checkpoint."""
    config = checkpoint.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DBRX, config["n_layers"])
    for name in checkpoint.names():
        tensor, kind = checkpoint.read(name), name.split(".")[-1]
        if kind in DBRX_EXPERTS:  # [E * I, D]
            tensor = tensor.reshape(config["ffn_config"]["moe_num_experts"], -1, config["d_model"])
            if kind == "w2":
                tensor = np.ascontiguousarray(tensor.swapaxes(1, 2))
            yield f"blk.{name.split('.')[2]}.{DBRX_EXPERTS[kind]}.weight", tensor
        else:
            yield names.get_name(name, (".weight",)) or name, tensor


def describe_llama(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])


def describe_dbrx(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    attention, experts = config["attn_config"], config["ffn_config"]
    writer.add_block_count(config["n_layers"])
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(config["d_model"])
    writer.add_feed_forward_length(experts["ffn_hidden_size"])
    writer.add_head_count(config["n_heads"])
    writer.add_head_count_kv(attention["kv_n_heads"])
    writer.add_rope_freq_base(attention["rope_theta"])
    writer.add_clamp_kqv(attention["clip_qkv"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_expert_count(experts["moe_num_experts"])
    writer.add_expert_used_count(experts["moe_top_k"])


ARCHITECTURES = {  # model_type -> llama.cpp's name, metadata, tensors
    "llama": ("llama", describe_llama, llama_tensors),
    "mixtral": ("llama", describe_llama, llama_tensors),
    "dbrx": ("dbrx", describe_dbrx, dbrx_tensors),
}


def encode(name: str, tensor: np.ndarray, kind: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    if tensor.ndim == 1 or "ffn_gate_inp" in name:
        return tensor, gguf.GGMLQuantizationType.F32
    return gguf.quants.quantize(tensor, KINDS[kind]), KINDS[kind]


def write(directory: Path, kind: str, path: Path) -> None:
    """The GGUF file, and beside it NAME.json with `bytes_per_token`: weight bytes that one decoded token reads."""
    checkpoint = Checkpoint(directory)
    architecture, describe, tensors = ARCHITECTURES[checkpoint.config["model_type"]]
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, architecture, use_temp_file=False)
    describe(writer, checkpoint.config)
    writer.add_vocab_size(checkpoint.config["vocab_size"])
    writer.add_tokenizer_model("none")
    read = 0.0
    chosen = checkpoint.config.get("num_experts_per_tok") or checkpoint.config.get("ffn_config", {}).get("moe_top_k", 1)
    for name, tensor in tensors(checkpoint):
        data, stored = encode(name, tensor, kind)
        writer.add_tensor(name, data, raw_dtype=stored)
        if name != "token_embd.weight":
            read += data.nbytes * (chosen / tensor.shape[0] if "_exps" in name else 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".json").write_text(json.dumps({"bytes_per_token": round(read)}))
    part.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    write(args.checkpoint, args.kind, args.out)


if __name__ == "__main__":
    main()
