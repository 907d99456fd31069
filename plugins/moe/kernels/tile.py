"""What both grouped matrix products share: which tile a program computes, and one tile's product with its weights.

Rows (choices sorted by expert) are cut into tiles of BM within each expert; every program finds its expert from
expert_offsets, so the grid needs only an upper bound of the number of tiles and nothing is read back to the host.

    dot(a, w)[m, n] = sum over k of a[m, k] * w[n, k]

    SCALING none     w as stored
            row      w = q * scale[n]: a tile of q, the scale in the epilogue
            step     w = q * scale[n, k // GROUP] with GROUP a multiple of BK: the scale after each step of BK columns
            ahead    step, its scale loaded while the step before is computed: no step waits for it, which takes registers
            weight   step, but the scale on every weight: both are rounded to a's type, and all steps add to one sum
            element  weight for any GROUP, in float32: one rounding
    CODES   none     a is float16 or bfloat16, q is converted to it
            int8, fp8   a and q are both 8 bits wide, a with a scale per row
    NIBBLES none     a weight is an element of memory
            bytes    4-bit weights; the product is w aT, totals are [BN, BM]: Hopper takes the left operand from registers,
                     where these weights are converted, and the right one's rows fill tiles of 8
            words    the same with loads of 32 bits, for products that Hopper runs in the background: BM >= 16, BN >= 64. In
                     their left operand a thread has every fourth byte of a row, so four threads each take one from the same
                     word. COLUMNS % 8 = 0
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


def _pairs(bytes: list[str], kind: str, base: int, one: int, minus: int) -> tl.constexpr:
    """PTX that makes a pair of numbers of a byte: of its low four bits and of its high ones, less 8. For each of `bytes` of
    the word which follows the results, named by where it lies in that word and in the same shifted by four bits.

    base: two numbers whose last place is 1, so that q in their last bits is q more; minus: these and 8, to take off.
    """
    word = f"${len(bytes)}"
    lines = ["{ .reg .b32 high, one, minus;", f"shr.u32 high, {word}, 4;"]
    lines += [f"mov.b32 one, {one:#x};", f"mov.b32 minus, {minus:#x};"]
    for i, byte in enumerate(bytes):
        lines += [f"prmt.b32 ${i}, {word}, high, {byte};"]
        lines += [f"lop3.b32 ${i}, ${i}, 0x000f000f, {base:#x}, 0xea;"]  # a & b | c
        lines += [f"fma.rn.{kind} ${i}, ${i}, one, minus;"]
    return tl.constexpr(" ".join([*lines, "}"]))


_F16 = ("f16x2", 0x64006400, 0x3C003C00, 0xE408E408)  # 1024, 1, -1032
_BF16 = ("bf16x2", 0x43004300, 0x3F803F80, 0xC308C308)  # 128, 1, -136
_EACH = ["0x0400", "0x0501", "0x0602", "0x0703"]
EACH_F16, EACH_BF16 = _pairs(_EACH, *_F16), _pairs(_EACH, *_BF16)
ONE_F16, ONE_BF16 = _pairs(["$2"], *_F16), _pairs(["$2"], *_BF16)


@triton.jit
def load_nibbles(
    w,
    rows,
    rows_real,
    k,
    COLUMNS: tl.constexpr,
    NIBBLES: tl.constexpr,
    DTYPE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """q [BN, BK] in float16 or bfloat16; w: the expert's first row of int4 weights."""
    EVEN: tl.constexpr = COLUMNS % BK == 0
    if NIBBLES == "words":
        WORDS: tl.constexpr = COLUMNS // 8
        places = k // 8 + tl.arange(0, BK // 8)
        pointers = w.to(tl.pointer_type(tl.int32)) + rows[:, None] * WORDS + places[None, :]
        words = load_columns(pointers, rows_real[:, None], places, WORDS, EVEN)
        words = tl.broadcast_to(words[:, :, None], (BN, BK // 8, 4))
        byte = tl.broadcast_to((tl.arange(0, 4) * 0x101 + 0x400)[None, None, :], (BN, BK // 8, 4))
        ONE: tl.constexpr = ONE_BF16 if DTYPE is tl.bfloat16 else ONE_F16
        pairs = tl.inline_asm_elementwise(ONE, "=&r,r,r", [words, byte], tl.int32, is_pure=True, pack=1)
    else:
        BYTES: tl.constexpr = (COLUMNS + 1) // 2
        places = k // 2 + tl.arange(0, BK // 2)
        pointers = w + rows[:, None] * BYTES + places[None, :]
        packed = load_columns(pointers, rows_real[:, None], places, BYTES, EVEN)
        EACH: tl.constexpr = EACH_BF16 if DTYPE is tl.bfloat16 else EACH_F16
        pairs = tl.inline_asm_elementwise(EACH, "=&r,=&r,=&r,=&r,r", [packed], tl.int32, is_pure=True, pack=4)
    low, high = pairs.to(tl.int16).to(DTYPE, bitcast=True), (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(low, high), (BN, BK))


@triton.jit
def multiply(
    total,  # [BM, BN] float32, or int32 with int8 codes; [BN, BM] with NIBBLES
    a,  # [BM, BK]
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
    rest=None,  # [BM, BK], the second codes of a
    fine=None,  # as total, of second int8 codes
):
    """total and fine, with the products of a and of rest with the weights' columns k to k + BK added to them, in fp8 both to
    total. Where columns end early, a is 0.
    """
    GROUPS: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    EVEN: tl.constexpr = COLUMNS % BK == 0
    real = rows_real[:, None]
    if NIBBLES != "none":
        q = load_nibbles(w, rows, rows_real, k, COLUMNS, NIBBLES, a.dtype, BN, BK)
    else:
        columns = k + tl.arange(0, BK)
        q = load_columns(w + rows[:, None] * COLUMNS + columns[None, :], real, columns, COLUMNS, EVEN)
    if SCALING == "element":
        columns = k + tl.arange(0, BK)
        scales = w_scale + rows[:, None] * GROUPS + columns[None, :] // GROUP
        q = (q.to(tl.float32) * load_columns(scales, real, columns, COLUMNS, EVEN)).to(a.dtype)
    if CODES == "none":
        q = q.to(a.dtype)

    if SCALING == "step" or SCALING == "weight":
        ahead = tl.load(w_scale + rows * GROUPS + k // GROUP, mask=rows_real, other=0.0)
    if SCALING == "weight":
        q = q * ahead.to(a.dtype)[:, None]

    # Triton compiles the one branch whose constant condition holds, early returns do not end a function for it.
    if NIBBLES != "none":
        if SCALING == "ahead":
            total += tl.dot(q, a.T) * ahead[:, None]
        else:
            total = tl.dot(q, a.T, total)
    elif SCALING == "ahead" or SCALING == "step":
        total += tl.dot(a, q.T) * ahead[None, :]
    elif CODES == "int8":
        total = tl.dot(a, q.T, total, out_dtype=tl.int32)
        if rest is not None:
            fine = tl.dot(rest, q.T, fine, out_dtype=tl.int32)
    elif CODES == "fp8":
        # Hopper adds fp8 products in fewer bits than float32 has. Moving sums to float32 every 128 columns would take 0.0003
        # off y's error of 0.0384 and 30 % more time (an H100, Mixtral's sizes, 4096 tokens, equal tiles).
        total = tl.dot(a, q.T, total)
        if rest is not None:
            total = tl.dot(rest, q.T, total)
    else:
        total = tl.dot(a, q.T, total)
    return total, fine


@triton.jit
def settled(total, NIBBLES: tl.constexpr):
    """The same at the end of a step, where its products are then finished: an operation on it, of no instruction.

    ptxas before 13.3 lets a step overwrite registers that are operands of products which the step before has begun.
    """
    if NIBBLES != "none":
        total = tl.inline_asm_elementwise("", "=r,0", [total], tl.float32, is_pure=True, pack=1)
    return total


@triton.jit
def no_total(BM: tl.constexpr, BN: tl.constexpr, CODES: tl.constexpr, NIBBLES: tl.constexpr):
    """The sum of nothing, in the shape and the type that `multiply` adds in."""
    if NIBBLES != "none":
        return tl.zeros((BN, BM), tl.float32)
    elif CODES == "int8":  # noqa: RET505
        return tl.zeros((BM, BN), tl.int32)
    else:
        return tl.zeros((BM, BN), tl.float32)


@triton.jit
def finish(total, a_scales, w_scale, bias, rows, rows_real, SCALING: tl.constexpr, NIBBLES: tl.constexpr):
    """Scales and bias on a finished sum; a_scales [BM] or None, bias: the expert's first row or None."""
    total = total.to(tl.float32)
    if NIBBLES != "none":
        total = total.T
    if a_scales is not None:
        total = total * a_scales[:, None]
    if SCALING == "row":
        total = total * tl.load(w_scale + rows, mask=rows_real, other=0.0)[None, :]
    if bias is not None:
        total = total + tl.load(bias + rows, mask=rows_real, other=0.0).to(tl.float32)[None, :]
    return total
