"""Canonical attention -> GroupQueryAttention: rotary, in-place cache write and attention in one kernel, q|k|v in one product.

Pre: RotaryEmbedding / TensorScatter / Attention as the decoder traces them. Where q and k are normalised, or q is scaled, the
one product is split again, and the operator takes three inputs.
Post: no Attention to a cache, TensorScatter or mask is left, unless a head's width, or its part that rotates, is not a multiple
of 16, which the kernel demands; such a model keeps the standard operators, and so does attention to an encoder's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from gatework.export.config import ModelConfig
from gatework.export.lower.graph import MS, Builder, linear_weight, producer, replace, sinks_of, without_sinks
from gatework.export.packing import Pack, TensorSpec, add_packed, is_weight, pack_of, static_shape
from gatework.export.positions import alibi_slopes

_SEQLENS_K, _POSITION_IDS, _ATTENTION_BIAS, _SINKS, _QUERY_SEQLENS = (
    5,
    9,
    10,
    11,
    16,
)  # input indices of GroupQueryAttention


class Lengths(NamedTuple):
    """int32: keys per row after this step less one, their maximum over the batch, and, if asked for, new tokens per row.

    end: that maximum once more, int64.
    """

    seqlens_k: ir.Value
    total: ir.Value
    end: ir.Value
    query: ir.Value | None

    def before(
        self,
        tables: Sequence[ir.Value | None],
        positions: ir.Value | None,
        bias: ir.Value | None,
        sinks: ir.Value | None,
    ) -> list[ir.Value | None]:
        """The operator's inputs behind the past cache; tables: cos and sin; positions: their rows, if not the slots."""
        inputs: list[ir.Value | None] = [self.seqlens_k, self.total, *tables]
        others = {_POSITION_IDS: positions, _ATTENTION_BIAS: bias, _SINKS: sinks, _QUERY_SEQLENS: self.query}
        for index, value in others.items():
            if value is not None:
                inputs += [None] * (index - _SEQLENS_K - len(inputs)) + [value]
        return inputs


def to_group_query_attention(model: ir.Model, config: ModelConfig, *, query_lengths: bool) -> tuple[ir.Model, bool]:
    """Rewrite every attention layer; `query_lengths` gives the operator its optional input of that meaning."""
    if config.head_dim % 16 or config.rotary_dim % 16:
        return model, False
    if not any(node.op_type == "TensorScatter" for node in model.graph):
        return model, False
    attentions = [node for node in model.graph if node.op_type == "Attention" and not _is_given(node.inputs[1])]
    lengths = attention_lengths(model.graph, query_lengths=query_lengths)
    bias = None
    if config.alibi_bias_max is not None:
        slopes = Builder(model.graph, attentions[0]).constant(alibi_slopes(config)[:, None, None].numpy())
        bias = alibi_bias(model.graph, attentions[0], lengths, slopes)
    if config.relative_buckets is not None:
        build = Builder(model.graph, attentions[0])
        start, axis = (build.constant(np.array([number], np.int64)) for number in (0, 3))
        (end,) = build.op("Unsqueeze", lengths.end, start)
        (bias,) = build.op("Slice", attentions[0].inputs[3], start, end, axis)  # of all keys that there may be
    for node in attentions:
        _rewrite(model.graph, node, config, lengths, bias)
    return model, True


def _is_given(keys: ir.Value | None) -> bool:
    """Whether they are an encoder's."""
    return keys is not None and keys.is_graph_input()


