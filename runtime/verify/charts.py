"""A report's charts, as inline SVG; what is not in them is their style (html.css)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any
from xml.etree.ElementTree import Element

from gatework.runtime.verify.markup import element, number, percent, shown

_WIDTH, _HEIGHT = 264, 176
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 258, 10, 152  # the edges of a plot
_SERIES = ("local", "expected", "bound", "accumulated")
_MOST_DECADES = 12
_MOST_LABELS = 8  # below a chart
_LEVELS = 10  # of colour, in a heat map
OUTSIDE = "outside the layers"  # the panel of stages that have no layer
Rows = Sequence[Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Axis:
    """A vertical axis from `low` to `high`, in decades if `log`."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def of_decades(cls, values: Sequence[float]) -> Axis:
        """Whole decades around the positive values."""
        exponents = [math.log10(value) for value in values if value > 0] or [-1.0]
        high = math.floor(max(exponents)) + 1
        return cls(max(math.floor(min(exponents)), high - _MOST_DECADES), high, log=True)

    def y(self, value: float) -> float:
        """What lies outside, such as 0 on a log axis, stands on the edge."""
        place = (math.log10(value) if value > 0 else -math.inf) if self.log else value
        share = (min(max(place, self.low), self.high) - self.low) / (self.high - self.low)
        return round(_BOTTOM - share * (_BOTTOM - _TOP), 1)


def stage_axis(stages: Sequence[dict[str, Any]]) -> Axis:
    """One for all panels, so that they compare."""
    values = (number(stage.get(name)) for stage in stages for name in _SERIES)
    return Axis.of_decades([value for value in values if value is not None])


def stage_panel(
    title: str, points: Sequence[tuple[Any, dict[str, Any]]], columns: Sequence[Any], axis: Axis
) -> Element:
    """Errors of the stages of one kind: `points` holds each with its column."""
    step = (_RIGHT - _LEFT) / len(columns)
    placed = [(_LEFT + (columns.index(column) + 0.5) * step, column, stage) for column, stage in points]
    half = min(step / 2, 16)
    marks = [
        *_decades(axis),
        *_columns(columns, step),
        *(
            element("path", d=f"M{x - half:.1f} {_TOP}h{2 * half:.1f}V{_BOTTOM}h-{2 * half:.1f}z", class_="fault-band")
            for x, _, stage in placed
            if not stage.get("passed")
        ),
        *(_steps(name, placed, half, axis) for name in ("expected", "bound")),
        *(_dots(name, placed, axis) for name in ("accumulated", "local")),
        *(_cross(x, number(stage.get("local")), axis) for x, _, stage in placed if not stage.get("passed")),
        *(_tip(x, max(step / 2, 1.0), _stage_words(title, column, stage)) for x, column, stage in placed),
    ]
    faults = sum(not stage.get("passed") for _, stage in points)
    words = f"{title}: relative error of {len(points)} stages on a logarithmic axis, {faults} beyond the bound"
    return _chart("stages", words, marks)


def _stage_words(title: str, column: Any, stage: dict[str, Any]) -> str:
    place = str(column) if title == OUTSIDE else f"layer {column}, {title}"
    values = ", ".join(f"{name} {shown(stage.get(name))}" for name in _SERIES)
    return f"{place}: {values}{'' if stage.get('passed') else ' – beyond the bound'}"


def _decades(axis: Axis) -> list[Element]:
    low, high = round(axis.low), round(axis.high)
    stride = math.ceil((high - low) / 6)
    return [
        mark
        for exponent in range(high, low - 1, -stride)
        for mark in _line(axis.y(10.0**exponent), f"10{str(exponent).translate(_SUPERSCRIPT)}")
    ]


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _line(y: float, label: str) -> list[Element]:
    """Of the grid."""
    return [
        element("path", d=f"M{_LEFT} {y}H{_RIGHT}", class_="grid"),
        element("text", label, x=_LEFT - 5, y=y + 3.5, text_anchor="end"),
    ]


