"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatework.runtime.stopping import StopMatcher

# Few letters, so that stop strings overlap themselves, each other and the cuts.
texts = st.text("ab\u4e2d", max_size=40)
stop_lists = st.lists(st.text("ab\u4e2d", min_size=1, max_size=5), max_size=4)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition, directly: the first end of a stop string, and the longest stop string that ends there."""
    for end in range(1, len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            longest = max(here, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(texts, stop_lists, st.lists(st.integers(0, 40), max_size=8), st.booleans())
def test_any_cut_of_the_text_gives_the_definition(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    matcher = StopMatcher(stops, include_stop=include)
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [matcher.push(text[start:end]) for start, end in pairwise(places)]
    shown, matched = expected(text, stops, include)
    assert matcher.matched == matched
    assert matcher.stopped == (matched is not None)
    assert "".join(pieces) + matcher.flush() == shown


@given(texts, stop_lists)
def test_no_more_is_held_back_than_could_be_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for place, char in enumerate(text):
        shown += matcher.push(char)
        if matcher.stopped:
            return
        held = text[len(shown) : place + 1]
        assert shown + held == text[: place + 1]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_over_several_tokens() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.push(piece) for piece in ("Hi", "!\n", "\nUs", "ed", "\n\n\nU", "ser", ": x")] == [
        "Hi",
        "!",
        "",
        "\n\nUsed",
        "\n",
        "",
        "",
    ]
    assert matcher.matched == "\n\nUser:"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_what_is_held_back_comes_out_at_the_end() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == "the "
    assert matcher.flush() == "EN"
    assert not matcher.stopped


def test_without_stop_strings_text_passes() -> None:
    assert StopMatcher([]).push("text") == "text"


def test_an_empty_stop_string_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        StopMatcher([""])
