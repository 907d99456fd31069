"""y[t] = sum over j, in rising order, of topk_weights[t, j] * expert_out[t*K + j]; float32, rounded once."""

import triton
import triton.language as tl


@triton.jit
def combine(
    expert_out,  # [T*K, D] float32
    topk_weights,  # [T, K] float32
    y,  # [T, D]
    K: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """One token and BD columns per program."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    for j in tl.static_range(K):
        weight = tl.load(topk_weights + token * K + j)
        total += weight * tl.load(expert_out + (token * K + j) * D + columns, mask=columns < D, other=0.0)
    tl.store(y + token * D + columns, total.to(y.dtype.element_ty), mask=columns < D)
