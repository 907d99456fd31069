"""Passes from the canonical graph to what a target runs, in the order in which they must go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir

from gatework.export.config import Dtype, ModelConfig
from gatework.export.groups import DenseFormat
from gatework.export.lower.attention import to_group_query_attention
from gatework.export.lower.cached_attention import to_cached_attention
from gatework.export.lower.clip import clip_in_float32
from gatework.export.lower.embedding import to_gather_block_quantized
from gatework.export.lower.experts import quantize_experts
from gatework.export.lower.graph import tidy
from gatework.export.lower.kernels import CPU_KERNELS, CUDA_FLOAT32_KERNELS, CUDA_KERNELS, Kernels
from gatework.export.lower.last_position import hoist_last_position
from gatework.export.lower.linear import to_fused_matmul, to_matmul_nbits
from gatework.export.lower.moe import to_contrib_moe
from gatework.export.lower.norm import fuse_residual_norm
from gatework.export.lower.packed import to_packed_matmul, to_packed_moe
from gatework.export.lower.products import Scales, quantize_products
from gatework.export.lower.softcap import to_plain_softcap
from gatework.export.lower.source_mask import to_compared_source_mask
from gatework.export.targets import ALL_BUT_CUDA
from gatework.plugins.engine_format import SOURCE_LENGTHS
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.spec import WeightFormat

GpuPrecision = Literal["bf16", "fp16", "fp8", "int8", "int4"]
WEIGHT_FORMATS: dict[GpuPrecision, WeightFormat] = {
    "bf16": "dense",
    "fp16": "dense",
    "fp8": "fp8_e4m3",
    "int8": "int8",
    "int4": "int4",
}
OrtPrecision = Literal["fp32", "bf16", "fp16", "int8", "int4"]
# Types of activations, caches and scales on GPUs.
CUDA_DTYPES: dict[OrtPrecision, Dtype] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "bfloat16",
    "int4": "bfloat16",
}
_BITS: dict[OrtPrecision, int] = {"int8": 8, "int4": 4}
NO_BLOCKS: Mapping[str, int] = {}


def lower_to_cpu(
    model: ir.Model,
    config: ModelConfig,
    precision: OrtPrecision,
    group: int,
    *,
    pure: bool = False,
    blocks: Mapping[str, int] = NO_BLOCKS,
) -> ir.Model:
    """Rewrite a canonical float32 graph, in place, for the CPU.

    Args:
        pure: see DenseFormat.
        blocks: weights stored as codes, which stay what they are where they can; see `to_packed_matmul`.

    Post: products, experts and embedding are in the precision asked for; routers, norms and activations are float32.
    """
    return _lower_to_ort(model, config, _dense(config, precision, group, pure), CPU_KERNELS, blocks)


def lower_to_cuda(
    model: ir.Model, config: ModelConfig, precision: OrtPrecision, group: int, *, pure: bool = False
) -> ir.Model:
    """Rewrite a canonical graph, in place, for ONNX Runtime's CUDA kernels.

    Pre: traced in the type of its activations, `CUDA_DTYPES`.

    Post: products, experts and embedding are in the precision asked for; routers are float32, all else has the graph's own
    type. In float32 the attention keeps its standard operators.
    """
    kernels = CUDA_FLOAT32_KERNELS if precision == "fp32" else CUDA_KERNELS
    return _lower_to_ort(model, config, _dense(config, precision, group, pure), kernels)


def _dense(config: ModelConfig, precision: OrtPrecision, group: int, pure: bool) -> DenseFormat | None:
    """None where weights are floats."""
    bits = _BITS.get(precision)
    return None if bits is None else DenseFormat(bits, group, config.moe is not None, pure)


def _lower_to_ort(
    model: ir.Model,
    config: ModelConfig,
    dense: DenseFormat | None,
    kernels: Kernels,
    blocks: Mapping[str, int] = NO_BLOCKS,
) -> ir.Model:
    if config.alibi_bias_max is not None and not kernels.attention_bias:
        raise GateworkError("this target has no kernel for ALiBi", fix=f"use --target {ALL_BUT_CUDA}")
    if config.ntk_length is not None and not kernels.own_positions:
        what, fix = "dynamic NTK has not been tried on this target", f"--max-seq {config.ntk_length}, or --target cpu"
        raise GateworkError(what, got="a longer context than the model was trained on", fix=fix)
    if config.attn_sinks and not kernels.sinks:
        raise GateworkError("attention sinks have not been tried on this target", fix="use --target cpu")
    if not config.encoder_layers:  # whose prompts are one token
        model, _ = hoist_last_position(model)
    if kernels.fused_attention:
        model, fused = to_group_query_attention(model, config, query_lengths=kernels.query_lengths)
    if not kernels.fused_attention or (config.attn_sinks and not fused):
        model, _ = to_plain_softcap(model)
    if dense is not None and kernels.packed:
        model, _ = to_packed_moe(model, bits=dense.bits, group=dense.group, blocks=blocks)
        model, _ = to_packed_matmul(model, dense, blocks=blocks)
        model, _ = to_cached_attention(model)
    else:
        bits, group = (None, 0) if dense is None else (dense.bits, dense.group)
        model, _ = to_contrib_moe(model, bits=bits, group=group, kernels=kernels)
        if dense is not None:
            model, _ = to_matmul_nbits(model, dense)
    if dense is not None:
        model, _ = to_gather_block_quantized(model, dense)
    model, _ = to_fused_matmul(model)
    model, _ = fuse_residual_norm(model)
    model, _ = clip_in_float32(model)
    return tidy(model)


def lower_to_tensorrt(
    model: ir.Model,
    precision: GpuPrecision,
    *,
    group: int = 0,
    scales: Scales | None = None,
    blocks: Mapping[str, int] = NO_BLOCKS,
    weight_only: bool = False,
) -> ir.Model:
    """Rewrite a canonical graph, in place, to what TensorRT compiles; with the MoE's function body any ONNX runtime runs it.

    The encoder's graph of a model that has one is lowered like the decoder's.

    Args:
        group: weights that share a scale, for int4.
        scales: of activations and weights, for int8 and fp8.
        blocks: weights stored as codes, which stay what they are where they can; see `quantize_products`.
        weight_only: for fp8: no activation is rounded, so that experts alone are stored in it.

    Post: products and experts are in the precision asked for; routers are float32, all else has the graph's own type.
    """
    if any(value.name == SOURCE_LENGTHS for value in model.graph.inputs):  # no prompt has more than its start token
        model, _ = to_compared_source_mask(model)
    else:
        model, _ = hoist_last_position(model)
    model, _ = to_plain_softcap(model)
    model, _ = quantize_experts(model, WEIGHT_FORMATS[precision], group, blocks, keep_activations=weight_only)
    if (precision == "fp8" and not weight_only) or precision == "int8" or precision == "int4":
        model, _ = quantize_products(model, precision, group=group, scales=scales, blocks=blocks)
    return tidy(model)
