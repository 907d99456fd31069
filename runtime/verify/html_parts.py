"""What the sections of a report's page are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element

from gatework.runtime.verify.markup import element, shown

Report = dict[str, Any]


def section(title: str, *content: Element | None, kind: str | None = None) -> Element:
    """Content under a heading."""
    return element("section", element("h2", title), *content, class_=kind)


def icon(passed: bool) -> Element:
    """A tick or a cross."""
    path = "M4.5 10.5l3.5 3.5 7.5-8" if passed else "M5.5 5.5l9 9m0-9l-9 9"
    attributes = {"viewBox": "0 0 20 20", "aria-hidden": "true"}
    return element("svg", element("path", d=path), class_="icon", **attributes)


def definitions(facts: Report, kind: str | None = None) -> Element:
    """Names and values, None left out."""
    pairs = [(name, value) for name, value in facts.items() if value is not None]
    entries = (element("div", element("dt", name), element("dd", shown(value))) for name, value in pairs)
    return element("dl", *entries, class_=kind)


def figure(caption: str, *content: Element | None, aside: Element | None = None) -> Element:
    """A chart in a box; `aside` stands at the end of its caption."""
    return element("figure", element("figcaption", element("span", caption), aside), *content)


def tile(name: str, value: str, detail: str, *, failed: bool = False) -> Element:
    """One large number."""
    return element(
        "div",
        element("h3", name),
        element("p", icon(False) if failed else None, value, class_="value"),
        element("p", detail),
        class_="tile failed" if failed else "tile",
    )


def table(caption: str, names: Sequence[str], rows: Sequence[Element], *, visible: bool = True) -> Element:
    """In a box of its own that scrolls sideways, by keyboard too."""
    head = element("thead", element("tr", *(element("th", name, scope="col") for name in names)))
    words = element("caption", caption, class_=None if visible else "hidden")
    attributes = {"role": "region", "aria-label": caption, "tabindex": 0}
    return element("div", element("table", words, head, element("tbody", *rows)), class_="scroll", **attributes)


def table_row(entry: Report, name: str, cells: Sequence[str], *, judged: bool) -> Element:
    """Name, result, numbers and note of a check or stage."""
    passed = bool(entry.get("passed"))
    result = (icon(passed), "ok" if passed else "failed") if judged or not passed else ()
    return element(
        "tr",
        element("th", name, scope="row"),
        element("td", *result, class_="result"),
        *(element("td", cell, class_="number") for cell in cells),
        element("td", shown(entry.get("note") or ""), class_="note"),
        class_=None if passed else "failed",
    )


def observed(value: Any) -> str:
    """A deviation, which is null in a report where it is no finite number."""
    return "not finite" if value is None else shown(value)
