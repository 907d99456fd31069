"""A report as one HTML page that needs nothing else: no script, no request, charts inline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from gatework.runtime.verify import charts
from gatework.runtime.verify.markup import element, number, percent, shown

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = Path(__file__).with_name("html.css")
_OUTSIDE = ("embedding", "output", "logits")  # tensors of no layer, in order of computation
_SERIES = {  # name -> what it is
    "local": "local error",
    "expected": "expected of rounding",
    "bound": "bound",
    "accumulated": "accumulated error",
}
Report = dict[str, Any]


def to_html(report: Report) -> str:
    """The page, to be written as UTF-8. What the report lacks is left out of it."""
    title = f"{_verdict_of(report)}: {shown(report.get('engine'))}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", **{"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", _STYLE.read_text(encoding="utf-8")),
    )
    sections = (_verdict, _divergence, _checks, _stages, _experts, _quality, _facts)
    body = element("body", element("main", *(section(report) for section in sections)))
    page = element("html", head, body, lang="en")
    return "<!doctype html>\n" + ElementTree.tostring(page, encoding="unicode", method="html") + "\n"


def _verdict_of(report: Report) -> str:
    return "Verification passed" if report.get("passed") else "Verification failed"


def _verdict(report: Report) -> Element:
    model = report.get("model") or {}
    words = [shown(model.get("family")), f"{shown(model.get('num_layers'))} layers"]
    if model.get("num_experts") is not None:
        words.append(f"{shown(model['num_experts'])} experts, {shown(model.get('top_k'))} per token")
    facts = {name: report.get(name) for name in ("engine", "reference", "precision", "target")}
    facts |= {"model": ", ".join(words)} if model else {}
    passed = bool(report.get("passed"))
    return element(
        "header",
        element("h1", _icon(passed), _verdict_of(report)),
        element("p", shown(report.get("summary")), class_="summary") if report.get("summary") else None,
        _definitions(facts),
        class_="passed" if passed else "failed",
    )


def _icon(passed: bool) -> Element:
    path = "M4.5 10.5l3.5 3.5 7.5-8" if passed else "M5.5 5.5l9 9m0-9l-9 9"
    attributes = {"viewBox": "0 0 20 20", "aria-hidden": "true"}
    return element("svg", element("path", d=path), class_="icon", **attributes)


def _divergence(report: Report) -> Element | None:
    first = report.get("first_divergence")
    if not first:
        return None
    note = first.get("note")
    facts = {name: first.get(name) for name in ("layer", "tensor", "sequence", "position", "phase")}
    facts |= {"observed": _observed(first.get("observed")), "bound": first.get("bound")}
    return _section(
        "First divergence", _definitions(facts), element("p", shown(note)) if note else None, kind="divergence"
    )


def _observed(value: Any) -> str:
    return "not finite" if value is None else shown(value)


def _checks(report: Report) -> Element | None:
    checks = report.get("checks") or []
    if not checks:
        return None
    names = ("Check", "Observed", "Bound", "Passes at", "Compared", "Result", "Note")
    return _section("Checks", _table("Checks", names, [_check_row(check) for check in checks]))


def _check_row(check: Report) -> Element:
    bounded = check.get("bound") is not None
    needed = check.get("would_pass")
    cells = (
        _observed(check.get("observed")),
        shown(check["bound"]) if bounded else "",
        "" if not bounded else "never" if needed is None else shown(needed),
        shown(check.get("compared")),
    )
    return _row(check, shown(check.get("name")), cells, judged=bounded)


def _row(entry: Report, name: str, cells: Sequence[str], *, judged: bool) -> Element:
    """Name, numbers, result and note."""
    passed = bool(entry.get("passed"))
    result = element("td", _icon(passed), "ok" if passed else "failed") if judged or not passed else element("td")
    return element(
        "tr",
        element("th", name, scope="row"),
        *(element("td", cell, class_="number") for cell in cells),
        _classed(result, "result"),
        element("td", shown(entry.get("note") or ""), class_="note"),
        class_=None if passed else "failed",
    )


def _classed(node: Element, name: str) -> Element:
    node.set("class", name)
    return node


def _stages(report: Report) -> Element | None:
    stages = report.get("stages") or []
    if not stages:
        return None
    faults = [stage for stage in stages if not stage.get("passed")]
    return _section(
        "Error by stage",
        element(
            "p",
            "Local: the stage's relative RMS error when the reference gets the engine's own inputs; only this is judged."
            " Accumulated: its relative error against the reference's own run.",
        ),
        _legend(),
        element("div", *_panels(stages), class_="panels"),
        _stage_table("Stages beyond their bound", faults) if faults else None,
        element("details", element("summary", f"All {len(stages)} stages"), _stage_table("All stages", stages)),
    )


def _legend() -> Element:
    items = [(name, words, "M1 6h22", name in ("local", "accumulated")) for name, words in _SERIES.items()]
    entries = [element("li", _swatch(name, path, dot), words) for name, words, path, dot in items]
    entries.append(element("li", _swatch("cross", "M8 2l8 8m0-8l-8 8", False), "beyond the bound"))
    return element("ul", *entries, class_="legend")


def _swatch(name: str, path: str, dot: bool) -> Element:
    marks = [element("path", d=path), element("circle", cx=12, cy=6, r=2.6) if dot else None]
    attributes = {"viewBox": "0 0 24 12", "aria-hidden": "true"}
    return element("svg", element("g", *marks, class_=name), class_="swatch", **attributes)


def _panels(stages: Sequence[Report]) -> list[Element]:
    """One for each kind of tensor in the layers, in order of appearance, and one for those outside."""
    axis = charts.stage_axis(stages)
    inside = [(stage["layer"], stage) for stage in stages if stage.get("layer") is not None]
    outside = [(shown(stage.get("tensor")), stage) for stage in stages if stage.get("layer") is None]
    layers = [layer for layer, _ in inside]
    panels = []
    for kind in dict.fromkeys(stage.get("tensor") for _, stage in inside):
        points = [(layer, stage) for layer, stage in inside if stage.get("tensor") == kind]
        chart = charts.stage_panel(shown(kind), points, range(min(layers), max(layers) + 1), axis)
        panels.append(_figure(shown(kind), _faults_in(points), chart))
    if outside:
        names = [name for name in _OUTSIDE if name in dict(outside)]
        names = list(dict.fromkeys(names + [name for name, _ in outside]))
        chart = charts.stage_panel("outside the layers", outside, names, axis)
        panels.append(_figure("outside the layers", _faults_in(outside), chart))
    return panels


def _faults_in(points: Sequence[tuple[Any, Report]]) -> Element | None:
    columns = [str(column) for column, stage in points if not stage.get("passed")]
    if not columns:
        return None
    more = f" and {len(columns) - 3} more" if len(columns) > 3 else ""
    return element("strong", _icon(False), f"{', '.join(columns[:3])}{more}")


def _figure(caption: str, extra: Element | None, *content: Element | None) -> Element:
    return element("figure", element("figcaption", element("span", caption), extra), *content)


def _stage_table(caption: str, stages: Sequence[Report]) -> Element:
    names = ("Stage", "Local", "Expected", "Bound", "Accumulated", "Compared", "Result", "Note")
    return _table(caption, names, [_stage_row(stage) for stage in stages], visible=True)


def _stage_row(stage: Report) -> Element:
    layer, tensor = stage.get("layer"), shown(stage.get("tensor"))
    cells = (
        _observed(stage.get("local")),
        *(shown(stage.get(name)) for name in ("expected", "bound", "accumulated", "compared")),
    )
    return _row(stage, tensor if layer is None else f"layer {layer} {tensor}", cells, judged=True)


def _experts(report: Report) -> Element | None:
    experts = report.get("experts") or {}
    figures = [
        *(_loads(experts.get("load") or {})),
        *(
            [_figure("agreement by layer", None, charts.agreement_chart(experts["agreement"]))]
            if experts.get("agreement")
            else []
        ),
    ]
    faults = experts.get("faults")
    tiles = [
        _tile("flipped choices", shown(experts.get("flips")), "tokens whose experts differ"),
        _tile("ties", shown(experts.get("ties")), "within what rounding explains"),
        _tile("faults", shown(faults), "beyond it", failed=bool(faults)),
    ]
    if not experts:
        return None
    return _section("Experts", element("div", *tiles, class_="tiles"), element("div", *figures, class_="panels"))


def _loads(load: Report) -> list[Element]:
    """A heat map of each side, on one scale, and one of what the engine has more or less."""
    sides = {side: load.get(side) or [] for side in ("reference", "engine")}
    shares = [share for rows in sides.values() for row in rows for value in row if (share := number(value)) is not None]
    most = max([*shares, 1e-9])
    scale = _scale("0 %", percent(most), [f"h{i}" for i in range(10)])
    figures = [
        _figure(f"load, {side}", None, charts.heat_map(rows, charts.heat_level(most), _load_words(side, rows)), scale)
        for side, rows in sides.items()
        if any(rows)
    ]
    shifts = charts.differences(sides["engine"], sides["reference"])
    sizes = [abs(shift) for row in shifts for shift in row if shift is not None]
    if sizes:
        most = max(*sizes, 0.01)
        names = [f"down h{i}" for i in range(9, -1, -2)] + [f"up h{i}" for i in range(1, 10, 2)]
        chart = charts.heat_map(
            shifts, charts.shift_level(most), f"Load, engine less reference, at most {percent(max(sizes), 2)}", _points
        )
        figures.append(
            _figure("load, engine less reference", None, chart, _scale(f"−{percent(most)}", f"+{percent(most)}", names))
        )
    return figures


def _points(value: Any) -> str:
    shift = number(value)
    return "–" if shift is None else f"{100 * shift:+.2f}"


def _load_words(side: str, rows: Sequence[Sequence[Any]]) -> str:
    cells = [(share, i, e) for i, row in enumerate(rows) for e, v in enumerate(row) if (share := number(v)) is not None]
    if not cells:
        return f"Load of the {side}: no numbers"
    share, layer, expert = max(cells)
    return f"Load of the {side} by layer and expert, at most {percent(share)}: layer {layer}, expert {expert}"


def _scale(low: str, high: str, names: Sequence[str]) -> Element:
    cells = [element("path", d=f"M{i * 12} 0h12v10h-12z", class_=name) for i, name in enumerate(names)]
    attributes = {"viewBox": "0 0 120 10", "aria-hidden": "true"}
    return element("p", low, element("svg", *cells, class_="heat-scale", **attributes), high, class_="scale")


def _quality(report: Report) -> Element | None:
    quality = report.get("quality") or {}
    if not quality:
        return None
    histogram, matches = quality.get("kl_histogram") or {}, quality.get("greedy_match") or []
    figures = []
    if histogram.get("counts"):
        chart = charts.histogram(histogram.get("edges") or [], histogram["counts"])
        figures.append(_figure("positions by KL (reference ‖ engine), nats", None, chart))
    if matches:
        figures.append(_figure("greedy tokens before the first that differs", None, _matches(matches)))
    tiles = [tile for make in (_perplexity, _kl, _tops) for tile in make(quality)]
    return _section("Quality", element("div", *tiles, class_="tiles"), element("div", *figures, class_="panels"))


def _perplexity(quality: Report) -> list[Element]:
    values = quality.get("perplexity") or {}
    ours, theirs = number(values.get("engine")), number(values.get("reference"))
    if not values:
        return []
    change = f", {100 * (ours / theirs - 1):+.2f} %" if ours is not None and theirs else ""
    return [_tile("perplexity", _observed(values.get("engine")), f"reference {shown(values.get('reference'))}{change}")]


def _kl(quality: Report) -> list[Element]:
    kl = quality.get("kl") or {}
    rest = " · ".join(f"{name} {shown(kl[name])}" for name in ("p50", "p90", "p99", "max") if name in kl)
    return [_tile("mean KL, nats", _observed(kl.get("mean")), rest)] if kl else []


def _tops(quality: Report) -> list[Element]:
    names = {"top1": ("top-1 agreement", "same best token"), "top5": ("top-5 overlap", "of the best five tokens")}
    return [
        _tile(words, percent(quality[name], 2), detail)
        for name, (words, detail) in names.items()
        if quality.get(name) is not None
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


def _tile(name: str, value: str, detail: str, *, failed: bool = False) -> Element:
    return element(
        "div",
        element("h3", name),
        element("p", _icon(False) if failed else None, value, class_="value"),
        element("p", detail),
        class_="tile failed" if failed else "tile",
    )


def _facts(report: Report) -> Element | None:
    facts = report.get("facts") or {}
    return (
        _section("Facts", _definitions({name.replace("_", " "): value for name, value in facts.items()}))
        if facts
        else None
    )


def _definitions(facts: Report) -> Element:
    pairs = [(name, value) for name, value in facts.items() if value is not None]
    entries = (element("div", element("dt", name), element("dd", shown(value))) for name, value in pairs)
    return element("dl", *entries)


def _section(title: str, *content: Element | None, kind: str | None = None) -> Element:
    return element("section", element("h2", title), *content, class_=kind)


def _table(caption: str, names: Sequence[str], rows: Sequence[Element], *, visible: bool = False) -> Element:
    """In a box of its own that scrolls sideways, by keyboard too."""
    head = element("thead", element("tr", *(element("th", name, scope="col") for name in names)))
    words = element("caption", caption, class_=None if visible else "hidden")
    attributes = {"role": "region", "aria-label": caption, "tabindex": 0}
    return element("div", element("table", words, head, element("tbody", *rows)), class_="scroll", **attributes)
