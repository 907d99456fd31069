"""Attention with capped logits -> plain operators, for runtimes that cap what is masked already, or do not cap.

Post: no Attention has a softcap. Logits, cap and softmax are float32, products have the graph's own type.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gatework.export.lower.graph import Builder, replace

_MASKED = -1e30  # xAI's own


def to_plain_softcap(model: ir.Model) -> tuple[ir.Model, bool]:
    """Rewrite every capped attention layer."""
    nodes = [node for node in model.graph if node.op_type == "Attention" and "softcap" in node.attributes]
    for node in nodes:
        _rewrite(model.graph, node)
    return model, bool(nodes)


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    """q [B, H, S, Dh], k and v [B, Hkv, S_max, Dh], mask [B, 1, S, S_max]; the H / Hkv queries of a key head go as one."""
    q, k, v, mask = node.inputs[:4]
    assert q is not None and q.shape is not None and k is not None and k.shape is not None and q.dtype is not None
    build, own = Builder(graph, node), q.dtype
    H, Hkv, S_max, Dh = (int(size) for size in (q.shape[1], *k.shape[1:]))  # type: ignore[arg-type]
    scale, cap = (node.attributes[name].as_float() for name in ("scale", "softcap"))

    def reshape(value: ir.Value | None, heads: int, width: int) -> ir.Value:
        return build.op("Reshape", value, build.constant(np.array([0, heads, -1, width], np.int64)))[0]

    def number(value: float) -> ir.Value:
        return build.constant(np.array(value, np.float32))

    (columns,) = build.op("Transpose", k, perm=[0, 1, 3, 2])
    (logits,) = build.op("MatMul", reshape(q, Hkv, Dh), columns)
    if own != ir.DataType.FLOAT:
        (logits,) = build.op("Cast", logits, to=ir.DataType.FLOAT)
    (scaled,) = build.op("Mul", reshape(logits, H, S_max), number(scale / cap))
    (bounded,) = build.op("Tanh", scaled)
    (capped,) = build.op("Mul", bounded, number(cap))
    (masked,) = build.op("Where", mask, capped, number(_MASKED))
    (weights,) = build.op("Softmax", masked, axis=-1)
    if own != ir.DataType.FLOAT:
        (weights,) = build.op("Cast", weights, to=own)
    (found,) = build.op("MatMul", reshape(weights, Hkv, S_max), v)
    replace(node.outputs[0], reshape(found, H, Dh))
