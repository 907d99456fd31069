"""Expert weights on their way to a GPU: from the memory-mapped file, through two pinned buffers, into one block."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gatework.plugins.errors import GateworkError
from gatework.runtime.backends.device import Device

EXPERTS = "experts.safetensors"
_PAGE = 4096  # tensors begin at multiples of it
_CHUNK = 64 << 20


class Place(NamedTuple):
    """First byte in the file, and bytes."""

    start: int
    nbytes: int


def read_places(path: Path) -> dict[str, Place]:
    """Where the file's tensors lie."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length) if length <= size else b"")
        ranges = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        places = {name: Place(8 + length + start, end - start) for name, (start, end) in ranges.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        places = {}
    if not places or any(place.nbytes < 0 or not 8 <= place.start <= size - place.nbytes for place in places.values()):
        raise GateworkError(f"{path} is damaged: it names no tensors inside it", fix="build the engine again")
    return places


def span(places: dict[str, Place]) -> tuple[int, int]:
    """First and last byte to copy; the first is that of a page, so that tensors keep their alignment."""
    first = min(place.start for place in places.values())
    return first // _PAGE * _PAGE, max(place.start + place.nbytes for place in places.values())


def chunks(start: int, end: int, size: int) -> Iterator[Place]:
    """A range in parts of `size` bytes, in order."""
    for at in range(start, end, size):
        yield Place(at, min(size, end - at))


def upload(device: Device, path: Path) -> dict[str, int]:
    """Copy every tensor to the device; returns their addresses, each a multiple of a page from the block's beginning.

    A progress bar is shown where standard error is a terminal.
    """
    from tqdm import tqdm

    places = read_places(path)
    start, end = span(places)
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
    return {name: base + place.start - start for name, place in places.items()}
