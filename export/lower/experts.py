"""Expert weights of gatework::MoE: stored in a weight format, then made inputs of the graph instead of constants.

`quantize_experts` keeps a portable graph, since the operator's function body reads every format; `experts_to_inputs`
prepares it for TensorRT, whose compiler never sees an expert's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor

from gatework.export.packing import Keep, Pack, TensorSpec, add_packed, is_weight, pack_of, retype, set_pack
from gatework.export.quantize import fp8_ranges, quantize_fp8, quantize_int8_rows, quantize_rows
from gatework.plugins.moe.spec import DOMAIN, INPUTS, MoEAttributes, WeightFormat
from gatework.plugins.moe.tensorrt import NODE_ATTRIBUTES

_STORED = {"fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}


def moe_nodes(model: ir.Model) -> list[ir.Node]:
    """The graph's gatework::MoE nodes, in order."""
    return [node for node in model.graph if node.domain == DOMAIN]


def attributes_of(node: ir.Node) -> MoEAttributes:
    """The operator's settings on this node."""
    return MoEAttributes.from_onnx({name: attribute.value for name, attribute in node.attributes.items()})


def with_format(
    attributes: MoEAttributes, weight_format: WeightFormat, group: int, *, keep_activations: bool = False
) -> MoEAttributes:
    """The settings with other weights: int4 has a scale per `group` neighbours, other formats one per row."""
    group = group if weight_format == "int4" else 0
    return replace(attributes, weight_format=weight_format, group_size=group, keep_activations=keep_activations)


def quantize_experts(
    model: ir.Model,
    weight_format: WeightFormat,
    group: int,
    blocks: Mapping[str, int],
    *,
    keep_activations: bool = False,
) -> tuple[ir.Model, bool]:
    """Store every MoE's weights in `weight_format`.

    Pre: gatework::MoE nodes with dense weights. Post: nodes of that format with float32 scales, one per row of an expert's
    matrix for fp8_e4m3 and int8, one per `group` neighbours for int4; dense changes nothing.

    Args:
        blocks: weights stored as codes, with the neighbours that share a scale; whole rows of int8 stay what they are.
        keep_activations: see MoEAttributes.
    """
    nodes = moe_nodes(model) if weight_format != "dense" else []
    for node in nodes:
        attributes = attributes_of(node)
        assert attributes.weight_format == "dense"
        attributes = with_format(attributes, weight_format, group, keep_activations=keep_activations)
        for attribute in ir.convenience.convert_attributes(attributes.to_onnx()):
            node.attributes.add(attribute)
        node.resize_inputs(len(INPUTS))
        for name in ("w_in", "w_out"):
            weight = node.inputs[INPUTS.index(name)]
            assert weight is not None
            scale = _quantize(model.graph, weight, attributes, blocks)
            node.replace_input_with(INPUTS.index(f"{name}_scale"), scale)
    return model, bool(nodes)


def _quantize(graph: ir.Graph, weight: ir.Value, attributes: MoEAttributes, blocks: Mapping[str, int]) -> ir.Value:
    """Retype a weight in place; returns its scale."""
    (spec,) = pack_of(weight).outputs
    E, rows, columns = spec.shape
    stored = TensorSpec(spec.name, _STORED[attributes.weight_format], (E, rows, attributes.stored_columns(columns)))
    scales = TensorSpec(f"{spec.name}_scale", torch.float32, (E, rows, attributes.groups(columns)))
    fits = attributes.weight_format == "int8" and blocks.get(spec.name) == columns
    keep = Keep(0, lambda codes, steps: (codes, steps.float())) if fits else None
    pack = Pack((spec.name,), (stored, scales), partial(encode_expert, attributes=attributes), keep)
    (scale,) = add_packed(graph, replace(pack, outputs=(scales,)))
    retype(weight, stored)
    set_pack([weight, scale], pack)
    return scale


def encode_expert(part: Tensor, attributes: MoEAttributes) -> tuple[Tensor, Tensor]:
    """Stored form [rows, stored columns] and scales [rows, groups] of one expert's matrix [rows, columns]."""
    match attributes.weight_format:
        case "fp8_e4m3":
            codes, scales = quantize_fp8(part, fp8_ranges(part))
            return codes, scales
        case "int8":
            codes, scales = quantize_int8_rows(part)
            return codes, scales[:, None]
        case "int4":
            codes, scales = quantize_rows(part, 4, attributes.group_size)
            return codes.flatten(1)[:, : attributes.stored_columns(part.shape[1])], scales
    raise AssertionError(attributes)


def experts_to_inputs(model: ir.Model) -> tuple[ir.Model, list[Pack]]:
    """Turn expert weights and scales into graph inputs; returns the packs that fill them at load time.

    Post: MoE nodes have no initializer among their inputs and none of their inputs is absent (TensorRT's plugins count
    inputs) and name the plugin; pairs of int4 are typed int8, since TensorRT takes no uint8.
    """
    packs: dict[Pack, None] = {}
    for node in moe_nodes(model):
        for value in node.inputs:
            if value is None or not is_weight(value):
                continue
            packs[pack_of(value)] = None
            assert value.name is not None
            model.graph.initializers.pop(value.name)
            if value.dtype == ir.DataType.UINT8:
                value.dtype = ir.DataType.INT8
            model.graph.inputs.append(value)
        for attribute in ir.convenience.convert_attributes(NODE_ATTRIBUTES):
            node.attributes.add(attribute)
        present = [value for value in node.inputs if value is not None]
        node.resize_inputs(len(present))
        for index, value in enumerate(present):
            node.replace_input_with(index, value)
    return model, list(packs)
