"""gatework::MoE -> ONNX Runtime's MoE contrib operator, in float32.

Pre: gatework::MoE nodes with softmax scores, two-way SiLU gates and dense expert weights.
Post: no gatework::MoE node is left. Gate and up rows are interleaved, as that kernel demands.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from gatework.export.lower.experts import attributes_of, moe_nodes
from gatework.export.lower.graph import MS, Builder, replace
from gatework.export.packing import Pack, TensorSpec, add_packed, pack_of


def to_contrib_moe(model: ir.Model) -> tuple[ir.Model, bool]:
    """Rewrite every MoE node."""
    nodes = moe_nodes(model)
    for node in nodes:
        attributes = attributes_of(node)
        assert attributes.scoring == "softmax" and attributes.activation == "silu" and attributes.glu == "two_way"
        x, router_logits, w_in, w_out = node.inputs[:4]
        assert w_in is not None and w_out is not None
        (rows,) = add_packed(model.graph, _interleaved(w_in))
        (y,) = Builder(model.graph, node).op(
            "MoE",
            *(x, router_logits, rows, None, w_out),
            domain=MS,
            k=attributes.top_k,
            normalize_routing_weights=int(attributes.renormalize),
            **SILU_GATE,
        )
        replace(node.outputs[0], y)
    return model, bool(nodes)


# silu(gate) * up, of gate and up rows in turn
SILU_GATE = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}


def interleave(rows: Tensor) -> Tensor:
    """[2I, D] with gate rows first -> gate and up rows in turn."""
    return torch.stack(rows.chunk(2)).transpose(0, 1).flatten(0, 1)


def _interleaved(w_in: ir.Value) -> Pack:
    (spec,) = pack_of(w_in).outputs
    outputs = (TensorSpec(f"{spec.name}.interleaved", spec.dtype, spec.shape),)
    return Pack((spec.name,), outputs, lambda part: (interleave(part.to(spec.dtype)),))
