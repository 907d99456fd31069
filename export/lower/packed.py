"""Products and experts in 8 or 4 bits -> the CPU kernels' PackedMatMul and PackedMoE, and from those to ONNX Runtime's own
MatMulNBits and QMoE, for machines without the kernels' library.

Both graphs read the same weights, in the kernels' layout; ONNX Runtime rearranges them when it loads the second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from gatework.export.groups import ATTENTION, PADDED_GROUP, DenseFormat, common_block, fit_group
from gatework.export.lower.cached_attention import to_group_query_attention
from gatework.export.lower.experts import attributes_of, moe_nodes
from gatework.export.lower.graph import MS, Builder, linear_weight, replace
from gatework.export.lower.moe import gate_settings, has_contrib
from gatework.export.packing import Keep, Pack, TensorSpec, add_packed, pack_of, static_shape
from gatework.export.quantize import in_blocks, keep_rows, quantize_rows
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe import cpu_ops
from gatework.plugins.moe.cpu_ops import BLOCK_ROWS, STEP_BYTES, WIDE_BITS
from gatework.plugins.moe.spec import ATTRIBUTE_KINDS, DOMAIN, MoEAttributes

_HEAD, _EMBEDDING = "lm_head.weight", "embed.weight"
_KEPT_BITS = 8  # of codes that a checkpoint may have


def encode_blocks(rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes [blocks, steps, 16, 4] and scales [blocks, groups, 16] of rows [N, K]."""
    return in_blocks(*quantize_rows(rows, bits, group, torch.bfloat16), bits)


