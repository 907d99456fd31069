"""MatMul with a transposed weight -> FusedMatMul, which reads W as it is stored.

Pre: canonical MatMul nodes. Post: no Transpose of a weight is left.
"""

from __future__ import annotations

import onnx_ir as ir

from gatework.export.lower.graph import MS, Builder, linear_weight, replace


def to_fused_matmul(model: ir.Model) -> tuple[ir.Model, bool]:
    """Let every remaining product with a weight read it as it is stored, (out, in)."""
    modified = False
    for node in list(model.graph):
        weight = linear_weight(node)
        if weight is None:
            continue
        (y,) = Builder(model.graph, node).op("FusedMatMul", node.inputs[0], weight, domain=MS, transB=1)
        replace(node.outputs[0], y)
        modified = True
    return model, modified
