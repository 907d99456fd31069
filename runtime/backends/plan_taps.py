"""What a plan that was built with taps computes inside its layers: outputs of it, from the device to NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gatework.plugins.engine_format import TAP_OUTPUT
from gatework.runtime.backends.device import Device
from gatework.runtime.backends.kv import align

_ITEM_BYTES = 4  # they are float32, whatever the plan computes in


class PlanTaps:
    """Room for the taps of one step, on the device and in pinned memory.

    widths: of a row of each output, by name. rows: most tokens of a step. addresses: of each output, by name.
    """

    def __init__(self, device: Device, widths: dict[str, int], rows: int) -> None:
        self._device = device
        ends = np.cumsum([align(rows * width * _ITEM_BYTES) for width in widths.values()]).tolist()
        self._places = dict(zip(widths, [0, *ends], strict=False))
        base = device.allocate(ends[-1], "values inside")
        self._host = device.pinned(ends[-1])
        self.addresses = {name: base + place for name, place in self._places.items()}

    def read(self, context: Any) -> dict[str, np.ndarray]:
        """Copies of what the context's last run gave, by tap; waits for the device."""
        shapes = {name: tuple(context.get_tensor_shape(name)) for name in self._places}
        for name, shape in shapes.items():
            nbytes = math.prod(shape) * _ITEM_BYTES
            self._device.to_host(self._host[self._places[name] :], self.addresses[name], nbytes)
        self._device.synchronize()
        found = {}
        for name, shape in shapes.items():
            part = self._host[self._places[name] :][: math.prod(shape) * _ITEM_BYTES]
            found[name.removesuffix(TAP_OUTPUT)] = part.view(np.float32).reshape(shape).copy()
        return found


def tap_widths(plan: Any, names: list[str]) -> dict[str, int]:
    """Of those tensors of a trt.ICudaEngine that are taps."""
    return {name: tuple(plan.get_tensor_shape(name))[-1] for name in names if name.endswith(TAP_OUTPUT)}
