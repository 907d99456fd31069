"""A writer of T5X checkpoints, from OpenMoE's Hugging Face layout: a zarr folder for each parameter, matrices (in, out)."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {  # Hugging Face -> T5X, part by part
    "model.embed_tokens.weight": "token_embedder.embedding",
    "model.norm.weight": "decoder.decoder_norm.scale",
    "lm_head.weight": "decoder.logits_dense.kernel",
    "model.layers.": "decoder.layers_",
    "self_attn.q_proj.weight": "self_attention.query.kernel",
    "self_attn.k_proj.weight": "self_attention.key.kernel",
    "self_attn.v_proj.weight": "self_attention.value.kernel",
    "self_attn.o_proj.weight": "self_attention.out.kernel",
    "input_layernorm.weight": "pre_self_attention_layer_norm.scale",
    "post_attention_layernorm.weight": "pre_mlp_layer_norm.scale",
    "pre_extra_mlp_layernorm.weight": "pre_extra_mlp_layer_norm.scale",
    "mlp.gate_weight": "mlp.router.router_weights.w.kernel",
    "mlp.experts.wi_gate": "mlp.expert.wi_0.kernel",
    "mlp.experts.wi_up": "mlp.expert.wi_1.kernel",
    "mlp.experts.wo": "mlp.expert.wo.kernel",
    "gate_proj.weight": "wi_0.kernel",
    "up_proj.weight": "wi_1.kernel",
    "down_proj.weight": "wo.kernel",
}


def write_t5x(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """Write the checkpoint, with config.json beside its parameters and a folder of the optimiser's; returns the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensor in tensors.items():
        theirs = name
        for before, after in NAMES.items():
            theirs = theirs.replace(before, after)
        turned = theirs.endswith("kernel") and tensor.ndim == 2
        array = tensor.T if turned else tensor
        write_zarr(folder / f"target.{theirs}", array, tuple(-(-n * 2 // 3) for n in array.shape))
    write_zarr(folder / "state.param_states.decoder.decoder_norm.scale.v", np.zeros(3, np.float32), (3,))
    return folder


def write_zarr(folder: Path, array: np.ndarray, chunks: tuple[int, ...], *, compressed: bool = True) -> None:
    """What TensorStore writes; the last chunks are filled up."""
    folder.mkdir()
    header = {"chunks": list(chunks), "compressor": {"id": "gzip", "level": 1} if compressed else None}
    header |= {
        "dtype": array.dtype.str if array.dtype.kind == "f" else array.dtype.name,
        "fill_value": None,
        "filters": None,
    }
    header |= {"order": "C", "shape": list(array.shape), "zarr_format": 2, "dimension_separator": "."}
    (folder / ".zarray").write_text(json.dumps(header))
    for index in itertools.product(*(range(-(-n // c)) for n, c in zip(array.shape, chunks, strict=True))):
        part = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunks, strict=True))]
        chunk = np.zeros(chunks, array.dtype)
        chunk[tuple(slice(0, n) for n in part.shape)] = part
        content = chunk.tobytes()
        (folder / ".".join(map(str, index))).write_bytes(gzip.compress(content, 1) if compressed else content)
