"""The first grouped matrix product with the gate in its epilogue; row r of expert e is choice token_order[r] = t*K + j.

    u = w_in[e] x[t] + b_in[e],  G*I rows
    GLU none:       hidden[r] = act(u)
        two_way:    hidden[r] = act(gate) * up,      gate | up = u
        three_way:  hidden[r] = a * act(b) * up,     a | b | up = u
    LIMIT clamps gate from above and up on both sides, silu has a slope ALPHA, BETA is added to up: of two_way gates.

A program computes BM rows by BN columns of hidden: G tiles of weights against one of x, float32 sums, one rounding.
"""

import triton
import triton.language as tl

from gatework.plugins.moe.kernels.tile import finish, load_columns, multiply, no_total, place, settled, step_scale


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    if ACTIVATION == "silu":
        return z * tl.sigmoid(z if ALPHA == 1.0 else z * ALPHA)
    if ACTIVATION == "gelu":
        return z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 = sigmoid(2u)
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return tl.maximum(z, 0.0)


@triton.jit
def gemm_in(
    x,  # [T, D], or its codes
    x_scale,  # [T] float32, or None
    w_in,  # [E, G*I, D], int4 [E, G*I, ceil(D / 2)]
    w_in_scale,  # [E, G*I, groups] float32, or None
    b_in,  # [E, G*I], or None
    expert_offsets,  # [E+1] int32
    token_order,  # [T*K] int32
    hidden,  # [T*K, I]
    m_tiles,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    GLU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    SCALING: tl.constexpr,
    GROUP: tl.constexpr,
    NIBBLES: tl.constexpr,
    CODES: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    G: tl.constexpr = 1 if GLU == "none" else 2 if GLU == "two_way" else 3
    STORED: tl.constexpr = (D + 1) // 2 if NIBBLES != "none" else D
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    expert, start, end, n = place(expert_offsets, m_tiles, tl.cdiv(I, BN), E, BE, BM)
    if expert >= E:
        return
    rows = start + tl.arange(0, BM)
    rows_real = rows < end
    tokens = (tl.load(token_order + rows, mask=rows_real, other=0) // K).to(tl.int64)
    columns = n * BN + tl.arange(0, BN)
    columns_real = columns < I
    # I rows of w_in to each of the G matrices
    first = expert.to(tl.int64) * (G * I)
    w = w_in + first * STORED
    scale = w_in_scale
    if SCALING != "none":
        scale += first * GROUPS
    bias = b_in
    if b_in is not None:
        bias += first

    total_0 = no_total(BM, BN, CODES, NIBBLES)
    total_1 = no_total(BM, BN, CODES, NIBBLES)
    total_2 = no_total(BM, BN, CODES, NIBBLES)
    rows_1 = columns + I
    rows_2 = columns + 2 * I
    ahead_0 = step_scale(scale, columns, columns_real, 0, D, SCALING, GROUP, BN)
    ahead_1 = ahead_0
    ahead_2 = ahead_0
    if G > 1:
        ahead_1 = step_scale(scale, rows_1, columns_real, 0, D, SCALING, GROUP, BN)
    if G > 2:
        ahead_2 = step_scale(scale, rows_2, columns_real, 0, D, SCALING, GROUP, BN)
    for k in range(0, D, BK):
        ks = k + tl.arange(0, BK)
        a = load_columns(x + tokens[:, None] * D + ks[None, :], rows_real[:, None], ks, D, D % BK == 0)
        coming_0 = step_scale(scale, columns, columns_real, k + BK, D, SCALING, GROUP, BN)
        total_0, _ = multiply(
            total_0, a, w, scale, ahead_0, columns, columns_real, k, D, SCALING, GROUP, NIBBLES, CODES, BN, BK
        )
        ahead_0 = coming_0
        if G > 1:
            coming_1 = step_scale(scale, rows_1, columns_real, k + BK, D, SCALING, GROUP, BN)
            total_1, _ = multiply(
                total_1, a, w, scale, ahead_1, rows_1, columns_real, k, D, SCALING, GROUP, NIBBLES, CODES, BN, BK
            )
            ahead_1 = coming_1
        if G > 2:
            coming_2 = step_scale(scale, rows_2, columns_real, k + BK, D, SCALING, GROUP, BN)
            total_2, _ = multiply(
                total_2, a, w, scale, ahead_2, rows_2, columns_real, k, D, SCALING, GROUP, NIBBLES, CODES, BN, BK
            )
            ahead_2 = coming_2
        if G == 1:
            total_0 = settled(total_0, NIBBLES)
        if G == 2:
            total_1 = settled(total_1, NIBBLES)
        if G == 3:
            total_2 = settled(total_2, NIBBLES)

    a_scales = None
    if x_scale is not None:
        a_scales = tl.load(x_scale + tokens, mask=rows_real, other=0.0)
    h = finish(total_0, a_scales, scale, bias, columns, columns_real, SCALING, NIBBLES)
    if G == 1:
        h = activate(h, ACTIVATION, ALPHA)
    if G == 2:
        up = finish(total_1, a_scales, scale, bias, rows_1, columns_real, SCALING, NIBBLES)
        if LIMIT > 0.0:
            h = tl.minimum(h, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        if BETA != 0.0:
            up += BETA
        h = activate(h, ACTIVATION, ALPHA) * up
    if G == 3:
        h = h * activate(
            finish(total_1, a_scales, scale, bias, rows_1, columns_real, SCALING, NIBBLES), ACTIVATION, ALPHA
        )
        h = h * finish(total_2, a_scales, scale, bias, rows_2, columns_real, SCALING, NIBBLES)
    cells = rows.to(tl.int64)[:, None] * I + columns[None, :]
    tl.store(hidden + cells, h.to(hidden.dtype.element_ty), mask=rows_real[:, None] & columns_real[None, :])
