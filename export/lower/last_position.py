"""Take the last position before the last feed-forward layer instead of after it: no other position's result is read.

Pre: the canonical graph, whose logits are those of the last position, and whose last feed-forward layer treats every token by
itself. Post: the last layer's feed-forward norm, if it has one of its own, its MoE or MLP, and the residual sum around it
run on [B, 1, D].
"""

from __future__ import annotations

import onnx_ir as ir

from gatework.export.lower.graph import Builder, producer, replace
from gatework.plugins.moe.spec import DOMAIN


def hoist_last_position(model: ir.Model) -> tuple[ir.Model, bool]:
    """Move the final Slice up past the last feed-forward layer; does nothing to a graph with all logits."""
    slices = [node for node in model.graph if node.op_type == "Slice"]
    add = producer(slices[-1].inputs[0], "Add") if slices else None
    if add is None or any(_has_capacity(node) for node in model.graph):
        return model, False
    (last,) = slices
    while (position := _hoist(model.graph, add, last)) is not None:  # past an extra MLP, and past the experts before it
        add, last = position.inputs[0].producer(), position  # type: ignore[union-attr]
        assert add is not None
    return model, True


def _hoist(graph: ir.Graph, add: ir.Node, last: ir.Node) -> ir.Node | None:
    """Move the Slice up past the part whose branch `add` adds; returns the new one if there is more before it."""
    residual, branch = add.inputs
    assert residual is not None
    users = [user for user, _ in residual.uses()]  # the layer's norm, and the sum itself
    norm = next((user for user in users if user is not add), None)
    before = norm if norm is not None else _reader_of_norm(branch)
    (position,) = Builder(graph, before).op("Slice", residual, *last.inputs[1:])
    position.type = residual.type
    for user in users:
        user.replace_input_with(list(user.inputs).index(residual), position)
    normed = None
    if norm is None:
        x = before.inputs[0]
        assert x is not None and x.dtype is not None
        (normed,) = Builder(graph, before).op("Slice", x, *last.inputs[1:])
        normed.dtype = x.dtype
        before.replace_input_with(0, normed)
    if (post_norm := producer(branch, "RMSNormalization")) is not None:
        branch = post_norm.inputs[0]
    total = producer(branch, "Add")  # with a shared expert's part
    routed = branch if total is None else total.inputs[0]
    reshape = producer(routed, "Reshape")  # tokens of a MoE [T, D] back to [B, S, D], where S is 1 now
    if reshape is not None:
        (shape,) = Builder(graph, reshape).op("Shape", position)
        reshape.replace_input_with(1, shape)
    name = add.outputs[0].name  # verification asks for it
    replace(last.outputs[0], add.outputs[0])
    add.outputs[0].name = name
    graph.remove(last)
    _forget_shapes(position, normed)
    return position.producer() if (residual.name or "").endswith(".routed") else None


def _forget_shapes(*values: ir.Value | None) -> None:
    """Of all that follows from values: they were those of every position, and ONNX Runtime reuses memory by them."""
    rest = [value for value in values if value is not None]
    seen = set(rest)
    while rest:
        made = {value for node, _ in rest.pop().uses() for value in node.outputs} - seen
        for value in made:
            value.shape = value.shape if value.is_graph_output() else None
        seen |= made
        rest += made


def _reader_of_norm(branch: ir.Value | None) -> ir.Node:
    """The first product of a feed-forward layer that reads the norm before attention."""
    node = branch.producer() if branch is not None else None
    while node is not None and producer(node.inputs[0], "RMSNormalization", "LayerNormalization") is None:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert node is not None
    return node


def _has_capacity(node: ir.Node) -> bool:
    """Whether a MoE may drop tokens, so that one token's result depends on the others."""
    return node.domain == DOMAIN and node.attributes["capacity_factor"].as_float() > 0
