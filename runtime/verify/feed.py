"""Feeding an engine given tokens (teacher forcing), through the same prefill and decode steps that generation takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gatework.runtime.scheduler import Backend


@dataclass(frozen=True, slots=True)
class Fed:
    """What one step gave: row i of logits [n, V] follows token `positions[i]` of sequence `sequences[i]`.

    The next step overwrites the logits. tokens: how many the step ran.
    """

    phase: Literal["prefill", "decode"]
    sequences: list[int]
    positions: list[int]
    logits: np.ndarray
    tokens: int


def feed(backend: Backend, sequences: Sequence[Sequence[int]], prompts: Sequence[int], chunk: int) -> Iterator[Fed]:
    """Run all sequences, in batches as large as the backend takes.

    Of sequence i the first prompts[i] tokens are prefilled, `chunk` at a time, which gives the logits after each chunk's
    last token; the others are decoded one by one, in a batch whose rows stand at different positions. The longest rest
    goes to slot 0, so that the slots in use are always the first ones.
    """
    order = sorted(range(len(sequences)), key=lambda i: prompts[i] - len(sequences[i]))
    for first in range(0, len(order), backend.max_batch):
        group = order[first : first + backend.max_batch]
        for slot, i in enumerate(group):
            for start in range(0, prompts[i], chunk):
                tokens = list(sequences[i][start : min(start + chunk, prompts[i])])
                logits = backend.prefill(slot, tokens, start)
                yield Fed("prefill", [i], [start + len(tokens) - 1], np.atleast_2d(logits)[-1:], len(tokens))
        yield from _decode(backend, sequences, prompts, group)


def _decode(
    backend: Backend, sequences: Sequence[Sequence[int]], prompts: Sequence[int], group: list[int]
) -> Iterator[Fed]:
    step = 0
    while rows := [i for i in group if prompts[i] + step < len(sequences[i])]:
        positions = [prompts[i] + step for i in rows]
        logits = backend.decode([sequences[i][at] for i, at in zip(rows, positions, strict=True)], positions)
        yield Fed("decode", rows, positions, logits, len(rows))
        step += 1