def _columns(columns: Sequence[Any], step: float) -> list[Element]:
    """Labels below the plot."""
    stride = next(n for n in _nice_strides() if len(columns) <= n * _MOST_LABELS)
    return [
        element("text", str(columns[i]), x=f"{_LEFT + (i + 0.5) * step:.1f}", y=_BOTTOM + 15, text_anchor="middle")
        for i in range(0, len(columns), stride)
    ]


def _nice_strides() -> Any:
    return (digit * 10**power for power in range(99) for digit in (1, 2, 5))


def _steps(name: str, placed: Sequence[tuple[float, Any, dict[str, Any]]], half: float, axis: Axis) -> Element:
    """A level for each stage; those of neighbours are joined, so that dashes run on."""
    path, end = "", -math.inf
    for x, _, stage in placed:
        if (value := number(stage.get(name))) is not None:
            y = axis.y(value)
            path += f"V{y}" if abs(x - half - end) < 0.01 else f"M{x - half:.2f} {y}"
            path, end = f"{path}H{x + half:.2f}", x + half
    return element("path", d=path, class_=name)


def _dots(name: str, placed: Sequence[tuple[float, Any, dict[str, Any]]], axis: Axis) -> Element:
    values = [(x, number(stage.get(name))) for x, _, stage in placed]
    path, pen = "", "M"
    for x, value in values:
        path += "" if value is None else f"{pen}{x:.1f} {axis.y(value)}"
        pen = "M" if value is None else "L"
    dots = (
        element("circle", cx=f"{x:.1f}", cy=axis.y(value), r=2.4 if len(values) <= 40 else 1.2)
        for x, value in values
        if value is not None
    )
    return element("g", element("path", d=path), *dots, class_=name)


def _cross(x: float, value: float | None, axis: Axis) -> Element:
    """On a fault; at the top where its error is no finite number."""
    y = _TOP if value is None else axis.y(value)
    return element("path", d=f"M{x - 5:.1f} {y - 5:.1f}l10 10m0-10l-10 10", class_="cross")


def _tip(x: float, half: float, words: str) -> Element:
    box = {"x": f"{x - half:.1f}", "y": _TOP, "width": f"{2 * half:.1f}", "height": _BOTTOM - _TOP}
    return element("rect", element("title", words), class_="tip", **box)


def _chart(kind: str, words: str, marks: Sequence[Element], height: float = _HEIGHT) -> Element:
    attributes = {"viewBox": f"0 0 {_WIDTH} {height:g}", "role": "img", "aria-label": words}
    return element("svg", *marks, class_=f"chart {kind}", **attributes)


def agreement_chart(agreement: Sequence[Any]) -> Element:
    """Per layer, on an axis that starts at the twentieth below the lowest."""
    values = [number(value) for value in agreement]
    lowest = min((value for value in values if value is not None), default=0.0)
    axis = Axis(min(max(math.floor(lowest * 20 - 1e-9) / 20, 0.0), 0.95), 1.0)
    ticks = [axis.low + i * (1 - axis.low) / 5 for i in range(6)]
    step = (_RIGHT - _LEFT) / len(values)
    middles = [(_LEFT + (i + 0.5) * step, i, {"local": value}) for i, value in enumerate(values)]
    marks = [
        *(mark for at in ticks for mark in _line(axis.y(at), percent(at, 0))),
        *_columns(range(len(values)), step),
        _dots("local", middles, axis),
        *(_tip(x, step / 2, f"layer {i}: {percent(entry['local'], 2)}") for x, i, entry in middles),
    ]
    return _chart("agreement", f"Agreement per layer, the lowest {percent(lowest, 2)}", marks)


