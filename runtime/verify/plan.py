"""What a verification runs through an engine: prompts, and windows of a text or of random tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gatework.plugins.errors import GateworkError
from gatework.runtime.engine import Engine
from gatework.runtime.tokenizer import load_tokenizer
from gatework.runtime.verify.feed import Case
from gatework.runtime.verify.perplexity import windows

_LONGEST_PROMPT = 1024
_LEAST_TEXT = 256
_TEXT_HEAD = 32
_RANDOM_WINDOWS = 4
_WINDOW_CHUNK = 32  # prefill step for windows, so that each gives several rows
_UNSEEN = "this plan shows no values inside; one built with --taps does"
_MOST_TAPPED = 1024  # tokens; every step of theirs is kept, and computed several times by the reference


@dataclass(frozen=True, slots=True)
class Plan:
    """Sequences for the engine.

    cases: prompts, windows to decode, the same windows to prefill. groups: their numbers, in the order of the runs.
    """

    cases: list[Case]
    groups: tuple[range, ...]

    @property
    def rows(self) -> int:
        """Tokens to run."""
        return sum(case.length for case in self.cases)

    def facts(self, engine: Engine) -> dict[str, Any]:
        """For the report."""
        prompts, windows = ([self.cases[i] for i in group] for group in self.groups[:2])
        tapped = sum(case.steps for case in self.cases if case.tapped)
        facts: dict[str, Any] = {
            "prompts": ", ".join(f"{case.name} of {len(case.source or case.ids[: case.prompt])}" for case in prompts),
            "windows": f"{len(windows)} of up to {max((case.length for case in windows), default=0)} tokens",
            "steps": f"of {tapped} tokens" if tapped else f"none: {_UNSEEN}",
        }
        reach = engine.model.get("sliding_window")
        if reach is not None and max(case.length for case in self.cases) <= reach:
            facts["not_covered"] = f"the sliding window of {reach}: no sequence here is longer"
        return facts


def make_plan(
    engine: Engine,
    text: str | None,
    prompts: Sequence[str | Sequence[int]] | None,
    tokens: int,
    window: int,
    *,
    taps: bool,
) -> Plan:
    """The arguments of `verify` as token ids that fit the engine; with `taps` some of the cases are tapped."""
    if tokens < 1 or window < 2:
        raise GateworkError(
            "--tokens or --window is too small", got=f"{tokens} and {window}", expected="at least 1 and 2"
        )
    max_seq = engine.limits.max_seq
    tokens = min(tokens, max(1, max_seq // 2))
    room = max_seq if engine.has_encoder else max_seq - tokens + 1
    rng = np.random.default_rng(0)
    text_ids = [] if text is None else _encode(engine, text)
    if text is not None and len(text_ids) < _LEAST_TEXT:
        got, expected = f"{len(text_ids)} tokens", f"at least {_LEAST_TEXT}; some thousands give figures to trust"
        raise GateworkError("the text is too short to verify with", got=got, expected=expected)
    if prompts is None:
        chosen = {f"random prompt {n}": ids for n, ids in enumerate(_random_prompts(engine, room, rng), start=1)}
        if text_ids:
            chosen["the text's head"] = text_ids[: min(_TEXT_HEAD, room)]
    else:
        encoded = [
            _encode(engine, prompt) if isinstance(prompt, str) else [int(id) for id in prompt] for prompt in prompts
        ]
        chosen = {f"prompt {n}": _checked(engine, ids, room) for n, ids in enumerate(encoded, start=1)}
    width = min(window, max_seq)
    if text is None:
        parts = [_random_ids(engine, width, rng) for _ in range(_RANDOM_WINDOWS)] if width >= 2 else []
    else:
        parts = windows(text_ids, width)
    kind = "random window" if text is None else "window"
    named = {f"{kind} {n}": ids for n, ids in enumerate(parts, start=1)}
    if engine.has_encoder:
        return _encoding_plan(engine.model["start_token_id"], chosen, named, tokens, taps=taps)
    return _plan(engine, chosen, named, tokens, taps=taps)


def _encoding_plan(
    start: int, prompts: dict[str, list[int]], windows: dict[str, list[int]], tokens: int, *, taps: bool
) -> Plan:
    """Of a model with an encoder, which reads prompts, and the first half of each window; the decoder takes token by token."""
    cases = [Case(name, [start], 1, 1, tokens, greedy=True, source=ids) for name, ids in prompts.items()]
    for name, ids in windows.items():
        half = len(ids) // 2
        cases.append(Case(name, [start, *ids[half:]], 0, 1, len(ids) - half + 1, source=ids[:half]))
    if taps:
        _tap(cases, list(range(len(cases))))
    return Plan(cases, (range(len(prompts)), range(len(prompts), len(cases))))


def _plan(
    engine: Engine, prompts: dict[str, list[int]], windows: dict[str, list[int]], tokens: int, *, taps: bool
) -> Plan:
    chunk = engine.limits.prefill_chunk
    cases = [Case(name, ids, len(ids), chunk, len(ids) + tokens - 1, greedy=True) for name, ids in prompts.items()]
    cases += [Case(name, ids, 0, 1, len(ids)) for name, ids in windows.items()]
    cases += [Case(name, ids, len(ids), min(_WINDOW_CHUNK, chunk), len(ids)) for name, ids in windows.items()]
    ends = (0, len(prompts), len(prompts) + len(windows), len(cases))
    groups = tuple(range(first, end) for first, end in itertools.pairwise(ends))
    if taps:
        _tap(cases, [*groups[0], *itertools.chain(*zip(*groups[1:], strict=True))])
    return Plan(cases, groups)


def _tap(cases: list[Case], order: list[int]) -> None:
    """Choose cases whose steps are to be compared: the first ones, until there are tokens enough."""
    total = 0
    for i in order:
        if total and total + cases[i].steps > _MOST_TAPPED:
            break
        cases[i].tapped = True
        total += cases[i].steps


def _encode(engine: Engine, text: str) -> list[int]:
    tokenizer = load_tokenizer(engine.path)
    if tokenizer is None:
        fix = "leave --text out, or build from a checkpoint with tokenizer files"
        raise GateworkError("this engine has no tokenizer", got="a text", expected="token ids", fix=fix)
    return tokenizer.encode(text)


def _checked(engine: Engine, ids: list[int], room: int) -> list[int]:
    """Prompt ids that the engine and the reference can take, with the tokens that follow."""
    vocab_size = engine.model["vocab_size"]
    if not 1 <= len(ids) <= room:
        raise GateworkError("a prompt does not fit", got=f"{len(ids)} tokens", expected=f"1 to {room}")
    if not all(0 <= token < vocab_size for token in ids):
        raise GateworkError("a token id is out of range", expected=f"0 to {vocab_size - 1}")
    return ids


def _random_prompts(engine: Engine, room: int, rng: np.random.Generator) -> list[list[int]]:
    """One token; some; enough for a second prefill chunk; and enough to leave a window or a trained length that is not far."""
    edges = [engine.limits.prefill_chunk, *(engine.model.get(name) for name in ("sliding_window", "ntk_length"))]
    lengths = {1, 17, *(edge + 9 for edge in edges if edge is not None and edge + 9 <= _LONGEST_PROMPT)}
    return [_random_ids(engine, length, rng) for length in sorted({min(length, room) for length in lengths})]


def _random_ids(engine: Engine, count: int, rng: np.random.Generator) -> list[int]:
    """Random tokens after BOS, where the model has one."""
    ids: list[int] = rng.integers(0, engine.model["vocab_size"], count).tolist()
    bos = engine.model.get("bos_token_id")
    return ids if bos is None else [bos, *ids[1:]]
