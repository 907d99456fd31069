"""gatework::MoE -> ONNX Runtime's MoE (floats) or QMoE (int8, int4) contrib operator.

Pre: gatework::MoE nodes with dense expert weights.
Post: no gatework::MoE node is left, but those with other than softmax scores and two-way SiLU gates (or, in floats on the CPU,
ReLU and no gate), where the target runs the operator's function body. Gate and up rows are interleaved, as those kernels
demand; a quantised expert width is padded with zeros to whole groups and to the kernels' multiple, which changes no result.
Those kernels take router logits in the type of x only. Where that has 16 bits the experts are chosen before, in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from gatework.export.groups import GROUP_SIZES, fit_group
from gatework.export.lower.experts import attributes_of, moe_nodes
from gatework.export.lower.graph import MS, Builder, replace
from gatework.export.lower.kernels import Kernels
from gatework.export.packing import Pack, TensorSpec, add_packed, pack_of, static_shape
from gatework.export.quantize import quantize_rows
from gatework.export.targets import ALL_BUT_CUDA
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.spec import MoEAttributes

# Gate and up rows in turn.
SILU_GATE: dict[str, Any] = {"activation_type": "swiglu", "swiglu_fusion": 1}
UNGATED: dict[str, Any] = {"activation_type": "relu"}
UNCHOSEN = -1e4  # a logit whose exponential is 0, in float16 too


def gate_settings(attributes: MoEAttributes) -> dict[str, Any]:
    """Attributes of the contrib operators that say what an expert's gate is."""
    limit = {"swiglu_limit": attributes.limit} if attributes.limit else {}
    return SILU_GATE | {"activation_alpha": attributes.alpha, "activation_beta": attributes.beta} | limit


def has_contrib(attributes: MoEAttributes) -> bool:
    """Whether the contrib operators do what the operator does with these settings, on every kind of device."""
    return _drops_none(attributes) and attributes.activation == "silu" and attributes.glu == "two_way"


def _is_ungated(attributes: MoEAttributes) -> bool:
    return _drops_none(attributes) and attributes.activation == "relu" and attributes.glu == "none"


def _drops_none(attributes: MoEAttributes) -> bool:
    """Whether every choice counts, by softmax scores."""
    return attributes.scoring == "softmax" and attributes.capacity_factor == 0


