"""A report as one HTML page that needs nothing else: no script, no request, charts inline."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from gatework.runtime.verify.html_parts import Report, definitions, icon, observed, section, table, table_row
from gatework.runtime.verify.html_pictures import experts, quality, stages
from gatework.runtime.verify.markup import element, shown

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = Path(__file__).with_name("html.css")


def to_html(report: Report) -> str:
    """The page, to be written as UTF-8. What the report lacks is left out of it."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", **{"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{_verdict_of(report)}: {shown(report.get('engine'))}"),
        element("style", _STYLE.read_text(encoding="utf-8")),
    )
    sections = (_verdict, _divergence, _checks, stages, experts, quality, _facts)
    body = element("body", element("main", *(make(report) for make in sections)))
    page = element("html", head, body, lang="en")
    return "<!doctype html>\n" + ElementTree.tostring(page, encoding="unicode", method="html") + "\n"


def _verdict_of(report: Report) -> str:
    return "Verification passed" if report.get("passed") else "Verification failed"


def _verdict(report: Report) -> Element:
    passed, summary = bool(report.get("passed")), report.get("summary")
    facts = {name: report.get(name) for name in ("engine", "reference", "precision", "target")}
    facts["model"] = _model(report.get("model") or {})
    return element(
        "header",
        element("h1", icon(passed), _verdict_of(report)),
        element("p", shown(summary), class_="summary") if summary else None,
        definitions(facts),
        class_="passed" if passed else "failed",
    )


def _model(model: Report) -> str | None:
    """Such as "mixtral, layers: 32, experts: 8, per token: 2"."""
    words = {"family": "{}", "num_layers": "layers: {}", "num_experts": "experts: {}", "top_k": "per token: {}"}
    parts = [form.format(shown(model[name])) for name, form in words.items() if model.get(name) is not None]
    return ", ".join(parts) or None


def _divergence(report: Report) -> Element | None:
    first = report.get("first_divergence")
    if not first:
        return None
    facts = {name: first.get(name) for name in ("layer", "tensor", "sequence", "position", "phase")}
    facts |= {"observed": observed(first.get("observed")), "bound": first.get("bound")}
    note = element("p", shown(first["note"])) if first.get("note") else None
    return section("First divergence", definitions(facts), note, kind="divergence")


def _checks(report: Report) -> Element | None:
    checks = report.get("checks") or []
    names = ("Check", "Result", "Observed", "Bound", "Passes at", "Compared", "Note")
    rows = [_check_row(check) for check in checks]
    return section("Checks", table("Checks", names, rows, visible=False)) if checks else None


def _check_row(check: Report) -> Element:
    bound, needed = check.get("bound"), check.get("would_pass")
    cells = (
        observed(check.get("observed")),
        "" if bound is None else shown(bound),
        "" if bound is None else "never" if needed is None else shown(needed),
        shown(check.get("compared")),
    )
    return table_row(check, shown(check.get("name")), cells, judged=bound is not None)


def _facts(report: Report) -> Element | None:
    facts = {name.replace("_", " "): value for name, value in (report.get("facts") or {}).items()}
    return section("Facts", definitions(facts, "rows")) if facts else None
