"""The second grouped matrix product: expert_out[token_order[r]] = w_out[e] hidden[r] + b_out[e], for row r of expert e.

float32 sums, not rounded. A program computes BM rows by BN columns.
"""

import triton
import triton.language as tl

from gatework.plugins.moe.kernels.quantize import FINER
from gatework.plugins.moe.kernels.tile import finish, load_columns, multiply, no_total, place, settled, step_scale


@triton.jit
def gemm_out(
    hidden,  # [T*K, I], or its codes [T*K, PARTS, I], see `quantize`
    hidden_scale,  # [T*K] float32, or None
    w_out,  # [E, D, I], int4 [E, D, ceil(I / 2)]
    w_out_scale,  # [E, D, groups] float32, or None
    b_out,  # [E, D], or None
    expert_offsets,  # [E+1] int32
    token_order,  # [T*K] int32
    expert_out,  # [T*K, D] float32
    m_tiles,
    E: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    SCALING: tl.constexpr,
    GROUP: tl.constexpr,
    NIBBLES: tl.constexpr,
    CODES: tl.constexpr,
    PARTS: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    STORED: tl.constexpr = (I + 1) // 2 if NIBBLES != "none" else I
    GROUPS: tl.constexpr = (I + GROUP - 1) // GROUP
    expert, start, end, n = place(expert_offsets, m_tiles, tl.cdiv(D, BN), E, BE, BM)
    if expert >= E:
        return
    rows = start + tl.arange(0, BM)
    rows_real = rows < end
    columns = n * BN + tl.arange(0, BN)
    columns_real = columns < D
    first = expert.to(tl.int64) * D
    w = w_out + first * STORED
    scale = w_out_scale
    if SCALING != "none":
        scale += first * GROUPS
    bias = b_out
    if b_out is not None:
        bias += first

    total = no_total(BM, BN, CODES, NIBBLES)
    fine = total
    ahead = step_scale(scale, columns, columns_real, 0, I, SCALING, GROUP, BN)
    for k in range(0, I, BK):
        ks = k + tl.arange(0, BK)
        cells = rows.to(tl.int64)[:, None] * (PARTS * I) + ks[None, :]
        a = load_columns(hidden + cells, rows_real[:, None], ks, I, I % BK == 0)
        rest = None
        if PARTS == 2:
            rest = load_columns(hidden + cells + I, rows_real[:, None], ks, I, I % BK == 0)
        coming = step_scale(scale, columns, columns_real, k + BK, I, SCALING, GROUP, BN)
        total, fine = multiply(
            total, a, w, scale, ahead, columns, columns_real, k, I, SCALING, GROUP, NIBBLES, CODES, BN, BK, rest, fine
        )
        ahead = coming
        total = settled(total, NIBBLES)

    a_scales = None
    if hidden_scale is not None:
        a_scales = tl.load(hidden_scale + rows, mask=rows_real, other=0.0)
    if PARTS == 2 and CODES == "int8":
        total = total.to(tl.float32) + fine.to(tl.float32) / FINER
    total = finish(total, a_scales, scale, bias, columns, columns_real, SCALING, NIBBLES)
    choices = tl.load(token_order + rows, mask=rows_real, other=0).to(tl.int64)
    cells = choices[:, None] * D + columns[None, :]
    tl.store(expert_out + cells, total, mask=rows_real[:, None] & columns_real[None, :])
