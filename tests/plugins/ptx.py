"""What PTX in a kernel computes, for Triton's interpreter, which has no inline assembly: the few instructions in use."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from tests.plugins.moe_cases import Array

NUMBERS: dict[str, Any] = {"fma.rn.f16x2": np.float16, "fma.rn.bf16x2": ml_dtypes.bfloat16}


def evaluate(text: str, results: int, operands: list[Array]) -> Array:
    """Results $0, $1, ... [..., results] uint32, of operands [...] uint32, whose numbers follow those of the results."""
    registers = {f"${results + i}": each for i, each in enumerate(operands)}
    for instruction in text.strip("{} ").split(";"):
        name, _, rest = instruction.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *sources = (each.strip() for each in rest.split(","))
        values = [registers[each] if each in registers else np.uint32(int(each, 0)) for each in sources]
        registers[target] = _execute(name, *np.broadcast_arrays(*values, operands[0])[:-1])
    return np.stack([registers[f"${i}"] for i in range(results)], axis=-1)


def _execute(name: str, *values: Array) -> Array:
    if name == "mov.b32":
        return values[0]
    if name == "shr.u32":
        return values[0] >> values[1]
    if name == "prmt.b32":
        return _permuted(*values)
    if name == "lop3.b32":
        return _looked_up(*values)
    a, b, c = (np.ascontiguousarray(each).view(NUMBERS[name]).astype(np.float64) for each in values)
    return (a * b + c).astype(NUMBERS[name]).view(np.uint32)


def _permuted(low: Array, high: Array, selector: Array) -> Array:
    """Byte i is that one of high:low's eight which the selector's i-th four bits name."""
    eight = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    found = np.zeros_like(low)
    for i in range(4):
        named = selector >> np.uint32(4 * i) & np.uint32(15)
        assert (named < 8).all(), "copies of signs are not in use"
        byte = eight >> named.astype(np.uint64) * np.uint64(8) & np.uint64(255)
        found |= byte.astype(np.uint32) << np.uint32(8 * i)
    return found


def _looked_up(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Bit by bit, the table's bit of index 4a + 2b + c."""
    found = np.zeros_like(a)
    for index in range(8):
        chosen = (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
        found |= chosen * (table >> np.uint32(index) & np.uint32(1))
    return found
