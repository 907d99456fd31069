"""What a module offers, from the docstrings that pybind11 writes: classes, their members, and how these are called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

# Names that signatures have for classes whose Python name is another.
ALIASES = {"IParserError": "ParserError", "PluginFieldCollection_": "PluginFieldCollection"}
_CPP_NAMESPACE = re.compile(r"\b(?:nvinfer1|nvonnxparser)::(?:v_\w+::)?")
_SIGNATURE = re.compile(r"^(?:\d+\. )?\w*\((.*)\) -> (.*)$", re.MULTILINE)
_SEQUENCE = re.compile(r"^(?:collections\.abc\.)?(?:Sequence|Iterable|list)\[(.*)\]$")


class Value(NamedTuple):
    """What an expression stands for: a class by name, an object of it, several objects of it, or one of its methods.

    kind: "class", "instance", "items", "method" (of an object), "function" (the same without one), or "untyped": a
    parameter, by name, of which nothing is known.
    """

    kind: str
    name: str


class Parameter(NamedTuple):
    """annotation: the text after the colon, "" if none."""

    name: str
    annotation: str
    required: bool


@dataclass(frozen=True)
class Signature:
    """One way to call a function; `returns` is its annotation's text."""

    parameters: tuple[Parameter, ...]
    returns: str

    def __str__(self) -> str:
        return f"({', '.join(each.name if each.required else f'{each.name}=' for each in self.parameters)})"

    def accepts(self, positional: int, keywords: set[str]) -> bool:
        """Whether a call with so many positional arguments and these keywords fits."""
        rest = {each.name for each in self.parameters[positional:]}
        required = {each.name for each in self.parameters[positional:] if each.required}
        return positional <= len(self.parameters) and required <= keywords <= rest


def _read_signatures(doc: str) -> list[Signature]:
    """Those that pybind11 writes into a docstring; the headline over several of them, which has no result, is left out."""
    return [_signature(inside, returns) for inside, returns in _SIGNATURE.findall(doc)]


def _signature(inside: str, returns: str) -> Signature:
    return Signature(tuple(_read_parameter(part) for part in _split(inside) if part not in ("", "/", "*")), returns)


def _read_parameter(text: str) -> Parameter:
    text, equals, _ = text.partition(" = ")
    name, _, annotation = text.partition(": ")
    return Parameter(name, annotation, not equals)


def _split(text: str) -> list[str]:
    """Split at the commas that no bracket encloses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


@dataclass(frozen=True)
class Member:
    """kind: "class", "method", "property" or "value"; type: name of the class that it is, or that a value is of."""

    kind: str
    type: str
    doc: str
    settable: bool

    @cached_property
    def type_annotation(self) -> str:
        """Of a property."""
        return next((each.returns for each in _read_signatures(self.doc)), "")


class Surface:
    """The classes of a module by qualified name, the module itself under ""."""

    def __init__(self, classes: dict[str, dict[str, Any]]) -> None:
        self.classes = {
            name: {key: Member(**member) for key, member in members.items()} for name, members in classes.items()
        }

    def value_of(self, annotation: str) -> Value | None:
        """What an annotation promises; None where no class of the module is meant."""
        annotation = _CPP_NAMESPACE.sub("", annotation)
        if (sequence := _SEQUENCE.match(annotation)) is not None:
            inside = self.value_of(sequence[1])
            return Value("items", inside.name) if inside is not None and inside.kind == "instance" else None
        annotation = ALIASES.get(annotation, annotation)
        return Value("instance", annotation) if annotation in self.classes and annotation else None

    def signatures(self, owner: str, name: str) -> list[Signature]:
        """How a method, or a function of the module if `owner` is "", is called: methods with `self`."""
        return _read_signatures(self.classes[owner][name].doc)

    def override_signatures(self, owner: str, name: str) -> list[Signature]:
        """How TensorRT calls an override: as in the class's own example if it has one, else as the method itself."""
        example = re.search(rf"def {name}\((.*)\).*:$", self.classes[""][owner].doc, re.MULTILINE)
        return [_signature(example[1], "")] if example else self.signatures(owner, name)
