"""Routing on the GPU, and the capacity that drops choices. Same definition as `reference.route` and `reference.kept`.

    p               = softmax or sigmoid of router_logits[t], over all E experts, float32
    topk_ids[t]     = the K experts of the largest logits, largest first; equal logits: the lower index first
    topk_weights[t] = p[topk_ids[t]], with RENORMALIZE divided by their sum

NaN logits rank as -inf, so that indices stay in range, and make the weights NaN.
"""

import triton
import triton.language as tl


@triton.jit
def route(
    router_logits,  # [T, E] float32
    topk_ids,  # [T, K] int32
    topk_weights,  # [T, K] float32
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,  # a power of 2 >= E
    BK: tl.constexpr,  # a power of 2 >= K
):
    """BT tokens per program."""
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    experts = tl.arange(0, BE)
    choices = tl.arange(0, BK)
    real = (tokens < T)[:, None] & (experts < E)[None, :]
    logits = tl.load(router_logits + tokens[:, None] * E + experts[None, :], mask=real, other=float("-inf"))
    if SCORING == "softmax":
        # Rows beyond T hold -inf only; a finite maximum keeps them from NaN.
        powers = tl.exp(logits - tl.maximum(tl.max(logits, axis=1), -3.0e38)[:, None])
        scores = powers / tl.sum(powers, axis=1)[:, None]
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))

    ranked = tl.where(logits == logits, logits, float("-inf"))
    left = (experts < E)[None, :] & (tokens >= 0)[:, None]  # not chosen so far
    ids = tl.zeros((BT, BK), tl.int32)
    weights = tl.zeros((BT, BK), tl.float32)
    for j in tl.static_range(K):
        largest = tl.max(tl.where(left, ranked, float("-inf")), axis=1)
        best = tl.min(tl.where(left & (ranked == largest[:, None]), experts[None, :], BE), axis=1)
        chosen = experts[None, :] == best[:, None]
        score = tl.sum(tl.where(chosen, scores, 0.0), axis=1)
        ids = tl.where(choices[None, :] == j, best[:, None], ids)
        weights = tl.where(choices[None, :] == j, score[:, None], weights)
        left = left & (experts[None, :] != best[:, None])
    if RENORMALIZE:
        weights = weights / tl.maximum(tl.sum(weights, axis=1), 1.1754943508222875e-38)[:, None]  # 2^-126

    cells = tokens[:, None] * K + choices[None, :]
    stored = (tokens < T)[:, None] & (choices < K)[None, :]
    tl.store(topk_ids + cells, ids, mask=stored)
    tl.store(topk_weights + cells, weights, mask=stored)


@triton.jit
def drop(
    topk_ids,  # [T, K] int32
    topk_weights,  # [T, K] float32, updated in place
    T,
    capacity,
    K: tl.constexpr,
    BT: tl.constexpr,
):
    """weight = 0 where the choice is not among its expert's first `capacity`; one program per expert.

    First choices of all tokens come first, in token order, then all second choices, and so on.
    """
    expert = tl.program_id(0)
    used = 0
    for j in range(K):
        for start in range(0, T, BT):
            tokens = start + tl.arange(0, BT)
            cells = tokens * K + j
            mine = tl.load(topk_ids + cells, mask=tokens < T, other=-1) == expert
            slots = used + tl.cumsum(mine.to(tl.int32), axis=0) - 1
            tl.store(topk_weights + cells, 0.0, mask=mine & (slots >= capacity))
            used += tl.sum(mine.to(tl.int32), axis=0)
