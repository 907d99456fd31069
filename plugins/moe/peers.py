"""What runs experts in PyTorch today, for comparison: grouped products as transformers uses them, and a product per expert.

Dense weights in x's dtype, or fp8 with a scale per row. Routing is part of each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gatework.plugins.moe.spec import MoEAttributes
from gatework.plugins.moe.torch_op import gated

LARGEST_FP8 = 448.0


def grouped(x: Tensor, router_logits: Tensor, w_in: Tensor, w_out: Tensor, attributes: MoEAttributes) -> Tensor:
    """transformers 5.23, `grouped_mm_experts_forward`: sort, histogram, two grouped products, weighted sum."""
    ids, weights = topk(router_logits, attributes)
    chosen, order = ids.flatten().sort()
    offsets = _offsets(chosen, len(w_in))
    u = torch._grouped_mm(x[order // attributes.top_k], w_in.transpose(-2, -1), offs=offsets)
    h = gated(u, attributes.activation, attributes.glu)
    out = torch._grouped_mm(h, w_out.transpose(-2, -1), offs=offsets)
    return _weighted_sum(out, weights, order, attributes.top_k).to(x.dtype)


def grouped_fp8(
    x: Tensor,
    router_logits: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_in_scale: Tensor,
    w_out_scale: Tensor,
    attributes: MoEAttributes,
) -> Tensor:
    """The same pipeline with `_scaled_grouped_mm`: weights and activations in fp8, a scale per row of each."""
    ids, weights = topk(router_logits, attributes)
    chosen, order = ids.flatten().sort()
    offsets = _offsets(chosen, len(w_in))

    def product(a: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        a_scale = a.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / LARGEST_FP8
        codes = (a / a_scale).to(torch.float8_e4m3fn)
        transposed = w.transpose(-2, -1)
        return torch._scaled_grouped_mm(
            codes, transposed, a_scale[:, 0], scale[..., 0], offs=offsets, out_dtype=x.dtype, use_fast_accum=True
        )

    h = gated(product(x[order // attributes.top_k], w_in, w_in_scale), attributes.activation, attributes.glu)
    out = product(h, w_out, w_out_scale)
    return _weighted_sum(out, weights, order, attributes.top_k).to(x.dtype)


def loop(x: Tensor, router_logits: Tensor, w_in: Tensor, w_out: Tensor, attributes: MoEAttributes) -> Tensor:
    """A pair of cuBLAS products for each expert that has tokens; reads their number back to the host."""
    ids, weights = topk(router_logits, attributes)
    chosen, order = ids.flatten().sort()
    counts = torch.bincount(chosen, minlength=len(w_in)).tolist()
    parts = []
    for e, tokens in enumerate((order // attributes.top_k).split(counts)):
        if len(tokens):
            h = gated(F.linear(x[tokens], w_in[e]), attributes.activation, attributes.glu)
            parts.append(F.linear(h, w_out[e]))
    return _weighted_sum(torch.cat(parts), weights, order, attributes.top_k).to(x.dtype)


def topk(router_logits: Tensor, attributes: MoEAttributes) -> tuple[Tensor, Tensor]:
    """Ids and weights [T, K], without a capacity."""
    scores = router_logits.softmax(-1) if attributes.scoring == "softmax" else router_logits.sigmoid()
    weights, ids = scores.topk(attributes.top_k, dim=-1)
    return ids, weights / weights.sum(-1, keepdim=True) if attributes.renormalize else weights


def _offsets(chosen: Tensor, experts: int) -> Tensor:
    values = chosen.int() if chosen.is_cuda else chosen.float()
    counts = torch.histc(values, bins=experts, min=0, max=experts - 1)
    return counts.cumsum(0, dtype=torch.int32)


def _weighted_sum(out: Tensor, weights: Tensor, order: Tensor, top_k: int) -> Tensor:
    """[T, D] from out [T*K, D], whose row i is choice order[i]."""
    weighted = out * weights.flatten()[order, None]
    return weighted[order.argsort()].view(-1, top_k, out.shape[1]).sum(1)