def attention_lengths(graph: ir.Graph, *, query_lengths: bool) -> Lengths:
    """Add what computes them from the graph's inputs."""
    inputs = {value.name: value for value in graph.inputs}
    build = Builder(graph, graph[0])
    (seq,) = build.op("Shape", inputs["position_ids"], start=1, end=2)  # [1]
    one = build.constant(np.array(1, np.int64))
    (last,) = build.op("Sub", seq, one)
    (ends,) = build.op("Add", inputs["write_indices"], last)  # [B]
    (seqlens_k,) = build.op("Cast", ends, to=ir.DataType.INT32)
    (longest,) = build.op("ReduceMax", ends, keepdims=0)
    (total64,) = build.op("Add", longest, one)
    (total,) = build.op("Cast", total64, to=ir.DataType.INT32)
    if not query_lengths:
        return Lengths(seqlens_k, total, total64, None)
    (batch,) = build.op("Shape", inputs["position_ids"], start=0, end=1)
    (rows,) = build.op("Expand", seq, batch)
    (query,) = build.op("Cast", rows, to=ir.DataType.INT32)
    return Lengths(seqlens_k, total, total64, query)


def alibi_bias(graph: ir.Graph, before: ir.Node, lengths: Lengths, slopes: ir.Value) -> ir.Value:
    """Slope [H, 1, 1] times (key - query) for every query of this step and key that there is: [B, H, S, total] float32."""
    (positions,) = (value for value in graph.inputs if value.name == "position_ids")
    build = Builder(graph, before)
    start, step = (build.constant(np.array(number, np.int64)) for number in (0, 1))
    (keys,) = build.op("Range", start, lengths.end, step)
    (queries,) = build.op("Unsqueeze", positions, build.constant(np.array([1, 3], np.int64)))
    (distance,) = build.op("Sub", keys, queries)
    (distance,) = build.op("Cast", distance, to=ir.DataType.FLOAT)
    return build.op("Mul", distance, slopes)[0]


def _rewrite(graph: ir.Graph, node: ir.Node, config: ModelConfig, lengths: Lengths, bias: ir.Value | None) -> None:
    k_write, v_write = (producer(without_sinks(value), "TensorScatter") for value in node.inputs[1:3])
    assert k_write is not None and v_write is not None
    build = Builder(graph, node)
    heads = [node.inputs[0], k_write.inputs[1], v_write.inputs[1]]
    tables: list[ir.Value | None] = [None, None]
    positions = None
    if config.rotary_dim:
        q_rope, k_rope = (producer(value, "RotaryEmbedding") for value in heads[:2])
        assert q_rope is not None and k_rope is not None
        heads[:2], tables = [q_rope.inputs[0], k_rope.inputs[0]], list(q_rope.inputs[1:3])
        positions = q_rope.inputs[3] if config.ntk_length is not None else None  # rows of the tables
    projected: list[ir.Value | None]
    if config.qk_norm is None and config.logn_length is None:
        projected = [_packed_projection(graph, build, heads, config.qkv_clip), None, None]
    else:
        projected = [*_split_projection(graph, build, heads, config)]
    past = (k_write.inputs[0], v_write.inputs[0])
    inputs = [*projected, *past, *lengths.before(tables, positions, bias, sinks_of(node))]
    y, present_k, present_v = build.op(
        "GroupQueryAttention",
        *inputs,
        domain=MS,
        outputs=3,
        num_heads=config.num_heads,
        kv_num_heads=config.num_kv_heads,
        do_rotary=int(config.rotary_dim > 0),
        scale=float(node.attributes["scale"].value),
        local_window_size=config.window(_layer(past[0])) or -1,
        softcap=config.attn_softcap or 0.0,
    )
    replace(k_write.outputs[0], present_k)
    replace(v_write.outputs[0], present_v)
    replace(_merged_heads(node.outputs[0]), y)  # [B, S, H * Dh]


def _layer(past: ir.Value | None) -> int:
    """The number of the layer whose cache this is."""
    assert past is not None and past.name is not None
    return int(past.name.split(".")[1])


def _merged_heads(value: ir.Value) -> ir.Value:
    """[B, H, S, Dh] followed through Transpose and Reshape to [B, S, H * Dh]."""
    for op_type in ("Transpose", "Reshape"):
        (user,) = value.consumers()
        assert user.op_type == op_type
        value = user.outputs[0]
    return value


