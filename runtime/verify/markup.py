"""Elements of HTML, SVG and XML, and numbers in them."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree.ElementTree import Element

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2


def printable(text: object) -> str:
    """The text without the characters that XML 1.0 forbids, escaped or not."""
    return _FORBIDDEN.sub("", str(text))


def element(tag: str, *children: Element | str | None, **attributes: object) -> Element:
    """Children in order, None left out. `class_` is class, `stroke_width` stroke-width; an attribute of None is left out.

    The serialiser escapes all text.
    """
    pairs = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items())
    node = Element(tag, {name: printable(value) for name, value in pairs if value is not None})
    for child in children:
        if isinstance(child, Element):
            node.append(child)
        elif child is not None and len(node):
            node[-1].tail = (node[-1].tail or "") + printable(child)
        elif child is not None:
            node.text = (node.text or "") + printable(child)
    return node


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def shown(value: Any) -> str:
    """A number in four digits, counts in full, other values as they are; a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def stage_name(layer: int | None, tensor: str) -> str:
    """Such as "layer 3 context", and of an encoder's layer "encoder layer 3 context"."""
    stack, _, value = tensor.rpartition(".")
    return " ".join(filter(None, (stack, "" if layer is None else f"layer {layer}", value)))


def percent(value: Any, digits: int = 1) -> str:
    """A share as a percentage."""
    share = number(value)
    return "–" if share is None else f"{100 * share:.{digits}f} %"
