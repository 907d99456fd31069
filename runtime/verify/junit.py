"""A report as JUnit XML, which CI systems list test by test."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from gatework.runtime.verify.markup import element, number, shown, stage_name


def to_junit(report: dict[str, Any]) -> str:
    """The XML, to be written as UTF-8.

    One suite: a case for the verdict, which fails with the report and has the time of all, and one for every check and every
    stage, none of which is timed. Facts are properties.
    """
    cases = [_verdict(report)]
    cases += [_case("checks", shown(check.get("name")), check, "observed") for check in report.get("checks") or []]
    cases += [_case("stages", _stage_name(stage), stage, "local") for stage in report.get("stages") or []]
    failures = sum(case.find("failure") is not None for case in cases)
    counts = {"tests": len(cases), "failures": failures, "errors": 0, "skipped": 0, "time": report.get("seconds")}
    suite = element("testsuite", _properties(report), *cases, name="gatework verify", **counts)
    root = element("testsuites", suite, name="gatework verify", **counts)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _properties(report: dict[str, Any]) -> ElementTree.Element:
    values = {name: report.get(name) for name in ("engine", "reference", "precision", "target")}
    values |= {f"model.{name}": value for name, value in (report.get("model") or {}).items()}
    values |= report.get("facts") or {}
    pairs = [(name, "" if value is None else value) for name, value in values.items()]
    return element("properties", *(element("property", name=name, value=value) for name, value in pairs))


def _verdict(report: dict[str, Any]) -> ElementTree.Element:
    summary = shown(report.get("summary"))
    first = report.get("first_divergence")
    if report.get("passed"):
        return _testcase("verdict", "verdict", element("system-out", summary), report.get("seconds"))
    place = "" if not first else "\n".join(f"{name}: {shown(value)}" for name, value in first.items())
    return _testcase("verdict", "verdict", _failure(summary, place), report.get("seconds"))


def _case(group: str, name: str, entry: dict[str, Any], observed: str) -> ElementTree.Element:
    found, note = _found(entry, observed), shown(entry.get("note") or "")
    if entry.get("passed"):
        return _testcase(group, name, element("system-out", "\n".join(filter(None, (found, note)))))
    return _testcase(group, name, _failure(f"{found}: {note}" if note else found, note))


def _found(entry: dict[str, Any], observed: str) -> str:
    """Such as "observed 0.02, bound 0.01, would pass 0.021, compared 64"."""
    value = number(entry.get(observed))
    words = [f"observed {'no finite number' if value is None else shown(value)}"]
    words += [
        f"{name.replace('_', ' ')} {shown(entry[name])}"
        for name in ("expected", "bound", "would_pass", "accumulated", "compared")
        if entry.get(name) is not None
    ]
    return ", ".join(words)


def _stage_name(stage: dict[str, Any]) -> str:
    name = stage_name(stage.get("layer"), shown(stage.get("tensor")))
    place, _, tensor = name.rpartition(" ")
    return name if stage.get("layer") is None else f"{place}: {tensor}"


def _testcase(group: str, name: str, result: ElementTree.Element, seconds: float | None = None) -> ElementTree.Element:
    return element("testcase", result, classname=f"gatework.verify.{group}", name=name, time=seconds)


def _failure(message: str, text: str) -> ElementTree.Element:
    return element("failure", text, message=message, type="VerificationFailure")
