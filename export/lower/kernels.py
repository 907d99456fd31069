"""What kernels want of a graph, which differs by execution provider and type of activations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The differences between providers, as read from their sources and schemas.

    packed: quantised products and experts go to this package's own kernels.
    function_bodies: experts that no contrib operator computes may stay gatework::MoE, whose definition the runtime runs.
    fused_attention: GroupQueryAttention has a kernel for the activations' type.
    query_lengths: GroupQueryAttention is told the new tokens per row. CUDA's learnt that only in 1.32, and needs it for prefill
    of several rows at once alone, which the runtime never does.
    attention_bias: GroupQueryAttention adds a bias to the scores. sinks: it was tried with learned sinks. own_positions: it
    rotates by positions that it is given.
    expert_multiple: hidden size and width of quantised experts come in multiples of this; dense_multiple: of dense ones.
    """

    packed: bool = False
    function_bodies: bool = False
    fused_attention: bool = True
    query_lengths: bool = False
    attention_bias: bool = False
    sinks: bool = False
    own_positions: bool = False
    expert_multiple: int = 1
    dense_multiple: int = 1


CPU_KERNELS = Kernels(
    packed=True, function_bodies=True, query_lengths=True, attention_bias=True, sinks=True, own_positions=True
)
CUDA_KERNELS = Kernels(expert_multiple=64, dense_multiple=8)  # dense rows are whole words of 128 bits
# CUDA's GroupQueryAttention computes in 16 bits only; the standard Attention that it replaces has a float32 kernel.
CUDA_FLOAT32_KERNELS = Kernels(fused_attention=False, dense_multiple=4)
