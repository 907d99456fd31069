"""Run as `python dump.py MODULE [FOLDER]`: import MODULE, from FOLDER if given, and print all that it offers as JSON."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from types import ModuleType
from typing import Any


def dump(module: ModuleType) -> dict[str, Any]:
    """Classes by qualified name, the module's own names under ""; the bindings' package name is left out of all text."""
    classes: dict[str, Any] = {}
    pending: list[Any] = [module]
    package = module.Builder.__module__ + "."
    while pending:
        owner = pending.pop()
        members = classes.setdefault(owner.__qualname__ if isinstance(owner, type) else "", {})
        for name in dir(owner):
            value = getattr(owner, name)
            if isinstance(value, type) and value.__module__ + "." == package and value.__qualname__ not in classes:
                pending.append(value)
            members[name] = _member(inspect.getattr_static(owner, name), value, package)
    return classes


def _member(static: Any, value: Any, package: str) -> dict[str, Any]:
    doc, settable = value.__doc__, False
    if isinstance(value, type):
        kind, name = "class", value.__qualname__
    elif isinstance(static, property):
        kind, name, doc, settable = "property", "", static.fget.__doc__, static.fset is not None
    elif callable(value):
        kind, name = "method", ""
    else:
        kind, name = "value", type(value).__qualname__
    return {"kind": kind, "type": name, "doc": (doc or "").replace(package, ""), "settable": settable}


if __name__ == "__main__":
    sys.path[:1] = sys.argv[2:]
    print(json.dumps(dump(importlib.import_module(sys.argv[1]))))
