"""The KV cache write: a torch operator that exports as ONNX TensorScatter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("gatework::cache_write", mutates_args=())
def cache_write(cache: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    """The cache [B, Hkv, S_max, Dh] with update [B, Hkv, S, Dh] written from slot write_indices[b] on, row by row."""
    slots = write_indices[:, None] + torch.arange(update.shape[2], device=cache.device)  # [B, S]
    rows = torch.arange(cache.shape[0], device=cache.device)[:, None]
    out = cache.clone()
    out[rows, :, slots] = update.transpose(1, 2)
    return out


@cache_write.register_fake
def _(cache: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    return torch.empty_like(cache)


def onnx_translation() -> dict[Any, Callable[..., Any]]:
    """Entry for `torch.onnx.export(custom_translation_table=...)`."""
    import onnxscript

    op = onnxscript.values.Opset("", 24)
    return {
        torch.ops.gatework.cache_write.default: lambda cache, update, write_indices: op.TensorScatter(
            cache, update, write_indices, axis=2
        )
    }
