"""Sorts choices by expert: a counting sort, stable, without atomics, so that the same input gives the same order.

expert_offsets[e] = number of choices of experts below e;  expert_offsets[E] = T*K
token_order[expert_offsets[e] + i] = the i-th choice t*K + j whose expert is e, in rising order
"""

import triton
import triton.language as tl


@triton.jit
def dispatch(
    topk_ids,  # [T*K] int32
    expert_offsets,  # [E+1] int32
    token_order,  # [T*K] int32
    choices,  # T*K
    E: tl.constexpr,
    BC: tl.constexpr,
):
    """One program per expert; each reads all ids twice, which stay in the cache: to count, then to place."""
    expert = tl.program_id(0)
    below = 0
    for start in range(0, choices, BC):
        cells = start + tl.arange(0, BC)
        ids = tl.load(topk_ids + cells, mask=cells < choices, other=E)
        below += tl.sum((ids < expert).to(tl.int32), axis=0)
    tl.store(expert_offsets + expert, below)

    row = below
    for start in range(0, choices, BC):
        cells = start + tl.arange(0, BC)
        mine = tl.load(topk_ids + cells, mask=cells < choices, other=E) == expert
        places = row + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(token_order + places, cells, mask=mine)
        row += tl.sum(mine.to(tl.int32), axis=0)
    if expert == E - 1:
        tl.store(expert_offsets + E, row)
