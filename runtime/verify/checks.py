"""verify: an engine and its reference go through the same tokens."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from gatework.plugins.errors import GateworkError
from gatework.runtime.backends.open import module_version, open_backend
from gatework.runtime.engine import Engine
from gatework.runtime.scheduler import Backend
from gatework.runtime.verify.bounds import DEFAULT_BOUNDS, Bounds
from gatework.runtime.verify.compare import Comparison, Place
from gatework.runtime.verify.feed import Fed, feed
from gatework.runtime.verify.perplexity import WINDOW, negative_log_likelihood, perplexity
from gatework.runtime.verify.plan import make_plan
from gatework.runtime.verify.report import Check, VerifyReport

if TYPE_CHECKING:
    from gatework.export.checkpoint import Checkpoint
    from gatework.export.reference import Reference

_TOOLS = ("gatework", "torch")
_MOST_SLOTS = 8  # windows compared at once: the reference's logits of all of them are in memory
_WINDOW_CHUNK = 32  # prefill step for windows, so that each gives several rows


def verify(
    engine_dir: str | os.PathLike[str],
    checkpoint_dir: str | os.PathLike[str],
    *,
    text: str | None = None,
    prompts: Sequence[str | Sequence[int]] | None = None,
    tokens: int = 64,
    window: int = WINDOW,
    bounds: Bounds | None = None,
    check_fingerprint: bool = True,
    threads: int | None = None,
    progress: bool = False,
) -> VerifyReport:
    """Compare an engine with the PyTorch reference of its checkpoint.

    Every prompt is prefilled and then decoded in a batch along the reference's own greedy tokens. Then every window, of
    the text or else of random tokens, is decoded token by token from an empty cache, and prefilled. Only outputs are
    compared: in a quantised engine, a fault that moves them less than rounding does goes unseen.

    Args:
        text: gives perplexity, and the windows.
        prompts: text or token ids; default: random ids of several lengths, fixed, and the text's first tokens.
        tokens: greedy tokens after each prompt; fewer where the engine's max_seq leaves less room.
        window: tokens of the text per window, at most max_seq.
        bounds: default: `DEFAULT_BOUNDS` of the engine's precision.
        check_fingerprint: refuse a checkpoint that the engine was not built from.
        threads: of the engine.
        progress: show a progress bar on standard error.

    Raises:
        GateworkError: a bad engine or checkpoint, one that does not belong to the other, or a prompt that does not fit.
    """
    from tqdm import tqdm

    from gatework.export.checkpoint import Checkpoint
    from gatework.export.reference import Reference

    engine = Engine.open(engine_dir)
    checkpoint = Checkpoint.open(os.fspath(checkpoint_dir))
    _check_pair(engine, checkpoint, check_fingerprint)
    bounds = bounds if bounds is not None else _default_bounds(engine)
    plan = make_plan(engine, text, prompts, tokens, window)
    reference = Reference.load(checkpoint, plan.longest)
    slots = min(engine.limits.max_batch, _MOST_SLOTS)
    run = _Run(reference, open_backend(engine, max_batch=slots, threads=threads), engine.limits.prefill_chunk)
    with tqdm(total=plan.rows, unit="tok", desc="verify", disable=not progress, file=sys.stderr) as bar:
        run.prompts(plan.prompts, plan.tokens, bar.update)
        run.windows(plan.windows, bar.update)
    checks = run.checks(bounds, has_text=text is not None)
    facts = plan.facts(engine) | run.facts(has_text=text is not None)
    versions = {name: version(name) for name in _TOOLS} | module_version(engine) | {"numpy": version("numpy")}
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    return VerifyReport(str(engine.path), str(checkpoint.path), engine.manifest["precision"], checks, facts)


def _check_pair(engine: Engine, checkpoint: Checkpoint, check_fingerprint: bool) -> None:
    if check_fingerprint and checkpoint.fingerprint() != engine.manifest["checkpoint"]["fingerprint"]:
        raise GateworkError(
            f"{engine.path} was not built from {checkpoint.path}",
            got="another fingerprint",
            fix="give the checkpoint that the engine was built from, or build the engine again",
        )
    ours, theirs = engine.model["vocab_size"], checkpoint.config.vocab_size
    if ours != theirs:
        raise GateworkError("engine and reference differ in vocab_size", got=f"{ours} and {theirs}")


def _default_bounds(engine: Engine) -> Bounds:
    precision = engine.manifest["precision"]
    if precision not in DEFAULT_BOUNDS:
        raise GateworkError("there are no default bounds for this precision", got=precision, fix="pass bounds=")
    return DEFAULT_BOUNDS[precision]


@dataclass(slots=True)
class _Run:
    """Both models at work, and what has been compared so far."""

    reference: Reference
    backend: Backend
    chunk: int
    rows: dict[str, Comparison] = field(default_factory=lambda: {"prefill": Comparison(), "decode": Comparison()})
    greedy: int = 0  # tokens compared
    flips: list[tuple[float, str]] = field(default_factory=list)  # margin and place of each that differs
    losses: dict[str, list[float]] = field(default_factory=lambda: {"reference": [], "engine": []})

    def prompts(self, prompts: dict[str, list[int]], tokens: int, step: Callable[[int], object]) -> None:
        """Prefill the prompts and decode the reference's greedy tokens."""
        names, lengths = list(prompts), [len(ids) for ids in prompts.values()]
        following = [self.reference.greedy(ids, tokens) for ids in prompts.values()]
        sequences = [ids + after[:-1] for ids, after in zip(prompts.values(), following, strict=True)]
        wanted = [self.reference.logits(ids) for ids in sequences]
        for fed in feed(self.backend, sequences, lengths, self.chunk):
            want = self._compare(fed, names, wanted)
            for row, (i, at) in enumerate(zip(fed.sequences, fed.positions, strict=True)):
                if at >= lengths[i] - 1:
                    token = following[i][at - lengths[i] + 1]
                    self._compare_token(want[row], fed.logits[row], token, Place(at + 1, names[i]))
            step(fed.tokens)

    def windows(self, windows: dict[str, list[int]], step: Callable[[int], object]) -> None:
        """Decode the windows from their first token on, then prefill them."""
        items = list(windows.items())
        for first in range(0, len(items), self.backend.max_batch):
            names = [name for name, _ in items[first : first + self.backend.max_batch]]
            sequences = [windows[name] for name in names]
            wanted = [self.reference.logits(ids) for ids in sequences]
            for fed in feed(self.backend, sequences, [0] * len(sequences), 1):
                self._score(fed, sequences, self._compare(fed, names, wanted))
                step(fed.tokens)
            for fed in feed(self.backend, sequences, [len(ids) for ids in sequences], min(_WINDOW_CHUNK, self.chunk)):
                self._compare(fed, names, wanted)
                step(fed.tokens)

    def _compare(self, fed: Fed, names: list[str], wanted: list[np.ndarray]) -> np.ndarray:
        """Compare a step's logits with the reference's, which are returned, [n, V]."""
        places = list(zip(fed.sequences, fed.positions, strict=True))
        want = np.stack([wanted[i][at] for i, at in places])
        self.rows[fed.phase].add(want, fed.logits, [Place(at, names[i]) for i, at in places])
        return want

    def _compare_token(self, want: np.ndarray, got: np.ndarray, token: int, place: Place) -> None:
        self.greedy += 1
        best = int(got.argmax())
        if best != token:
            margin = float(want[token] - want[best]) / float(np.abs(want).max())
            self.flips.append((max(margin, 0.0), f"{place}: {best} instead of {token}"))

    def _score(self, fed: Fed, sequences: list[list[int]], want: np.ndarray) -> None:
        """Losses of the tokens that follow, in rows that are not their window's last."""
        places = zip(fed.sequences, fed.positions, strict=True)
        following = [(row, sequences[i][at + 1]) for row, (i, at) in enumerate(places) if at + 1 < len(sequences[i])]
        if following:
            rows, targets = zip(*following, strict=True)
            for side, logits in (("reference", want), ("engine", fed.logits)):
                self.losses[side] += negative_log_likelihood(logits[list(rows)], targets).tolist()

    def checks(self, bounds: Bounds, *, has_text: bool) -> tuple[Check, ...]:
        """Everything compared, judged."""
        checks = [
            _row_check(f"{phase}: max relative error", rows.relative, np.max, bounds.relative, rows)
            for phase, rows in self.rows.items()
        ]
        checks.append(self._greedy_check(bounds.greedy_margin))
        for phase, rows in self.rows.items():
            checks.append(_row_check(f"{phase}: mean KL", rows.kl, np.mean, bounds.mean_kl, rows))
            checks.append(_row_check(f"{phase}: max KL", rows.kl, np.max, None, rows))
        every = list(self.rows.values())
        compared = sum(map(len, every))
        checks.append(
            Check("top-1 agreement", _reduced(np.mean, [x for rows in every for x in rows.top1]), None, compared)
        )
        checks.append(
            Check("top-5 overlap", _reduced(np.mean, [x for rows in every for x in rows.top5]), None, compared)
        )
        if has_text:
            ours, theirs = perplexity(self.losses["engine"]), perplexity(self.losses["reference"])
            note = f"{ours:.4f}, reference {theirs:.4f}"
            checks.append(
                Check("perplexity change", abs(ours / theirs - 1), bounds.perplexity, len(self.losses["engine"]), note)
            )
        return tuple(checks)

    def _greedy_check(self, bound: float | None) -> Check:
        note = f"{self.greedy - len(self.flips)} of {self.greedy} tokens the same"
        if self.flips:
            note += f"; {max(self.flips)[1]}"
        margin = max((margin for margin, _ in self.flips), default=0.0)
        return Check("greedy tokens: margin of a flip", margin, bound, self.greedy, note)

    def facts(self, *, has_text: bool) -> dict[str, Any]:
        """For the report."""
        if not has_text:
            return {}
        values = {side: perplexity(losses) for side, losses in self.losses.items()}
        return {f"perplexity_{side}": value if math.isfinite(value) else None for side, value in values.items()}


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


def _reduced(reduce: Callable[[list[float]], float], values: list[float]) -> float:
    """np.max or np.mean, both of which pass NaN on; NaN for nothing."""
    return float(reduce(values)) if values else math.nan
