"""The engine directory's contract between the exporter that writes it and the runtime that reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gatework.plugins.machine import usable_cpus

FORMAT_VERSION = 2  # 1: caches of CPU engines were float32
MANIFEST = "manifest.json"
FALLBACK = "fallback.onnx"  # of a CPU engine: the graph for machines without the CPU kernels' library
ENCODER = "encoder.onnx"  # of an encoder-decoder model; reads the same weight files as model.onnx
PLAN, ENCODER_PLAN = "model.plan", "encoder.plan"  # of TensorRT engines
# What a decoder reads of its encoder: cross.{layer}.k and .v, and the lengths of the prompts.
CROSS, SOURCE_LENGTHS = "cross", "source_lengths"
KERNELS = "kernels"  # a folder in an engine: compiled GPU kernels
CHECKPOINT = "checkpoint"  # a folder in a portable model: files that it shares with the checkpoint it was made from
# Of a portable model inside the checkpoint's own folder: names that no reader of a checkpoint looks for, the graph last.
IN_PLACE = ("model.onnx.weights", "model.onnx.experts", ENCODER, "model.onnx")
MAX_HEAD = 8 << 20  # bytes of a shared file, those before its weights, that are hashed at most

CACHE_DTYPE = "cache_dtype"  # field of the manifest: the type of cached keys and values, a name of PyTorch's
STAGES = "stages"  # field of a staged engine's manifest: layers [first, end) and weight_bytes of each stage
KEPT = "kept"  # field of the manifest: weights that have the checkpoint's own codes -> neighbours that share a scale, 0: a row

# Files that make a tokenizer; the builder copies those that a checkpoint has, the runtime reads them from the engine.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "cl100k_base.tiktoken",
    "qwen.tiktoken",
)

# Fields of manifest.json and the types that they must have.
MANIFEST_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "gatework_version": str,
    "target": str,
    "precision": str,
    "model": dict,  # ModelConfig.to_dict()
    "limits": dict,  # max_batch, max_seq, prefill_chunk
    "toolchain": dict,  # package -> version used for the build
    "plugin_version": int,
    "checkpoint": dict,  # fingerprint, num_parameters, num_active_parameters
    CACHE_DTYPE: str,
    "weight_bytes": dict,  # total, per_token: bytes of packed weights; those that one decoded token reads
    "tensors": dict,  # name -> dtype, shape, file of every packed weight
    "files": dict,  # name, kernels/name, checkpoint/name or stage0/name ... -> size, sha256; head, if not of the whole file
}


def kept_choices(router: str) -> str:
    """Name of which of a token's choices were kept, by that of the router's logits."""
    return f"{router.removesuffix('router')}kept"


def layer_taps(layer: int, model: Mapping[str, Any]) -> list[str]:
    """Values of a layer that every ONNX graph names, in order of computation; model: `ModelConfig.to_dict()`.

    `layers.{i}.context`: what the heads read from the cache, before the output projection; `attention`: after it;
    `residual`: the stream with it; `router`: logits, and `experts`, and `shared`, or `mlp`: what the feed-forward part adds;
    `cross_context`, `cross_attention`, `cross_residual`: the same of attention to the encoder's output, where there is one;
    `routed`: the stream with that, and `extra`: what an MLP after the experts adds; `output`: the stream after all.
    """
    moe = model["moe"]
    branches, extra = ["mlp"], []
    dense = (layer + 1) % (model.get("moe_interval") or 1) or layer in model.get("dense_layers", ())
    if moe is not None and not dense:
        branches = ["router", "experts", *(["shared"] if moe.get("shared_width") is not None else [])]
        extra = ["routed", "extra"] if model.get("extra_mlp") else []
    cross = ["cross_context", "cross_attention", "cross_residual"] if model.get("encoder_layers") else []
    names = ("context", "attention", "residual", *cross, *branches, *extra, "output")
    return [f"layers.{layer}.{name}" for name in names]


TAP_OUTPUT = ".float32"  # follows a tap's name where an output gives it as float32


def graph_taps(model: Mapping[str, Any]) -> list[str]:
    """Values of a whole graph that verification compares, in order of computation; model: `ModelConfig.to_dict()`."""
    layers = (layer_taps(i, model) for i in range(model["num_layers"]))
    return ["embedding", *(name for names in layers for name in names)]


def encoder_taps(model: Mapping[str, Any]) -> list[str]:
    """Values of an encoder's graph that verification compares, in order of computation; none where there is no encoder.

    Those of `graph_taps` after "encoder."; and of each layer `key` and `value`, [B, S, Hkv * Dh], which are in no cache; and
    `encoder.norm`: the stream after the last norm.
    """
    count = model.get("encoder_layers") or 0
    stack = {**model, "encoder_layers": 0}
    layers = ([f"layers.{i}.key", f"layers.{i}.value", *layer_taps(i, stack)] for i in range(count))
    names = ["embedding", *(name for names in layers for name in names), "norm"] if count else []
    return [f"{ENCODER_TAPS}{name}" for name in names]


ENCODER_TAPS = "encoder."  # before the names of what an encoder's graph computes
CROSS_CACHE = ("cross_key", "cross_value")  # of a decoder layer: what it reads of the encoder


def tap_name(layer: int | None, tensor: str) -> str:
    """The value's name in its graph; tensor: "context", or "encoder.context" of an encoder's layer."""
    stack, dot, value = tensor.rpartition(".")
    return tensor if layer is None else f"{stack}{dot}layers.{layer}.{value}"


def tap_place(name: str) -> tuple[int | None, str]:
    """Layer and tensor of a value; inverse of `tap_name`."""
    stack, inside, rest = name.rpartition("layers.")
    layer, _, value = rest.partition(".")
    return (int(layer), stack + value) if inside else (None, name)


def of_source(tensor: str) -> bool:
    """Whether the tensor's rows are tokens that an encoder reads, and not the decoder's."""
    return tensor.startswith(ENCODER_TAPS) or tensor in CROSS_CACHE


def stage_folder(number: int) -> str:
    """The folder in an engine that holds graph and weights of a stage."""
    return f"stage{number}"


def stage_input(layer: int) -> str:
    """What a stage whose first layer is this one takes from the stage before it, [B, S, D]."""
    return f"layers.{layer - 1}.output"


def sha256(path: Path, head: int | None = None) -> str:
    """Hex digest of a file's content, or of its first `head` bytes."""
    with path.open("rb") as file:
        if head is not None:
            return hashlib.sha256(file.read(head)).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_table(directory: Path, names: list[str], heads: Mapping[str, int] | None = None) -> dict[str, dict[str, Any]]:
    """Size and digest of each file, in the form of the manifest's `files`.

    heads: files of which only so many bytes are hashed.
    """
    heads = heads or {}
    with ThreadPoolExecutor(max_workers=usable_cpus()) as pool:
        digests = pool.map(lambda name: sha256(directory / name, heads.get(name)), names)
    return {
        name: {"size": (directory / name).stat().st_size, "sha256": digest}
        | ({"head": heads[name]} if name in heads else {})
        for name, digest in zip(names, digests, strict=True)
    }
