"""Attention whose logits are capped: a torch operator that exports as ONNX Attention with a softcap.

`torch.onnx.ops.attention` caps what is masked already, -inf, to -c, so that masked keys are read. ONNX, its reference evaluator
and ONNX Runtime cap first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("gatework::capped_attention", mutates_args=())
def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """softmax(c tanh(scale q k^T / c) where the mask is true) v: [B, H, S, Dh].

    q [B, H, S, Dh], k and v [B, Hkv, S_max, Dh], mask [B, 1, S, S_max] bool. Logits and softmax in float32.
    """
    groups = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    logits = softcap * torch.tanh(scale * (q.float() @ keys.float().transpose(2, 3)) / softcap)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ values.float()).to(q.dtype)


@capped_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    return torch.empty_like(q)


def onnx_translation() -> dict[Any, Callable[..., Any]]:
    """Entry for `torch.onnx.export(custom_translation_table=...)`."""
    import onnxscript

    op = onnxscript.values.Opset("", 24)

    def translate(q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float) -> Any:
        y, *_ = op.Attention(q, k, v, mask, scale=scale, softcap=softcap)
        return y

    return {torch.ops.gatework.capped_attention.default: translate}
