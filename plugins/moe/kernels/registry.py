"""The Triton functions by the name that `launches` gives them; importing this imports Triton."""

from __future__ import annotations

from typing import Any

from gatework.plugins.moe.kernels.combine import combine
from gatework.plugins.moe.kernels.dispatch import dispatch
from gatework.plugins.moe.kernels.gemm_in import gemm_in
from gatework.plugins.moe.kernels.gemm_out import gemm_out
from gatework.plugins.moe.kernels.quantize import quantize
from gatework.plugins.moe.kernels.routing import drop, route

KERNELS: dict[str, Any] = {
    "route": route,
    "drop": drop,
    "dispatch": dispatch,
    "quantize": quantize,
    "gemm_in": gemm_in,
    "gemm_out": gemm_out,
    "combine": combine,
}
