"""Sampling against transformers' logits processors, against formulas, and against chance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gatework.plugins.errors import GateworkError
from gatework.runtime.sampling import Sampler, SamplingParams, candidates, top_k_ids

V = 1000


def logits_row(seed: int, size: int = V, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def distribution(logits: np.ndarray, **params: Any) -> np.ndarray:
    """Probabilities [V] float64 that a sampler draws from."""
    ids, weights = candidates(logits, float(logits.max()), SamplingParams(**params))
    probabilities = np.zeros(len(logits))
    probabilities[slice(None) if ids is None else ids] = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    return probabilities


def expected_distribution(logits: np.ndarray, **params: Any) -> np.ndarray:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.get("temperature", 1.0))])
    if params.get("top_k"):
        warpers.append(TopKLogitsWarper(params["top_k"]))
    if params.get("top_p", 1) < 1:
        warpers.append(TopPLogitsWarper(params["top_p"]))
    if params.get("min_p"):
        warpers.append(MinPLogitsWarper(params["min_p"]))
    scores = warpers(None, torch.from_numpy(logits).double()[None])
    return torch.softmax(scores, -1)[0].numpy()


FILTERS = [
    {},
    {"temperature": 0.7},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": V - 1},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.8},
    {"temperature": 0.8, "top_k": 200, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.3, "top_p": 0.7, "min_p": 0.05},
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
@pytest.mark.parametrize("spread", [0.1, 3.0, 12.0])
def test_filters_agree_with_transformers(params: dict[str, Any], spread: float) -> None:
    for seed in range(5):
        logits = logits_row(seed, spread=spread)
        ours, theirs = distribution(logits, **params), expected_distribution(logits, **params)
        kept, wanted = ours > 1e-30, theirs > 1e-30  # below that float32 has no room
        assert np.array_equal(kept, wanted), f"{kept.sum()} tokens kept, not {wanted.sum()}"
        # float32 exp of a scaled float32 logit: a few units in the last place
        assert np.abs(ours - theirs).max() <= 2e-6 * theirs.max()


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("size", [20_000, 60_000])
def test_nucleus_of_a_flat_row_needs_more_than_the_first_guess(top_p: float, size: int) -> None:
    logits = logits_row(1, size, spread=0.5)
    ours = np.flatnonzero(distribution(logits, top_p=top_p))
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    expected = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]
    assert abs(len(ours) - len(expected)) <= 1  # the last token in is decided by rounding
    assert len(np.setxor1d(ours, expected)) <= 1


def test_ties_go_to_the_lowest_index() -> None:
    logits = np.array([1, 3, 2, 3, 2, 2, 0], np.float32)
    assert Sampler(SamplingParams(temperature=0), [], 7).sample(logits).token_id == 1
    assert top_k_ids(logits, 3).tolist() == [1, 2, 3]
    assert top_k_ids(logits, 4).tolist() == [1, 2, 3, 4]
    flat = np.zeros(10, np.float32)
    assert np.flatnonzero(distribution(flat, top_k=4)).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(distribution(flat, top_p=0.35)).tolist() == [0, 1, 2, 3]
    top = Sampler(SamplingParams(temperature=0, logprobs=3), [], 7).sample(logits).top_logprobs
    assert list(top or {}) == [1, 3, 2]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_agrees_with_transformers(penalty: float) -> None:
    prompt = [5, 9, 9, 700]
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=penalty), prompt, V)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    seen = list(prompt)
    for step in range(20):
        logits = logits_row(step % 3)  # the same rows again, so that the penalty decides
        expected = int(processor(torch.tensor([seen]), torch.from_numpy(logits)[None]).argmax())
        assert sampler.sample(logits).token_id == expected
        seen.append(expected)
    assert len(set(seen)) > 4


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = np.array([4.0, 3.5, 3.0, -9], np.float32)
    params = SamplingParams(temperature=0, frequency_penalty=0.3, presence_penalty=0.4)
    sampler = Sampler(params, [0, 0, 0], 4)
    counts = np.zeros(4)
    for _ in range(12):
        expected = int((logits - 0.3 * counts - 0.4 * (counts > 0)).argmax())
        assert sampler.sample(logits).token_id == expected
        counts[expected] += 1
    assert (counts[:3] > 0).all()


def test_logit_bias_and_min_tokens() -> None:
    logits = np.array([5, 4, 3, 2], np.float32)
    biased = Sampler(SamplingParams(temperature=0, logit_bias={3: 10, 0: -100}), [], 4)
    assert biased.sample(logits).token_id == 3
    sampler = Sampler(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[1]), [], 4, eos_token_ids=[0])
    assert [sampler.sample(logits).token_id for _ in range(4)] == [2, 2, 0, 0]
    ignoring = Sampler(SamplingParams(temperature=0, min_tokens=2, ignore_eos=True), [], 4, eos_token_ids=[0])
    assert ignoring.sample(logits).token_id == 0
    assert logits.tolist() == [5, 4, 3, 2]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.6, "top_k": 5}, {"top_p": 0.8}, {"min_p": 0.01}], ids=str)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    draws, size = 20_000, 1200  # more than one block of weights
    logits = logits_row(3, size, spread=1.5)
    logits[[7, 600, 1199]] += 6
    expected = expected_distribution(logits, **params) * draws
    sampler = Sampler(SamplingParams(seed=11, **params), [], size)
    counts = np.bincount([sampler.sample(logits).token_id for _ in range(draws)], minlength=size)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5  # Pearson's statistic needs some counts in every cell
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    assert freedom >= 3
    assert statistic < freedom + 4 * math.sqrt(2 * freedom), f"{statistic:.1f} at {freedom} degrees of freedom"


def test_a_seed_fixes_the_tokens_whatever_the_company() -> None:
    rows = [logits_row(seed) for seed in range(30)]
    alone = Sampler(SamplingParams(seed=5, top_p=0.9), [1], V)
    tokens = [alone.sample(row).token_id for row in rows]
    again, other = Sampler(SamplingParams(seed=5, top_p=0.9), [1], V), Sampler(SamplingParams(seed=6), [1], V)
    mixed = []
    for row in rows:
        other.sample(row)
        mixed.append(again.sample(row).token_id)
    assert mixed == tokens
    assert [other.sample(row).token_id for row in rows] != tokens
    unseeded = [[Sampler(SamplingParams(), [], V).sample(row).token_id for row in rows] for _ in range(2)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("count", [0, 1, 5, V, V + 10])
def test_logprobs_are_of_the_raw_logits(count: int) -> None:
    logits = logits_row(4)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    params = SamplingParams(logprobs=count, temperature=5.0, repetition_penalty=1.5, top_k=100, seed=1)
    sampler = Sampler(params, [1, 2, 3], V)
    for _ in range(5):
        sampled = sampler.sample(logits)
        assert sampled.top_logprobs is not None
        best = np.argsort(-expected, kind="stable")[:count].tolist()
        assert list(sampled.top_logprobs) == best + ([] if sampled.token_id in best else [sampled.token_id])
        assert sampled.logprob == sampled.top_logprobs[sampled.token_id]
        errors = [abs(value - expected[token_id]) for token_id, value in sampled.top_logprobs.items()]
        assert max(errors) <= 1e-6  # float32 logits; the sum is float64
    without = Sampler(SamplingParams(temperature=0), [], V).sample(logits)
    assert without.logprob is None
    assert without.top_logprobs is None


def test_forbidden_and_extreme_logits() -> None:
    logits = np.full(2000, -np.inf, np.float32)
    logits[[3, 1900]] = [1e4, 1e4 - 1]
    sampler = Sampler(SamplingParams(seed=0, logprobs=3), [], 2000)
    sampled = [sampler.sample(logits) for _ in range(50)]
    assert {each.token_id for each in sampled} == {3, 1900}
    assert all(math.isfinite(each.logprob or 0) for each in sampled)
    cold = Sampler(SamplingParams(seed=0, temperature=1e-38), [], 2000)
    assert {cold.sample(logits).token_id for _ in range(20)} == {3}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"repetition_penalty": 1.2}], ids=str)
def test_logits_that_are_not_numbers_are_refused(bad: float, params: dict[str, Any]) -> None:
    logits = np.full(8, -np.inf if bad == -np.inf else 0, np.float32)
    logits[5] = bad
    with pytest.raises(GateworkError, match="logits cannot be sampled"):
        Sampler(SamplingParams(**params), [1], 8).sample(logits)


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"min_tokens": -1},
        {"min_tokens": 20},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": "1"},
        {"top_k": -2},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"presence_penalty": 3},
        {"frequency_penalty": None},
        {"seed": -1},
        {"stop": ""},
        {"stop": ["a", 1]},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": 3},
        {"ignore_eos": 1},
        {"logprobs": -1},
        {"logit_bias": {1: 200}},
        {"logit_bias": {"1": 2}},
        {"logit_bias": [1]},
    ],
    ids=str,
)
def test_wrong_parameters_are_refused(params: dict[str, Any]) -> None:
    name = next(iter(params))
    with pytest.raises(GateworkError, match=rf"^{name} is not valid; got .*; expected ") as caught:
        SamplingParams(**params)
    assert "\n" not in str(caught.value)


def test_parameters_in_their_other_forms() -> None:
    params = SamplingParams(
        max_tokens=None, top_k=-1, stop="END", stop_token_ids=[1, 2], temperature=np.float32(0.5), seed=np.int64(3)
    )
    assert params.stop_strings == ("END",)
    assert params.stop_token_ids == (1, 2)
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    with pytest.raises(TypeError, match="tempratur"):
        SamplingParams(tempratur=1)  # type: ignore[call-arg]
    with pytest.raises(GateworkError, match="expected token ids below 10"):
        Sampler(SamplingParams(stop_token_ids=[10]), [], 10)
