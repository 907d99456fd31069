"""From the rounds' figures to medians, ratios and lines of text."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.peers.cells import OURS, SAME

Figures = dict[str, dict[str, list[float]]]  # cell -> peer -> tokens per second, a figure a round


def ratio(figures: dict[str, list[float]], ours: str, theirs: str) -> float | None:
    """Median of the rounds' ratios; None where one of the two was not measured."""
    if ours not in figures or theirs not in figures:
        return None
    return statistics.median(a / b for a, b in zip(figures[ours], figures[theirs], strict=True))


def summary(figures: Figures) -> dict[str, Any]:
    """cell -> medians of tokens per second, and for each of our precisions the ratios to two peers."""
    rows: dict[str, Any] = {}
    for cell, by_peer in figures.items():
        medians = {peer: statistics.median(values) for peer, values in by_peer.items()}
        others = {peer: value for peer, value in medians.items() if peer not in OURS.values()}
        best = max(others, key=lambda peer: others[peer], default="")
        ratios = {}
        for precision, ours in OURS.items():
            if ours in by_peer:
                ratios[precision] = {"best": ratio(by_peer, ours, best), "same": ratio(by_peer, ours, SAME[precision])}
        rows[cell] = {"tok_s": medians, "best_peer": best, "ratios": ratios}
    return rows


def bandwidth_share(figures: Figures, bytes_per_token: dict[str, int], seen: Figures) -> dict[str, float]:
    """peer -> weight bytes that decoding one sequence read per second, over what the memory gave just before; medians.

    seen: the memory's bytes per second, as `figures`.
    """
    cell = "decode-b1"
    return {
        peer: bytes_per_token[peer] * statistics.median(a / b for a, b in zip(speeds, seen[cell][peer], strict=True))
        for peer, speeds in figures.get(cell, {}).items()
    }


def markdown(model: str, rows: dict[str, Any], shares: dict[str, float]) -> str:
    """Tokens per second of every peer, then the ratios: int8 and int4 over the best peer, and over the same precision's."""
    peers = list(dict.fromkeys(peer for row in rows.values() for peer in row["tok_s"]))
    precisions = [precision for precision, ours in OURS.items() if ours in peers]
    head = [model, *peers]
    head += [f"{precision} / {other}" for precision in precisions for other in ("best peer", SAME[precision])]
    lines = [head, ["---"] * len(head)]
    for cell, row in rows.items():
        figures = [number(row["tok_s"].get(peer), 1) for peer in peers]
        for precision in precisions:
            found = row["ratios"].get(precision, {})
            figures += [number(found.get("best"), 2), number(found.get("same"), 2)]
        lines.append([cell, *figures])
    if shares:
        percent = [f"{100 * shares[peer]:.0f} %" if peer in shares else "" for peer in peers]
        lines.append(["decode-b1, share of bandwidth", *percent, *[""] * (2 * len(precisions))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
