"""Add followed by RMSNormalization -> SkipSimplifiedLayerNormalization, which sums and normalises in one pass.

Pre: canonical residual sums. Post: no RMSNormalization reads a two-operand Add directly, or the stream that a stage is given:
it was summed in the stage before, and here the same kernel adds zero, so that stages give the same bits as the whole.
"""

from __future__ import annotations

import onnx_ir as ir

from gatework.export.lower.graph import MS, Builder, producer, replace


def fuse_residual_norm(model: ir.Model) -> tuple[ir.Model, bool]:
    """Fuse every residual sum with the norm that follows it."""
    modified = False
    for node in [node for node in model.graph if node.op_type == "RMSNormalization"]:
        stream = node.inputs[0]
        assert stream is not None
        add = producer(stream, "Add")
        if add is None and not stream.is_graph_input():
            continue
        build = Builder(model.graph, node if add is None else add)
        terms = [stream, *build.op("Sub", stream, stream)] if add is None else add.inputs
        settings = {"epsilon": node.attributes["epsilon"].as_float()}
        outputs = build.op("SkipSimplifiedLayerNormalization", *terms, node.inputs[1], domain=MS, outputs=4, **settings)
        normed, mean, deviation, total = outputs
        mean.name = deviation.name = ""  # optional and not computed
        replace(node.outputs[0], normed)
        if add is not None:
            replace(add.outputs[0], total)
        modified = True
    return model, modified
