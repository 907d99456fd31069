"""Makers of hostile checkpoints: zip archives that lie, pickles made by hand, headers and folders that nobody writes."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GB = 1 << 30


# ---- safetensors


def tensor_entry(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_safetensors(path: Path, header: Any, data: int, length: int | None = None) -> None:
    """A header (JSON unless it is bytes already) and `data` bytes of nothing. length: what the file says the header has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text) if length is None else length) + text)
        file.truncate(8 + len(text) + data)


# ---- zip archives


@dataclass
class Record:
    """One entry of an archive. hole: so many bytes of nothing instead of data. Sizes are as claimed."""

    name: str
    data: bytes = b""
    hole: int = 0
    method: int = 0
    flags: int = 0
    size: int | None = None
    packed_size: int | None = None

    def crc(self) -> int:
        """Of the data as they are packed."""
        return zlib.crc32(self.data)

    def sizes(self) -> tuple[int, int]:
        """Packed and unpacked."""
        real = self.hole or len(self.data)
        return (
            real if self.packed_size is None else self.packed_size,
            real if self.size is None else self.size,
        )


def local_header(record: Record) -> bytes:
    name = record.name.encode()
    return (
        struct.pack(
            "<4s5H3I2H", b"PK\3\4", 20, record.flags, record.method, 0, 0, record.crc(), *record.sizes(), len(name), 0
        )
        + name
    )


def central_header(record: Record, offset: int) -> bytes:
    name = record.name.encode()
    fields = (
        20,
        20,
        record.flags,
        record.method,
        0,
        0,
        record.crc(),
        *record.sizes(),
        len(name),
        0,
        0,
        0,
        0,
        0,
        offset,
    )
    return struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields) + name


def end_record(count: int, size: int, offset: int) -> bytes:
    return struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, offset, 0)


def write_zip(path: Path, records: list[Record]) -> None:
    """An archive with exactly these records, as they claim to be."""
    directory = b""
    with path.open("wb") as file:
        for record in records:
            directory += central_header(record, file.tell())
            file.write(local_header(record) + record.data)
            if record.hole:
                file.seek(record.hole, os.SEEK_CUR)
        start = file.tell()
        file.write(directory + end_record(len(records), len(directory), start))


def deflated_zeros(size: int) -> bytes:
    """A deflate stream that unpacks to `size` zeros, a thousandth as long; made in no time, out of one repeated block."""
    block = 16 << 20
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first * (size // block) + packer.flush()


# ---- pickles, in the protocol that torch.save writes


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def numbers(values: list[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def call(function: str, arguments: bytes) -> bytes:
    """`function`, as "module name", of the arguments that a piece of pickle leaves on the stack."""
    return b"c" + function.replace(" ", "\n").encode() + b"\n(" + arguments + b"tR"


def tensor(shape: list[int], strides: list[int], offset: int = 0, key: str = "0") -> bytes:
    """A float32 tensor over storage `key`, as torch.save describes one."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(4) + b"tQ"
    hooks = call("collections OrderedDict", b"")
    return call(
        "torch._utils _rebuild_tensor_v2",
        storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + hooks,
    )


def state(items: bytes) -> bytes:
    """A dict of key and value, key and value."""
    return b"\x80\x02}(" + items + b"u."


def torch_records(code: bytes) -> list[Record]:
    """The records of a torch.save archive with this pickle and one storage of 16 bytes."""
    small = [Record("archive/byteorder", b"little"), Record("archive/version", b"3\n")]
    return [Record("archive/data.pkl", code), *small, Record("archive/data/0", bytes(16))]


def write_torch(path: Path, code: bytes) -> None:
    write_zip(path, torch_records(code))


def write_two_directories(path: Path, trace: Path) -> None:
    """An archive with two central directories: the end record's offset leads to one, its size and place to the other."""
    evil = Record("archive/data.pkl", state(text("a") + call("os system", text(f"touch {trace}"))))
    good = Record("archive/date.pkl", state(text("a") + tensor([4], [1])))
    rest = torch_records(b"")[1:]
    parts, places = b"", {}
    for record in (evil, good, *rest):
        places[record.name] = len(parts)
        parts += local_header(record) + record.data
    first = b"".join(central_header(record, places[record.name]) for record in (evil, *rest))
    good.name = "archive/data.pkl"
    shift = len(first)  # zipfile takes the distance between the two for bytes that stand before the archive
    second = b"".join(
        central_header(record, places["archive/date.pkl" if record is good else record.name] - shift & 0xFFFFFFFF)
        for record in (good, *rest)
    )
    assert len(first) == len(second)
    path.write_bytes(parts + first + second + end_record(1 + len(rest), len(second), len(parts)))


# ---- folders


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    """A file of `size` bytes that takes no room."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def link(path: Path, target: Path | str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def resave(path: Path, **tensors: torch.Tensor | None) -> None:
    """Change tensors of a .pth file; None removes one."""
    changed = torch.load(path, weights_only=True) | tensors
    torch.save({name: value for name, value in changed.items() if value is not None}, path)
