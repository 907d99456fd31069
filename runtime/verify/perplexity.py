"""Perplexity of a text.

The text is encoded once, with the tokenizer's special tokens, and cut into consecutive windows of 256 tokens that do not
overlap; a last window of one token is dropped. Each window runs alone, from an empty cache, and every token but its first
is scored. Perplexity is exp(mean negative log likelihood), computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gatework.runtime.verify.compare import log_softmax

WINDOW = 256


def windows(token_ids: Sequence[int], size: int = WINDOW) -> list[list[int]]:
    """The windows of an encoded text."""
    parts = [list(token_ids[start : start + size]) for start in range(0, len(token_ids), size)]
    return [part for part in parts if len(part) >= 2]


def negative_log_likelihood(logits: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """-log p(target) of each row: logits [N, V], targets [N] -> [N] float64."""
    return -log_softmax(logits)[np.arange(len(targets)), list(targets)]


def perplexity(losses: Sequence[float]) -> float:
    """exp(mean) of negative log likelihoods; NaN for none, inf where it is beyond float64."""
    if not losses:
        return math.nan
    with np.errstate(over="ignore"):
        return float(np.exp(np.mean(np.asarray(losses, np.float64))))
