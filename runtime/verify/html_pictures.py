"""The sections of a report's page that have charts: stages, experts, quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element

from gatework.runtime.verify import charts
from gatework.runtime.verify.html_parts import Report, figure, icon, observed, section, table, table_row, tile
from gatework.runtime.verify.markup import element, number, percent, shown, stage_name

_LEGEND = {  # class -> what it is, how it is drawn, whether with a dot
    "local": ("local error", "M1 6h22", True),
    "expected": ("expected of rounding", "M1 6h22", False),
    "bound": ("bound of the local error", "M1 6h22", False),
    "accumulated": ("accumulated error", "M1 6h22", True),
    "cross": ("beyond the bound", "M8 2l8 8m0-8l-8 8", False),
}
# Tensors of no layer, in order of computation.
_OUTSIDE = ("encoder.embedding", "encoder.norm", "embedding", "output", "logits")


def stages(report: Report) -> Element | None:
    """Errors by stage: a panel for each kind of tensor, and tables."""
    entries = report.get("stages") or []
    if not entries:
        return None
    faults = [stage for stage in entries if not stage.get("passed")]
    return section(
        "Error by stage",
        element(
            "p",
            "Local: the relative RMS error of a stage when the reference gets the engine's own inputs; only this is judged."
            " Accumulated: its relative error against the reference's own run. Layers run from left to right; all panels"
            " share one logarithmic axis.",
        ),
        element(
            "ul", *(element("li", _swatch(name), words) for name, (words, _, _) in _LEGEND.items()), class_="legend"
        ),
        element("div", *_panels(entries), class_="panels"),
        _stage_table("Stages beyond their bound", faults) if faults else None,
        element("details", element("summary", "All stages in numbers"), _stage_table("All stages", entries)),
    )


def _swatch(name: str) -> Element:
    _, path, dot = _LEGEND[name]
    marks = (element("path", d=path), element("circle", cx=12, cy=6, r=2.6) if dot else None)
    attributes = {"viewBox": "0 0 24 12", "aria-hidden": "true"}
    return element("svg", element("g", *marks, class_=name), class_="swatch", **attributes)


def _panels(entries: Sequence[Report]) -> list[Element]:
    """One for each kind of tensor in the layers, in order of appearance, and one for those outside."""
    axis = charts.stage_axis(entries)
    inside = [(stage["layer"], stage) for stage in entries if stage.get("layer") is not None]
    outside = [(shown(stage.get("tensor")), stage) for stage in entries if stage.get("layer") is None]
    layers = [layer for layer, _ in inside]
    panels = []
    for kind in dict.fromkeys(stage.get("tensor") for _, stage in inside):
        points = [(layer, stage) for layer, stage in inside if stage.get("tensor") == kind]
        panels.append(_panel(shown(kind), points, range(min(layers), max(layers) + 1), axis))
    if outside:
        known = [name for name in _OUTSIDE if name in dict(outside)]
        names = list(dict.fromkeys([*known, *dict(outside)]))
        panels.append(_panel(charts.OUTSIDE, outside, names, axis))
    return panels


def _panel(kind: str, points: Sequence[tuple[Any, Report]], columns: Sequence[Any], axis: charts.Axis) -> Element:
    faults = [str(column) for column, stage in points if not stage.get("passed")]
    words = ", ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
    words = words if kind == charts.OUTSIDE else f"layer {words}"
    mark = element("strong", icon(False), words) if faults else None
    return figure(kind, charts.stage_panel(kind, points, columns, axis), aside=mark)


def _stage_table(caption: str, entries: Sequence[Report]) -> Element:
    names = ("Stage", "Result", "Local", "Expected", "Bound", "Accumulated", "Compared", "Note")
    return table(caption, names, [_stage_row(stage) for stage in entries])


def _stage_row(stage: Report) -> Element:
    rest = (shown(stage.get(name)) for name in ("expected", "bound", "accumulated", "compared"))
    name = stage_name(stage.get("layer"), shown(stage.get("tensor")))
    return table_row(stage, name, (observed(stage.get("local")), *rest), judged=True)


def experts(report: Report) -> Element | None:
    """Which experts the tokens went to."""
    found = report.get("experts") or {}
    if not found:
        return None
    figures = _loads(found.get("load") or {})
    if found.get("agreement"):
        figures.append(figure("agreement by layer", charts.agreement_chart(found["agreement"])))
    tiles = (
        tile("flipped choices", shown(found.get("flips")), "tokens whose experts differ"),
        tile("ties", shown(found.get("ties")), "flips that rounding explains"),
        tile("faults", shown(found.get("faults")), "flips that it does not", failed=bool(found.get("faults"))),
    )
    words = element("p", "Load: an expert's share of a layer's tokens. Rows are layers, columns experts.")
    return section("Experts", element("div", *tiles, class_="tiles"), words, element("div", *figures, class_="panels"))


def _loads(load: Report) -> list[Element]:
    """A heat map of each side, on one scale, and one of what the engine has more or less."""
    sides = {side: load.get(side) or [] for side in ("reference", "engine")}
    shares = [share for rows in sides.values() for row in rows for value in row if (share := number(value)) is not None]
    most = max([*shares, 1e-9])
    level, scale = charts.heat_level(most), _scale("0 %", percent(most), [f"h{i}" for i in range(10)])
    figures = [
        figure(f"load, {side}", charts.heat_map(rows, level, f"Load, {side}, at most {percent(most)}"), scale)
        for side, rows in sides.items()
        if any(rows)
    ]
    shifts = charts.differences(sides["engine"], sides["reference"])
    sizes = [abs(shift) for row in shifts for shift in row if shift is not None]
    if sizes:
        figures.append(_load_shift(shifts, max(*sizes, most / 10)))
    return figures


def _load_shift(shifts: charts.Rows, most: float) -> Element:
    words = f"Load, engine less reference, between {_points(-most)} and {_points(most)} percentage points"
    chart = charts.heat_map(shifts, charts.shift_level(most), words, _points)
    names = [f"down h{i}" for i in range(9, 0, -2)] + [f"up h{i}" for i in range(1, 10, 2)]
    return figure("load, engine less reference", chart, _scale(_points(-most), f"{_points(most)} points", names))


def _points(value: Any) -> str:
    shift = number(value)
    return "–" if shift is None else f"{100 * shift:+.2f}"


def _scale(low: str, high: str, names: Sequence[str]) -> Element:
    cells = [element("path", d=f"M{i * 12} 0h12v10h-12z", class_=name) for i, name in enumerate(names)]
    attributes = {"viewBox": "0 0 120 10", "aria-hidden": "true"}
    return element("p", low, element("svg", *cells, class_="heat-scale", **attributes), high, class_="scale")


def quality(report: Report) -> Element | None:
    """What the engine's errors come to in its output."""
    found = report.get("quality") or {}
    if not found:
        return None
    histogram, matches = found.get("kl_histogram") or {}, found.get("greedy_match") or []
    figures = []
    if histogram.get("counts"):
        chart = charts.histogram(histogram.get("edges") or [], histogram["counts"])
        figures.append(figure("KL of every position, nats", chart))
    if matches:
        figures.append(figure("greedy tokens before the first that differs", _matches(matches)))
    tiles = (*_perplexity(found), *_kl(found), *_tops(found))
    return section("Quality", element("div", *tiles, class_="tiles"), element("div", *figures, class_="panels wide"))


