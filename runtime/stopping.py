"""Stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces, and holds back what could be the start of one.

    The first is the one that is complete first; of those that end together, the longest. Where the text is cut makes no
    difference. Each stop string is followed by its own automaton (Knuth, Morris, Pratt 1977), so that a character costs
    amortised constant time per stop string.

    Attributes:
        matched: the stop string found, or None.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        assert all(stops), "an empty stop string"
        self.matched: str | None = None
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._failures = [_failures(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)  # characters of each stop string that end the text so far
        self._held = ""  # the longest of them

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """Take the next piece; returns what may be shown. Pieces after a match are dropped."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        for index, char in enumerate(text):
            self._advance(char)
            if self.matched is not None:
                whole = self._held + text[: index + 1]
                self._held = ""
                return whole if self._include_stop else whole.removesuffix(self.matched)
        whole = self._held + text
        shown = len(whole) - max(self._states)
        self._held = whole[shown:]
        return whole[:shown]

    def flush(self) -> str:
        """The text has ended: returns what was held back."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> None:
        for number, (stop, failures) in enumerate(zip(self._stops, self._failures, strict=True)):
            state = self._states[number]
            while state and stop[state] != char:
                state = failures[state - 1]
            state += stop[state] == char
            self._states[number] = state
            if state == len(stop) and (self.matched is None or state > len(self.matched)):
                self.matched = stop


def _failures(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    failures = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = failures[length - 1]
        length += stop[index] == stop[length]
        failures[index] = length
    return failures