def histogram(edges: Sequence[Any], counts: Sequence[Any]) -> Element:
    """Bins are drawn as wide as each other, whatever their edges are."""
    heights = [number(count) or 0.0 for count in counts]
    labels = [f"{edge:.1e}" if isinstance(edge, float) else shown(edge) for edge in edges]
    axis = Axis(0, max([1.0, *heights]))
    step = (_RIGHT - _LEFT) / max(len(heights), 1)
    stride = math.ceil(len(labels) / 5)
    marks = [element("path", d=f"M{_LEFT} {_BOTTOM}H{_RIGHT}", class_="grid"), *_line(_TOP, shown(round(axis.high)))]
    for i, height in enumerate(heights):
        y, x = min(axis.y(height), _BOTTOM - 1.5), _LEFT + i * step
        bar = f"M{x + 0.5:.1f} {_BOTTOM}V{y}h{step - 1:.1f}V{_BOTTOM}z"
        marks += [element("path", d=bar, class_="bar")] if height > 0 else []
        marks.append(_tip(x + step / 2, step / 2, f"{' to '.join(labels[i : i + 2])}: {shown(round(height))}"))
    for i in range(0, len(labels), stride):
        marks.append(element("text", labels[i], x=f"{_LEFT + i * step:.1f}", y=_BOTTOM + 15, text_anchor="middle"))
    return _chart("histogram", f"Histogram of {shown(round(sum(heights)))} values", marks)


def heat_map(rows: Rows, level: Callable[[float], str], words: str, show: Callable[[Any], str] = percent) -> Element:
    """Rows are layers, columns experts; `level` gives the class of a cell. A row's tooltip lists its values."""
    widest = max(map(len, rows))
    width, height = (_RIGHT - _LEFT + 4) / widest, min(18.0, max(4.0, 256 / len(rows)))
    gap = 1 if min(width, height) > 8 else 0
    stride = next(n for n in _nice_strides() if n * height >= 10)
    marks = []
    for layer, row in enumerate(rows):
        y = layer * height
        if layer % stride == 0:
            marks.append(element("text", str(layer), x=_LEFT - 5, y=f"{y + height / 2 + 3.5:.1f}", text_anchor="end"))
        cells: dict[str, str] = {}
        for expert, value in enumerate(row):
            if (share := number(value)) is not None:
                box = f"M{_LEFT + expert * width:.2f} {y:.2f}h{width - gap:.2f}v{height - gap:.2f}h-{width - gap:.2f}z"
                cells[level(share)] = cells.get(level(share), "") + box
        paths = (element("path", d=path, class_=name) for name, path in cells.items())
        marks.append(element("g", element("title", f"layer {layer}: {', '.join(map(show, row))}"), *paths))
    bottom = len(rows) * height
    stride = next(n for n in _nice_strides() if widest <= n * _MOST_LABELS)
    for i in range(0, widest, stride):
        x = f"{_LEFT + (i + 0.5) * width:.1f}"
        marks.append(element("text", str(i), x=x, y=f"{bottom + 14:.1f}", text_anchor="middle"))
    return _chart("heat", words, marks, bottom + 20)


def heat_level(most: float) -> Callable[[float], str]:
    """Classes h0 to h9 for shares from 0 to `most`."""
    return lambda share: f"h{min(max(int(share / most * _LEVELS), 0), _LEVELS - 1)}"


def shift_level(most: float) -> Callable[[float], str]:
    """Classes h0 to h9 for the size of a difference of up to `most`, after "up" or "down" for its sign."""
    return lambda shift: f"{'up' if shift >= 0 else 'down'} {heat_level(most)(abs(shift))}"


def differences(engine: Rows, reference: Rows) -> list[list[float | None]]:
    """Engine less reference, None where either lacks a number."""
    rows = zip_longest(engine, reference, fillvalue=())
    return [[_less(ours, theirs) for ours, theirs in zip_longest(*pair)] for pair in rows]


def _less(ours: Any, theirs: Any) -> float | None:
    left, right = number(ours), number(theirs)
    return None if left is None or right is None else left - right


def match_bar(matched: Any, of: Any) -> Element:
    """How much of a sequence is the same."""
    share = (number(matched) or 0.0) / max(number(of) or 0.0, 1.0)
    bar = f"M0 0h{100 * min(share, 1):.2f}v8h-{100 * min(share, 1):.2f}z"
    attributes = {"viewBox": "0 0 100 8", "preserveAspectRatio": "none", "role": "img", "aria-label": percent(share)}
    track = element("rect", width=100, height=8, class_="track")
    return element("svg", track, element("path", d=bar, class_="bar"), class_="match", **attributes)
