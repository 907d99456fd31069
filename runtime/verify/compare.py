"""Two rows of logits side by side: how far apart they are, in numbers and in the distributions that they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

_TOP = 5


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A position in a sequence."""

    position: int
    sequence: str

    def __str__(self) -> str:
        return f"{self.sequence}, position {self.position}"


def relative_error(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """max |difference| / max |want| of each row: [N, V], [N, V] -> [N] float64. NaN or inf where `got` has one."""
    largest = np.maximum(np.abs(want).max(-1), np.finfo(np.float32).tiny)
    return np.abs(got.astype(np.float64) - want).max(-1) / largest


def kl_divergence(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """KL(softmax(want) || softmax(got)) of each row in nats: [N, V], [N, V] -> [N] float64, computed in float64."""
    p, q = log_softmax(want), log_softmax(got)
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities [N, V] float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def top_overlap(want: np.ndarray, got: np.ndarray, count: int = _TOP) -> np.ndarray:
    """Share of the `count` best tokens that both rows have: [N, V], [N, V] -> [N]."""
    count = min(count, want.shape[-1])
    best = [np.argpartition(logits, -count, axis=-1)[:, -count:] for logits in (want, got)]
    return (best[0][:, :, None] == best[1][:, None, :]).any(-1).mean(-1)


@dataclass(slots=True)
class Comparison:
    """Rows compared so far: a few numbers of each, and none of the logits.

    relative, kl, top1, top5: one value per row; worst_token: where the row's largest difference is.
    """

    places: list[Place] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)
    worst_token: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    top1: list[bool] = field(default_factory=list)
    top5: list[float] = field(default_factory=list)

    def add(self, want: np.ndarray, got: np.ndarray, places: Sequence[Place]) -> None:
        """Compare rows [N, V] of the reference with those of the engine; `places` says where each comes from."""
        assert want.shape == got.shape and len(places) == len(want), (want.shape, got.shape, len(places))
        with np.errstate(invalid="ignore", over="ignore"):  # a broken engine's NaN and inf show in the results
            self.relative += relative_error(want, got).tolist()
            self.kl += kl_divergence(want, got).tolist()
            self.worst_token += np.abs(got - want).argmax(-1).tolist()
        self.top1 += (want.argmax(-1) == got.argmax(-1)).tolist()
        self.top5 += top_overlap(want, got).tolist()
        self.places += places

    def __len__(self) -> int:
        return len(self.places)
