"""Routers, residual sums and norms -> inputs of the CPU kernels' PackedMoE and PackedMatMul that follow them, and which then
compute them row by row on the way: a decode step spends less of its time between operators.

Pre: a graph lowered to those kernels. Post: no value that `taps` named is gone.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from gatework.export.lower.graph import Builder, producer, replace, tidy
from gatework.plugins.moe import cpu_ops
from gatework.plugins.moe.spec import DOMAIN

_SKIP_NORM = "SkipSimplifiedLayerNormalization"
_NORMS = (_SKIP_NORM, "RMSNormalization", "LayerNormalization")
# Places of the inputs in question.
_GAMMA = {cpu_ops.MATMUL: 3, cpu_ops.MOE: 9}
_ROUTER = 8


def fuse_into_kernels(model: ir.Model) -> tuple[ir.Model, bool]:
    """Let the kernels do all they can of what comes before them."""
    modified = False
    for node in [node for node in model.graph if node.op_type == cpu_ops.MOE]:
        modified |= _take_router(model.graph, node)
    tidy(model)
    for node in [node for node in model.graph if node.op_type in _GAMMA]:
        modified |= _take_norm(model.graph, node)
    model.graph.sort()
    return tidy(model), modified


def _take_router(graph: ir.Graph, node: ir.Node) -> bool:
    """The product that makes the logits; x and y keep the graph's own shape [B, S, D] then."""
    flat, logits = node.inputs[:2]
    before, router = producer(flat, "Reshape"), producer(logits, "Gemm", "FusedMatMul")
    after = [user for user, _ in node.outputs[0].uses()]
    if before is None or router is None or [user.op_type for user in after] != ["Reshape"]:
        return False
    weight = router.inputs[1]
    assert weight is not None
    settings = {name: attribute.value for name, attribute in router.attributes.items()}
    plain = settings.get("transB") == 1 and settings.get("alpha", 1.0) == 1.0
    if router.inputs[0] is not flat or len(router.inputs) != 2 or not plain or not weight.is_initializer():
        return False
    assert logits is not None
    inputs = [before.inputs[0], None, *_padded(node.inputs[2:], _ROUTER - 2), weight]
    y, total, scores = _rebuilt(graph, node, inputs, 3)
    total.name, name = "", node.outputs[0].name
    replace(after[0].outputs[0], y)
    node.outputs[0].name, y.name = None, name  # verification asks for it
    replace(logits, scores)
    return True


def _take_norm(graph: ir.Graph, node: ir.Node) -> bool:
    """The norm that makes x, if nothing else reads it, and the sum that the norm reads."""
    x = node.inputs[0]
    norm = producer(x, *_NORMS)
    if x is None or norm is None or len(x.uses()) > 1 or x.is_graph_output():
        return False
    if norm.op_type == "LayerNormalization" and len(norm.inputs) > 2:  # with a bias
        return False
    stream, skip, gamma, old_total = _operands(norm)
    place = _GAMMA[node.op_type]
    inputs = [stream, *_padded(node.inputs[1:], place - 1), gamma, *([skip] if skip is not None else [])]
    settings = {
        "epsilon": norm.attributes["epsilon"].as_float(),
        "centred": float(norm.op_type == "LayerNormalization"),
    }
    y, total, *scores = _rebuilt(graph, node, inputs, max(len(node.outputs), 2), **settings)
    for old, new in zip((node.outputs[0], *node.outputs[2:]), (y, *scores), strict=True):
        replace(old, new)
    if skip is None:
        total.name = ""
    elif old_total is not None:
        replace(old_total, total)
    return True


def _operands(norm: ir.Node) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None, ir.Value | None]:
    """The stream, what is added to it or None, the norm's weight, and the sum or None."""
    if norm.op_type == _SKIP_NORM:
        stream, skip, gamma = norm.inputs[:3]
        return stream, None if producer(skip, "Sub") is not None else skip, gamma, norm.outputs[3]  # minus itself: zero
    stream, gamma = norm.inputs[:2]
    add = producer(stream, "Add")
    if add is None or any(value is None or value.is_initializer() for value in add.inputs):
        return stream, None, gamma, None
    return *add.inputs, gamma, stream  # type: ignore[return-value]


def _padded(inputs: Sequence[ir.Value | None], count: int) -> list[ir.Value | None]:
    return [*inputs, *[None] * (count - len(inputs))]


def _rebuilt(
    graph: ir.Graph, node: ir.Node, inputs: Sequence[ir.Value | None], outputs: int, **more: object
) -> Sequence[ir.Value]:
    """Outputs of a node like the given one."""
    settings = {name: attribute.value for name, attribute in node.attributes.items()} | more
    return Builder(graph, node).op(node.op_type, *inputs, domain=DOMAIN, outputs=outputs, **settings)
