"""Numbers and tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def size(nbytes: int) -> str:
    """Bytes in decimal units: 1234567 -> "1.2 MB"."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{nbytes} B" if unit == "B" else f"{value:,.1f} {unit}"


def counted(number: int, one: str, many: str | None = None) -> str:
    """A count and what is counted: "1 token", "1,024 tokens"; many: where that is not `one` with an s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def numbers(ascending: Iterable[int], step: int = 1) -> str:
    """In few words: "0, 3 to 7", or, where they go by steps of 4, "3, 7, … 23"."""
    runs: list[list[int]] = []
    for number in ascending:
        if runs and number - runs[-1][-1] == step:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(_run(run, step) for run in runs)


def _run(run: list[int], step: int) -> str:
    if len(run) < 4:
        return ", ".join(map(str, run))
    return f"{run[0]} to {run[-1]}" if step == 1 else f"{run[0]}, {run[1]}, … {run[-1]}"


def table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns side by side, two spaces apart; `align` has "<" or ">" for each."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(align))]
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
