"""The mask over an encoder's keys, repeated for every query -> compared, of that shape from the start.

TensorRT-RTX 1.7 fails to compile a boolean mask that Expand makes and two attentions read.

Pre: `Decoder`'s mask, true for the keys [B, 1, 1, L] that a prompt has, expanded to [B, 1, S, L]. Post: no such Expand.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gatework.export.lower.graph import Builder, producer, replace


def to_compared_source_mask(model: ir.Model) -> tuple[ir.Model, bool]:
    """Rewrite the mask that all layers share; every query's position is at least 0."""
    masks = {node.inputs[3]: None for node in model.graph if node.op_type == "Attention"}
    expands = [node for mask in masks if (node := producer(mask, "Expand")) is not None]
    for node in expands:
        build = Builder(model.graph, node)
        (positions,) = (value for value in model.graph.inputs if value.name == "position_ids")
        (queries,) = build.op("Unsqueeze", positions, build.constant(np.array([1, 3], np.int64)))  # [B, 1, S, 1]
        (always,) = build.op("GreaterOrEqual", queries, build.constant(np.array(0, np.int64)))
        (mask,) = build.op("And", node.inputs[0], always)
        replace(node.outputs[0], mask)
    return model, bool(expands)
