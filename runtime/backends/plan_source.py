"""What a plan's decoder reads of a prompt: keys and values that the encoder's plan made of it, kept by slot on the device.

Not run yet: no GPU with a plan's TensorRT was at hand. What can be checked without one is: see tests/runtime/test_tensorrt.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gatework.plugins.engine_format import CROSS, SOURCE_LENGTHS
from gatework.runtime.backends.device import Device
from gatework.runtime.backends.kv import ALIGNMENT, DeviceCache, KVLayout, align
from gatework.runtime.backends.plan import bind

_INT64 = 8


class PlanSource:
    """Keys and values of every decoder layer, for prompts of up to S_max tokens, and the prompts' lengths, [slots] int64.

    The encoder writes them as dense as a prompt is long, [1, Hkv, S, Dh], into room of their own; from there they go to the
    slot's first S positions.

    Args:
        context: the encoder's, an IExecutionContext.
        layout: of the decoder's own cache, which is that of these as well.
        names: the tensors of the encoder's plan. experts: addresses of the engine's expert weights.
    """

    def __init__(
        self, device: Device, context: Any, layout: KVLayout, names: Sequence[str], experts: dict[str, int]
    ) -> None:
        self._device, self._context = device, context
        self.cache = DeviceCache(layout, device)
        self.lengths = np.ones(layout.slots, np.int64)
        self._experts = {name: experts[name] for name in names if name in experts}
        nbytes = align(layout.positions * _INT64) + ALIGNMENT
        self._inputs, self._host = device.allocate(nbytes, "prompt"), device.pinned(nbytes)
        self._room = align(layout.slot_bytes)
        self._made = device.allocate(len(layout.names) * self._room, "encoder's output")

    def encode(self, slot: int, tokens: list[int], run: Callable[[Any], None]) -> None:
        """Read a prompt, for a slot; `run` queues the context."""
        count, layout, lengths = len(tokens), self.cache.layout, align(len(tokens) * _INT64)
        self._host[: count * _INT64] = np.array(tokens, np.int64).view(np.uint8)
        self._host[lengths : lengths + _INT64] = np.array([count], np.int64).view(np.uint8)
        self._device.to_device(self._inputs, self._host, lengths + _INT64)
        addresses = self.addresses(count)
        bind(self._context, addresses, {"input_ids": (1, count), SOURCE_LENGTHS: (1,)})
        run(self._context)
        width, pitch = count * layout.head_bytes, layout.positions * layout.head_bytes
        for name in layout.names:
            made, kept = addresses[f"{CROSS}.{name}"], self.cache.address(name, slot)
            self._device.copy_rows(kept, pitch, made, width, width, layout.heads)
        self._device.synchronize()
        self.lengths[slot] = count

    def move(self, source: int, target: int) -> None:
        """Copy what a slot has to another."""
        self.lengths[target] = self.lengths[source]
        self.cache.move(source, target, int(self.lengths[source]))

    def addresses(self, count: int) -> dict[str, int]:
        """Where the encoder finds every tensor for a prompt of `count` tokens: input_ids [1, S], then source_lengths [1]."""
        found = {"input_ids": self._inputs, SOURCE_LENGTHS: self._inputs + align(count * _INT64)}
        for number, name in enumerate(self.cache.layout.names):
            found[f"{CROSS}.{name}"] = self._made + number * self._room
        return found | self._experts
