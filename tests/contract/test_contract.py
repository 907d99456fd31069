"""The code uses nothing of TensorRT's Python modules that one of their versions lacks, wherever it can be built and tested."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from gatework.export.targets import TARGETS
from gatework.plugins.tensorrt_module import REQUIREMENTS
from tests.contract.bindings import MODULES, ROOT, VERSIONS, arguments, surface
from tests.contract.tables import LACKING, LAYER_KINDS, OURS, PARAMETERS, RESULTS
from tests.contract.walk import MISSING, Use, Walk

CLASSES = """Builder IBuilderConfig ILayer ILogger ILogger.Severity INetworkDefinition IOptimizationProfile IProgressMonitor
    IStreamWriter ITensor ITimingCache LayerType OnnxParser ParserError DynamicPluginTensorDesc IPluginCreatorV3One
    IExecutionContext ExecutionContextAllocationStrategy
    IPluginRegistry IPluginV3 IPluginV3OneBuild IPluginV3OneCore IPluginV3OneRuntime PluginField PluginTensorDesc ICudaEngine
    ISerializationConfig OnnxParserRefitter Refitter Runtime SerializationFlag"""
ROOMS = ("export", "plugins", "runtime")


@cache
def walks(name: str) -> list[Walk]:
    """Over every file that speaks of `trt`."""
    files = {path: path.read_text() for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}
    return [
        Walk(path.relative_to(ROOT).as_posix(), source, surface(name))
        for path, source in files.items()
        if re.search(r"\btrt\b", source)
    ]


def uses(name: str) -> list[Use]:
    return [use for walk in walks(name) for use in walk.uses]


@pytest.mark.parametrize("name", MODULES)
def test_whatever_the_code_uses_is_there(name: str) -> None:
    problems = [use for use in uses(name) if use.problem is not None]
    lacking = {use.name for use in problems if use.problem == MISSING and use.name in LACKING[name]}
    wrong = [str(use) for use in problems if use.name not in lacking]
    assert not wrong, "\n".join(wrong)
    assert lacking == set(LACKING[name]), "tables.LACKING lists more than the code uses and the module lacks"


@pytest.mark.parametrize("name", MODULES)
def test_the_walk_sees_the_code(name: str) -> None:
    """A walk that loses its way reports no problem either."""
    found = uses(name)
    assert len(found) > 200
    assert {use.name.rpartition(".")[0] for use in found} >= set(CLASSES.split())


@pytest.mark.parametrize("name", VERSIONS)
def test_the_walk_sees_the_same_everywhere(name: str) -> None:
    """A docstring that no longer tells a type hides the uses behind it."""
    # What a name hides that is not there.
    behind = tuple(f"{lacked}{mark}" for lacked in LACKING[name] for mark in ("()", "."))
    expected = {use[:3] for use in uses("tensorrt_rtx") if not use.name.startswith(behind)}
    assert {use[:3] for use in uses(name)} == expected


@pytest.mark.parametrize("name", MODULES)
def test_the_tables_hold_nothing_stale(name: str) -> None:
    listed = {("OURS", owner, each) for owner, names in OURS.items() for each in names}
    for table, entries in (("LAYER_KINDS", LAYER_KINDS), ("PARAMETERS", PARAMETERS), ("RESULTS", RESULTS)):
        listed |= {(table, entry) for entry in entries}
    assert set().union(*(walk.needed for walk in walks(name))) == listed


def test_targets_are_compute_capabilities() -> None:
    known = surface("tensorrt_rtx").classes["ComputeCapability"]
    wanted = {target.sm for target in TARGETS.values() if "tensorrt_rtx" in target.toolchains}
    assert wanted
    assert wanted <= set(known)


def test_the_versions_are_those_that_the_toolchain_allows() -> None:
    allowed = REQUIREMENTS["tensorrt"].removeprefix("tensorrt")
    assert all(version in SpecifierSet(allowed) for version in VERSIONS)
    oldest = ".".join(VERSIONS[0].split(".")[:2])
    assert allowed.startswith(f">={oldest},")


@pytest.mark.parametrize("name", MODULES)
def test_our_classes_work_with_the_bindings(name: str) -> None:
    """As far as that goes without TensorRT's libraries."""
    surface(name)
    command = [sys.executable, str(Path(__file__).with_name("objects.py")), *arguments(name)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "objects: ok\n"), run.stderr
