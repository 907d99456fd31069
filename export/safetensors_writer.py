"""A safetensors file written in parts: every tensor's place is known first, its bytes arrive in any number of pieces."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gatework.export.packing import TensorSpec
from gatework.plugins.errors import GateworkError

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8"}
_NAMES |= {torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3"}


class SafetensorsWriter:
    """Writes `specs` to `path` (format: the safetensors README), each tensor starting at a multiple of `align` bytes.

    The format allows no holes, so alignment is made of `__pad.N` tensors. The file takes its full size at once: a disk
    that is too small is an error before any work.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec], *, align: int = 64) -> None:
        self.path = path
        self._entries, header, end = _layout(specs, align)
        blob = json.dumps(header, separators=(",", ":")).encode()
        blob += b" " * (-(len(blob) + 8) % align)
        self._base = 8 + len(blob)
        self._filled = dict.fromkeys(self._entries, 0)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._blocks = _Blocks(self._fd, self._base + end)
        try:
            _reserve(self._fd, self._base + end)
            self._blocks.write(memoryview(len(blob).to_bytes(8, "little") + blob), 0)
            for name, entry in header.items():
                if name not in self._entries:
                    start, stop = entry["data_offsets"]
                    self._blocks.write(memoryview(bytes(stop - start)), self._base + start)
        except OSError as error:
            os.close(self._fd)
            raise disk_error(error, path, self._base + end) from None

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._fd)
        if kind is None:
            for name, (_, size) in self._entries.items():
                assert self._filled[name] == size, f"{name}: {self._filled[name]} of {size} bytes written"
            assert not self._blocks.open, "a block was not written"

    def append(self, name: str, part: Tensor) -> None:
        """Write the next bytes of a tensor."""
        data = part.contiguous().reshape(-1).view(torch.uint8).numpy().data
        offset, size = self._entries[name]
        assert self._filled[name] + len(data) <= size, f"{name}: more data than its shape holds"
        try:
            self._blocks.write(data, self._base + offset + self._filled[name])
        except OSError as error:
            raise disk_error(error, self.path, size) from None
        self._filled[name] += len(data)

    def location(self, name: str) -> tuple[int, int]:
        """Offset from the start of the file, and length, in bytes."""
        offset, size = self._entries[name]
        return self._base + offset, size


class _Blocks:
    """Writes a file of `size` bytes, each byte once and in any order, in whole blocks of 2 MiB.

    Linux keeps what one such write brings as one huge page, if the file system can (ext4 since 6.16, XFS): weights mapped
    from the file are then read with fewer misses of the TLB.
    """

    SIZE = 2 << 20

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self._size = fd, size
        self.open: dict[int, tuple[bytearray, int]] = {}  # by number: the bytes of a block, how many are missing

    def write(self, data: memoryview, offset: int) -> None:
        data = data.cast("B")
        while data:
            number, start = divmod(offset, self.SIZE)
            piece = data[: self.SIZE - start]
            self._fill(number, start, piece)
            data, offset = data[len(piece) :], offset + len(piece)

    def _fill(self, number: int, start: int, piece: memoryview) -> None:
        first = number * self.SIZE
        size = min(self.SIZE, self._size - first)
        if len(piece) == size:
            _write_at(self._fd, piece, first)
            return
        block, missing = self.open.pop(number) if number in self.open else (bytearray(size), size)
        block[start : start + len(piece)] = piece
        if missing > len(piece):
            self.open[number] = block, missing - len(piece)
        else:
            _write_at(self._fd, memoryview(block), first)


def _layout(
    specs: Iterable[TensorSpec], align: int
) -> tuple[dict[str, tuple[int, int]], dict[str, dict[str, Any]], int]:
    """Offset and size of every tensor, the file's JSON header, and the end of the data."""
    entries: dict[str, tuple[int, int]] = {}
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for spec in specs:
        if gap := -end % align:
            header[f"__pad.{len(header)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
            end += gap
        size = math.prod(spec.shape) * spec.dtype.itemsize
        entries[spec.name] = (end, size)
        offsets = [end, end + size]
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        end += size
    return entries, header, end


def _reserve(fd: int, size: int) -> None:
    """Give the file its full size; where the system can, with the disk's promise that there is room."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.truncate(fd, size)


def _write_at(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def disk_error(error: OSError, path: Path, size: int) -> Exception:
    """A one-line error for a full disk; anything else as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        needed = f"{size / 1e6:,.1f} MB for {path.name}"
        return GateworkError(
            f"no room to write {path}", got="a full disk", expected=needed, fix="free space or change --out"
        )
    return error
