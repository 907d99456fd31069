"""Writers of T5X checkpoints, from the Hugging Face layouts of OpenMoE and Switch Transformer.

A zarr folder for each parameter, matrices (in, out).
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
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


SWITCH_NAMES = {
    "shared.weight": "token_embedder.embedding",
    "encoder.final_layer_norm.weight": "encoder.encoder_norm.scale",
    "decoder.final_layer_norm.weight": "decoder.decoder_norm.scale",
    "lm_head.weight": "decoder.logits_dense.kernel",
    "block.0.layer.0.SelfAttention.relative_attention_bias.weight": "relpos_bias.rel_embedding",
}
SWITCH_PARTS = {  # of a layer; those of the encoder, then of the decoder
    "encoder": {"0.SelfAttention": "attention", "0.layer_norm": "pre_attention_layer_norm"}
    | {"1.layer_norm": "pre_mlp_layer_norm", "1.mlp": "mlp"},
    "decoder": {"0.SelfAttention": "self_attention", "0.layer_norm": "pre_self_attention_layer_norm"}
    | {"1.EncDecAttention": "encoder_decoder_attention", "1.layer_norm": "pre_cross_attention_layer_norm"}
    | {"2.layer_norm": "pre_mlp_layer_norm", "2.mlp": "mlp"},
}
SWITCH_ENDS = {"q": "query.kernel", "k": "key.kernel", "v": "value.kernel", "o": "out.kernel", "wi": "wi.kernel"}
SWITCH_ENDS |= {"wi_0": "wi_0.kernel", "wi_1": "wi_1.kernel", "wo": "wo.kernel", "layer_norm": "scale"}
SWITCH_ENDS |= {"classifier": "router_weights.w.kernel"}


def write_switch_t5x(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """Write the checkpoint, with config.json beside its parameters; returns the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays: dict[str, Any] = {}
    for name, tensor in tensors.items():
        theirs, expert = switch_name(name)
        if expert is None:
            arrays[theirs] = tensor.T if theirs.endswith(("kernel", "rel_embedding")) else tensor
        else:
            arrays.setdefault(theirs, {})[expert] = tensor.T
    for name, array in arrays.items():
        if isinstance(array, dict):
            array = np.stack([array[e] for e in range(len(array))])
        write_zarr(folder / f"target.{name}", array, tuple(-(-n * 2 // 3) for n in array.shape))
    return folder


def switch_name(name: str) -> tuple[str, int | None]:
    """T5X's name of a tensor of transformers', and which expert's it is."""
    if name in SWITCH_NAMES:
        return SWITCH_NAMES[name], None
    match = re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d\.\w+)\.?(.*)\.weight", name)
    if match is None or "relative_attention_bias" in name:
        stack, _, rest = name.partition(".")
        return f"{stack}.{SWITCH_NAMES[rest]}", None
    stack, layer, part, rest = match.groups()
    parts, expert = rest.split(".") if rest else ["layer_norm"], None
    if parts[0] == "experts":
        expert, parts[:2] = int(parts[1].removeprefix("expert_")), ["expert"]
    last = SWITCH_ENDS[parts[-1]]
    return ".".join([stack, f"layers_{layer}", SWITCH_PARTS[stack][part], *parts[:-1], last]), expert


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
