"""Rounding a matrix with knowledge of its inputs: GPTQ (Frantar et al., arXiv:2210.17323), and coordinate descent after it.

What counts is the squared error of the product, tr((W - Q) H (W - Q)^T) with H the second moments of the inputs. GPTQ rounds
one column after the other, those with the largest inputs first, and moves the error of each into the columns still to come, as
the Cholesky factor of H's inverse says. A scale is chosen for the squared error that its group then leaves: what an error in
column j costs is 1 / U_jj^2. At last every scale, and then every code, is set to the best one for all others as they are.

Scales have the 8 bits of bfloat16, so that code * scale is exact in float32, and the formats' own encoders find codes and
scales of such a matrix again (see `quantize`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gatework.export.quantize import FP8_LARGEST

DAMPING = 0.1  # of the mean of H's diagonal, added to it
SWEEPS = 2  # of coordinate descent
_SHRINK = tuple(1.2 - 0.04 * i for i in range(16))  # of the scale that just holds the largest weight
_BLOCK = 128  # columns whose errors reach the rest in one product
_CACHED = 1 << 18  # weights whose scales are searched for at once


class Moments:
    """H = sum over tokens of share^2 x x^T, [K, K] float32, of inputs x [K] that come in parts."""

    def __init__(self, width: int) -> None:
        self.sum = torch.zeros(width, width)

    def add(self, x: Tensor, shares: Tensor | None = None) -> None:
        """Take inputs [..., K], and how much of each product is used, [tokens]."""
        x = x.flatten(0, -2)
        if shares is not None:
            x = x * shares[:, None]
        self.sum.addmm_(x.T, x)


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that a weight may have: signed 4-bit codes, or those of fp8 e4m3, times a scale.

    group: consecutive weights of a row that share a scale; 0: all of them. positive: so are 4-bit scales.
    """

    group: int = 0
    positive: bool = False
    fp8: bool = False

    def nearest(self, w: Tensor, scales: Tensor) -> Tensor:
        """The codes that come closest to w, as floats."""
        x = w * torch.where(scales == 0, 0.0, 1 / scales)
        if self.fp8:
            return x.clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).float()
        return x.round_().clamp_(-8, 7)

    def scales(self, w: Tensor, costs: Tensor) -> Tensor:
        """Scales [N, groups] of w [N, K] for the least squared error, where one in column j costs costs[j]."""
        K = w.shape[1]
        size = self.group or K
        costs = F.pad(costs, (0, -K % size)).unflatten(0, (-1, size))
        found = [
            self._search(F.pad(rows, (0, -K % size)).unflatten(1, (-1, size)), costs)
            for rows in w.split(max(1, _CACHED // K))
        ]
        return torch.cat(found)

    def _search(self, w: Tensor, costs: Tensor) -> Tensor:
        """Of w [N, groups, size], costs [groups, size]."""
        high, low = w.amax(-1), w.amin(-1)
        peak = torch.where(high > -low, high, low)
        int4 = torch.where(peak > 0, 7, -7) if self.positive else -8
        widest = peak.abs() / FP8_LARGEST if self.fp8 else peak / int4
        best, least = torch.zeros_like(widest), torch.full_like(widest, torch.inf)
        for shrink in _SHRINK:
            scales = (widest * shrink).bfloat16().float()
            error = self.nearest(w, scales[..., None]).mul_(scales[..., None]).sub_(w).square_().mul_(costs).sum(-1)
            better = error < least
            best, least = torch.where(better, scales, best), torch.where(better, error, least)
        return best


def round_matrix(w: Tensor, moments: Tensor, grid: Grid) -> Tensor:
    """Round w [N, K], whose inputs have the second moments [K, K], to the grid: [N, K] float32."""
    w, K = w.float(), w.shape[1]
    mean = float(moments.diagonal().mean())
    H = moments.clone()
    H.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)  # without any input: to the nearest
    order = H.diagonal().argsort(descending=True, stable=True)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H[order][:, order])), upper=True)
    costs = torch.empty(K)
    costs[order] = U.diagonal() ** -2
    scales = grid.scales(w, costs)
    wide = scales.repeat_interleave(grid.group or K, 1)[:, :K].T.contiguous()  # [K, N]: columns are contiguous
    codes = torch.empty_like(wide)
    codes[order] = _compensated(w.T[order], wide[order], U, grid)
    for _ in range(SWEEPS):
        codes, wide = _refined(w.T, codes, wide, H, grid)
    return (codes * wide).T.contiguous()


def _compensated(w: Tensor, scales: Tensor, U: Tensor, grid: Grid) -> Tensor:
    """GPTQ's codes of w [K, N] with scales [K, N]; U [K, K] is the upper Cholesky factor of the inverse of H."""
    w, codes, K = w.clone(), torch.empty_like(w), len(w)
    for start in range(0, K, _BLOCK):
        stop = min(start + _BLOCK, K)
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            codes[j] = grid.nearest(w[j], scales[j])
            error = (w[j] - codes[j] * scales[j]) / U[j, j]
            w[j + 1 : stop] -= U[j, j + 1 : stop, None] * error
            errors[j - start] = error
        w[stop:] -= U[start:stop, stop:].T @ errors
    return codes


def _refined(w: Tensor, codes: Tensor, scales: Tensor, H: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Better codes and scales, all [K, N]: first each scale is the best for the codes, then each code for the scales."""
    codes, scales, K = codes.clone(), scales.clone(), len(w)
    slope = H @ (w - codes * scales)  # half of what the error falls by with each weight
    size = grid.group or K
    for start in range(0, K, size):
        part = slice(start, start + size)
        c = codes[part]
        change = (c * slope[part]).sum(0) / (c * (H[part, part] @ c)).sum(0).clamp_min(torch.finfo(torch.float32).tiny)
        new = (scales[start] + change).bfloat16().float()
        new = torch.where(new * scales[start] > 0, new, scales[start])
        slope -= H[:, part] @ (c * (new - scales[start]))
        scales[part] = new
    for start in range(0, K, _BLOCK):
        stop = min(start + _BLOCK, K)
        changes = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            before = codes[j] * scales[j]
            codes[j] = grid.nearest(before + slope[j] / H[j, j], scales[j])
            change = codes[j] * scales[j] - before
            slope[start:stop] -= H[start:stop, j, None] * change
            changes[j - start] = change
        slope[:start] -= H[:start, start:stop] @ changes
        slope[stop:] -= H[stop:, start:stop] @ changes
    return codes, scales
