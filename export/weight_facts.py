"""What an engine's manifest says of its weights and its cache."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch

from gatework.export.config import ModelConfig
from gatework.export.packing import TORCH_DTYPES, TensorSpec, is_weight, pack_of
from gatework.plugins import engine_format


def weight_facts(model: ir.Model, config: ModelConfig, encoder: ir.Model | None = None) -> dict[str, Any]:
    """The tensor table, and weight bytes: in all, and read for one decoded token (chosen experts, one embedding row).

    cache_dtype: the type of cached keys and values. kept: weights that have the checkpoint's own codes, with the neighbours
    that share a scale; 0: a whole row.
    """
    if encoder is not None:
        decoder, other = weight_facts(model, config), weight_facts(encoder, config)
        own = {name: facts for name, facts in other["tensors"].items() if name not in decoder["tensors"]}
        sizes = decoder["weight_bytes"]
        sizes["total"] += sum(
            math.prod(facts["shape"]) * getattr(torch, facts["dtype"]).itemsize for facts in own.values()
        )
        return decoder | {name: decoder[name] | other[name] for name in ("tensors", engine_format.KEPT)}
    tensors, total, per_token = {}, 0, 0.0
    kept: dict[str, int] = {}
    for value in model.graph.initializers.values():
        if not is_weight(value):
            continue
        pack = pack_of(value)
        spec = next(spec for spec in pack.outputs if spec.name == value.name)
        nbytes = _nbytes(spec)
        tensors[spec.name] = {"dtype": str(spec.dtype).removeprefix("torch."), "shape": list(spec.shape)}
        total += nbytes
        if pack.keep is not None:
            kept |= dict.fromkeys(pack.sources, pack.keep.group)
        share = 1.0
        if (".moe.w_" in spec.name or ".moe.b_" in spec.name) and config.moe is not None:
            share = config.moe.top_k / config.moe.num_experts
        elif spec.name.startswith("embed.") and not _feeds_product(value):
            share = 1 / config.vocab_size
        per_token += nbytes * share
    facts: dict[str, Any] = {"weight_bytes": {"total": total, "per_token": round(per_token)}, "tensors": tensors}
    past = next((value for value in model.graph.inputs if str(value.name).startswith("past.")), None)
    if past is not None:  # no encoder's
        assert past.dtype is not None
        facts[engine_format.CACHE_DTYPE] = str(TORCH_DTYPES[past.dtype]).removeprefix("torch.")
    return facts | {engine_format.KEPT: kept}


def _nbytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _feeds_product(value: ir.Value) -> bool:
    """Whether an embedding table is the output head as well."""
    return any(user.op_type == "Transpose" or "MatMul" in user.op_type for user, _ in value.uses())
