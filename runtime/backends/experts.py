"""Expert weights on their way to a GPU: from the memory-mapped file, through two pinned buffers, into one block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gatework.runtime.backends.device import Device
from gatework.runtime.backends.weight_file import WeightTensor, read_header

EXPERTS = "experts.safetensors"
_PAGE = 4096  # tensors begin at multiples of it
_CHUNK = 64 << 20


class Place(NamedTuple):
    """First byte in the file, and bytes."""

    start: int
    nbytes: int


def span(tensors: dict[str, WeightTensor]) -> tuple[int, int]:
    """First and last byte to copy; the first is that of a page, so that tensors keep their alignment."""
    first = min(tensor.start for tensor in tensors.values())
    return first // _PAGE * _PAGE, max(tensor.start + tensor.nbytes for tensor in tensors.values())


def chunks(start: int, end: int, size: int) -> Iterator[Place]:
    """A range in parts of `size` bytes, in order."""
    for at in range(start, end, size):
        yield Place(at, min(size, end - at))


def upload(device: Device, path: Path) -> dict[str, int]:
    """Copy every tensor to the device; returns their addresses, each a multiple of a page from the block's beginning.

    A progress bar is shown where standard error is a terminal.
    """
    from tqdm import tqdm

    tensors = read_header(path)
    start, end = span(tensors)
    base = device.allocate(end - start, "experts")
    pages = np.memmap(path, np.uint8, "r")
    staging = [device.pinned(min(_CHUNK, end - start)) for _ in range(2)]
    events: list[Any] = [None, None]  # behind the copy out of each buffer
    with tqdm(total=end - start, unit="B", unit_scale=True, desc="experts", disable=None) as bar:
        for number, part in enumerate(chunks(start, end, _CHUNK)):
            which = number % 2
            if events[which] is not None:
                device.wait(events[which])
            staging[which][: part.nbytes] = pages[part.start : part.start + part.nbytes]
            device.to_device(base + part.start - start, staging[which], part.nbytes)
            events[which] = device.record()
            bar.update(part.nbytes)
    for event in events:
        if event is not None:
            device.wait(event)
    for buffer in staging:
        device.free_pinned(buffer)
    return {name: base + tensor.start - start for name, tensor in tensors.items()}
