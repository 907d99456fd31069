"""What a verification found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gatework.runtime.formatting import table
from gatework.runtime.verify.stages import Stage

_OF_QUALITY = ("prefill: mean KL", "decode: mean KL", "top-1 disagreement", "perplexity change")


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
class Divergence:
    """Where an engine first does something else than its reference would with the same input."""

    stage: Stage
    sequence: str
    position: int
    phase: str

    def __str__(self) -> str:
        stage, note = self.stage, f": {self.stage.note}" if self.stage.note else ""
        where = f"{self.sequence}, position {self.position} ({self.phase})"
        return f"{stage}, {where}{note}; error {stage.observed:.2g}, bound {stage.bound:.2g}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        stage = self.stage.to_dict()
        kept = {name: stage[name] for name in ("layer", "tensor", "observed", "bound", "note")}
        return kept | {"sequence": self.sequence, "position": self.position, "phase": self.phase}


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """All that is known of one engine.

    stages: every step of the tapped tokens, in order of computation. first_divergence: the first of them that failed.
    experts: see `routing.Experts`; None for a dense model, or without steps. quality: figures of the logits.
    facts: what all this was made with. seconds: how long it took, or this run's part of it.
    """

    engine: str
    reference: str
    target: str
    precision: str
    model: dict[str, Any]
    checks: tuple[Check, ...]
    stages: tuple[Stage, ...]
    first_divergence: Divergence | None
    experts: dict[str, Any] | None
    quality: dict[str, Any]
    facts: dict[str, Any]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every check passed, and at least one had a bound."""
        return all(check.passed for check in self.checks) and any(check.bound is not None for check in self.checks)

    @property
    def quality_judged(self) -> bool:
        """Whether there was a bound on what number formats cost the model; without a text `verify` sets none."""
        return any(check.bound is not None and check.name in _OF_QUALITY for check in self.checks)

    @property
    def summary(self) -> str:
        """The verdict in a line."""
        if self.passed:
            judged = sum(check.bound is not None for check in self.checks)
            steps = sum(math.isfinite(stage.bound) for stage in self.stages)
            inside = f", {steps} steps explained by rounding" if steps else ""
            unjudged = "" if self.quality_judged else "; quality was not judged (no --text)"
            return f"passed: {judged} checks within their bounds{inside}{unjudged}"
        if self.first_divergence is not None:
            return f"FAILED: first divergence in {self.first_divergence}"
        return "FAILED: " + ", ".join(check.name for check in self.checks if not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        moe = self.model.get("moe") or {}
        model = {name: self.model.get(name) for name in ("family", "num_layers")}
        model |= {name: moe.get(name) for name in ("num_experts", "top_k")}
        return {
            "engine": self.engine,
            "reference": self.reference,
            "target": self.target,
            "precision": self.precision,
            "model": model,
            "passed": self.passed,
            "summary": self.summary,
            "seconds": round(self.seconds, 3),
            "first_divergence": None if self.first_divergence is None else self.first_divergence.to_dict(),
            "checks": [check.to_dict() for check in self.checks],
            "stages": [stage.to_dict() for stage in self.stages],
            "experts": self.experts,
            "quality": self.quality,
            "facts": self.facts,
        }

    def __str__(self) -> str:
        parts = [f"{self.engine} ({self.target} {self.precision}) against {self.reference}", self._checks()]
        if self.stages:
            parts.append(self._stages())
        parts.append("\n".join(f"{name.replace('_', ' ')}: {_shown(value)}" for name, value in self.facts.items()))
        return "\n\n".join([*parts, self.summary])

    def _checks(self) -> str:
        rows = [("check", "observed", "bound", "passes at", "compared", "", "")]
        for check in self.checks:
            judged = check.bound is not None or not check.passed
            bound = "" if check.bound is None else f"{check.bound:.1e}"
            needed = "" if check.bound is None else "never" if check.would_pass is None else f"{check.would_pass:.1e}"
            verdict = ("ok" if check.passed else "FAILED") if judged else ""
            rows.append(
                (check.name, f"{check.observed:.4g}", bound, needed, f"{check.compared:,}", verdict, check.note)
            )
        return table(rows, "<>>>><<")

    def _stages(self) -> str:
        """Of every tensor the layer that comes closest to its bound, or is furthest beyond it; without bounds, the most off."""
        rows: list[tuple[str, ...]] = [("step", "layers", "error", "expected", "bound", "accumulated", "tightest", "")]
        for tensor in dict.fromkeys(stage.tensor for stage in self.stages):
            same = [stage for stage in self.stages if stage.tensor == tensor]
            tight = max(same, key=lambda stage: (not stage.passed, stage.share, stage.accumulated))
            failed = [str(stage.layer) for stage in same if not stage.passed and stage.layer is not None]
            judged = "ok" if any(math.isfinite(stage.bound) for stage in same) else ""
            passed = all(stage.passed for stage in same)
            verdict = judged if passed else f"FAILED {', '.join(failed)}".rstrip()
            numbers = (tight.local, tight.expected, tight.bound, tight.accumulated)
            place = "" if tight.layer is None else f"layer {tight.layer}"
            rows.append(
                (
                    tensor,
                    str(len(same)),
                    *(f"{number:.2g}" if math.isfinite(number) else "" for number in numbers),
                    place,
                    verdict,
                )
            )
        return table(rows, "<>>>>>><")


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
