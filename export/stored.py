"""StoredTensor: a tensor that still lies in its file, and shards of one that were split over files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gatework.plugins.errors import GateworkError

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Stored(Protocol):
    """A tensor whose rows (axis 0) can be read without reading the rest.

    dtype: a key of TORCH_DTYPES, or the file's own word for a dtype that Gatework does not read.
    """

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_into(self, out: Tensor, start: int) -> None:
        """Fill the contiguous `out` [n, ...] with rows start to start + n."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Row-major bytes in a file, `offset` bytes from its start; the reader has checked that they lie within it.

    Rows are read with plain reads into fresh memory and not through a memory map: mapped pages count as this process's
    memory, which has to stay bounded by the rows asked for, and a file cut short while mapped would kill the process.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file; the dtype has to be a known one."""
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize

    def read_into(self, out: Tensor, start: int) -> None:
        row = math.prod(self.shape[1:]) * out.element_size()
        rest = out.view(-1).view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * row)
            while len(rest):
                count = file.readinto(rest)
                if not count:
                    raise GateworkError(f"{self.path} ended while it was read", fix="leave the file alone, then retry")
                rest = rest[count:]


@dataclass(frozen=True, slots=True)
class Shards:
    """One tensor split over several files along `dim`, 0 or 1."""

    parts: tuple[StoredTensor, ...]
    dim: int

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    def read_into(self, out: Tensor, start: int) -> None:
        position = 0  # of the part's first row or column
        for part in self.parts:
            size = part.shape[self.dim]
            if self.dim == 1:
                block = torch.empty((out.shape[0], size), dtype=out.dtype)
                part.read_into(block, start)
                out[:, position : position + size] = block
            else:
                first, last = max(start, position), min(start + out.shape[0], position + size)
                if first < last:
                    part.read_into(out[first - start : last - start], first - position)
            position += size


def merge(name: str, parts: Sequence[StoredTensor], dim: int) -> Stored:
    """The tensor that `parts` are shards of; parts that cannot be joined along `dim` are a GateworkError."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    others = tuple(n for axis, n in enumerate(first.shape) if axis != dim)
    for part in parts:
        same = tuple(n for axis, n in enumerate(part.shape) if axis != dim) == others
        if not (same and len(part.shape) == 2 and part.dtype == first.dtype):
            got = f"{part.dtype} {part.shape} in {part.path.name}, {first.dtype} {first.shape} in {first.path.name}"
            raise GateworkError(f"shards of tensor {name} do not fit together", got=got)
    return Shards(tuple(parts), dim)
