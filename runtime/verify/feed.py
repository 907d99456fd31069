"""Feeding an engine given tokens, through the same prefill and decode steps that generation takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from gatework.runtime.scheduler import Backend, EncodingBackend


@dataclass(slots=True)
class Case:
    """One sequence for the engine.

    ids: its tokens. prompt: how many of them are prefilled, `chunk` at a time; the others are decoded one by one.
    length: tokens to run in all; where `ids` has fewer, the engine's own most likely ones are appended as it goes.
    greedy: the most likely token after the prompt, and after each that follows, is of interest.
    tapped: every step is to be compared, not the logits alone. source: what the encoder reads, where there is one.
    """

    name: str
    ids: list[int]
    prompt: int
    chunk: int
    length: int
    greedy: bool = False
    tapped: bool = False
    source: list[int] | None = None

    @property
    def steps(self) -> int:
        """Tokens that encoder and decoder take."""
        return self.length + len(self.source or ())

    def follow(self, logits: np.ndarray) -> None:
        """Append the most likely token after the last one, unless there are enough."""
        if len(self.ids) < self.length:
            self.ids.append(int(logits.argmax()))


@dataclass(frozen=True, slots=True)
class Fed:
    """What one step gave: row i of logits [n, V] follows token `positions[i]` of case `cases[i]`.

    The next step overwrites the logits. tokens: how many the step ran.
    """

    phase: Literal["prefill", "decode"]
    cases: list[int]
    positions: list[int]
    logits: np.ndarray
    tokens: int


def feed(
    backend: Backend,
    cases: Sequence[Case],
    finished: Callable[[int, int], None],
    encoded: Callable[[int], None] | None = None,
) -> Iterator[Fed]:
    """Run all cases, in batches as large as the backend takes.

    `finished` gets the slot and number of each that is through, `encoded` the number of each whose source was just encoded.

    Decoding goes in a batch whose rows stand at different positions. The longest rest goes to slot 0, so that the slots in
    use are always the first ones.
    """
    order = sorted(range(len(cases)), key=lambda i: cases[i].prompt - cases[i].length)
    for first in range(0, len(order), backend.max_batch):
        group = order[first : first + backend.max_batch]
        for slot, i in enumerate(group):
            if (source := cases[i].source) is not None:
                cast(EncodingBackend, backend).encode(slot, source)
                if encoded is not None:
                    encoded(i)
            yield from _prefill(backend, slot, i, cases[i])
        yield from _decode(backend, cases, group)
        for slot, i in enumerate(group):
            finished(slot, i)


def _prefill(backend: Backend, slot: int, i: int, case: Case) -> Iterator[Fed]:
    for start in range(0, case.prompt, case.chunk):
        tokens = case.ids[start : min(start + case.chunk, case.prompt)]
        logits = np.atleast_2d(backend.prefill(slot, tokens, start, case.prompt))[-1:]
        if start + len(tokens) == len(case.ids):
            case.follow(logits[0])
        yield Fed("prefill", [i], [start + len(tokens) - 1], logits, len(tokens))


def _decode(backend: Backend, cases: Sequence[Case], group: list[int]) -> Iterator[Fed]:
    step = 0
    while rows := [i for i in group if cases[i].prompt + step < len(cases[i].ids)]:
        positions = [cases[i].prompt + step for i in rows]
        logits = backend.decode([cases[i].ids[at] for i, at in zip(rows, positions, strict=True)], positions)
        for i, at, row in zip(rows, positions, logits, strict=True):
            if at + 1 == len(cases[i].ids):
                cases[i].follow(row)
        yield Fed("decode", rows, positions, logits, len(rows))
        step += 1
