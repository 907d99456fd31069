"""What a compiled kernel does to registers that are operands of products under way, read from its machine code.

Hopper's products run in the background, with their left operand in registers: nothing may write to these until a wait.
ptxas 12.8 lets the next turn of a loop do so, where the wait in it comes later (triton-lang/triton#9433).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gatework.plugins.moe.kernels.compile import dump

# Of these, the first register is read.
READERS = ("ST", "LDGSTS", "BAR", "BRA", "DEPBAR", "WARPGROUP", "RED", "R2UR", "ISETP", "FSETP", "PLOP3")
WIDTHS = {".128": 4, ".64": 2, ".WIDE": 2}


def instructions(cubin: bytes) -> list[tuple[int, str]]:
    """Address and text of each."""
    return [(int(at, 16), code) for at, code in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", dump(cubin, "-sass"))]


def overwritten_operands(cubin: bytes) -> tuple[int, list[str]]:
    """How many products with operands in registers a loop holds, and what writes to these before the wait for them."""
    listed = instructions(cubin)
    places = {at: i for i, (at, _) in enumerate(listed)}
    products = [i for i, (_, code) in enumerate(listed) if re.search(r"HGMMA\S* R\d+, R\d+, gdesc", code)]
    for i, (at, code) in enumerate(listed):
        target = re.search(r"\bBRA.* 0x([0-9a-f]+)", code)
        start = places[int(target[1], 16)] if target and int(target[1], 16) <= at else i
        inside = [each for each in products if start <= each < i]
        if inside:
            return len(inside), list(_overwriting(code for _ in range(3) for _, code in listed[start : i + 1]))
    return 0, []


def _overwriting(codes: Iterable[str]) -> Iterable[str]:
    groups: list[set[int]] = []
    begun: set[int] = set()
    for code in codes:
        if found := re.search(r"HGMMA\S* R\d+, R(\d+), gdesc", code):
            begun |= {int(found[1]) + i for i in range(4)}
            if "gsb0" in code:
                groups, begun = [*groups, begun], set()
        elif found := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)", code):
            groups = groups[max(0, len(groups) - int(found[1], 16)) :]
        elif _written(code) & begun.union(*groups):
            yield code


def _written(code: str) -> set[int]:
    found = re.match(r"(?:@!?U?P\w+ )?(\S+) (?:U?P\w+, )?R(\d+)\b", code)
    if not found or found[1].startswith(READERS):
        return set()
    width = max((count for name, count in WIDTHS.items() if name in found[1]), default=1)
    return {int(found[2]) + i for i in range(width)}
