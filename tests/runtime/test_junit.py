"""JUnit XML of a report: what fails in the report fails in it, whatever its strings hold."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from gatework.runtime.verify.junit import to_junit
from tests.runtime.report_sample import sample


def suite_of(report: dict[str, Any]) -> ElementTree.Element:
    root = ElementTree.fromstring(to_junit(report).encode())
    (suite,) = root
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    return suite


def failures(suite: ElementTree.Element) -> dict[str, ElementTree.Element]:
    found = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    return {name: failure for name, failure in found.items() if failure is not None}


def test_a_case_for_every_check_and_stage() -> None:
    report = sample(layers=3)
    suite = suite_of(report)
    cases = list(suite.iter("testcase"))
    assert len(cases) == len({(case.get("classname"), case.get("name")) for case in cases})
    assert len(cases) == 1 + len(report["checks"]) + len(report["stages"])
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": str(len(cases)), "failures": "0", "errors": "0", "skipped": "0"}
    timed = {node.get("name"): node.get("time") for node in [suite, *cases] if node.get("time") is not None}
    assert timed == {"gatework verify": "41.37", "verdict": "41.37"}
    properties = {node.get("name"): node.get("value") for node in suite.iter("property")}
    assert properties["precision"] == "int8"
    assert properties["model.num_layers"] == "3"
    assert properties["threads"] == "2"
    assert properties["not_covered"] == ""


def test_failures_say_what_was_found() -> None:
    suite = suite_of(sample(layers=3, faulty=1))
    failed = failures(suite)
    assert set(failed) == {"verdict", "decode: mean KL", "layer 1: experts"}
    assert suite.get("failures") == "3"
    message = "observed 0.2113, expected 0.008, bound 0.024, "
    assert (failed["layer 1: experts"].get("message") or "").startswith(message)
    assert failed["layer 1: experts"].text == "expert 3"
    assert "position: 63" in (failed["verdict"].text or "")


def test_a_report_that_fails_by_no_check_fails_here_too() -> None:
    assert set(failures(suite_of({"passed": False, "summary": "no check had a bound"}))) == {"verdict"}


def test_errors_that_are_no_numbers() -> None:
    check = {
        "name": "KL",
        "observed": None,
        "bound": 0.1,
        "passed": False,
        "would_pass": None,
        "compared": 3,
        "note": "",
    }
    failure = failures(suite_of({"passed": False, "checks": [check]}))["KL"]
    assert failure.get("message") == "observed no finite number, bound 0.1, compared 3"


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "]]>", "\"&quot;'", "a\nb\tc", "🦊"])
def test_strings_come_back_as_they_were(hostile: str) -> None:
    report = sample(layers=1, faulty=0)
    report["checks"][1] |= {"name": hostile, "note": hostile}
    report["facts"][hostile] = hostile
    suite = suite_of(report)
    assert failures(suite)[hostile].text == hostile
    assert hostile in [node.get("value") for node in suite.iter("property") if node.get("name") == hostile]


def test_characters_that_xml_forbids_are_left_out() -> None:
    report = sample(layers=1)
    report["checks"][0] |= {"name": "a\x00b\x1bc\ud800d\uffffe", "passed": False}
    assert "abcde" in failures(suite_of(report))
