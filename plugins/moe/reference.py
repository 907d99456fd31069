"""The definition of `gatework::MoE` version 1, in NumPy. Every other implementation is tested against this file.

For each token t, with p = score(router_logits[t]) over all E experts (softmax or sigmoid, float32):

    chosen[t]   = the K experts of the largest router logits, largest first; equal logits: the lower index first
    weight[t,j] = p[chosen[t,j]]                           and, with renormalize, divided by the sum over j
    weight[t,j] = 0 when a capacity is set and the choice found its expert full (see `kept` and `kept_gshard`)
    y[t]        = sum over j of weight[t,j] * expert(chosen[t,j], x[t])

    expert(e, x) = w_out[e] h + b_out[e],   with  u = w_in[e] x + b_in[e]  and
        glu none:       h = act(u)
        glu two_way:    gate | up = u,     h = act(gate) * up
        glu three_way:  a | b | up = u,    h = a * act(b) * up
    Two-way silu gates are g sigmoid(alpha g) * (v + beta), where g is gate, at most limit, and v is up, in [-limit, limit];
    without a limit (0) g = gate and v = up.

Both score functions rise with the logit, so the largest logits have the largest scores; choosing by logit keeps the
choice free of any exponential's rounding, hence equal on every machine. Softmax with renormalize is "top K, then
softmax over them". Mixtral and DBRX renormalise; Grok-1 and OpenMoE do not; OpenMoE's gate is three_way, with capacity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.spec import MoEAttributes, check_shapes

Array = NDArray[Any]
TINY = np.float32(2.0**-126)  # the smallest normal float32: scores that all underflow renormalise to 0, not to NaN


def moe(
    x: Array,
    router_logits: Array,
    w_in: Array,
    w_out: Array,
    attributes: MoEAttributes,
    *,
    b_in: Array | None = None,
    b_out: Array | None = None,
    w_in_scale: Array | None = None,
    w_out_scale: Array | None = None,
    accumulate: type[np.floating[Any]] = np.float64,
) -> Array:
    """y [T, D] in dtype `accumulate`, in which everything after the routing is computed.

    Shapes and dtypes are those of `spec`; bfloat16 and float8 are the ml_dtypes types. The operator's output has x's
    dtype: an implementation rounds once at the end, here nothing is rounded. Raises GateworkError for inputs that do
    not fit together.
    """
    given = {"x": x, "router_logits": router_logits, "w_in": w_in, "w_out": w_out, "b_in": b_in, "b_out": b_out}
    given |= {"w_in_scale": w_in_scale, "w_out_scale": w_out_scale}
    sizes = check_shapes(attributes, {name: None if a is None else a.shape for name, a in given.items()})
    indices, weights = route(router_logits, attributes)  # [T, K]
    x = np.asarray(x).astype(accumulate)
    y = np.zeros((sizes.T, sizes.D), accumulate)

    def matrix(w: Array, scale: Array | None, e: int, columns: int) -> Array:
        return dequantize(w[e], None if scale is None else scale[e], attributes, columns=columns, dtype=accumulate)

    for e in range(sizes.E):
        tokens, choice = np.nonzero(indices == e)  # a token chooses an expert at most once
        u = x[tokens] @ matrix(w_in, w_in_scale, e, sizes.D).T  # [tokens, G*I]
        if b_in is not None:
            u = u + b_in[e].astype(accumulate)
        out = expert_activation(u, attributes) @ matrix(w_out, w_out_scale, e, sizes.I).T  # [tokens, D]
        if b_out is not None:
            out = out + b_out[e].astype(accumulate)
        y[tokens] += weights[tokens, choice, None].astype(accumulate) * out
    return y


def expert_activation(u: Array, attributes: MoEAttributes) -> Array:
    """h [tokens, I] from u [tokens, G*I]."""
    activation = ACTIVATIONS[attributes.activation]
    match np.split(u, attributes.matrices, axis=-1):
        case [z]:
            return activation(z)
        case [gate, up]:
            if attributes.has_own_gates:
                return clamped_gate(gate, up, attributes)
            return activation(gate) * up
        case [a, b, up]:
            return a * activation(b) * up
    raise AssertionError(attributes)


def clamped_gate(gate: Array, up: Array, attributes: MoEAttributes) -> Array:
    """Two-way silu gates of their own kind: gpt-oss has alpha 1.702, beta 1, limit 7."""
    limit = attributes.limit or np.inf
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate * sigmoid(attributes.alpha * gate) * (up + attributes.beta)


def route(router_logits: Array, attributes: MoEAttributes) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Chosen experts [T, K] int64, best first, and their weights [T, K] float32, from logits [T, E] read as float32."""
    logits = np.asarray(router_logits).astype(np.float32)
    if logits.ndim != 2 or logits.shape[1] < attributes.top_k:
        raise GateworkError(
            "router_logits has the wrong shape", got=logits.shape, expected=f"[T, {attributes.top_k} or more]"
        )
    indices = np.argsort(-logits, axis=-1, kind="stable")[:, : attributes.top_k]
    weights = np.take_along_axis(SCORES[attributes.scoring](logits), indices, axis=-1)
    if attributes.renormalize:
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), TINY)
    if attributes.capacity_factor > 0:
        if attributes.capacity_rule == "gshard":
            weights = weights * kept_gshard(indices, weights, logits.shape[1], attributes)
        else:
            weights = weights * kept(indices, logits.shape[1], attributes)
    return indices, weights


