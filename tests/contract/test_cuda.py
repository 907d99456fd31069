"""The code uses only functions, constants and arguments that the installed cuda-bindings has."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
from packaging.requirements import Requirement

from gatework.runtime.backends.device import BINDINGS
from tests.contract.bindings import ROOT

cudart = pytest.importorskip(
    "cuda.bindings.runtime", reason="no cuda-bindings: runtime/backends/device.py is not checked against them"
)
FILE = ROOT / "runtime" / "backends" / "device.py"


def is_cudart(node: ast.expr) -> bool:
    """`cudart` or `self.cudart`."""
    return ast.unparse(node) in ("cudart", "self.cudart")


def problems(source: str) -> tuple[int, list[str]]:
    """Uses of the module, and those that it does not have."""
    tree = ast.parse(source)
    found = list(wrong_names(tree)) + list(wrong_calls(tree))
    uses = sum(isinstance(node, ast.Attribute) and is_cudart(node.value) for node in ast.walk(tree))
    return uses, found


def wrong_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_cudart(node.value) and not hasattr(cudart, node.attr):
            yield f"{node.attr}: no such name"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and is_cudart(node.value.value):
            owner = getattr(cudart, node.value.attr, None)
            if not hasattr(owner, node.attr):
                yield f"{node.value.attr}.{node.attr}: no such name"


def wrong_calls(tree: ast.AST) -> Iterator[str]:
    """Arguments, and what `_check` takes for the one value besides the status."""
    checked = {
        id(node.args[0]): True
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_check"
    }
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_cudart(node.func.value)):
            continue
        function = getattr(cudart, node.func.attr, None)
        if function is None:
            continue
        parameters = inspect.signature(function).parameters
        if len(node.args) != len(parameters) or node.keywords:
            yield f"{node.func.attr}: takes {list(parameters)}"
        if id(node) in checked and results(function) > 1:
            yield f"{node.func.attr}: gives more than one value"


def results(function: Any) -> int:
    """Values besides the status, as the docstring lists them."""
    listed = re.search(r"Returns\n\s*-+\n(.*?)(?:\n\n|\Z)", function.__doc__, re.DOTALL)
    assert listed is not None, function
    return sum(not line.startswith(" ") for line in listed[1].splitlines()) - 1


def test_whatever_the_code_uses_is_there() -> None:
    uses, found = problems(FILE.read_text())
    assert found == []
    assert uses > 25


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("cudart.cudaMalloc2(1)", "cudaMalloc2: no such name"),
        ("self.cudart.cudaStreamNonBlock", "cudaStreamNonBlock: no such name"),
        ("cudart.cudaMemcpyKind.cudaMemcpyUp", "cudaMemcpyKind.cudaMemcpyUp: no such name"),
        ("cudart.cudaMalloc(1, 2)", "cudaMalloc: takes ['size']"),
        ("_check(cudart.cudaMemGetInfo())", "cudaMemGetInfo: gives more than one value"),
    ],
)
def test_a_mistake_is_found(source: str, problem: str) -> None:
    assert problems(source)[1] == [problem]


def test_the_installed_version_is_one_that_is_asked_for() -> None:
    assert version("cuda-bindings") in Requirement(BINDINGS).specifier