def _split_projection(
    graph: ir.Graph, build: Builder, heads: list[ir.Value | None], config: ModelConfig
) -> list[ir.Value]:
    """q, k and v [B, S, heads * Dh] as the graph normalises and clips them, out of one product."""
    matmuls = [_projection(value) for value in heads]
    first = Builder(graph, matmuls[0])
    packed = _packed_projection(graph, first, heads, None)
    widths = np.array([static_shape(_weight(matmul))[0] for matmul in matmuls], np.int64)
    parts = first.op("Split", packed, first.constant(widths), axis=-1, outputs=3)
    for matmul, part in zip(matmuls, parts, strict=True):
        replace(matmul.outputs[0] if _bias(matmul) is None else _only_user(matmul).outputs[0], part)
    return [_with_heads_side_by_side(build, value) for value in heads]


def _with_heads_side_by_side(build: Builder, value: ir.Value | None) -> ir.Value:
    """[B, heads, S, Dh] -> [B, S, heads * Dh]: what was reshaped, or, normalised since, reshaped back."""
    transpose = producer(value, "Transpose")
    assert transpose is not None
    split = producer(transpose.inputs[0], "Reshape")
    flat = split.inputs[0] if split is not None else None
    if flat is None:
        (flat,) = build.op("Reshape", transpose.inputs[0], build.constant(np.array([0, 0, -1], np.int64)))
    return flat


def _packed_projection(graph: ir.Graph, build: Builder, heads: list[ir.Value | None], clip: float | None) -> ir.Value:
    """One product x [Wq; Wk; Wv]^T, with the bias and clip of the three that it replaces: [B, S, (H + 2 Hkv) * Dh]."""
    matmuls = [_projection(value) for value in heads]
    packed = _stacked(graph, [_weight(matmul) for matmul in matmuls])
    (transposed,) = build.op("Transpose", packed, perm=[1, 0])
    (qkv,) = build.op("MatMul", matmuls[0].inputs[0], transposed)
    biases = [bias for matmul in matmuls if (bias := _bias(matmul)) is not None]
    if biases:
        (qkv,) = build.op("Add", qkv, _stacked(graph, biases))
    if clip is not None:
        assert packed.dtype is not None
        qkv.dtype = packed.dtype
        low, high = (build.constant(np.array(sign * clip, packed.dtype.numpy())) for sign in (-1, 1))
        (qkv,) = build.op("Clip", qkv, low, high)
    return qkv


def _stacked(graph: ir.Graph, parts: list[ir.Value]) -> ir.Value:
    """The weights or biases of q, k and v, one below the other."""
    packs = [pack_of(part) for part in parts]
    spec, shapes = packs[0].outputs[0], [static_shape(part) for part in parts]
    shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
    sources = tuple(source for pack in packs for source in pack.sources)
    name = spec.name.replace(".q.", ".qkv.")
    (stacked,) = add_packed(graph, Pack(sources, (TensorSpec(name, spec.dtype, shape),), packs[0].encode))
    return stacked


def _bias(matmul: ir.Node) -> ir.Value | None:
    """What is added to a product of its own."""
    user = _only_user(matmul)
    return next((value for value in user.inputs if user.op_type == "Add" and is_weight(value)), None)


def _only_user(node: ir.Node) -> ir.Node:
    (user,) = node.outputs[0].consumers()
    return user


def _projection(value: ir.Value | None) -> ir.Node:
    """The MatMul behind Transpose, Reshape and, where the model adds a bias, scales, normalises or clips, what does that."""
    while (node := producer(value, "Transpose", "Reshape", "RMSNormalization", "Clip", "Add", "Mul")) is not None:
        value = node.inputs[0]
    matmul = producer(value, "MatMul")
    assert matmul is not None
    return matmul


def _weight(matmul: ir.Node) -> ir.Value:
    weight = linear_weight(matmul)
    assert weight is not None
    return weight
