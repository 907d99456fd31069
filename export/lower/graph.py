"""Small steps that several passes share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from gatework.export.packing import is_weight

MS = "com.microsoft"  # domain of ONNX Runtime's contrib operators


class Builder:
    """Inserts nodes before a given node."""

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self.graph, self.before = graph, before

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: object
    ) -> Sequence[ir.Value]:
        """Add a node; returns its outputs."""
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs)  # type: ignore[arg-type]
        self.graph.insert_before(self.before, node)
        return node.outputs

    def constant(self, array: np.ndarray) -> ir.Value:
        """A small constant, shared by equal content."""
        name = f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{'_'.join(str(x) for x in array.ravel())}"
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            self.graph.initializers[name] = value
        return self.graph.initializers[name]


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes the value, if it is of one of the given types."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types else None


def without_sinks(value: ir.Value | None) -> ir.Value | None:
    """Keys or values that attention reads, without what the decoder puts behind them where a model has sinks."""
    joined = producer(value, "Concat")
    return value if joined is None else joined.inputs[0]


def sinks_of(attention: ir.Node) -> ir.Value | None:
    """Learned logits [H] of an Attention node, in the graph's own type, or none."""
    joined = producer(attention.inputs[3], "Concat") if producer(attention.inputs[1], "Concat") is not None else None
    if joined is None:
        return None
    value = joined.inputs[1]
    while (node := producer(value, "Expand", "Unsqueeze", "Reshape")) is not None:
        value = node.inputs[0]
    return value


def linear_weight(node: ir.Node) -> ir.Value | None:
    """W of a MatMul that computes x W^T (the second input is a Transpose of a weight), else None."""
    if node.op_type != "MatMul" or node.domain != "":
        return None
    transpose = producer(node.inputs[1], "Transpose")
    weight = transpose.inputs[0] if transpose is not None else None
    return weight if is_weight(weight) else None


def linear_users(weight: ir.Value) -> int:
    """How many of the weight's uses are transposes that feed products."""
    return sum(user.op_type == "Transpose" for user, _ in weight.uses())


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every use of `old`, graph outputs included, read `new`, which takes over its name and type."""
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.name = None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def tidy(model: ir.Model) -> ir.Model:
    """Drop nodes and initializers that nothing uses any more, and declare the domains in use."""
    RemoveUnusedNodesPass()(model)
    model.opset_imports.setdefault(MS, 1)
    RemoveUnusedOpsetsPass()(model)
    return model
