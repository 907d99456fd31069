"""Activations in 8 bits, one scale per row:  scale = max |x| / LARGEST,  code = x / scale, to the nearest, ties to even.

LARGEST is 127 for int8 and 448 for float8_e4m3fn. A row of zeros has codes 0. With PARTS 2 a second code follows the row's
codes, of what they left: rest = x / scale - code, in fp8 on the same scale, in int8 on one FINER times finer.
"""

import triton
import triton.language as tl

from gatework.plugins.moe import workspace

FINER = tl.constexpr(workspace.FINER)


@triton.jit
def quantize(
    values,  # [rows, COLUMNS]
    codes,  # [rows, PARTS, COLUMNS] int8 or float8_e4m3fn
    scales,  # [rows] float32
    rows,
    COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """BR rows per program, read twice: for the scale, then for the codes."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    starts = row.to(tl.int64)[:, None] * COLUMNS
    largest = tl.zeros((BR, BC), tl.float32)
    for start in range(0, COLUMNS, BC):
        columns = start + tl.arange(0, BC)
        real = (row < rows)[:, None] & (columns < COLUMNS)[None, :]
        x = tl.load(values + starts + columns[None, :], mask=real, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.maximum(tl.max(largest, axis=1), 1e-30) / LARGEST
    tl.store(scales + row, scale, mask=row < rows)
    for start in range(0, COLUMNS, BC):
        columns = start + tl.arange(0, BC)
        real = (row < rows)[:, None] & (columns < COLUMNS)[None, :]
        x = tl.load(values + starts + columns[None, :], mask=real, other=0.0).to(tl.float32)
        # The quotient's own rounding could exceed the format's largest number.
        q = tl.minimum(tl.maximum(x / scale[:, None], -LARGEST), LARGEST)
        code = nearest(q, codes.dtype.element_ty)
        cells = codes + starts * PARTS + columns[None, :]
        tl.store(cells, code, mask=real)
        if PARTS == 2:
            rest = q - code.to(tl.float32)
            if codes.dtype.element_ty == tl.int8:
                rest *= FINER
            tl.store(cells + COLUMNS, nearest(rest, codes.dtype.element_ty), mask=real)


@triton.jit
def nearest(q, CODE: tl.constexpr):
    """q in the codes' type."""
    if tl.int8 == CODE:
        q = (q + 12582912.0) - 12582912.0  # 1.5 * 2^23: float32 keeps no fraction there
    return q.to(CODE)