def kept(indices: NDArray[np.int64], num_experts: int, attributes: MoEAttributes) -> NDArray[np.bool_]:
    """Which choices [T, K] find a free slot of their expert, each expert having `attributes.capacity(T, E)` slots.

    Slots are handed out to the first choices of all tokens in token order, then to all second choices, and so on. A
    choice uses up a slot number whether or not it is kept, so later choices are offset by all earlier ones (OpenMoE's
    PyTorch port).
    """
    T, K = indices.shape
    ordered = indices.T.reshape(K * T)
    counts = np.cumsum(ordered[:, None] == np.arange(num_experts), axis=0)  # [K*T, E]
    slots = counts[np.arange(K * T), ordered] - 1
    return (slots < attributes.capacity(T, num_experts)).reshape(K, T).T


def kept_gshard(
    indices: NDArray[np.int64], weights: NDArray[np.float32], num_experts: int, attributes: MoEAttributes
) -> NDArray[np.bool_]:
    """The same by the rule of GShard (arXiv:2006.16668, algorithm 1, in the form of Mesh TensorFlow); weights [T, 2].

    Tokens of one call are one group. First choices take slots in token order. Second choices whose weight is above
    `second_threshold` take those behind the first choices that were kept, in token order, each using up a slot number whether
    or not it is kept. A dropped choice does not raise the weight of the other. (Mesh TensorFlow adds 1e-9 to the sum that the
    weights are divided by, which float32 does not show.)
    """
    capacity = attributes.capacity(len(indices), num_experts)
    first, second = (indices[:, j, None] == np.arange(num_experts) for j in range(2))  # [T, E]
    first = first & (np.cumsum(first, axis=0) <= capacity)
    second = second & (weights[:, 1:] > np.float32(attributes.second_threshold))
    second = second & (np.cumsum(second, axis=0) + first.sum(axis=0) <= capacity)
    return np.stack([first.any(axis=1), second.any(axis=1)], axis=1)


def dequantize(
    w: Array,
    scale: Array | None,
    attributes: MoEAttributes,
    *,
    columns: int | None = None,
    dtype: type[np.floating[Any]] = np.float32,
) -> Array:
    """Weights [..., rows, columns] in `dtype` from their stored form [..., rows, stored columns].

    With scale [..., rows, groups] float32, w = q * scale; a group is `group_size` neighbours along the columns, the
    last one possibly shorter, and group_size 0 is one group per row.

    dense:    any float type, no scale.
    fp8_e4m3: float8_e4m3fn (1-4-3 bits, no infinities, largest 448).
    int8:     signed int8, q in [-128, 127].
    int4:     signed, q in [-8, 7], stored as q + 8 (unsigned nibbles with the fixed zero point 8), two to a uint8:
              column 2j in the low nibble of byte j, 2j + 1 in its high nibble. The last high nibble is unused where
              `columns` is odd.
    """
    stored = STORED_DTYPES.get(attributes.weight_format)
    if stored is not None and w.dtype.name != stored:
        raise GateworkError(f"{attributes.weight_format} weights have the wrong dtype", got=w.dtype, expected=stored)
    if (scale is None) != (stored is None):
        raise GateworkError(f"{attributes.weight_format} weights and their scale do not go together")
    if attributes.weight_format == "int4":
        w = unpack_int4(w)[..., :columns]
    if scale is None:
        return w.astype(dtype)
    groups = attributes.groups(w.shape[-1])
    if scale.shape != (*w.shape[:-1], groups):
        raise GateworkError("weight scale has the wrong shape", got=scale.shape, expected=(*w.shape[:-1], groups))
    if attributes.group_size:
        scale = np.repeat(scale, attributes.group_size, axis=-1)[..., : w.shape[-1]]
    return w.astype(dtype) * scale.astype(dtype)


def pack_int4(q: Array) -> NDArray[np.uint8]:
    """Signed int4 values [..., columns] in [-8, 7] to their stored bytes [..., ceil(columns / 2)]; see `dequantize`."""
    if q.size and not -8 <= q.min() <= q.max() <= 7:
        raise GateworkError("int4 values are out of range", got=f"{q.min()} to {q.max()}", expected="-8 to 7")
    padding = [(0, 0)] * (q.ndim - 1) + [(0, q.shape[-1] % 2)]
    nibbles = np.pad(q.astype(np.int16) + 8, padding, constant_values=8).astype(np.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << np.uint8(4)


def unpack_int4(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Signed int4 values [..., 2 * bytes] as int8; inverse of `pack_int4` but for the padding."""
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).astype(np.int8) - 8
    return nibbles.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(z: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-z) = inf gives the right 0
        return 1 / (1 + np.exp(-z))


def silu(z: Array) -> Array:
    return z * sigmoid(z)


def gelu(z: Array) -> Array:
    """z * Phi(z), Phi the normal distribution (arXiv:1606.08415)."""
    return (z * (0.5 + 0.5 * erf(z / math.sqrt(2)))).astype(z.dtype)


def gelu_tanh(z: Array) -> Array:
    """Its approximation by tanh (arXiv:1606.08415, section 2)."""
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def relu(z: Array) -> Array:
    return np.maximum(z, 0)


erf: Callable[[Array], Array] = np.vectorize(math.erf, otypes=[np.float64])
SCORES: dict[str, Callable[[Array], Array]] = {"softmax": softmax, "sigmoid": sigmoid}
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}
STORED_DTYPES = {"fp8_e4m3": "float8_e4m3fn", "int8": "int8", "int4": "uint8"}
