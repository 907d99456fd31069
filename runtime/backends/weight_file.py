"""The header of one of an engine's weight files, which are in the safetensors format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from gatework.plugins.errors import GateworkError


class WeightTensor(NamedTuple):
    """A tensor in a safetensors file: safetensors' name of its type, its shape, its first byte in the file, and bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, WeightTensor]:
    """The tensors of one of an engine's files; GateworkError where it names none, or some that are not in it."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length) if length <= size else b"")
        tensors = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                tensors[name] = WeightTensor(entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    except (ValueError, KeyError, TypeError, AttributeError):
        tensors = {}
    if not tensors or any(t.nbytes < 0 or not 8 <= t.start <= size - t.nbytes for t in tensors.values()):
        raise GateworkError(f"{path} is damaged: it names no tensors inside it", fix="build the engine again")
    return tensors
