"""The page of a report: its content as text, and what a browser makes of it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gatework.runtime.verify.html import to_html
from tests.runtime.report_sample import sample

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"]
ARGS += ["--disable-background-networking", "--disable-sync"]
HOSTILE = ["<script>alert(1)</script>", "]]>", '"><img src=x onerror=alert(1)>', "</style></title><b>", "&lt;"]
LONG = "unbroken" * 200


# ---- the text


def test_order() -> None:
    page = to_html(sample(faulty=5))
    heads = re.findall(r"<h[12]>(?:<svg.*?</svg>)?([^<]*)", page)
    assert heads == [
        "Verification failed",
        "First divergence",
        "Checks",
        "Error by stage",
        "Experts",
        "Quality",
        "Facts",
    ]
    for words in ("layer 5 experts: 0.21, bound 0.024", "gate and up may be swapped", "39,626", "18.88", "+0.08 %"):
        assert words in page
    assert "First divergence" not in to_html(sample())


def test_nothing_is_loaded() -> None:
    page = to_html(sample(faulty=5))
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|img|iframe)|\bsrc=|\bhref=|url\(|@import|https?:", page)


@pytest.mark.parametrize("text", HOSTILE)
def test_strings_are_escaped(text: str) -> None:
    page = to_html(hostile(sample(layers=2, faulty=1), text))
    if "<" in text:
        assert text not in page
        assert text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in page


def hostile(value: Any, text: str) -> Any:
    """Every string, and every name of a fact, replaced."""
    if isinstance(value, dict):
        changed = {name: hostile(entry, text) for name, entry in value.items()}
        return changed | {"facts": {text: text}} if "facts" in value else changed
    if isinstance(value, list):
        return [hostile(entry, text) for entry in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize("part", sorted(sample()))
@pytest.mark.parametrize("absent", [True, False])
def test_parts_may_be_missing(part: str, absent: bool) -> None:
    report = sample(layers=2, faulty=1)
    if absent:
        del report[part]
    else:
        report[part] = None
    to_html(report)


def holes(value: Any) -> Any:
    """Every number null."""
    if isinstance(value, dict):
        return {name: holes(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [holes(entry) for entry in value]
    return None if isinstance(value, int | float) and not isinstance(value, bool) else value


ODD = {
    "nothing": {},
    "no numbers": holes(sample(layers=3, faulty=1)),
    "no layers": sample(layers=0),
    "one layer, one expert": sample(layers=1, experts=1),
    "zeros": sample(layers=2)
    | {"stages": [stage | {"local": 0.0, "bound": 0.0} for stage in sample(layers=2)["stages"]]}
    | {"quality": {"kl_histogram": {"edges": [0.0, 1.0], "counts": [0]}, "greedy_match": [{"matched": 0, "of": 0}]}},
    "dense layers between": sample(layers=3)
    | {
        "experts": {
            "load": {"reference": [[], [0.5, 0.5], []], "engine": [[], [1.0], []]},
            "agreement": [None, 1, None],
        }
    },
    "no loads": sample() | {"experts": {"load": {"reference": [[], []], "engine": []}, "agreement": []}},
    "deep and wide": sample(layers=64, experts=64, faulty=40),
    "long": hostile(sample(layers=2, faulty=1), LONG),
}


# ---- the browser


def chromium() -> str:
    """Where it is. Without one the calling test is skipped, or fails where CI is set."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        reason = "no Chromium is installed: the page is not opened in a browser"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGS)  # with a new, empty profile
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """Opens a report's page, of which nothing may be loaded and nothing may complain."""
    pages: list[Page] = []
    file = tmp_path / "report.html"

    def show(report: dict[str, Any], width: int = 1280, scheme: Any = "light") -> Page:
        file.write_text(to_html(report), encoding="utf-8")
        pages.append(page := browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme))
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(file.as_uri())
        return page

    requests: list[str] = []
    complaints: list[str] = []
    yield show
    for page in pages:
        page.close()
    assert set(requests) == {file.as_uri()}
    assert not complaints


