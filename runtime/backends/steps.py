"""Prefill and decode in terms of one operation, for engines that are one graph or several in turn."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np


class Steps(ABC):
    """What the backends on ONNX Runtime share.

    Args:
        all_logits: a step gives those of every position. one_by_one: slots decode one after the other.
    """

    def __init__(self, max_batch: int, max_seq: int, *, all_logits: bool = False, one_by_one: bool = False) -> None:
        self.max_batch, self.max_seq = max_batch, max_seq
        self._all_logits, self.one_by_one = all_logits, one_by_one
        self._prompts = np.ones(max_batch, np.int64)  # lengths, by slot
        self.tapped: dict[str, np.ndarray] = {}

    @abstractmethod
    def forward(self, slot: int, x: np.ndarray, starts: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """One step of the slots from `slot` on: tokens x [B, S] at positions from starts [B] on.

        prompts: lengths of the rows' prompts, [B]. Returns logits [B, 1 or S, V], overwritten by the next step of the size.
        """

    @abstractmethod
    def _copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot's cache to another slot."""

    def prefill(self, slot: int, tokens: list[int], start: int, prompt: int | None = None) -> np.ndarray:
        """Run `tokens` at positions start.. of a slot; returns the logits, [V] (or [S, V] from an all-logits graph).

        prompt: length of the whole prompt, if it does not end with these tokens; models with dynamic NTK depend on it.
        """
        end = start + len(tokens)
        self._check_room(end)
        self._prompts[slot] = end if prompt is None else prompt
        rows = slice(slot, slot + 1)
        logits = self.forward(slot, np.array([tokens], np.int64), np.array([start], np.int64), self._prompts[rows])[0]
        return (logits if self._all_logits else logits[0]).copy()

    def decode(self, tokens: list[int], positions: list[int]) -> np.ndarray:
        """Advance slot i by tokens[i] at positions[i]; returns logits [n, V], overwritten by the next call of this size."""
        self._check_room(max(positions) + 1)
        ids, starts = np.array(tokens, np.int64)[:, None], np.array(positions, np.int64)
        self._prompts[: len(ids)][starts == 0] = 1  # a sequence that begins with decoding
        if not self.one_by_one:
            return self._decode(slice(0, len(ids)), ids, starts)
        rows, tapped = [], []
        for i in range(len(tokens)):
            rows.append(self._decode(slice(i, i + 1), ids, starts).copy())
            tapped.append(self.tapped)
        self.tapped = {tap: np.concatenate([values[tap] for values in tapped]) for tap in self.tapped}
        return np.concatenate(rows)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot's cache to another slot."""
        self._copy(source, target, length)
        self._prompts[target] = self._prompts[source]

    def _decode(self, slots: slice, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return self.forward(slots.start, ids[slots], starts[slots], self._prompts[slots])[:, -1]

    def _check_room(self, end: int) -> None:
        assert end <= self.max_seq, f"{end} positions in a cache of {self.max_seq}"