def keep_blocks(codes: Tensor, scales: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The same of stored codes [N, K] int8 and scales [N, blocks]."""
    return in_blocks(*keep_rows(codes, scales, group), _KEPT_BITS)


def block_shapes(N: int, K: int, bits: int, group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what `encode_blocks` returns."""
    blocks, groups = -(-N // BLOCK_ROWS), -(-K // group)
    steps = groups * group * bits // 8 // STEP_BYTES
    return (blocks, steps, BLOCK_ROWS, STEP_BYTES), (blocks, groups, BLOCK_ROWS)


def to_packed_matmul(model: ir.Model, dense: DenseFormat, *, blocks: Mapping[str, int]) -> tuple[ir.Model, bool]:
    """Quantise every product with a weight but the routers'.

    Pre: canonical MatMul nodes.

    Args:
        blocks: weights stored as codes, with the neighbours that share a scale. Where 8 bits are wanted and groups can be
            found that divide the blocks, codes and scales stay what they are.
    """
    modified = False
    for node in list(model.graph):
        weight = linear_weight(node)
        if weight is None or ".router." in (weight.name or ""):
            continue
        pack = pack_of(weight)
        (spec,) = pack.outputs
        N, K = static_shape(weight)
        name = _HEAD if spec.name == _EMBEDDING else spec.name  # tied
        width, widest = dense.of(name)
        size = fit_group(K, widest) or min(widest, PADDED_GROUP)  # the last group of an odd row is padded
        stored = fit_group(common_block(pack.sources, blocks), size) if width == _KEPT_BITS else None
        size = stored or size
        codes, scales = block_shapes(N, K, width, size)
        outputs = _specs(name, codes, scales)
        encode = partial(encode_blocks, bits=width, group=size)
        keep = None if stored is None else Keep(size, partial(keep_blocks, group=size))
        packed = add_packed(model.graph, Pack(pack.sources, outputs, encode, keep))
        settings = {
            "N": N,
            "K": K,
            "bits": width,
            "group_size": size,
            "wide": int(width == WIDE_BITS and (name == _HEAD or any(part in name for part in ATTENTION))),
        }
        (y,) = Builder(model.graph, node).op(cpu_ops.MATMUL, node.inputs[0], *packed, domain=DOMAIN, **settings)
        replace(node.outputs[0], y)
        modified = True
    return model, modified


def to_packed_moe(model: ir.Model, *, bits: int, group: int, blocks: Mapping[str, int]) -> tuple[ir.Model, bool]:
    """Quantise every MoE's experts.

    Pre: gatework::MoE nodes with dense weights. Post: an expert's width is padded with zeros to whole groups, which changes
    no result.

    Args:
        blocks: see `to_packed_matmul`; both matrices have groups of one size.
    """
    nodes = moe_nodes(model)
    for node in nodes:
        attributes = attributes_of(node)
        if attributes.capacity_rule != "choices":
            got, fix = attributes.capacity_rule, "use --precision fp32"
            raise GateworkError("quantised experts drop no choices by this rule", got=got, fix=fix)
        x, router_logits, w_in, w_out, b_in, b_out = (*node.inputs, None, None)[:6]
        assert w_in is not None and w_out is not None
        E, D, I = static_shape(w_out)
        stored = [blocks.get(weight.name or "", 0) if bits == _KEPT_BITS else 0 for weight in (w_in, w_out)]
        size = _expert_group(D, group, math.gcd(*stored))
        I += -I % size
        keep_in, keep_out = (block > 0 and block % size == 0 for block in stored)
        fc1 = add_packed(model.graph, _experts_in(w_in, attributes.matrices, I, bits, size, keep=keep_in))
        fc2 = add_packed(model.graph, _experts_out(w_out, I, bits, size, keep=keep_out))
        settings: dict[str, Any] = attributes.to_onnx()
        for name in ("weight_format", "capacity_rule", "second_threshold", "keep_activations"):
            del settings[name]
        settings |= {"bits": bits, "group_size": size, "hidden_size": D, "expert_width": I, "num_experts": E}
        biases = () if b_in is None else (_bias_in(model.graph, b_in, attributes.matrices, I), b_out)
        build = Builder(model.graph, node)
        (y,) = build.op(cpu_ops.MOE, x, router_logits, *fc1, *fc2, *biases, domain=DOMAIN, **settings)
        replace(node.outputs[0], y)
    return model, bool(nodes)


def _expert_group(hidden: int, group: int, block: int) -> int:
    """The group size; block: a multiple of it if that can be, 0 if nothing is stored in blocks."""
    size = fit_group(hidden, group)
    if size is None:
        fix = "use --precision fp32"
        raise GateworkError(
            "experts cannot be quantised", got=f"hidden size {hidden}", expected="a multiple of 16", fix=fix
        )
    return fit_group(block, size) or size


def _specs(name: str, codes: tuple[int, ...], scales: tuple[int, ...]) -> tuple[TensorSpec, TensorSpec]:
    return TensorSpec(f"{name}.codes", torch.uint8, codes), TensorSpec(f"{name}.scales", torch.bfloat16, scales)


def _experts_in(w_in: ir.Value, matrices: int, width: int, bits: int, group: int, *, keep: bool) -> Pack:
    (spec,) = pack_of(w_in).outputs
    E, _, D = spec.shape
    codes, scales = block_shapes(width, D, bits, group)

    def padded(rows: Tensor) -> Tensor:
        parts = rows.unflatten(0, (matrices, -1))
        return F.pad(parts, (0, 0, 0, width - parts.shape[1])).flatten(0, 1)  # whole groups are whole blocks

    def encode(part: Tensor) -> tuple[Tensor, ...]:
        return encode_blocks(padded(part), bits, group)

    def kept(part: Tensor, part_scales: Tensor) -> tuple[Tensor, ...]:
        return keep_blocks(padded(part), padded(part_scales), group)

    outputs = _specs(spec.name, (E, matrices, *codes), (E, matrices, *scales))
    return Pack((spec.name,), outputs, encode, Keep(group, kept) if keep else None)


def _bias_in(graph: ir.Graph, b_in: ir.Value, matrices: int, width: int) -> ir.Value:
    """[E, G * I] padded like the rows of w_in."""
    (spec,) = pack_of(b_in).outputs

    def encode(part: Tensor) -> tuple[Tensor, ...]:
        parts = part.to(spec.dtype).unflatten(1, (matrices, -1))
        return (F.pad(parts, (0, width - parts.shape[2])).flatten(1),)

    outputs = (TensorSpec(f"{spec.name}.padded", spec.dtype, (spec.shape[0], matrices * width)),)
    return add_packed(graph, Pack((spec.name,), outputs, encode))[0]


def _experts_out(w_out: ir.Value, width: int, bits: int, group: int, *, keep: bool) -> Pack:
    (spec,) = pack_of(w_out).outputs
    E, D, _ = spec.shape
    codes, scales = block_shapes(D, width, bits, group)
    encode = partial(encode_blocks, bits=bits, group=group)  # pads columns itself
    kept = Keep(group, partial(keep_blocks, group=group)) if keep else None  # whose columns are whole groups
    return Pack((spec.name,), _specs(spec.name, (E, *codes), (E, *scales)), encode, kept)


def to_contrib(model: ir.Model) -> tuple[ir.Model, bool]:
    """Replace this package's operators by ONNX Runtime's MatMulNBits, QMoE and GroupQueryAttention.

    Nothing is replaced where QMoE cannot compute the experts. Post: constant nodes undo the kernels' layout; ONNX Runtime
    evaluates them once, at load.
    """
    experts = (_attributes(node) for node in model.graph if node.op_type == cpu_ops.MOE)
    if not all(map(has_contrib, experts)):
        return model, False
    model, modified = to_group_query_attention(model)
    for node in [node for node in model.graph if node.op_type in (cpu_ops.MATMUL, cpu_ops.MOE)]:
        build = Builder(model.graph, node)
        y = _matmul_nbits(build, node) if node.op_type == cpu_ops.MATMUL else _qmoe(build, node)
        replace(node.outputs[0], y)
        model.graph.remove(node, safe=True)
        modified = True
    model.opset_imports.setdefault(MS, 1)
    return model, modified


def _settings(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _attributes(node: ir.Node) -> MoEAttributes:
    """The operator's settings on a PackedMoE."""
    return MoEAttributes.from_onnx(
        {name: value for name, value in _settings(node).items() if name in ATTRIBUTE_KINDS and name != "group_size"}
    )


def _matmul_nbits(build: Builder, node: ir.Node) -> ir.Value:
    settings = _settings(node)
    bits, size, N, K = (settings[name] for name in ("bits", "group_size", "N", "K"))
    x, codes, scales = node.inputs
    rows = _rearranged(build, codes, (0, 2, 1, 3), (-1, -(-K // size), size * bits // 8))
    scale_rows = _rearranged(build, _float(build, scales), (0, 2, 1), (-1, -(-K // size)))
    if N % BLOCK_ROWS:
        first, end, axis = (build.constant(np.array([index], np.int64)) for index in (0, N, 0))
        rows, scale_rows = (build.op("Slice", value, first, end, axis)[0] for value in (rows, scale_rows))
    contrib = {"bits": bits, "block_size": size, "N": N, "K": K, "accuracy_level": 4}
    return build.op("MatMulNBits", x, rows, scale_rows, domain=MS, **contrib)[0]


def _qmoe(build: Builder, node: ir.Node) -> ir.Value:
    settings = _settings(node)
    x, router_logits, w_in, w_in_scale, w_out, w_out_scale, *biases = node.inputs
    E, D, I = (settings[name] for name in ("num_experts", "hidden_size", "expert_width"))
    bits, size = settings["bits"], settings["group_size"]
    shape = build.constant(np.array((E, 2, I), np.int64))  # of the first bias: gate, then up
    fc1 = _rearranged(build, w_in, (0, 2, 4, 1, 3, 5), (E, 2 * I, D * bits // 8))
    fc1_scale = _rearranged(build, _float(build, w_in_scale), (0, 2, 4, 1, 3), (E, 2 * I, D // size))
    fc2 = _rearranged(build, w_out, (0, 1, 3, 2, 4), (E, D, I * bits // 8))
    fc2_scale = _rearranged(build, _float(build, w_out_scale), (0, 1, 3, 2), (E, D, I // size))
    contrib = {
        "k": settings["top_k"],
        "normalize_routing_weights": settings["renormalize"],
        "expert_weight_bits": bits,
        "block_size": size,
        "accuracy_level": 4,
        "weights_prepacked": 0,
    }
    inputs: list[ir.Value | None] = [x, router_logits, fc1, fc1_scale, None, fc2, fc2_scale]
    if biases:
        pairs = _rearranged(build, build.op("Reshape", biases[0], shape)[0], (0, 2, 1), (E, 2 * I))
        inputs = [*inputs[:4], pairs, *inputs[5:], biases[1]]
    return build.op("QMoE", *inputs, domain=MS, **contrib, **gate_settings(_attributes(node)))[0]


def _float(build: Builder, value: ir.Value | None) -> ir.Value:
    return build.op("Cast", value, to=ir.DataType.FLOAT)[0]


def _rearranged(build: Builder, value: ir.Value | None, order: tuple[int, ...], shape: tuple[int, ...]) -> ir.Value:
    (transposed,) = build.op("Transpose", value, perm=list(order))
    return build.op("Reshape", transposed, build.constant(np.array(shape, np.int64)))[0]
