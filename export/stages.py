"""Pipeline stages: which layers each one holds, and its part of the canonical graph."""

from __future__ import annotations

import onnx_ir as ir

from gatework.export.config import ModelConfig
from gatework.export.lower import OrtPrecision
from gatework.export.sizes import tensor_bytes
from gatework.plugins.engine_format import stage_input
from gatework.plugins.errors import GateworkError


def divide(config: ModelConfig, stages: int, precision: OrtPrecision, group: int) -> list[range]:
    """The layers of each stage, so that the largest has as few bytes of weights as can be.

    The first stage holds the embedding as well, the last one the final norm and the head. All layers are of one size.

    Raises:
        GateworkError: weights that this precision cannot hold.
    """
    sizes = tensor_bytes(config, "bf16" if precision == "fp16" else precision, group)
    if sizes is None:
        raise GateworkError("the weights cannot be stored so", got=precision, fix="use --precision fp32")
    layer = sum(nbytes for name, nbytes in sizes.items() if name.startswith("layers.0."))
    embedding = sizes["embed.weight"]
    counts, loads = [1] * stages, [layer] * stages
    loads[0] += embedding
    loads[-1] += sum(sizes.values()) - layer * config.num_layers - embedding
    for _ in range(config.num_layers - stages):
        lightest = loads.index(min(loads))
        counts[lightest] += 1
        loads[lightest] += layer
    ends = [sum(counts[: number + 1]) for number in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def cut(model: ir.Model, layers: range, num_layers: int) -> ir.Model:
    """The part of a canonical graph that computes these layers, a copy.

    The first stage takes input_ids, each other one the stream [B, S, D] under the name that it has in the whole graph,
    `layers.{i}.output`. All but the last give that of their last layer. The cache is that of their own layers.

    Pre: the graph as `trace` makes it.
    """
    graph = model.clone().graph
    own = tuple(f".{i}.{kind}" for i in layers for kind in "kv")
    inputs, outputs = (
        [value for value in values if "." not in str(value.name) or str(value.name).endswith(own)]
        for values in (graph.inputs, graph.outputs)
    )
    made = {value.name: value for node in graph for value in node.outputs}
    if layers.start > 0:
        ids, positions = inputs[:2]
        inputs[0] = made[stage_input(layers.start)]
        _measure(ids, positions)
    if layers.stop < num_layers:
        outputs[0] = made[stage_input(layers.stop)]
    past = next(value for value in inputs if str(value.name).startswith("past."))
    for value in graph.inputs:
        if value not in inputs:
            _measure(value, past)
    part = ir.convenience.extract(graph, inputs, outputs)
    return ir.Model(part, ir_version=model.ir_version)


def _measure(old: ir.Value, new: ir.Value) -> None:
    """Let what asks for the shape of `old` ask `new`, which has the same."""
    for node, index in tuple(old.uses()):
        if node.op_type == "Shape":
            node.replace_input_with(index, new)
