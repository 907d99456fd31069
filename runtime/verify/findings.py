"""What a verification has found: every step judged, every row of logits compared, and the report that they make."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gatework.plugins.engine_format import encoder_taps, graph_taps, tap_place
from gatework.runtime.engine import Engine
from gatework.runtime.verify.bounds import Bounds
from gatework.runtime.verify.compare import Comparison, Place
from gatework.runtime.verify.perplexity import negative_log_likelihood, perplexity
from gatework.runtime.verify.record import Recording
from gatework.runtime.verify.report import Check, Divergence, VerifyReport
from gatework.runtime.verify.routing import Experts
from gatework.runtime.verify.stages import Stage, difference, judge
from gatework.runtime.verify.work import Work

if TYPE_CHECKING:
    from gatework.export.checkpoint import Checkpoint
    from gatework.export.rounding import Format

_BINS = 24
_ROWS = 64  # of logits in memory at once


@dataclass(slots=True)
class Findings:
    """What the comparison has found so far."""

    recording: Recording
    model: dict[str, Any]
    stages: list[Stage] = field(default_factory=list)
    experts: Experts | None = None
    rows: dict[str, Comparison] = field(default_factory=lambda: {"prefill": Comparison(), "decode": Comparison()})
    greedy: dict[int, list[bool]] = field(default_factory=dict)  # by case: whether each token is the reference's choice
    flips: list[tuple[float, str]] = field(default_factory=list)  # margin and place of each that is not
    amplified: float = 0.0  # largest relative error of a row whose every step was compared
    losses: dict[str, list[float]] = field(default_factory=lambda: {"reference": [], "engine": []})

    def collect(self, checkpoint: Checkpoint, form: Format, work: Work | None, progress: bool) -> None:
        """Stream the reference and compare; `work` keeps what was found after every layer."""
        from tqdm import tqdm

        from gatework.export.layerwise import LayerwiseReference
        from gatework.export.steps.compared import Compared

        cases = self.recording.cases
        config = checkpoint.config
        by_prompt = config.ntk_length is not None  # or else a token's place in or after the prompt is all one
        numbers: dict[tuple[int, tuple[int, ...], tuple[int, ...], int], int] = {}
        keys = (  # where tokens are dropped, each case has company of its own
            (case.prompt * by_prompt, tuple(case.ids), tuple(case.source or ()), i * config.drop_tokens)
            for i, case in enumerate(cases)
        )
        of_case = [numbers.setdefault(key, len(numbers)) for key in keys]
        prompts, sequences, sources, _ = zip(*numbers, strict=True)
        tapped = [of_case[i] for i in self.recording.starts]
        company = self.recording.company if config.drop_tokens else ()
        given = (sequences, prompts, tapped, form, sources, company)
        reference = LayerwiseReference(checkpoint, self.recording, *given)
        if self.model["moe"] is not None:
            self.experts = Experts(self.model["moe"]["top_k"])
        if work is not None and (done := work.reference()) is not None:
            layers, hidden, self.stages, experts = done
            reference.resume(layers, hidden)
            self.experts = None if experts is None else Experts(**experts)
        with tqdm(
            total=reference.total + 1,
            initial=reference.layers,
            unit="layer",
            desc="reference",
            disable=not progress,
            file=sys.stderr,
        ) as bar:
            for step in reference.steps():
                if isinstance(step, Compared):
                    self._add_step(step)
                    continue
                bar.update()
                if work is not None:
                    work.keep_reference(step + 1, reference.hidden, self.stages, self.experts)
            for item in reference.logits():
                if isinstance(item, Compared):
                    self._add_step(item)
                    continue
                number, start, want = item
                for i in [i for i, other in enumerate(of_case) if other == number]:
                    self._add_logits(i, start, want.numpy())
            bar.update()

    def collect_from(self, other: Recording) -> None:
        """Take another engine's values for the reference's."""
        for name in [*encoder_taps(self.model), *graph_taps(self.model)] if self.recording.starts else []:
            self.stages.append(difference(*tap_place(name), self.recording.rows(name), other.rows(name)))
        for i, case in enumerate(self.recording.cases):
            for start in range(0, len(case.ids), _ROWS):
                found, want = other.logits[i].read(start, start + _ROWS)
                rows = np.zeros((_ROWS, want.shape[1]), np.float32)
                rows[found - start] = want
                self._add_logits(i, start, rows)

    def _add_step(self, step: Any) -> None:
        self.stages.append(judge(step, self.recording))
        if step.tensor.rpartition(".")[2] == "router" and self.experts is not None:
            self.experts.add(step)

    def _add_logits(self, i: int, start: int, want: np.ndarray) -> None:
        """Compare the logits of a case at positions from `start` on with the reference's, [n, V]."""
        case = self.recording.cases[i]
        found, got = self.recording.logits[i].read(start, start + len(want))
        want = want[found - start]
        for phase, rows in self.rows.items():
            chosen = [at for at, position in enumerate(found) if self.recording.phase(i, int(position)) == phase]
            if chosen:
                rows.add(want[chosen], got[chosen], [Place(int(found[at]), case.name) for at in chosen])
                if case.tapped:
                    self.amplified = max([self.amplified, *rows.relative[-len(chosen) :]])
        if case.greedy:
            self._add_greedy(i, found, want, got)
        elif case.prompt == 0:
            followed = [row for row, at in enumerate(found) if at + 1 < len(case.ids)]
            targets = [case.ids[found[row] + 1] for row in followed]
            for side, logits in (("reference", want), ("engine", got)):
                self.losses[side] += negative_log_likelihood(logits[followed], targets).tolist()

    def _add_greedy(self, i: int, found: np.ndarray, want: np.ndarray, got: np.ndarray) -> None:
        """Whether the engine's most likely tokens after a prompt are the reference's."""
        case = self.recording.cases[i]
        for at, theirs, ours in zip(found, want, got, strict=True):
            if at < case.prompt - 1:
                continue
            token, best = int(theirs.argmax()), int(ours.argmax())
            self.greedy.setdefault(i, []).append(token == best)
            if token != best:
                margin = float(theirs[token] - theirs[best]) / float(np.abs(theirs).max())
                place = Place(int(at) + 1, case.name)
                self.flips.append((max(margin, 0.0), f"{place}: {best} instead of {token}"))

    def first_divergence(self) -> Divergence | None:
        """The first step in the order of computation that rounding does not explain."""
        stage = next((stage for stage in self.stages if not stage.passed), None)
        if stage is None:
            return None
        case, position, phase = self.recording.spot(stage.tensor, stage.row)
        return Divergence(stage, self.recording.cases[case].name, position, phase)

    def step_checks(self, difference: float | None) -> list[Check]:
        """Of the steps inside the layers; difference: None where the engine was built to be observed."""
        if not self.stages:
            return []
        tight = max(self.stages, key=lambda stage: (not stage.passed, stage.share))
        divergence = self.first_divergence()
        compared = sum(stage.compared for stage in self.stages)
        note = f"first divergence: {divergence}" if divergence else f"tightest: {tight}"
        checks = [Check("steps: share of the rounding bound", tight.share, 1.0, compared, note)]
        if difference is not None:
            checks.append(Check("steps: logits changed by observing them", difference, 0.0, 1))
        return checks

    def difference_checks(self) -> list[Check]:
        """Of the values inside the layers of two engines."""
        differing = [stage for stage in self.stages if stage.accumulated > 0]
        note = f"the first is {differing[0]}" if differing else "the same bits in all"
        compared = sum(stage.compared for stage in self.stages)
        return [Check("steps that differ", len(differing), None, compared, note)] if self.stages else []

    def logit_checks(self, bounds: Bounds, *, has_text: bool) -> list[Check]:
        """Of what comes out, from the tokens on."""
        relative = bounds.relative
        explained = bool(self.stages) and all(stage.passed and math.isfinite(stage.bound) for stage in self.stages)
        if relative is not None and bounds.amplified is not None and explained:
            relative = max(relative, bounds.amplified * self.amplified)
        checks = [
            _row_check(f"{phase}: max relative error", rows.relative, np.max, relative, rows)
            for phase, rows in self.rows.items()
        ]
        checks.append(self._greedy_check(bounds.greedy_margin))
        for phase, rows in self.rows.items():
            checks.append(_row_check(f"{phase}: mean KL", rows.kl, np.mean, bounds.mean_kl, rows))
            checks.append(_row_check(f"{phase}: max KL", rows.kl, np.max, None, rows))
        top1, top5 = ([x for rows in self.rows.values() for x in getattr(rows, name)] for name in ("top1", "top5"))
        share = _reduced(np.mean, top1)
        checks.append(Check("top-1 disagreement", 1 - share, bounds.top1, len(top1), f"{share:.1%} the same"))
        share = _reduced(np.mean, top5)
        checks.append(Check("top-5 disagreement", 1 - share, None, len(top5), f"{share:.1%} the same"))
        if has_text:
            ours, theirs = perplexity(self.losses["engine"]), perplexity(self.losses["reference"])
            note = f"{ours:.4f}, reference {theirs:.4f}"
            checks.append(
                Check("perplexity change", abs(ours / theirs - 1), bounds.perplexity, len(self.losses["engine"]), note)
            )
        return checks

    def _greedy_check(self, bound: float | None) -> Check:
        same = [x for tokens in self.greedy.values() for x in tokens]
        note = f"{sum(same)} of {len(same)} tokens the same"
        if self.flips:
            note += f"; {max(self.flips)[1]}"
        margin = max((margin for margin, _ in self.flips), default=0.0)
        return Check("greedy tokens: margin of a flip", margin, bound, len(same), note)

    def quality(self, *, has_text: bool) -> dict[str, Any]:
        """Figures of the logits, for the report."""
        every = list(self.rows.values())
        kl = np.array([x for rows in every for x in rows.kl])
        kl = kl[np.isfinite(kl)]
        counts, edges = np.histogram(np.log10(np.maximum(kl, 1e-12)), _BINS)
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
        points = {name: float(np.quantile(kl, share)) for name, share in shares.items()} if len(kl) else {}
        return {
            "perplexity": _finite({side: perplexity(losses) for side, losses in self.losses.items()})
            if has_text
            else None,
            "kl": {"mean": float(kl.mean())} | points if len(kl) else None,
            "kl_histogram": {"edges": np.power(10, edges).tolist(), "counts": counts.tolist()},
            "top1": _reduced(np.mean, [x for rows in every for x in rows.top1]),
            "top5": _reduced(np.mean, [x for rows in every for x in rows.top5]),
            "greedy_match": [
                {"sequence": self.recording.cases[i].name, "matched": [*same, False].index(False), "of": len(same)}
                for i, same in self.greedy.items()
            ],
        }

    def report(
        self,
        engine: Engine,
        reference: str,
        checks: Sequence[Check],
        facts: dict[str, Any],
        versions: dict[str, str],
        *,
        has_text: bool,
        seconds: float,
    ) -> VerifyReport:
        """All together."""
        return VerifyReport(
            engine=str(engine.path),
            reference=reference,
            target=engine.manifest["target"],
            precision=engine.manifest["precision"],
            model=engine.model,
            checks=tuple(checks),
            stages=tuple(self.stages),
            first_divergence=self.first_divergence(),
            experts=self.experts.to_dict() if self.experts is not None and self.stages else None,
            quality=self.quality(has_text=has_text),
            facts=facts | {"versions": ", ".join(f"{name} {number}" for name, number in versions.items())},
            seconds=seconds,
        )

    def facts(self, *, has_text: bool) -> dict[str, Any]:
        """For the report."""
        facts: dict[str, Any] = {}
        if self.experts is not None and self.experts.agreement:
            share = f"{np.mean(self.experts.agreement):.2%} agree with the reference's own run"
            facts["experts"] = f"{share}; {self.experts.flips} tokens differ, {self.experts.faults} beyond a near tie"
        if has_text:
            values = {f"perplexity_{side}": perplexity(losses) for side, losses in self.losses.items()}
            facts |= _finite(values)
        return facts


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _row_check(
    name: str, values: list[float], reduce: Callable[[list[float]], float], bound: float | None, rows: Comparison
) -> Check:
    """A check of all rows together; its note says where the largest is, and which is the first beyond a broken bound."""
    check = Check(name, _reduced(reduce, values), bound, len(values))
    if not values or (check.passed and reduce is not np.max):
        return check
    worst = int(np.argmax(values))
    note = f"{rows.places[worst]}, token {rows.worst_token[worst]}"
    beyond = [i for i, value in enumerate(values) if bound is not None and not value <= bound]
    if beyond and not check.passed:
        first = min(beyond, key=lambda i: rows.places[i])
        note += f" ({values[worst]:.2g}); first beyond the bound: {rows.places[first]} ({values[first]:.2g})"
    return replace(check, note=note)


def _reduced(reduce: Callable[[list[float]], float], values: list[Any]) -> float:
    """np.max or np.mean, both of which pass NaN on; NaN for nothing."""
    return float(reduce(values)) if values else math.nan
