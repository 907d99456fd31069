"""Add followed by RMSNormalization -> SkipSimplifiedLayerNormalization, which sums and normalises in one pass.

Pre: canonical residual sums. Post: no RMSNormalization reads a two-operand Add directly.
"""

from __future__ import annotations

import onnx_ir as ir

from gatework.export.lower.graph import MS, Builder, producer, replace


def fuse_residual_norm(model: ir.Model) -> tuple[ir.Model, bool]:
    """Fuse every residual sum with the norm that follows it."""
    modified = False
    for node in [node for node in model.graph if node.op_type == "RMSNormalization"]:
        add = producer(node.inputs[0], "Add")
        if add is None:
            continue
        settings = {"epsilon": node.attributes["epsilon"].as_float()}
        outputs = Builder(model.graph, add).op(
            "SkipSimplifiedLayerNormalization", *add.inputs, node.inputs[1], domain=MS, outputs=4, **settings
        )
        normed, mean, deviation, total = outputs
        mean.name = deviation.name = ""  # optional and not computed
        replace(node.outputs[0], normed)
        replace(add.outputs[0], total)
        modified = True
    return model, modified
