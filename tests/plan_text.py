"""What a TensorRT-RTX plan says of its own compiled products, read from the text that its compiler leaves in the file.

Independent of the builder's listing: that tells what was asked for, this what was made. The text is not a documented format.
"""

from __future__ import annotations

import re
from pathlib import Path

_TENSOR = re.compile(rb'^\s*(?:sub_)?tensor=\{.* name="([^"]+)" .* type=(\w+) \}', re.MULTILINE)
_PRODUCT = re.compile(rb'fully_connected=\{ name="([^"]+)" output=\{[^}]*\} input=\{"([^"]+)" "([^"]+)"')


def compiled_products(plan: Path) -> list[tuple[str, str]]:
    """The operands' types of every product that the plan runs, such as ("int8", "int8"); one entry a profile and product."""
    data = plan.read_bytes()
    types: dict[bytes, str] = {}
    products = []
    events = sorted([*_TENSOR.finditer(data), *_PRODUCT.finditer(data)], key=re.Match.start)
    for event in events:
        if event.re is _TENSOR:
            types[event[1]] = event[2].decode()
        else:
            products.append((types.get(event[2], "?"), types.get(event[3], "?")))
    return products
