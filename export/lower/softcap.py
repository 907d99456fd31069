"""Attention with capped logits or with sinks -> plain operators.

For runtimes that cap what is masked already, or do not cap; and so that no cache is copied to put one key behind it.

Post: no Attention has a softcap or sinks. Logits, cap and softmax are float32, products have the graph's own type.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from gatework.export.lower.graph import Builder, producer, replace, sinks_of, without_sinks

_MASKED = -1e30  # xAI's own


def to_plain_softcap(model: ir.Model) -> tuple[ir.Model, bool]:
    """Rewrite every attention layer that is capped or has sinks."""
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    nodes = [node for node in attentions if "softcap" in node.attributes or sinks_of(node) is not None]
    for node in nodes:
        _rewrite(model.graph, node)
    return model, bool(nodes)


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    """q [B, H, S, Dh], k and v [B, Hkv, S_max, Dh], mask [B, 1, S, S_max]; the H / Hkv queries of a key head go as one."""
    q, sinks = node.inputs[0], sinks_of(node)
    k, v = (without_sinks(value) for value in node.inputs[1:3])
    mask = node.inputs[3] if sinks is None else _mask_of(node.inputs[3])
    assert q is not None and q.shape is not None and k is not None and k.shape is not None and q.dtype is not None
    build, own = Builder(graph, node), q.dtype
    H, Hkv, S_max, Dh = (int(size) for size in (q.shape[1], *k.shape[1:]))  # type: ignore[arg-type]
    scale = node.attributes["scale"].as_float()

    def reshape(value: ir.Value | None, heads: int, width: int) -> ir.Value:
        return build.op("Reshape", value, build.constant(np.array([0, heads, -1, width], np.int64)))[0]

    def number(value: float) -> ir.Value:
        return build.constant(np.array(value, np.float32))

    (columns,) = build.op("Transpose", k, perm=[0, 1, 3, 2])
    (logits,) = build.op("MatMul", reshape(q, Hkv, Dh), columns)
    if own != ir.DataType.FLOAT:
        (logits,) = build.op("Cast", logits, to=ir.DataType.FLOAT)
    logits = reshape(logits, H, S_max)
    if "softcap" in node.attributes:
        cap = node.attributes["softcap"].as_float()
        (bounded,) = build.op("Tanh", build.op("Mul", logits, number(scale / cap))[0])
        (logits,) = build.op("Mul", bounded, number(cap))
    else:
        (logits,) = build.op("Mul", logits, number(scale))
    (masked,) = build.op("Where", mask, logits, number(_MASKED))
    weights = (
        build.op("Softmax", masked, axis=-1)[0] if sinks is None else _with_sinks(build, masked, sinks, number, S_max)
    )
    if own != ir.DataType.FLOAT:
        (weights,) = build.op("Cast", weights, to=own)
    (found,) = build.op("MatMul", reshape(weights, Hkv, S_max), v)
    replace(node.outputs[0], reshape(found, H, Dh))


def _with_sinks(
    build: Builder, logits: ir.Value, sinks: ir.Value, number: Callable[[float], ir.Value], S_max: int
) -> ir.Value:
    """Softmax [B, H, S, S_max] float32 of the logits and of one sink for each head, whose own weight is dropped."""
    first, stop, axis, places = (build.constant(np.array(values, np.int64)) for values in ([0], [1], [3], [0, 2, 3]))
    (sinks,) = build.op("Cast", sinks, to=ir.DataType.FLOAT)
    (heads,) = build.op("Unsqueeze", sinks, places)  # [1, H, 1, 1]
    (column,) = build.op("Slice", logits, first, stop, axis)
    (column,) = build.op("Add", build.op("Mul", column, number(0.0))[0], heads)
    (joined,) = build.op("Concat", logits, column, axis=-1)
    (weights,) = build.op("Softmax", joined, axis=-1)
    return build.op("Slice", weights, first, build.constant(np.array([S_max], np.int64)), axis)[0]


def _mask_of(bias: ir.Value | None) -> ir.Value:
    """The boolean mask [B, 1, S, S_max] in what is added to the logits of a model with sinks."""
    value = bias
    while (node := producer(value, "Concat", "Expand", "Cast")) is not None:
        value = node.inputs[0]
    choice = producer(value, "Where")
    assert choice is not None and choice.inputs[0] is not None
    return choice.inputs[0]
