"""The KV cache: where keys and values lie, for any device, and the caches themselves.

For every layer and kind a tensor [slots, Hkv, S_max, Dh]; a sequence owns one slot of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from gatework.runtime.backends.device import Device

ALIGNMENT = 256  # bytes; TensorRT's for an address


class Copy(NamedTuple):
    """`rows` rows of `width` bytes, `pitch` bytes apart, from one offset to another."""

    target: int
    source: int
    pitch: int
    width: int
    rows: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Tensors in one block of memory, one after the other, each aligned.

    names: "0.k", "0.v", "1.k", ... heads: Hkv. positions: S_max. width: Dh. itemsize: bytes of one value.
    """

    names: tuple[str, ...]
    slots: int
    heads: int
    positions: int
    width: int
    itemsize: int

    @property
    def head_bytes(self) -> int:
        """Of one head's key at one position."""
        return self.width * self.itemsize

    @property
    def slot_bytes(self) -> int:
        """Of one slot of one tensor."""
        return self.heads * self.positions * self.head_bytes

    @property
    def tensor_bytes(self) -> int:
        """From one tensor to the next."""
        return align(self.slots * self.slot_bytes)

    @property
    def total(self) -> int:
        """Of the whole cache."""
        return len(self.names) * self.tensor_bytes

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        """Of `batch` slots of one tensor."""
        return batch, self.heads, self.positions, self.width

    def offset(self, name: str, slot: int) -> int:
        """Where the slots of a tensor from `slot` on begin."""
        return self.names.index(name) * self.tensor_bytes + slot * self.slot_bytes

    def move(self, source: int, target: int, length: int) -> list[Copy]:
        """Copies of the first `length` positions of a slot to another: one for each tensor, a row for each head."""
        pitch, width = self.positions * self.head_bytes, length * self.head_bytes
        return [
            Copy(self.offset(name, target), self.offset(name, source), pitch, width, self.heads) for name in self.names
        ]


def align(nbytes: int) -> int:
    """Rounded up to whole ALIGNMENTs."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def cache_names(layers: int) -> tuple[str, ...]:
    """`0.k`, `0.v`, `1.k`, ...: what follows `past.` and `present.` in a graph."""
    return tuple(f"{layer}.{kind}" for layer in range(layers) for kind in "kv")


class HostCache:
    """Zeros in the process's memory, which the system provides page by page as they are written."""

    device = "cpu"

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self._block = np.zeros(layout.total + ALIGNMENT, np.uint8)
        self._base = align(self._block.ctypes.data) - self._block.ctypes.data

    def address(self, name: str, slot: int) -> int:
        """Of the slots of a tensor from `slot` on."""
        return self._block.ctypes.data + self._base + self.layout.offset(name, slot)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        for each in self.layout.move(source, target, length):
            self._rows(each.target, each)[:] = self._rows(each.source, each)

    def read(self, name: str, slot: int) -> np.ndarray:
        """A copy of a slot of a tensor, [Hkv, S_max, bytes of Dh values] uint8."""
        layout = self.layout
        block = self._block[self._base + layout.offset(name, slot) :][: layout.slot_bytes]
        return block.reshape(layout.heads, layout.positions, layout.head_bytes).copy()

    def _rows(self, offset: int, copy: Copy) -> np.ndarray:
        block = self._block[self._base + offset :][: copy.rows * copy.pitch]
        return block.reshape(copy.rows, copy.pitch)[:, : copy.width]


class DeviceCache:
    """Zeros on a GPU."""

    device = "cuda"

    def __init__(self, layout: KVLayout, device: Device) -> None:
        self.layout, self._device = layout, device
        self._base = device.allocate(layout.total, "KV cache")
        device.synchronize()

    def address(self, name: str, slot: int) -> int:
        """Of the slots of a tensor from `slot` on."""
        return self._base + self.layout.offset(name, slot)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        self._device.copy(self._base, self.layout.move(source, target, length))
        self._device.synchronize()

    def read(self, name: str, slot: int) -> np.ndarray:
        """A copy of a slot of a tensor, [Hkv, S_max, bytes of Dh values] uint8."""
        layout = self.layout
        block = self._device.pinned(layout.slot_bytes)
        self._device.to_host(block, self.address(name, slot), layout.slot_bytes)
        self._device.synchronize()
        copy = block.reshape(layout.heads, layout.positions, layout.head_bytes).copy()
        self._device.free_pinned(block)
        return copy


Cache = HostCache | DeviceCache


def cached_rows(cache: Cache, name: str, slot: int, length: int, dtype: str) -> np.ndarray:
    """Keys or values at a slot's first positions, [Hkv, length, Dh] float32; dtype: of the cache, ONNX's name."""
    rows = cache.read(name, slot)[:, :length]
    if dtype == "bfloat16":
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return rows.view(dtype).astype(np.float32)