def _perplexity(found: Report) -> list[Element]:
    values = found.get("perplexity") or {}
    if not values:
        return []
    ours, theirs = number(values.get("engine")), number(values.get("reference"))
    change = f", {100 * (ours / theirs - 1):+.2f} %" if ours is not None and theirs else ""
    return [tile("perplexity", observed(values.get("engine")), f"reference {shown(values.get('reference'))}{change}")]


def _kl(found: Report) -> list[Element]:
    kl = found.get("kl") or {}
    rest = " · ".join(f"{name}\u00a0{shown(kl[name])}" for name in ("p50", "p90", "p99", "max") if name in kl)
    return [tile("mean KL, nats", observed(kl.get("mean")), rest)] if kl else []


def _tops(found: Report) -> list[Element]:
    names = {"top1": ("top-1 agreement", "the same best token"), "top5": ("top-5 overlap", "of the best five tokens")}
    return [
        tile(words, percent(found[name], 2), detail)
        for name, (words, detail) in names.items()
        if found.get(name) is not None
    ]


def _matches(matches: Sequence[Report]) -> Element:
    rows = [
        element(
            "li",
            element("span", shown(match.get("sequence"))),
            charts.match_bar(match.get("matched"), match.get("of")),
            element("span", f"{shown(match.get('matched'))} of {shown(match.get('of'))}", class_="number"),
        )
        for match in matches
    ]
    return element("ul", *rows, class_="matches")
