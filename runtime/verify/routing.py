"""Which experts the engine chose, and which the reference did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gatework.export.steps.compared import Compared

_MARGIN = 8.0  # two logits, each off by up to four times the expected error


@dataclass(slots=True)
class Experts:
    """Choices of the tapped tokens, layer by layer.

    loads: share of the choices that each expert got. agreement: share of the reference's experts that the engine chose, too.
    flips: tokens whose experts differ from those of the reference's own run. faults: tokens whose experts differ from those
    that the reference chooses for the same input, by more than rounding explains; all other flips follow from earlier error or
    stand near a tie.
    """

    top_k: int
    loads: dict[str, list[list[float]]] = field(default_factory=lambda: {"reference": [], "engine": []})
    agreement: list[float] = field(default_factory=list)
    flips: int = 0
    faults: int = 0

    def add(self, step: Compared) -> None:
        """Take a layer's router logits."""
        got, want, own = (x.numpy() for x in (step.got, step.want, step.own))
        chosen, here, there = (self._choices(logits) for logits in (got, want, own))
        for name, choices in (("reference", there), ("engine", chosen)):
            counts = np.bincount(choices.ravel(), minlength=got.shape[1])
            self.loads[name].append((counts / max(counts.sum(), 1)).tolist())
        shared = (chosen[:, :, None] == there[:, None, :]).any(1).mean(1)
        self.agreement.append(float(shared.mean()) if len(shared) else 1.0)
        self.flips += int((shared < 1).sum())
        if self.top_k < got.shape[1]:
            ordered = np.sort(want, axis=1)[:, ::-1]
            margin = ordered[:, self.top_k - 1] - ordered[:, self.top_k]
            differs = (np.sort(chosen, 1) != np.sort(here, 1)).any(1)
            self.faults += int((differs & ~(margin <= _MARGIN * step.noise.numpy())).sum())

    def _choices(self, logits: np.ndarray) -> np.ndarray:
        """The top k of each row, [n, k]; the lower index among equals."""
        return np.argsort(-logits, axis=1, kind="stable")[:, : self.top_k]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "load": self.loads,
            "agreement": self.agreement,
            "flips": self.flips,
            "ties": max(self.flips - self.faults, 0),
            "faults": self.faults,
        }
