"""How the command refuses: exit code 2, one line on standard error, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable

Refuse = Callable[..., str]  # a command line's words -> the line on standard error


def check_refusal(status: int, err: str) -> None:
    """Assert the form of a refusal."""
    assert status == 2
    assert err.startswith("gatework: error: ")
    assert err.count("\n") == 1, err
