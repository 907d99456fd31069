"""Grouped weight-only quantisation to the layout of ONNX Runtime's MatMulNBits, QMoE and GatherBlockQuantized.

w = (code - zero_point) * scale with zero_point = 2^(bits - 1); one float32 scale for `group` consecutive weights of a row
(the contraction axis). Codes are unsigned bytes; with 4 bits the even column sits in the low nibble.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Fractions of the largest weight that may set the scale of a 4-bit group; the one with the least squared error wins.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_BLOCK = 1 << 18  # weights worked on at once, so that the passes over them stay in the CPU's cache


def quantize_rows(rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Quantise each row in groups.

    Args:
        rows: [N, K] float; the last group is padded with zeros when group does not divide K.
        bits: 4 or 8.

    Returns:
        codes [N, groups, group * bits / 8] uint8 and scales [N, groups] float32.
    """
    N, K = rows.shape
    groups = -(-K // group)
    codes = torch.empty(N, groups, group * bits // 8, dtype=torch.uint8)
    scales = torch.empty(N, groups)
    block = max(1, _BLOCK // (groups * group))
    for start in range(0, N, block):
        part = slice(start, start + block)
        w = rows[part].float()
        if K % group:
            w = F.pad(w, (0, groups * group - K))
        w = w.reshape(-1, groups, group)
        scales[part] = _scales_int8(w) if bits == 8 else _scales_int4(w)
        codes[part] = _pack_nibbles(_codes(w, scales[part], 4)) if bits == 4 else _codes(w, scales[part], 8)
    return codes, scales


def dequantize_rows(codes: Tensor, scales: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `quantize_rows`: [N, columns] float32."""
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    w = (codes.float() - 2 ** (bits - 1)) * scales[..., None]
    return w.flatten(1)[:, :columns]


def _rounded(w: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Signed codes, still float."""
    half = 2 ** (bits - 1)
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)[..., None]
    return (w * inverse).round_().clamp_(-half, half - 1)


def _codes(w: Tensor, scales: Tensor, bits: int) -> Tensor:
    return _rounded(w, scales, bits).add_(2 ** (bits - 1)).to(torch.uint8)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """Neighbours in one byte, the even column low."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _scales_int8(w: Tensor) -> Tensor:
    return w.abs().amax(-1) / 127


def _scales_int4(w: Tensor) -> Tensor:
    """The largest weight lands on -8, the code with no positive twin; shrunken scales clip it when that costs less."""
    high, low = w.amax(-1), w.amin(-1)
    peak = torch.where(high > -low, high, low)
    best = torch.zeros_like(peak)
    least = torch.full_like(peak, torch.inf)
    for shrink in _SHRINK:
        scales = peak * (shrink / -8)
        error = _rounded(w, scales, 4).mul_(scales[..., None]).sub_(w).square_().sum(-1)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best
