"""Gather of embedding rows -> GatherBlockQuantized.

Pre: Gather(embedding weight, input_ids). Post: the embedding is stored in `bits` bits; rows are dequantised as they are read.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import torch

from gatework.export.lower.graph import MS, Builder, replace
from gatework.export.lower.moe import expert_group_size
from gatework.export.packing import Pack, TensorSpec, add_packed, is_weight, pack_of
from gatework.export.quantize import quantize_rows


def to_gather_block_quantized(model: ir.Model, *, bits: int, group: int) -> tuple[ir.Model, bool]:
    """Quantise embedding tables."""
    nodes = [node for node in model.graph if node.op_type == "Gather" and is_weight(node.inputs[0])]
    for node in nodes:
        assert node.inputs[0] is not None
        pack = pack_of(node.inputs[0])
        (spec,) = pack.outputs
        V, D = spec.shape
        size = expert_group_size(D, group)
        outputs = (
            TensorSpec(f"{spec.name}.codes", torch.uint8, (V, D * bits // 8)),
            TensorSpec(f"{spec.name}.scales", torch.float32, (V, D // size)),
        )
        codes, scales = add_packed(model.graph, Pack(pack.sources, outputs, partial(quantize_rows, bits=bits, group=size)))
        settings = {"bits": bits, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
        (y,) = Builder(model.graph, node).op("GatherBlockQuantized", codes, node.inputs[1], scales, domain=MS, **settings)
        replace(node.outputs[0], y)
    return model, bool(nodes)
