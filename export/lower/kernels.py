"""What ONNX Runtime's contrib kernels want of a graph, which differs by execution provider and type of activations."""

from __future__ import annotations

from dataclasses import dataclass

from gatework.export.groups import HEAD_GROUP


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The differences between providers, as read from their sources and schemas.

    fused_attention: GroupQueryAttention has a kernel for the activations' type.
    query_lengths: GroupQueryAttention is told the new tokens per row. CUDA's learnt that only in 1.32, and needs it for prefill
    of several rows at once alone, which the runtime never does.
    accuracy_level: of MatMulNBits and QMoE; 4 lets a kernel round activations to 8 bits. None where it has no meaning.
    expert_multiple: hidden size and width of quantised experts come in multiples of this; dense_multiple: of dense ones.
    head_group: weights of the output head that share a scale, at most.
    """

    fused_attention: bool = True
    query_lengths: bool = False
    accuracy_level: int | None = None
    expert_multiple: int = 1
    dense_multiple: int = 1
    head_group: int = HEAD_GROUP


CPU_KERNELS = Kernels(query_lengths=True, accuracy_level=4)
CUDA_KERNELS = Kernels(expert_multiple=64, dense_multiple=8, head_group=128)  # dense rows are whole words of 128 bits
# CUDA's GroupQueryAttention computes in 16 bits only; the standard Attention that it replaces has a float32 kernel.
CUDA_FLOAT32_KERNELS = Kernels(fused_attention=False, dense_multiple=4)
