"""The memory of one call of `gatework::MoE`: guarded, filled with NaN before, and looked at afterwards."""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np

from gatework.plugins.moe.spec import MoEAttributes, check_shapes
from gatework.plugins.moe.workspace import ALIGNMENT, buffers, layout
from tests.plugins.moe_cases import Array

GUARD = 64  # bytes behind every buffer that no kernel may touch
SCRATCH = "scratch"  # the workspace


class CallMemory:
    """Inputs, y and workspace as bytes, in `blocks`.

    Inputs are as in `moe_cases`; what is float32 there and not so by definition becomes `dtype`. Memory is filled
    with NaN bytes first, what lies behind a buffer must not change, and neither must the inputs.
    """

    def __init__(
        self, attributes: MoEAttributes, inputs: dict[str, Array], dtype: Literal["float16", "bfloat16"]
    ) -> None:
        self.attributes = attributes
        self.sizes = check_shapes(attributes, {name: value.shape for name, value in inputs.items()})
        self.narrow = np.dtype(getattr(ml_dtypes, dtype, dtype))
        kept = ("router_logits", "w_in_scale", "w_out_scale")
        self.inputs = {
            name: value if name in kept or value.dtype != np.float32 else value.astype(self.narrow)
            for name, value in inputs.items()
        }
        self.workspace = layout(self.sizes, attributes, self.narrow.itemsize)
        self.blocks = {name: _guarded(value) for name, value in self.inputs.items()}
        nbytes = {"y": self.sizes.T * self.sizes.D * self.narrow.itemsize, SCRATCH: self.workspace.total}
        self.blocks |= {name: np.full(size + GUARD, 0xFF, np.uint8) for name, size in nbytes.items()}

    def buffers(self) -> dict[str, Array]:
        """The bytes from where each input, buffer of the workspace, and y begins."""
        scratch = self.blocks[SCRATCH]
        return self.blocks | {name: scratch[offset:] for name, offset in self.workspace.offsets.items()}

    def results(self) -> dict[str, Array]:
        """y and the workspace's buffers by name, after the checks."""
        for name, block in self.blocks.items():
            assert (block[-GUARD:] == 0xFF).all(), f"written beyond {name}"
        for name, value in self.inputs.items():
            assert self.blocks[name][:-GUARD].tobytes() == value.tobytes(), f"{name} was changed"
        codes: Any = {"fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "int8": np.dtype(np.int8)}
        codes = codes.get(self.attributes.weight_format)
        dtypes: dict[str, Any] = {"topk_ids": np.int32, "expert_offsets": np.int32, "token_order": np.int32}
        dtypes |= {"hidden": self.narrow, "x_codes": codes, "hidden_codes": codes}
        views = {"y": self.blocks["y"][:-GUARD].view(self.narrow).reshape(self.sizes.T, self.sizes.D)}
        memory = self.buffers()
        for name, (shape, itemsize) in buffers(self.sizes, self.attributes, self.narrow.itemsize).items():
            size = int(np.prod(shape)) * itemsize
            flat, gap = memory[name][:size], memory[name][size : -(-size // ALIGNMENT) * ALIGNMENT]
            assert (gap == 0xFF).all(), f"written beyond {name}"
            views[name] = flat.view(dtypes.get(name, np.float32)).reshape(shape)
        return views


def _guarded(value: Array) -> Array:
    return np.concatenate([np.frombuffer(value.tobytes(), np.uint8), np.full(GUARD, 0xFF, np.uint8)])
