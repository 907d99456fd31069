"""What a verification found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gatework.runtime.formatting import table


@dataclass(frozen=True, slots=True)
class Check:
    """One number that an engine was judged by.

    observed: the deviation; 0 is perfect, unless `bound` is None and the name says otherwise.
    bound: the largest that passes; None: reported only.
    compared: how many comparisons are behind it; a check of none fails.
    note: where the largest deviation is, the first one beyond the bound, or what else there is to say.
    """

    name: str
    observed: float
    bound: float | None
    compared: int
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether something was compared and, where there is a bound, lies within it. NaN never does."""
        return self.compared > 0 and (self.bound is None or self.observed <= self.bound)

    @property
    def would_pass(self) -> float | None:
        """The smallest bound, in two digits, that this engine would pass; None where no bound would do."""
        if not math.isfinite(self.observed) or self.compared == 0:
            return None
        rounded = float(f"{self.observed:.1e}")
        if rounded >= self.observed:
            return rounded
        half = 0.05 * 10.0 ** math.floor(math.log10(self.observed))
        return float(f"{self.observed + half:.1e}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; a deviation that is no number is null."""
        return {
            "name": self.name,
            "observed": self.observed if math.isfinite(self.observed) else None,
            "bound": self.bound,
            "passed": self.passed,
            "would_pass": self.would_pass,
            "compared": self.compared,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """All checks of one engine; `facts` says what they were made with."""

    engine: str
    reference: str
    precision: str
    checks: tuple[Check, ...]
    facts: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every check passed, and at least one had a bound."""
        return all(check.passed for check in self.checks) and any(check.bound is not None for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "engine": self.engine,
            "reference": self.reference,
            "precision": self.precision,
            "passed": self.passed,
            "checks": [check.to_dict() for check in self.checks],
            "facts": self.facts,
        }

    def __str__(self) -> str:
        rows = [("check", "observed", "bound", "passes at", "compared", "", "")]
        for check in self.checks:
            judged = check.bound is not None or not check.passed
            bound = "" if check.bound is None else f"{check.bound:.1e}"
            needed = "" if check.bound is None else "never" if check.would_pass is None else f"{check.would_pass:.1e}"
            verdict = ("ok" if check.passed else "FAILED") if judged else ""
            rows.append(
                (check.name, f"{check.observed:.4g}", bound, needed, f"{check.compared:,}", verdict, check.note)
            )
        facts = "\n".join(f"{name.replace('_', ' ')}: {_shown(value)}" for name, value in self.facts.items())
        verdict = "passed" if self.passed else "FAILED"
        head = f"{self.engine} ({self.precision}) against {self.reference}"
        return f"{head}\n\n{table(rows, '<>>>><<')}\n\n{facts}\n\n{verdict}"


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
