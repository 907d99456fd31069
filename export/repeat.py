"""Repeating traced layers: layers that differ in nothing but their weights are traced once and copied in the graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's note of the modules that a node was traced in


@dataclass(frozen=True, slots=True)
class _Layer:
    """A traced layer: its nodes, and the residual stream [B, S, D] before and after it."""

    body: list[ir.Node]
    stream_in: ir.Value
    stream_out: ir.Value


def repeat_layers(graph: ir.Graph, traced: int, templates: Sequence[int]) -> None:
    """Grow a graph of `traced` decoder layers by one for each of `templates`, numbers of layers that they are copies of.

    None of them is the first layer. Weights `layers.{i}.*` and cache tensors `past.{i}.*` and `present.{i}.*` are made for
    each copy; what does not depend on the layer (masks, tables, shapes) is shared. The nodes must still carry the exporter's
    scopes.
    """
    if not templates:
        return
    layers = {number: _traced(graph, number) for number in sorted({*templates, traced - 1})}
    last = layers[traced - 1]
    inside = set(last.body)
    readers = [(node, index) for node, index in last.stream_out.uses() if node not in inside]
    stream, at = last.stream_out, last.body[-1]
    for i, number in enumerate(templates, traced):
        copies = {layers[number].stream_in: stream}
        at = _append(graph, at, layers[number].body, number, i, copies)
        stream = copies[layers[number].stream_out]
    for node, index in readers:
        node.replace_input_with(index, stream)


def _append(
    graph: ir.Graph, at: ir.Node, body: list[ir.Node], number: int, i: int, copies: dict[ir.Value, ir.Value]
) -> ir.Node:
    """Copy the nodes of layer `number` as those of layer i behind a node, adding to `copies`; returns the last one."""
    own = re.compile(rf"(layers|past|present)\.{number}\.")
    for node in body:
        for value in node.inputs:
            if value is not None and value.producer() is None and own.match(value.name or ""):
                copies.setdefault(value, _copy_source(graph, value, own.sub(rf"\1.{i}.", value.name or "")))
        if not any(value in copies for value in node.inputs):
            continue  # the same in every layer
        copy = _copy_node(node, copies)
        graph.insert_after(at, copy)
        at = copy
    for value in [value for value in graph.outputs if value in copies]:
        copies[value].name = own.sub(rf"\1.{i}.", value.name or "")
        graph.outputs.append(copies[value])
    return at


def _traced(graph: ir.Graph, number: int) -> _Layer:
    """A layer that is not the first."""
    body = _layer(graph, number)
    inside = set(body)
    (stream_in,) = _crossing(_layer(graph, number - 1), body)
    (stream_out,) = _crossing(body, (node for node in graph if node not in inside))
    return _Layer(body, stream_in, stream_out)


def _layer(graph: ir.Graph, number: int) -> list[ir.Node]:
    """The nodes from the first to the last that a layer was traced into; those that the optimizer made have no scope."""
    nodes = list(graph)
    scope = repr(f"layers.{number}")
    own = [i for i, node in enumerate(nodes) if scope in node.metadata_props.get(_SCOPES, "")]
    return nodes[own[0] : own[-1] + 1]


def _crossing(makers: Iterable[ir.Node], users: Iterable[ir.Node]) -> set[ir.Value]:
    """Floating-point sums that nodes of one group make and nodes of another read; shapes and masks do not count."""
    made = {
        value
        for node in makers
        for value in node.outputs
        if node.op_type == "Add" and value.dtype is not None and value.dtype.is_floating_point()
    }
    return {value for node in users for value in node.inputs if value is not None and value in made}


def _copy_source(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """A graph input or a data-free initializer like `value`, under another name."""
    copy = ir.Value(name=name, type=value.type, shape=value.shape)
    if value.is_initializer():
        graph.initializers[name] = copy
    else:
        graph.inputs.append(copy)
    return copy


def _copy_node(node: ir.Node, copies: dict[ir.Value, ir.Value]) -> ir.Node:
    """The node with copied inputs; its outputs are added to `copies`."""
    inputs = [copies.get(value, value) if value is not None else None for value in node.inputs]
    copy = ir.Node(node.domain, node.op_type, inputs, node.attributes, num_outputs=len(node.outputs))
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        copies[old] = new
    return copy
