"""gatework::MoE -> ONNX Runtime's MoE (float32) or QMoE (int8, int4) contrib operator.

Pre: gatework::MoE nodes with softmax scores, two-way SiLU gates and dense expert weights.
Post: no gatework::MoE node is left. Gate and up rows are interleaved, as those kernels demand; a quantised expert width is
padded with zeros to whole groups, which changes no result.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from gatework.export.groups import fit_group
from gatework.export.lower.experts import attributes_of, moe_nodes
from gatework.export.lower.graph import MS, Builder, replace
from gatework.export.packing import Pack, TensorSpec, add_packed, pack_of, static_shape
from gatework.export.quantize import quantize_rows
from gatework.plugins.errors import GateworkError


def to_contrib_moe(model: ir.Model, *, bits: int | None, group: int) -> tuple[ir.Model, bool]:
    """Rewrite every MoE node; bits None keeps float32."""
    nodes = moe_nodes(model)
    for node in nodes:
        attributes = attributes_of(node)
        assert attributes.scoring == "softmax" and attributes.activation == "silu" and attributes.glu == "two_way"
        common: dict[str, Any] = {
            "k": attributes.top_k,
            "normalize_routing_weights": int(attributes.renormalize),
            "activation_type": "swiglu",  # with alpha 1, beta 0 and no limit: silu(gate) * up
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
        }
        build = Builder(model.graph, node)
        x, router_logits, w_in, w_out = node.inputs[:4]
        assert w_in is not None and w_out is not None
        if bits is None:
            (rows,) = add_packed(model.graph, _dense(w_in))
            (y,) = build.op("MoE", x, router_logits, rows, None, w_out, domain=MS, **common)
        else:
            expert_group = _group_size(static_shape(w_in)[2], group)
            fc1 = add_packed(model.graph, _quantised_in(w_in, bits, expert_group))
            fc2 = add_packed(model.graph, _quantised_out(w_out, bits, expert_group))
            settings = common | {"expert_weight_bits": bits, "block_size": expert_group, "accuracy_level": 4}
            (y,) = build.op("QMoE", x, router_logits, *fc1, None, *fc2, domain=MS, weights_prepacked=0, **settings)
        replace(node.outputs[0], y)
    return model, bool(nodes)


def _group_size(hidden: int, group: int) -> int:
    size = fit_group(hidden, group)
    if size is None:
        fix = "use --precision fp32"
        raise GateworkError(
            "experts cannot be quantised", got=f"hidden size {hidden}", expected="a multiple of 16", fix=fix
        )
    return size


def interleave(rows: Tensor) -> Tensor:
    """[2I, D] with gate rows first -> gate and up rows in turn."""
    return torch.stack(rows.chunk(2)).transpose(0, 1).flatten(0, 1)


def _dense(w_in: ir.Value) -> Pack:
    (spec,) = pack_of(w_in).outputs
    outputs = (TensorSpec(f"{spec.name}.interleaved", spec.dtype, spec.shape),)
    return Pack((spec.name,), outputs, lambda part: (interleave(part.to(spec.dtype)),))


def _specs(name: str, experts: int, rows: int, columns: int, bits: int, group: int) -> tuple[TensorSpec, TensorSpec]:
    codes = TensorSpec(f"{name}.codes", torch.uint8, (experts, rows, columns * bits // 8))
    return codes, TensorSpec(f"{name}.scales", torch.float32, (experts, rows, columns // group))


def _padding(width: int, group: int) -> int:
    return -width % group


def _quantised_in(w_in: ir.Value, bits: int, group: int) -> Pack:
    (spec,) = pack_of(w_in).outputs
    E, rows, D = spec.shape
    padding = _padding(rows // 2, group)

    def encode(part: Tensor, padding: int = padding) -> tuple[Tensor, ...]:
        return quantize_rows(F.pad(interleave(part), (0, 0, 0, 2 * padding)), bits, group)

    return Pack((spec.name,), _specs(spec.name, E, rows + 2 * padding, D, bits, group), encode)


def _quantised_out(w_out: ir.Value, bits: int, group: int) -> Pack:
    (spec,) = pack_of(w_out).outputs
    E, D, width = spec.shape
    encode = partial(quantize_rows, bits=bits, group=group)  # pads columns itself
    return Pack((spec.name,), _specs(spec.name, E, D, width + _padding(width, group), bits, group), encode)
