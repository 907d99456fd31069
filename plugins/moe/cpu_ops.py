"""The CPU kernels' operators for ONNX Runtime, and where their library is.

`gatework::PackedMatMul` version 1: y [..., N] = x W^T, W quantised. Attributes: N, K, bits (4 or 8), group_size,
wide (1: activations have 16 bits, else 8).

    x         [..., K]                        float32
    w         [blocks, steps, 16, 4]          uint8     blocks of 16 rows of W; steps of 4 (8 bits) or 8 (4 bits) columns
    w_scale   [blocks, groups, 16]            bfloat16
    gamma     [K]                             float32   optional, a norm's weight: the product is of norm(x)
    skip      like x                          float32   optional, is added to x first
    y         [..., N]                        float32
    sum       like x                          float32   x + skip, where that is given

With gamma there are the attributes epsilon, and centred (0: RMS norm, 1: layer norm, without a bias).

`gatework::PackedMoE` version 1: gatework::MoE on such weights. Attributes: those of MoE but weight_format, and bits,
hidden_size D, expert_width I, num_experts E, and those of the norm.

    x             [..., D]                                       float32   T tokens
    router_logits [T, E]                                         float32   or, in its place, `router`
    w_in          [E, G, blocks of I, steps of D, 16, 4]         uint8     G matrices: gate, up (see `spec`)
    w_in_scale    [E, G, blocks of I, groups of D, 16]           bfloat16
    w_out         [E, blocks of D, steps of I, 16, 4]            uint8
    w_out_scale   [E, blocks of D, groups of I, 16]              bfloat16
    b_in, b_out   [E, G * I], [E, D]                             float32   optional
    router        [E, D]                                         float32   optional, makes the logits of (normalised) x
    gamma, skip   [D], like x                                    float32   optional, as above
    y, sum        like x                                         float32   sum only with skip
    logits        [T, E]                                         float32   only with router

`gatework::CachedAttention` version 1: rotary positions, the write into the cache and grouped-query attention. New keys and
values are rounded to the nearest float16, those beyond 65504 to that; all else is float32. Attributes: num_heads H,
kv_num_heads Hkv, scale, softcap (0: none; else scores become c * tanh(score / c)), window (0: none; else the keys that a query
sees, its own included).

    q             [B, S, (H + 2 Hkv) * Dh]    float32   q|k|v, or, where k and v are given, q alone [B, S, H * Dh]
    past_k, _v    [B, Hkv, S_max, Dh]         float16   Dh a multiple of 16
    write_indices [B]                         int64     slot, and position, of the first new key
    cos, sin      [S_max, R / 2]              float32   the first R <= Dh elements are rotated, in halves; R may be 0
    k, v          [B, S, Hkv * Dh]            float32   optional
    slopes        [H]                         float32   optional, ALiBi's: off a score for each position that the key is behind
    sinks         [H]                         float32   optional, a score more in each head's softmax, for no key
    y             [B, S, H * Dh]              float32
    present_k, _v like past_k                 float16   a caller may bind them to the memory of past_k and past_v

The layout of a block is written down in cpu/layout.h. Activations are quantised to int8 per token and group; to 16 bits are
those inside an expert, whose error would weigh most, and those of `wide` products. Products are sums of integers; norms,
routers and attention add in one order: the same token gives the same bits in any company, on any number of threads and on
any processor.
"""

from __future__ import annotations

import ctypes
import os
from importlib.resources import files
from pathlib import Path

from gatework.plugins.errors import GateworkError

MATMUL, MOE, ATTENTION = "PackedMatMul", "PackedMoE", "CachedAttention"
PATHS = ("avx512_vnni", "avx_vnni", "avx2", "neon", "portable")
BLOCK_ROWS = 16
STEP_BYTES = 4  # of a row
WIDE_BITS = 8  # weights of so many bits in attention and head meet activations of 16 bits
# Releases of ONNX Runtime whose C API the library was tested with; it is used with no others.
ORT_VERSIONS = ("1.32",)
_NAME = "libgatework_cpu.so"


def chosen_path(library: Path) -> str:
    """Name of the kernels that run on this processor; GateworkError if GATEWORK_CPU_PATH asks for others."""
    chosen = ctypes.CDLL(str(library)).gatework_cpu_path
    chosen.restype = ctypes.c_char_p
    name: bytes | None = chosen()
    if name is None:
        expected = f"one of {', '.join(PATHS)}, if the processor has it"
        what = "GATEWORK_CPU_PATH names no kernels of this machine"
        raise GateworkError(what, got=os.environ["GATEWORK_CPU_PATH"], expected=expected, fix="unset it")
    return name.decode()


def usable_library(ort_version: str) -> Path | None:
    """The library, if there is one and it was tested with that ONNX Runtime."""
    return find_library() if ort_version.startswith(ORT_VERSIONS) else None


def find_library() -> Path | None:
    """The kernels' library, or None where the package was installed without a C++ compiler."""
    path = Path(str(files("gatework.plugins.moe").joinpath("cpu", _NAME)))
    return path if path.is_file() else None