def to_contrib_moe(model: ir.Model, *, bits: int | None, group: int, kernels: Kernels) -> tuple[ir.Model, bool]:
    """Rewrite every MoE node; bits None keeps the graph's own type."""
    nodes = moe_nodes(model)
    for node in nodes:
        attributes = attributes_of(node)
        ungated = bits is None and kernels.function_bodies and _is_ungated(attributes)
        if not has_contrib(attributes) and not ungated:
            if kernels.function_bodies:
                continue
            got = f"{attributes.scoring} scores, {attributes.glu} {attributes.activation} gates"
            got += ", a capacity" if attributes.capacity_factor else ""
            expected, fix = "softmax scores, two_way silu gates", f"use --target {ALL_BUT_CUDA}"
            raise GateworkError(
                "this target has no kernels for the model's experts", got=got, expected=expected, fix=fix
            )
        settings = UNGATED if ungated else gate_settings(attributes)
        build = Builder(model.graph, node)
        x, router_logits, w_in, w_out, b_in, b_out = (*node.inputs, None, None)[:6]
        assert x is not None and x.dtype is not None and w_in is not None and w_out is not None
        narrow, share = x.dtype != ir.DataType.FLOAT, None
        if narrow:
            assert router_logits is not None
            router_logits, share = choose_experts(build, router_logits, attributes, x.dtype)
        settings = settings | {
            "k": attributes.top_k,
            "normalize_routing_weights": int(attributes.renormalize or narrow),
        }
        if bits is None:
            _check_sizes(static_shape(w_out), kernels.dense_multiple)
            rows, bias = w_in, b_in
            if not ungated:
                (rows,) = add_packed(model.graph, _dense(w_in))
                bias = None if b_in is None else add_packed(model.graph, _bias_in(b_in))[0]
            inputs = [x, router_logits, rows, bias, w_out, b_out]
            (y,) = build.op("MoE", *inputs[: 6 if b_out is not None else 5], domain=MS, **settings)
        else:
            expert_group = _group_size(static_shape(w_in)[2], group, kernels)
            padding = -(static_shape(w_in)[1] // 2) % max(expert_group, kernels.expert_multiple)  # powers of two
            fc1 = add_packed(model.graph, _quantised_in(w_in, bits, expert_group, padding))
            fc2 = add_packed(model.graph, _quantised_out(w_out, bits, expert_group, padding))
            bias = None if b_in is None else add_packed(model.graph, _bias_in(b_in, padding))[0]
            settings |= {"expert_weight_bits": bits, "block_size": expert_group, "weights_prepacked": 0}
            inputs = [x, router_logits, *fc1, bias, *fc2, b_out]
            (y,) = build.op("QMoE", *inputs[: 8 if b_out is not None else 7], domain=MS, **settings)
        if share is not None:
            (y,) = build.op("Mul", y, share)
        replace(node.outputs[0], y)
    return model, bool(nodes)


def choose_experts(
    build: Builder, router_logits: ir.Value, attributes: MoEAttributes, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value | None]:
    """Logits [T, E] in `dtype` of which the kernels choose what they would of the float32 ones; and what y is to be multiplied
    by, [T, 1], or None.

    The chosen experts' logits less the largest, which leaves small numbers to be rounded; all others' so low that they are
    neither chosen nor weigh. The kernels then divide by the sum of the chosen scores, which `share` brings back.
    """
    (shape,) = build.op("Shape", router_logits)
    (rest,) = build.op("ConstantOfShape", shape, value=ir.tensor(np.array([UNCHOSEN], np.float32)))
    last, k = build.constant(np.array([-1])), build.constant(np.array([attributes.top_k]))
    highest, chosen = build.op("TopK", router_logits, k, outputs=2)
    (largest,) = build.op("ReduceMax", highest, last)
    (centred,) = build.op("Sub", highest, largest)
    (masked,) = build.op("ScatterElements", rest, chosen, centred, axis=-1)
    (narrow,) = build.op("Cast", masked, to=dtype)
    if attributes.renormalize:
        return narrow, None
    (scores,) = build.op("Softmax", router_logits, axis=-1)
    (kept,) = build.op("GatherElements", scores, chosen, axis=-1)
    (share,) = build.op("ReduceSum", kept, last)
    (share,) = build.op("Cast", share, to=dtype)
    return narrow, share


def _check_sizes(shape: tuple[int, ...], multiple: int) -> None:
    """Of w_out [E, D, I]."""
    _, hidden, width = shape
    if hidden % multiple or width % multiple:
        raise GateworkError(
            "the experts do not fit this target's kernels",
            got=f"hidden size {hidden}, width {width}",
            expected=f"multiples of {multiple}",
            fix="use --target cpu",
        )


def _group_size(hidden: int, group: int, kernels: Kernels) -> int:
    multiple = max(GROUP_SIZES[-1], kernels.expert_multiple)
    size = fit_group(hidden, group)
    if size is None or hidden % multiple:
        got, expected = f"hidden size {hidden}", f"a multiple of {multiple}"
        raise GateworkError(
            "experts cannot be quantised for this target",
            got=got,
            expected=expected,
            fix="use --precision bf16",
        )
    return size


def interleave(rows: Tensor) -> Tensor:
    """[2I, D] with gate rows first -> gate and up rows in turn."""
    return torch.stack(rows.chunk(2)).transpose(0, 1).flatten(0, 1)


def _dense(w_in: ir.Value) -> Pack:
    (spec,) = pack_of(w_in).outputs
    outputs = (TensorSpec(f"{spec.name}.interleaved", spec.dtype, spec.shape),)
    return Pack((spec.name,), outputs, lambda part: (interleave(part.to(spec.dtype)),))


def _bias_in(b_in: ir.Value, padding: int = 0) -> Pack:
    """[E, 2I], gate first -> [E, 2 (I + padding)], gate and up in turn."""
    (spec,) = pack_of(b_in).outputs
    E, width = spec.shape

    def encode(part: Tensor) -> tuple[Tensor, ...]:
        pairs = part.to(spec.dtype).unflatten(1, (2, -1)).transpose(1, 2)  # [E, I, 2]
        return (F.pad(pairs, (0, 0, 0, padding)).flatten(1),)

    return Pack((spec.name,), (TensorSpec(f"{spec.name}.interleaved", spec.dtype, (E, width + 2 * padding)),), encode)


def _specs(spec: TensorSpec, rows: int, columns: int, bits: int, group: int) -> tuple[TensorSpec, TensorSpec]:
    experts = spec.shape[0]
    codes = TensorSpec(f"{spec.name}.codes", torch.uint8, (experts, rows, columns * bits // 8))
    return codes, TensorSpec(f"{spec.name}.scales", spec.dtype, (experts, rows, columns // group))


def _quantised_in(w_in: ir.Value, bits: int, group: int, padding: int) -> Pack:
    (spec,) = pack_of(w_in).outputs
    _, rows, D = spec.shape

    def encode(part: Tensor) -> tuple[Tensor, ...]:
        return quantize_rows(F.pad(interleave(part), (0, 0, 0, 2 * padding)), bits, group, spec.dtype)

    return Pack((spec.name,), _specs(spec, rows + 2 * padding, D, bits, group), encode)


def _quantised_out(w_out: ir.Value, bits: int, group: int, padding: int) -> Pack:
    (spec,) = pack_of(w_out).outputs
    _, D, width = spec.shape

    def encode(part: Tensor) -> tuple[Tensor, ...]:
        return quantize_rows(F.pad(part, (0, padding)), bits, group, spec.dtype)

    return Pack((spec.name,), _specs(spec, D, width + padding, bits, group), encode)
