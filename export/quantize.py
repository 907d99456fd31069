"""Quantisation of weights: w = code * scale.

`quantize_rows` writes the layout of ONNX Runtime's MatMulNBits, QMoE and GatherBlockQuantized: w = (code - zero_point) * scale
with zero_point = 2^(bits - 1); one scale for `group` consecutive weights of a row (the contraction axis). Codes are unsigned
bytes; with 4 bits the even column sits in the low nibble. The others have signed codes and no zero point.

A scale that is stored in a narrower type is rounded to it before the codes are chosen, so that its rounding costs nothing.

Weights that are codes times scales already, with 4 bits or in fp8, as `gptq` leaves them, keep their values: the scale is then
the largest weight over the code that it has.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gatework.plugins.moe.cpu_ops import BLOCK_ROWS, STEP_BYTES

# Fractions of the largest weight that may set the scale of a 4-bit group; the one with the least squared error wins.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
FP8_LARGEST = 448.0  # of float8_e4m3fn
# Codes that a group's largest weight may have. Lower ones of fp8 are twice, four times … as much on a smaller scale.
_INT4_PEAKS = (-8, *(sign * code for code in range(7, 0, -1) for sign in (1, -1)))
_FP8_PEAKS = (448, 416, 384, 352, 320, 288, 256, 240)
_BLOCK = 1 << 18  # weights worked on at once, so that the passes over them stay in the CPU's cache


def quantize_rows(
    rows: Tensor, bits: int, group: int, scale_dtype: torch.dtype = torch.float32, *, positive: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantise each row in groups.

    Args:
        rows: [N, K] float; the last group is padded with zeros when group does not divide K.
        bits: 4 or 8.
        positive: no scale of a 4-bit group is negative, which costs a little precision; scales of 8-bit groups never are.

    Returns:
        codes [N, groups, group * bits / 8] uint8 and scales [N, groups] in `scale_dtype`.
    """
    N, K = rows.shape
    groups = -(-K // group)
    codes = torch.empty(N, groups, group * bits // 8, dtype=torch.uint8)
    scales = torch.empty(N, groups, dtype=scale_dtype)
    block = max(1, _BLOCK // (groups * group))
    for start in range(0, N, block):
        part = slice(start, start + block)
        w = rows[part].float()
        if K % group:
            w = F.pad(w, (0, groups * group - K))
        w = w.reshape(-1, groups, group)
        scales[part] = _scales_int8(w) if bits == 8 else _scales_int4(w, positive)
        stored = scales[part].float()
        codes[part] = _pack_nibbles(_codes(w, stored, 4)) if bits == 4 else _codes(w, stored, 8)
    return codes, scales


def keep_rows(codes: Tensor, scales: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Signed codes [N, K] int8 and scales [N, blocks] as `quantize_rows` writes them; group divides a block."""
    block = codes.shape[1] // scales.shape[1]
    return (codes.view(torch.uint8) ^ 0x80).unflatten(1, (-1, group)), scales.repeat_interleave(block // group, 1)


def in_blocks(codes: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rows that `quantize_rows` made, in the layout of the CPU kernels (plugins/moe/cpu/layout.h).

    Returns:
        codes [blocks, steps, 16, 4] and scales [blocks, groups, 16]; rows that fill up the last block are zeros.
    """
    filler = -len(codes) % BLOCK_ROWS
    zero = 0x88 if bits == 4 else 0x80
    codes = F.pad(codes.flatten(1), (0, 0, 0, filler), value=zero).unflatten(0, (-1, BLOCK_ROWS))
    scales = F.pad(scales, (0, 0, 0, filler)).unflatten(0, (-1, BLOCK_ROWS))
    return codes.unflatten(2, (-1, STEP_BYTES)).transpose(1, 2).contiguous(), scales.transpose(1, 2).contiguous()


def quantize_int8_rows(rows: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Signed codes [N, K] int8 in [-127, 127] and one scale per row [N] of rows [N, K]."""
    w = rows.float()
    scales = (one_for_zero(w.abs().amax(1)) / 127).to(scale_dtype)
    return (w / scales.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def quantize_fp8(w: Tensor, absmax: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn in w's shape, and absmax / 448 as scales in absmax's shape, which w's has to extend."""
    scales = (one_for_zero(absmax.float()) / FP8_LARGEST).to(scale_dtype)
    return (w.float() / scales.float()).clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn), scales


def fp8_ranges(w: Tensor) -> Tensor:
    """What the scales of rows w [N, K] are to hold, [N, 1]: the largest magnitude, or more where that keeps all values."""
    w = w.float()
    absmax = w.abs().amax(1, keepdim=True)
    kept, where = _kept_fp8(w[:1], absmax[:1])
    if where.all():  # the first row is: all rows may be
        kept, where = _kept_fp8(w, absmax)
        return torch.where(where, kept, absmax)
    return absmax


def _kept_fp8(w: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges [N, 1] with which codes give rows w [N, K] exactly, and where there are any."""
    kept, where = torch.zeros_like(absmax), torch.zeros_like(absmax, dtype=torch.bool)
    for peak in _FP8_PEAKS:
        ranges = absmax / peak * FP8_LARGEST
        codes, scales = quantize_fp8(w, ranges)
        exact = (codes.float().mul_(scales) == w).all(1, keepdim=True) & ~where
        kept, where = torch.where(exact, ranges, kept), where | exact
    return kept, where


def one_for_zero(x: Tensor) -> Tensor:
    """TensorRT takes positive scales only; of zeros any will do."""
    return torch.where(x == 0, 1.0, x)


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


def _scales_int4(w: Tensor, positive: bool) -> Tensor:
    """The largest weight lands on -8, the code with no positive twin; shrunken scales clip it when that costs less.

    The scale's sign is free for that, unless it has to be positive: then the largest weight lands on 7 or -7.
    """
    high, low = w.amax(-1), w.amin(-1)
    peak = torch.where(high > -low, high, low)
    code = torch.where(peak > 0, 7, -7) if positive else -8
    best = torch.zeros_like(peak)
    least = torch.full_like(peak, torch.inf)
    for shrink in _SHRINK:
        scales = peak * shrink / code
        error = _rounded(w, scales, 4).mul_(scales[..., None]).sub_(w).square_().sum(-1)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    if _kept(w[:1], peak[:1])[1].all():  # the first row is: all rows may be
        kept, where = _kept(w, peak)
        best = torch.where(where, kept, best)
    return best


def _kept(w: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of 4-bit codes that give w [N, groups, group] exactly, and where there are any; peak: its largest weights."""
    kept, where = torch.zeros_like(peak), torch.zeros_like(peak, dtype=torch.bool)
    for code in _INT4_PEAKS:
        scales = peak / code
        exact = (_rounded(w, scales, 4).mul_(scales[..., None]) == w).all(-1) & ~where
        kept, where = torch.where(exact, scales, kept), where | exact
    return kept, where
