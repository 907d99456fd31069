"""The one exception type for a user's mistakes, and the one of warnings, shared by every room."""

from __future__ import annotations

_LONGEST = 1000  # characters of a part


class GateworkError(Exception):
    """Something the caller can fix: bad input, a damaged file, an impossible request.

    Its text is always one line: what is wrong, what was found, what was expected, and how to fix it.
    The command line prints that line and exits with code 2. Settings are called by their options (`--max-seq`), in Python as
    well; sampling parameters, which Python knows better, by their names, and `gatework generate` has the options instead.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        if fix is not None:
            parts.append(f"fix: {fix}")
        super().__init__("; ".join(map(_one_line, parts)))


class GateworkWarning(UserWarning):
    """Something that works, but less well than the caller may expect. The command line prints it in one line."""


def option(name: str) -> str:
    """What the command line calls a setting: "--max-seq" for max_seq."""
    return f"--{name.replace('_', '-')}"


def _one_line(part: str) -> str:
    """Without line breaks, what steers a terminal, and the middle of what is too long: names come out of files, too."""
    line = " ".join(str(part).split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
