"""Rounding with knowledge of the inputs, against NumPy by other formulas, plain rounding and every choice of codes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from gatework.export import gptq
from gatework.export.gptq import Grid, Moments, round_matrix
from gatework.export.quantize import dequantize_rows, fp8_ranges, quantize_fp8, quantize_rows

GRIDS = {
    "int4": Grid(16),
    "int4, positive scales": Grid(16, positive=True),
    "int4, a padded group": Grid(32),
    "fp8": Grid(fp8=True),
}


def case(rows: int, columns: int, tokens: int = 500) -> tuple[Tensor, Tensor]:
    """A matrix, and correlated inputs [tokens, columns]."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), torch.randn(tokens, columns, generator=generator) @ mixed


def moments(x: Tensor) -> Tensor:
    found = Moments(x.shape[1])
    for part in x.split(100):
        found.add(part)
    return found.sum


def encoded(w: Tensor, grid: Grid) -> Tensor:
    """There and back, by the encoder of engines."""
    if grid.fp8:
        codes, scales = quantize_fp8(w, fp8_ranges(w))
        return codes.float() * scales
    codes, scales = quantize_rows(w, 4, grid.group, torch.bfloat16, positive=grid.positive)
    return dequantize_rows(codes, scales.float(), 4, w.shape[1])


@pytest.mark.parametrize("name", GRIDS)
def test_less_error_than_plain_rounding(name: str) -> None:
    grid = GRIDS[name]
    w, x = case(40, 176)
    plain, found = encoded(w, grid), round_matrix(w, moments(x), grid)
    lost = [((w - each) @ x.T).square().sum().item() for each in (plain, found)]
    assert lost[1] < 0.6 * lost[0]
    assert (w - found).square().sum() > (w - plain).square().sum()  # which is why one has to look at the inputs


@pytest.mark.parametrize("name", GRIDS)
def test_encoders_find_the_codes_again(name: str) -> None:
    w, x = case(40, 176)
    w[3] = 0
    found = round_matrix(w, moments(x), GRIDS[name])
    assert torch.equal(encoded(found, GRIDS[name]), found)
    assert not torch.equal(encoded(w, GRIDS[name]), w)


def test_plain_weights_keep_their_scales() -> None:
    """Nothing of what recognises rounded weights touches others."""
    w, _ = case(64, 64)
    assert torch.equal(fp8_ranges(w), w.abs().amax(1, keepdim=True))
    half = w.clone()
    half[0] = encoded(w, Grid(16))[0]  # the first row is on a grid, and no other
    for first, second in zip(
        quantize_rows(w, 4, 16, torch.bfloat16), quantize_rows(half, 4, 16, torch.bfloat16), strict=True
    ):
        assert torch.equal(first[1:], second[1:])


def eliminated(w: np.ndarray, scales: np.ndarray, H: np.ndarray) -> np.ndarray:
    """Codes of w [N, K] by optimal brain quantisation in order, in float64: each rounded column is eliminated from H^-1."""
    w, codes, inverse = w.astype(np.float64), np.empty(w.shape), np.linalg.inv(H)
    for j in range(w.shape[1]):
        codes[:, j] = np.clip(np.round(w[:, j] / scales[:, j]), -8, 7)
        error = (w[:, j] - codes[:, j] * scales[:, j]) / inverse[j, j]
        w[:, j + 1 :] -= np.outer(error, inverse[j, j + 1 :])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def test_compensation_equals_elimination() -> None:
    w, x = case(6, 150)  # more than a block of columns
    H = moments(x) + 20 * torch.eye(150)
    U = torch.linalg.cholesky(torch.linalg.inv(H.double()), upper=True).float()
    scales = torch.full_like(w, 0.3)
    got = gptq._compensated(w.T, scales.T.contiguous(), U, Grid(150)).T
    want = eliminated(w.numpy(), scales.double().numpy(), H.double().numpy())
    np.testing.assert_array_equal(got.numpy(), want)


def test_refinement_ends_where_no_single_code_is_better() -> None:
    """For one group, with the scale that was found, against each of 16^3 choices."""
    w, x = case(1, 3)
    H = moments(x) + gptq.DAMPING * moments(x).diagonal().mean() * torch.eye(3)
    found = round_matrix(w, moments(x), Grid(3))
    codes, scales = quantize_rows(found, 4, 4)
    assert torch.equal(dequantize_rows(codes, scales, 4, 3), found)

    def lost(each: Tensor) -> float:
        return float((w - each)[0] @ H @ (w - each)[0])

    choices = [torch.tensor([c]) * scales[0, 0] for c in itertools.product(range(-8, 8), repeat=3)]
    best = min(map(lost, choices))
    nearest = (w / scales[0, 0]).round().clamp(-8, 7) * scales[0, 0]
    assert best <= lost(found) <= lost(nearest)
    for j, code in itertools.product(range(3), range(-8, 8)):
        other = found.clone()
        other[0, j] = code * scales[0, 0]
        assert lost(found) <= lost(other) * (1 + 1e-5)  # float32


def test_moments_weigh_tokens_by_the_square_of_their_shares() -> None:
    _, x = case(1, 8, tokens=5)
    shares = torch.tensor([0.5, 1.0, 0.0, 0.25, 2.0])
    found = Moments(8)
    found.add(x[:2], shares[:2])
    found.add(x[2:], shares[2:])
    want = sum(float(s) ** 2 * np.outer(row, row) for s, row in zip(shares, x.numpy(), strict=True))
    np.testing.assert_allclose(
        found.sum.numpy(), want, rtol=1e-5, atol=1e-4
    )  # float32 sums of a few numbers of order 10


def test_an_expert_without_tokens_is_rounded_to_the_nearest() -> None:
    w, _ = case(8, 32)
    found = round_matrix(w, torch.zeros(32, 32), Grid(16))
    scales = torch.where(found == 0, 1.0, found).abs()
    assert ((found - w).abs() <= scales.amax(1, keepdim=True)).all()
    assert (found - w).square().sum() <= 1.02 * (encoded(w, Grid(16)) - w).square().sum()
