"""Writers of every public checkpoint format, from the Hugging Face checkpoints that tests/checkpoints.py makes.

The bits of the weights never change, only names, row order and files do. The formats follow the published releases and
share no code with the readers under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import TABLE, new_folder

Tensors = dict[str, Tensor]


def formats_of(model: str) -> list[str]:
    """The keys of FORMATS in which this model is published."""
    model_type, _ = TABLE[model]
    own = {
        "llama": ["meta", "meta-mp2"],
        "mistral": ["meta", "consolidated"],
        "mixtral": ["meta", "consolidated", "stacked"],
    }
    return ["sharded", "bin", "sharded-bin", *own.get(model_type, [])]


def convert(path: Path, file_format: str) -> Path:
    """Write the checkpoint at `path` in another format, a key of FORMATS, to a new folder beside it."""
    out = new_folder(path.parent, file_format)
    config = json.loads((path / "config.json").read_text())
    FORMATS[file_format](config, load_file(path / "model.safetensors"), out)
    return out


def write_json(path: Path, value: Any) -> None:
    """Indented, as the hub's files are."""
    path.write_text(json.dumps(value, indent=2))


def split(tensors: Tensors, count: int) -> list[Tensors]:
    """Disjoint parts of a state dict."""
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[i::count]} for i in range(count)]


# ---- Hugging Face


def write_sharded(
    config: dict[str, Any], tensors: Tensors, out: Path, stem: str, save: Callable[[Tensors, Path], None]
) -> None:
    """Three shards and their index."""
    write_json(out / "config.json", config)
    first, suffix = stem.split(".")
    weight_map: dict[str, str] = {}
    for i, part in enumerate(split(tensors, 3)):
        name = f"{first}-{i + 1:05d}-of-00003.{suffix}"
        save(part, out / name)
        weight_map |= dict.fromkeys(part, name)
    write_json(out / f"{stem}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_safetensors_shards(config: dict[str, Any], tensors: Tensors, out: Path) -> None:
    """model-0000N-of-00003.safetensors."""
    write_sharded(config, tensors, out, "model.safetensors", save_file)


def write_bin_shards(config: dict[str, Any], tensors: Tensors, out: Path) -> None:
    """pytorch_model-0000N-of-00003.bin."""
    write_sharded(config, tensors, out, "pytorch_model.bin", torch.save)


def write_bin(config: dict[str, Any], tensors: Tensors, out: Path) -> None:
    """pytorch_model.bin, with the rotary tables that old files hold."""
    write_json(out / "config.json", config)
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    torch.save(tensors | tables, out / "pytorch_model.bin")


# ---- Meta and Mistral

META_NAMES = {  # Hugging Face -> Meta and Mistral
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "block_sparse_moe": "feed_forward",
}


def to_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows (j, j + Dh/2) of every head to adjacent rows (2j, 2j + 1)."""
    rows, columns = tensor.shape
    return tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).clone()


def meta_tensors(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """The weights under Meta's names, with query and key rows ordered for rotation of adjacent pairs."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    renamed = {}
    for name, tensor in tensors.items():
        kind = name.split(".")[-2]
        meta_name = name
        for theirs, ours in META_NAMES.items():
            meta_name = meta_name.replace(theirs, ours)
        renamed[meta_name] = to_pairs(tensor, heads[kind]) if kind in heads else tensor
    return renamed


def params(config: dict[str, Any]) -> dict[str, Any]:
    """params.json as Meta (LLaMA) or Mistral would write it."""
    D, H, Hkv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    fields = {"dim": D, "n_layers": config["num_hidden_layers"], "n_heads": H, "norm_eps": config["rms_norm_eps"]}
    if config.get("head_dim") not in (None, D // H):
        fields["head_dim"] = config["head_dim"]
    if Hkv != H:
        fields["n_kv_heads"] = Hkv
    if config["model_type"] == "llama":
        return fields | meta_params(config)
    fields |= {"hidden_dim": config["intermediate_size"], "vocab_size": config["vocab_size"]}
    if config["sliding_window"] is not None:
        fields["sliding_window"] = config["sliding_window"]
    if "num_local_experts" in config:
        E, K = config["num_local_experts"], config["num_experts_per_tok"]
        fields["moe"] = {"num_experts_per_tok": K, "num_experts": E}
    return fields


def meta_params(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that only Meta has: no vocabulary size, and a formula for the feed-forward width."""
    D, I = config["hidden_size"], config["intermediate_size"]
    fields = {"vocab_size": -1, "multiple_of": I, "ffn_dim_multiplier": 1.0 if int(8 * D / 3) <= I else 0.5}
    theta = config["rope_parameters"]["rope_theta"]
    return fields if theta == 1e4 else fields | {"rope_theta": theta}


def write_meta(config: dict[str, Any], tensors: Tensors, out: Path, count: int = 1) -> None:
    """consolidated.NN.pth in `count` model-parallel shards: matrices cut by rows or columns, norms in every shard."""
    write_json(out / "params.json", params(config))
    for i in range(count):
        shard = {"rope.freqs": torch.ones(4)}
        for name, tensor in meta_tensors(config, tensors).items():
            dim = 1 if any(part in name for part in ("wo.", "w2.", "tok_embeddings.")) else 0
            shard[name] = tensor if tensor.dim() == 1 else tensor.chunk(count, dim)[i].contiguous()
        torch.save(shard, out / f"consolidated.{i:02d}.pth")


def write_meta_mp2(config: dict[str, Any], tensors: Tensors, out: Path) -> None:
    """Two model-parallel shards."""
    write_meta(config, tensors, out, 2)


def write_consolidated(config: dict[str, Any], tensors: Tensors, out: Path) -> None:
    """consolidated.safetensors, as Mistral publishes."""
    write_json(out / "params.json", params(config))
    save_file(meta_tensors(config, tensors), out / "consolidated.safetensors")


def write_stacked(config: dict[str, Any], tensors: Tensors, out: Path) -> None:
    """Mixtral's original files: disjoint consolidated.NN.pt, all experts of a layer in one matrix, w2 transposed."""
    names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"]
    names += ["vocab_size", "rms_norm_eps", "num_local_experts", "num_experts_per_tok", "head_dim"]
    fields = {name: config[name] for name in names if config.get(name) is not None}
    write_json(out / "params.json", fields | {"rope_theta": config["rope_parameters"]["rope_theta"]})
    meta = meta_tensors(config, tensors)
    others = {name: tensor for name, tensor in meta.items() if ".experts." not in name}
    stacked = {name.replace("feed_forward", "block_sparse_moe"): tensor for name, tensor in others.items()}
    for i in range(config["num_hidden_layers"]):
        for matrix in ("w1", "w2", "w3"):
            prefix = f"layers.{i}.feed_forward.experts"
            parts = [meta[f"{prefix}.{e}.{matrix}.weight"] for e in range(config["num_local_experts"])]
            rows = [part.t() if matrix == "w2" else part for part in parts]
            stacked[f"layers.{i}.block_sparse_moe.{matrix}"] = torch.cat(rows)
    for i, part in enumerate(split(stacked, 3)):
        torch.save(part, out / f"consolidated.{i:02d}.pt")


FORMATS: dict[str, Callable[[dict[str, Any], Tensors, Path], None]] = {
    "sharded": write_safetensors_shards,
    "bin": write_bin,
    "sharded-bin": write_bin_shards,
    "meta": write_meta,
    "meta-mp2": write_meta_mp2,
    "consolidated": write_consolidated,
    "stacked": write_stacked,
}
