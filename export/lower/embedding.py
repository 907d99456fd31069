"""Gather of embedding rows -> GatherBlockQuantized.

Pre: Gather(embedding weight, input_ids). Post: the embedding is stored in 8 bits and rows are dequantised as they are
read, unless the hidden size is not a multiple of 16, which the kernel demands.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import torch

from gatework.export.groups import DenseFormat, fit_group
from gatework.export.lower.graph import MS, Builder, replace
from gatework.export.packing import Pack, TensorSpec, add_packed, is_weight, pack_of
from gatework.export.quantize import quantize_rows


def to_gather_block_quantized(model: ir.Model, dense: DenseFormat) -> tuple[ir.Model, bool]:
    """Quantise embedding tables."""
    modified = False
    for node in [node for node in model.graph if node.op_type == "Gather" and is_weight(node.inputs[0])]:
        assert node.inputs[0] is not None
        pack = pack_of(node.inputs[0])
        (spec,) = pack.outputs
        V, D = spec.shape
        width, widest = dense.of(spec.name)
        size = fit_group(D, widest)
        if size is None:
            continue
        outputs = (
            TensorSpec(f"{spec.name}.codes", torch.uint8, (V, D * width // 8)),
            TensorSpec(f"{spec.name}.scales", spec.dtype, (V, D // size)),
        )
        encode = partial(quantize_rows, bits=width, group=size, scale_dtype=spec.dtype)
        codes, scales = add_packed(model.graph, Pack(pack.sources, outputs, encode))
        settings = {"bits": width, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
        (y,) = Builder(model.graph, node).op(
            "GatherBlockQuantized", codes, node.inputs[1], scales, domain=MS, **settings
        )
        replace(node.outputs[0], y)
        modified = True
    return model, modified
