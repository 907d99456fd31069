"""Clip in bfloat16 -> Clip in float32 between casts: ONNX Runtime's CUDA provider has no bfloat16 kernel for it.

Pre: any graph. Post: no Clip has bfloat16 operands. Float32 holds every bfloat16 number, so no result changes.
"""

from __future__ import annotations

import onnx_ir as ir

from gatework.export.lower.graph import Builder, replace


def clip_in_float32(model: ir.Model) -> tuple[ir.Model, bool]:
    """Rewrite every Clip of bfloat16."""
    clips = [node for node in model.graph if node.op_type == "Clip" and _is_bfloat16(node.inputs[0])]
    for node in clips:
        build = Builder(model.graph, node)
        wide = [value and build.op("Cast", value, to=ir.DataType.FLOAT)[0] for value in node.inputs]
        (clipped,) = build.op("Clip", *wide)
        (y,) = build.op("Cast", clipped, to=ir.DataType.BFLOAT16)
        replace(node.outputs[0], y)
    return model, bool(clips)


def _is_bfloat16(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.BFLOAT16
