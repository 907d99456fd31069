"""Arrays as TensorStore's zarr driver writes them, version 2 of the format: a folder with `.zarray` and a file for each chunk.

T5X keeps every parameter so. A chunk is read whole, decompressed to the size that `.zarray` gives it and no further.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatework.export import folder as folders
from gatework.export.families.fields import Fields
from gatework.export.stored import TORCH_DTYPES
from gatework.plugins.errors import GateworkError

HEADER = ".zarray"
MAX_CHUNK_BYTES = 1 << 30  # T5X aims at 64 MB
MAX_CHUNKS = 100_000
_DTYPES = {"<f4": "float32", "<f2": "float16", "bfloat16": "bfloat16"}
_DOWNLOAD = "download the folder again"


@dataclass(frozen=True, slots=True)
class ZarrArray:
    """An array in chunks, all of one shape; the last ones reach over its end.

    compressed: by gzip.
    """

    folder: Path
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    compressed: bool
    offset: int = 0  # of the first chunk in its file

    @property
    def first(self) -> Path:
        """The file of the first chunk."""
        return self.folder / ".".join("0" for _ in self.shape)

    def read_into(self, out: Tensor, start: int) -> None:
        stop = start + out.shape[0]
        for index in self.grid(start, stop):
            begins = [i * size for i, size in zip(index, self.chunks, strict=True)]
            ends = [min(b + n, whole) for b, n, whole in zip(begins, self.chunks, self.shape, strict=True)]
            first, last = max(begins[0], start), min(ends[0], stop)
            chunk = self.chunk(index)
            inside = tuple(slice(0, e - b) for b, e in zip(begins[1:], ends[1:], strict=True))
            outside = tuple(slice(b, e) for b, e in zip(begins[1:], ends[1:], strict=True))
            out[(slice(first - start, last - start), *outside)] = chunk[
                (slice(first - begins[0], last - begins[0]), *inside)
            ]

    def grid(self, start: int, stop: int) -> Iterator[tuple[int, ...]]:
        """Places of the chunks that hold the rows."""
        rows = range(start // self.chunks[0], -(-stop // self.chunks[0]))
        others = (range(-(-whole // n)) for whole, n in zip(self.shape[1:], self.chunks[1:], strict=True))
        return itertools.product(rows, *others)

    def chunk(self, index: tuple[int, ...]) -> Tensor:
        """One chunk, in its full shape."""
        path = folders.member(self.folder, ".".join(map(str, index)))
        dtype = TORCH_DTYPES[self.dtype]
        content = _content(path, math.prod(self.chunks) * dtype.itemsize, self.compressed)
        return torch.frombuffer(content, dtype=dtype).view(self.chunks)


@lru_cache(maxsize=2)  # neighbouring experts lie in one chunk
def _content(path: Path, nbytes: int, compressed: bool) -> bytearray:
    """What a chunk's file holds, `nbytes` bytes."""
    try:
        if path.stat().st_size > nbytes + nbytes // 100 + 1024:  # what gzip adds at most
            raise ValueError("it is too large")
        content = path.read_bytes()
        if compressed:
            machine = zlib.decompressobj(wbits=31)
            content = machine.decompress(content, nbytes + 1)
        if len(content) != nbytes:
            raise ValueError(f"it has not the {nbytes} bytes of a chunk")
        return bytearray(content)
    except (ValueError, zlib.error) as error:
        raise GateworkError(f"{path} is damaged: {error}", fix=_DOWNLOAD) from None
    except OSError as error:
        raise GateworkError(f"cannot read {path}: {error.strerror}", fix=_DOWNLOAD) from None


def read_zarr(folder: Path) -> ZarrArray:
    """The array in a folder; its chunks have to be there, and none is read."""
    path = folders.member(folder, HEADER)
    if not folders.exists(folder, HEADER):
        raise GateworkError(f"{path} is missing", fix=_DOWNLOAD)
    fields = Fields(folders.read_json(path), f"{path}: ")
    for name, allowed in {"zarr_format": (2,), "order": ("C",), "filters": (), "dimension_separator": (".",)}.items():
        fields.refuse_unless(name, *allowed)
    compressor = fields.raw.get("compressor")
    if compressor is not None and (not isinstance(compressor, dict) or compressor.get("id") != "gzip"):
        raise fields.unsupported("compressor", "gzip or none")
    dtype = fields.raw.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise fields.unsupported("dtype", " or ".join(_DTYPES))
    shape, chunks = _sizes(fields, "shape"), _sizes(fields, "chunks")
    if len(shape) != len(chunks):
        raise fields.error("chunks", fields.raw.get("chunks"), f"{len(shape)} sizes")
    array = ZarrArray(folder, _DTYPES[dtype], shape, chunks, compressor is not None)
    if math.prod(chunks) * TORCH_DTYPES[array.dtype].itemsize > MAX_CHUNK_BYTES:
        raise fields.error("chunks", list(chunks), f"at most {MAX_CHUNK_BYTES} bytes")
    if math.prod(-(-whole // n) for whole, n in zip(shape, chunks, strict=True)) > MAX_CHUNKS:
        raise fields.error("chunks", list(chunks), f"at most {MAX_CHUNKS} chunks")
    for index in array.grid(0, shape[0]):
        if not folders.exists(folder, name := ".".join(map(str, index))):
            raise GateworkError(f"{folder / name} is missing", fix=_DOWNLOAD)
    return array


def _sizes(fields: Fields, name: str) -> tuple[int, ...]:
    value: Any = fields.raw.get(name)
    if (
        not isinstance(value, list)
        or not 1 <= len(value) <= 4
        or not all(type(n) is int and 0 < n < 2**40 for n in value)
    ):
        raise fields.error(name, value, "one to four positive sizes")
    return tuple(value)
