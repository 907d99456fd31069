"""Every use that a source file makes of TensorRT's Python module, checked against what the module offers.

The walk follows types: `trt` is the module, calls and attributes have the types that the docstrings tell, and parameters
those of the method that is overridden or of tables.PARAMETERS. What has no type by these rules is not checked.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tests.contract.surface import Signature, Surface, Value
from tests.contract.tables import LAYER_KINDS, OURS, PARAMETERS, RESULTS

MODULE = Value("instance", "")
MISSING = "no such name"
NOT_KNOWN = "neither TensorRT's nor in tables.OURS"
UNTYPED = "of no known type: add the parameter to tables.PARAMETERS, or annotate it if it is not TensorRT's"
_LAYER_KIND = re.compile("[A-Z][A-Z0-9_]+")


class Use(NamedTuple):
    """One use, such as Builder.create_network, and what is wrong with it, if anything."""

    file: str
    line: int
    name: str
    problem: str | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.name}: {self.problem}"


class Walk(ast.NodeVisitor):
    """After `Walk(file, source, surface)`: the uses, and which entries of the tables were needed."""

    def __init__(self, file: str, source: str, surface: Surface) -> None:
        self.file, self.surface = file, surface
        self.uses: list[Use] = []
        self.needed: set[tuple[str, ...]] = set()
        self.names: dict[str, Value | None] = {}
        self.bases: list[str] = []  # TensorRT's, of the class in hand
        tree = ast.parse(source)
        self.class_bases = _class_bases(tree)
        self.visit(tree)

    def note(self, node: ast.expr | ast.stmt, owner: str, name: str, problem: str | None = None) -> None:
        self.uses.append(Use(self.file, node.lineno, f"{owner}.{name}".removeprefix("."), problem))

    @contextmanager
    def scope(self, bases: list[str] | None = None) -> Iterator[None]:
        before = self.names, self.bases
        self.names, self.bases = dict(self.names), self.bases if bases is None else bases
        try:
            yield
        finally:
            self.names, self.bases = before

    # Expressions: each method returns what the expression stands for, or None.

    def visit_Constant(self, node: ast.Constant) -> None:
        if self.file in LAYER_KINDS and isinstance(node.value, str) and _LAYER_KIND.fullmatch(node.value):
            self.needed.add(("LAYER_KINDS", self.file))
            self.member(node, Value("class", "LayerType"), node.value)

    def visit_Name(self, node: ast.Name) -> Value | None:
        return MODULE if node.id == "trt" else self.names.get(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> Value | None:
        owner = self.visit(node.value)
        if node.attr == "trt":  # where our classes keep the module
            return MODULE
        if owner is None or owner.kind in ("items", "method", "function"):
            return None
        if owner.kind == "untyped":
            self.note(node, owner.name, node.attr, UNTYPED)
            return None
        return self.member(node, owner, node.attr, store=isinstance(node.ctx, ast.Store))

    def member(self, node: ast.expr | ast.stmt, owner: Value, name: str, *, store: bool = False) -> Value | None:
        found = self.surface.classes.get(owner.name, {}).get(name)
        if found is None:
            if not self.is_ours(owner.name, name):
                self.note(node, owner.name, name, MISSING)
            return None
        self.note(node, owner.name, name, "cannot be set" if store and not found.settable else None)
        match found.kind:
            case "class":
                return Value("class", found.type)
            case "method":
                return Value("function" if owner.kind == "class" else "method", f"{owner.name}.{name}")
            case "property":
                return self.surface.value_of(found.type_annotation)
        return self.surface.value_of(found.type)

    def is_ours(self, owner: str, name: str) -> bool:
        if name not in OURS.get(owner, ()):
            return False
        self.needed.add(("OURS", owner, name))
        return True

    def visit_Call(self, node: ast.Call) -> Value | None:
        function = self.visit(node.func)
        arguments = [self.visit(argument) for argument in (*node.args, *node.keywords)]
        if ast.unparse(node.func) == "int" and arguments[:1] and (number := arguments[0]) and number.kind == "instance":
            self.member(node, number, "__int__")
        if function is None or function.kind not in ("class", "method", "function"):
            return None
        owner, _, name = function.name.rpartition(".") if function.kind != "class" else (function.name, "", "__init__")
        keywords = {keyword.arg or "**" for keyword in node.keywords}
        given_self = owner != "" and function.kind != "function"
        self.note_call(node, owner, name, given_self + len(node.args), keywords)
        if function.kind == "class":
            return Value("instance", function.name)
        if name in RESULTS and owner == "":
            self.needed.add(("RESULTS", name))
            return Value("instance", RESULTS[name])
        signatures = self.surface.signatures(owner, name)
        return self.surface.value_of(signatures[0].returns) if signatures else None

    def note_call(self, node: ast.expr | ast.stmt, owner: str, name: str, positional: int, keywords: set[str]) -> None:
        """`positional` counts `self`."""
        signatures = self.surface.signatures(owner, name)
        fits = any(each.accepts(positional, keywords) for each in signatures)
        problem = f"cannot be called with {positional} arguments and {sorted(keywords)}, only as {_shown(signatures)}"
        self.note(node, owner, f"{name}()", None if fits else problem)

    def visit_IfExp(self, node: ast.IfExp) -> Value | None:
        self.visit(node.test)
        values = self.visit(node.body), self.visit(node.orelse)
        return values[0] or values[1]

    def visit_Subscript(self, node: ast.Subscript) -> Value | None:
        value = self.visit(node.value)
        self.visit(node.slice)
        return self.element(value)

    def element(self, value: Value | None) -> Value | None:
        return Value("instance", value.name) if value is not None and value.kind == "items" else None

    # Statements: what names stand for.

    def visit_Assign(self, node: ast.Assign) -> None:
        parts = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        values = [self.visit(part) for part in parts]
        for target in node.targets:
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            paired = values if len(values) == len(targets) else [None] * len(targets)
            for each, value in zip(targets, paired, strict=True):
                self.bind(each, value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.bind(node.target, self.visit(node.value) if node.value is not None else None)

    def bind(self, target: ast.expr, value: Value | None) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, ast.Tuple):
            for each in target.elts:
                self.bind(each, None)
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            self.set_on_self(target)
        else:
            self.visit(target)

    def set_on_self(self, target: ast.Attribute) -> None:
        known = next((base for base in self.bases if target.attr in self.surface.classes[base]), None)
        if known is not None:
            self.member(target, Value("instance", known), target.attr, store=True)
        elif self.bases and not self.is_ours(self.bases[0], target.attr):
            self.note(target, self.bases[0], target.attr, NOT_KNOWN)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> Value | None:
        value = self.visit(node.value)
        self.bind(node.target, value)
        return value

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, self.element(self.visit(node.iter)))
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.bind(node.target, self.element(self.visit(node.iter)))
        for condition in node.ifs:
            self.visit(condition)

    def generic_visit(self, node: ast.AST) -> None:
        """Comprehensions bind their names first, though their syntax has them last."""
        if not hasattr(node, "generators"):
            return super().generic_visit(node)
        with self.scope():
            for generator in node.generators:
                self.visit(generator)
            for part in ("key", "value", "elt"):
                if hasattr(node, part):
                    self.visit(getattr(node, part))
        return None

    def visit_withitem(self, node: ast.withitem) -> None:
        self.visit(node.context_expr)
        if node.optional_vars is not None:
            self.bind(node.optional_vars, None)

    # Definitions.

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            value = self.visit(base)
            if value is not None and value.kind == "class":
                self.note_call(node, value.name, "__init__", 1, set())
        with self.scope([base for base in self.class_bases[node.name] if base in self.surface.classes]):
            for statement in node.body:
                if isinstance(statement, ast.FunctionDef):
                    self.visit_method(statement)
                else:
                    self.visit(statement)

    def visit_method(self, node: ast.FunctionDef) -> None:
        types: dict[str, Value | None] = {}
        base = next((base for base in self.bases if node.name in self.surface.classes[base]), None)
        if base is not None and not node.name.startswith("_"):
            signatures = self.surface.override_signatures(base, node.name)
            problem = None if _fits(node.args, signatures) else f"is called as {_shown(signatures)}"
            self.note(node, base, node.name, problem)
            for signature in self.surface.signatures(base, node.name):
                for argument, parameter in zip(node.args.args[1:], signature.parameters[1:], strict=False):
                    types[argument.arg] = self.surface.value_of(parameter.annotation)
        elif self.bases and not (node.name.startswith("_") or self.is_ours(self.bases[0], node.name)):
            self.note(node, self.bases[0], node.name, NOT_KNOWN)
        self.visit_function(node, types)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.visit_function(node, {})

    def visit_function(self, node: ast.FunctionDef, types: dict[str, Value | None]) -> None:
        for decorator in node.decorator_list:
            self.visit(decorator)
        with self.scope():
            for argument in (*node.args.args, *node.args.kwonlyargs):
                self.names[argument.arg] = types.get(argument.arg) or self.parameter(argument)
            for statement in node.body:
                self.visit(statement)

    def parameter(self, argument: ast.arg) -> Value | None:
        annotation = "Any" if argument.annotation is None else ast.unparse(argument.annotation)
        if annotation != "Any" or argument.arg == "self":
            return None
        if argument.arg not in PARAMETERS:
            return Value("untyped", argument.arg)
        self.needed.add(("PARAMETERS", argument.arg))
        return PARAMETERS[argument.arg]


def _class_bases(tree: ast.Module) -> dict[str, list[str]]:
    """TensorRT's classes under each class; one that is mixed into such a class, as MoEPlugin is, has those of that class."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found: dict[str, list[str]] = {node.name: [] for node in classes}
    for node in classes:
        bases = [ast.unparse(base) for base in node.bases]
        direct = [base.removeprefix("trt.") for base in bases if base.startswith("trt.")]
        for name in (node.name, *(base for base in bases if base in found)):
            found[name] += direct
    return found


def _fits(arguments: ast.arguments, signatures: list[Signature]) -> bool:
    """Whether a method with these arguments can be called in one of these ways."""
    most = len(arguments.args)
    return any(most - len(arguments.defaults) <= len(each.parameters) <= most for each in signatures)


def _shown(signatures: list[Signature]) -> str:
    return " or ".join(map(str, signatures)) or "nothing that its docstring tells"
