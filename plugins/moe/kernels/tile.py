"""What both grouped matrix products share: which tile a program computes, and one tile's product with its weights.

Rows (choices sorted by expert) are cut into tiles of BM within each expert; every program finds its expert from
expert_offsets, so the grid needs only an upper bound of the number of tiles and nothing is read back to the host.

    dot(a, w)[m, n] = sum over k of a[m, k] * w[n, k]

    SCALING none     w as stored
            row      w = q * scale[n]: a tile of q, the scale in the epilogue
            step     w = q * scale[n, k // GROUP] with GROUP a multiple of BK: the scale after each step of BK columns
            ahead    step, its scale loaded while the step before is computed: no step waits for it, which takes registers
            element  the same for any GROUP: the scale on every weight, which is then rounded to a's type
    CODES   none     a is float16 or bfloat16, q is converted to it
            int8, fp8   a and q are both 8 bits wide, a with a scale per row
"""

import triton
import triton.language as tl


@triton.jit
def place(expert_offsets, m_tiles, n_tiles: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr):
    """This program's expert (E: none), its first row, that expert's end row and its column tile.

    Neighbouring programs share a tile of weights and differ in rows, in bands of 16 row tiles.
    """
    band_size = 16 * n_tiles
    program = tl.program_id(0)
    first = program // band_size * 16
    band = tl.minimum(m_tiles - first, 16)
    m = first + program % band_size % band
    n = program % band_size // band

    experts = tl.arange(0, BE)
    starts = tl.load(expert_offsets + experts, mask=experts < E, other=0)
    ends = tl.load(expert_offsets + experts + 1, mask=experts < E, other=0)
    tiles = (ends - starts + BM - 1) // BM
    up_to = tl.cumsum(tiles, axis=0)  # tiles of this and all lower experts
    expert = tl.sum(((up_to <= m) & (experts < E)).to(tl.int32), axis=0)
    mine = experts == expert
    start = tl.sum(tl.where(mine, starts + (m - up_to + tiles) * BM, 0), axis=0)
    end = tl.sum(tl.where(mine, ends, 0), axis=0)
    return expert, start, end, n


@triton.jit
def load_columns(pointers, rows_real, columns, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """[rows, columns], 0 outside; EVEN: no column is outside."""
    if EVEN:
        return tl.load(pointers, mask=rows_real, other=0.0)
    else:  # noqa: RET505
        return tl.load(pointers, mask=rows_real & (columns < COLUMNS)[None, :], other=0.0)


@triton.jit
def step_scale(
    w_scale,  # the expert's first row: [rows, groups]
    rows,
    rows_real,
    k,
    COLUMNS: tl.constexpr,
    SCALING: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
):
    """With SCALING ahead the scales [BN] of the step at column k, one for each row."""
    if SCALING == "ahead":
        GROUPS: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
        return tl.load(w_scale + rows * GROUPS + k // GROUP, mask=rows_real & (k < COLUMNS), other=0.0)
    else:  # noqa: RET505
        return tl.zeros((BN,), tl.float32)


@triton.jit
def multiply(
    total,  # [BM, BN] float32, or int32 with int8 codes
    a,  # [BM, BK]
    rest,  # [BM, BK], the second codes of a; or None
    w,  # the expert's first row: [rows, COLUMNS], int4 [rows, ceil(COLUMNS / 2)]
    w_scale,  # the expert's first row: [rows, groups]
    ahead,  # [BN], of step_scale
    rows,  # [BN]
    rows_real,
    k,
    COLUMNS: tl.constexpr,
    SCALING: tl.constexpr,
    GROUP: tl.constexpr,
    NIBBLES: tl.constexpr,
    CODES: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """total + the product of a (+ rest) with the weights' columns k to k + BK. Where they end early, a is 0."""
    GROUPS: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    EVEN: tl.constexpr = COLUMNS % BK == 0
    real = rows_real[:, None]
    if NIBBLES:
        STORED: tl.constexpr = (COLUMNS + 1) // 2
        places = k // 2 + tl.arange(0, BK // 2)
        packed = load_columns(w + rows[:, None] * STORED + places[None, :], real, places, STORED, EVEN)
        low, high = (packed & 15).to(tl.int8) - 8, (packed >> 4).to(tl.int8) - 8
        q = tl.reshape(tl.join(low, high), (BN, BK))
    else:
        columns = k + tl.arange(0, BK)
        q = load_columns(w + rows[:, None] * COLUMNS + columns[None, :], real, columns, COLUMNS, EVEN)
    if SCALING == "element":
        columns = k + tl.arange(0, BK)
        scales = w_scale + rows[:, None] * GROUPS + columns[None, :] // GROUP
        q = (q.to(tl.float32) * load_columns(scales, real, columns, COLUMNS, EVEN)).to(a.dtype)
    if CODES == "none":
        q = q.to(a.dtype)

    # Triton compiles the one branch whose constant condition holds, early returns do not end a function for it.
    if SCALING == "ahead":
        total += tl.dot(a, q.T) * ahead[None, :]
    elif SCALING == "step":
        scale = tl.load(w_scale + rows * GROUPS + k // GROUP, mask=rows_real, other=0.0)
        total += tl.dot(a, q.T) * scale[None, :]
    elif CODES == "int8":
        total = tl.dot(a, q.T, total, out_dtype=tl.int32)
    elif CODES == "fp8":
        # Hopper adds fp8 products in fewer bits than float32 has: at most BK of them.
        total = tl.dot(a, q.T, total, max_num_imprecise_acc=BK)
        if rest is not None:
            total = tl.dot(rest, q.T, total, max_num_imprecise_acc=BK)
    else:
        total = tl.dot(a, q.T, total)
    return total


@triton.jit
def no_total(BM: tl.constexpr, BN: tl.constexpr, CODES: tl.constexpr):
    """The sum of nothing, in the type that `multiply` adds in."""
    if CODES == "int8":
        return tl.zeros((BM, BN), tl.int32)
    else:  # noqa: RET505
        return tl.zeros((BM, BN), tl.float32)


@triton.jit
def finish(total, a_scales, w_scale, bias, rows, rows_real, SCALING: tl.constexpr):
    """Scales and bias on a finished sum; a_scales [BM] or None, bias: the expert's first row or None."""
    total = total.to(tl.float32)
    if a_scales is not None:
        total = total * a_scales[:, None]
    if SCALING == "row":
        total = total * tl.load(w_scale + rows, mask=rows_real, other=0.0)[None, :]
    if bias is not None:
        total = total + tl.load(bias + rows, mask=rows_real, other=0.0).to(tl.float32)[None, :]
    return total
