"""Numbers and tables for people."""

from __future__ import annotations

from collections.abc import Sequence


def size(nbytes: int) -> str:
    """Bytes in decimal units: 1234567 -> "1.2 MB"."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{nbytes} B" if unit == "B" else f"{value:,.1f} {unit}"


def table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns side by side, two spaces apart; `align` has "<" or ">" for each."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(align))]
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