def boxes(page: Page, selector: str) -> list[dict[str, float]]:
    return page.evaluate(
        "selector => [...document.querySelectorAll(selector)].map(e => {"
        " const b = e.getBBox(), r = e.getBoundingClientRect();"
        " return {width: b.width, height: b.height, left: r.left, right: r.right, area: r.width * r.height}; })",
        selector,
    )


def overflow(page: Page) -> int:
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("layers", [4, 64])
def test_charts_are_drawn(show: Any, width: int, layers: int) -> None:
    page = show(sample(layers=layers, faulty=3), width)
    charts = boxes(page, "svg.chart")
    assert len(charts) == 7 + 4 + 1  # kinds of stages, experts, histogram
    assert all(
        box["area"] > 10_000 and box["width"] > 100 and 0 <= box["left"] < box["right"] <= width for box in charts
    )
    assert len(boxes(page, ".stages .local circle")) == layers * 6 + 3
    for mark in (".stages path.bound", ".stages path.expected", ".stages .accumulated > path"):
        assert [box["width"] > 50 for box in boxes(page, mark)] == [True] * 7
    (cross,) = boxes(page, ".stages .cross")
    assert cross["width"] == cross["height"] == 10
    assert len(boxes(page, "svg.heat g")) == layers * 3
    assert all(box["area"] > 0 for box in boxes(page, "svg.heat g"))
    assert all(box["height"] > 0 for box in boxes(page, ".histogram .bar"))
    assert overflow(page) == 0


def test_heights_are_the_errors(show: Any) -> None:
    """In two panels together: the larger an error, the higher its dot."""
    page = show(sample(layers=4, faulty=2))
    stages = sample(layers=4, faulty=2)["stages"]
    drawn = page.evaluate(
        "[...document.querySelectorAll('.stages')].map(e => [...e.querySelectorAll('.local circle')]"
        ".map(c => +c.getAttribute('cy')))"
    )
    experts = [stage["local"] for stage in stages if stage["tensor"] == "experts"]
    keys = [stage["local"] for stage in stages if stage["tensor"] == "key"]
    pairs = sorted(zip(experts + keys, drawn[5] + drawn[0], strict=True))
    assert [y for _, y in pairs] == sorted((y for _, y in pairs), reverse=True)


def test_both_schemes(show: Any) -> None:
    def colours(scheme: str) -> tuple[int, int]:
        page = show(sample(), scheme=scheme)
        values = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.chart text')).fill]"
        )
        background, text = (sum(map(int, re.findall(r"\d+", value)[:3])) for value in values)
        return background, text

    light, dark = colours("light"), colours("dark")
    assert light[0] > 600 > light[1] + 200
    assert dark[0] < 100 < dark[1] - 200


def test_tables_scroll_in_their_own_boxes(show: Any) -> None:
    page = show(sample(faulty=5), 390)
    wide, inside = page.evaluate(
        "(e => [e.scrollWidth - e.clientWidth, e.clientWidth])(document.querySelector('.scroll'))"
    )
    assert wide > 0
    assert inside < 390
    page.locator("summary").click()
    assert page.locator("details table").is_visible()
    assert overflow(page) == 0


def test_the_page_reads_without_colour(show: Any) -> None:
    page = show(sample(faulty=5))
    assert page.get_by_role("heading", level=1).inner_text() == "Verification failed"
    assert page.locator("tr.failed td.result").all_inner_texts()[0] == "failed"
    names = page.eval_on_selector_all("svg[role=img]", "all => all.map(e => e.getAttribute('aria-label'))")
    assert all(names)
    assert "experts: relative error of 8 stages on a logarithmic axis, 1 beyond the bound" in names


@pytest.mark.parametrize("name", ODD)
def test_odd_reports(show: Any, name: str) -> None:
    for width in (390, 1280):
        page = show(ODD[name], width)
        assert overflow(page) == 0
        assert page.locator("h1").is_visible()
        assert not re.search(r"\b(nan|inf|undefined)\b", page.content(), re.IGNORECASE)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_stay_text(show: Any, text: str) -> None:
    page = show(hostile(sample(layers=2, faulty=1), text))
    assert page.locator("script, img, b").count() == 0
    assert page.locator("header dd").first.inner_text() == text
    assert page.locator("dl.rows dt").inner_text() == text
