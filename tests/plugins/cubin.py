"""What a cubin says of its kernel: the parameters and the block size, read from its ELF section .nv.info.<kernel>."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

# Kinds of entries, and how much data follows one: a value of 4 bytes or less in place, or a block of the size given.
_BLOCK, _PARAMETER, _THREADS = 4, 0x17, 0x10


class Parameter(NamedTuple):
    """Bytes of the n-th parameter, and its place among all of them."""

    offset: int
    size: int


class Signature(NamedTuple):
    parameters: tuple[Parameter, ...]
    block: tuple[int, int, int]


def signature(cubin: bytes, entry: str) -> Signature:
    """Of the kernel `entry`."""
    found, block = {}, (0, 0, 0)
    for kind, data in _entries(_section(cubin, f".nv.info.{entry}")):
        if kind == _PARAMETER:  # index, ordinal, offset, flags with the size from bit 18 on
            _, ordinal, offset, flags = struct.unpack("<IHHI", data)
            found[ordinal] = Parameter(offset, flags >> 18)
        elif kind == _THREADS:
            block = struct.unpack("<III", data)
    assert sorted(found) == list(range(len(found)))
    return Signature(tuple(found[i] for i in range(len(found))), block)


def _section(elf: bytes, wanted: str) -> bytes:
    (table,) = struct.unpack_from("<Q", elf, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * entry_size) for i in range(count)]
    names = sections[names_index][4]
    for name, _, _, _, offset, size, *_ in sections:
        start = names + name
        if elf[start : elf.index(b"\0", start)].decode() == wanted:
            return elf[offset : offset + size]
    raise AssertionError(f"no section {wanted}")


def _entries(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < len(data):
        form, kind, size = struct.unpack_from("<BBH", data, position)
        position += 4
        if form == _BLOCK:
            yield kind, data[position : position + size]
            position += size
