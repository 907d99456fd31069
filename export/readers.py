"""Readers of weight files: which tensors a file holds and where, checked against its size, with no data read."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from io import FileIO
from pathlib import Path
from typing import Any

import safetensors

from gatework.export.stored import StoredTensor
from gatework.export.torch_pickle import MAX_PICKLE_BYTES, ForeignGlobal, PickledTensor, read_state
from gatework.plugins.errors import GateworkError

SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TEXT = frozenset(b"\t\n\r") | frozenset(range(32, 127))
DOWNLOAD = "download the file again"
MAX_HEADER_BYTES = 8 << 20  # some 120 bytes describe a tensor
MAX_DIRECTORY_BYTES = 2 << 20  # of a zip archive; some 100 bytes describe a record


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a `.safetensors` file. A damaged or truncated file is a GateworkError that names it."""
    try:
        with path.open("rb") as file:
            first, size = file.read(8), path.stat().st_size
            if size < 8:
                raise ValueError(f"it has {size} bytes, and the size of a header alone takes 8")
            _refuse_text(first, f"{path} is no safetensors file")  # as a size, beyond any file's
            (header_bytes,) = struct.unpack("<Q", first)
            if header_bytes > MAX_HEADER_BYTES:
                raise ValueError(f"its header has {header_bytes} bytes, and at most {MAX_HEADER_BYTES} are read")
            # The library checks the header's size and JSON, and that the tensors cover the file without overlap.
            with safetensors.safe_open(path, framework="pt"):
                pass
            header = json.loads(file.read(header_bytes), object_pairs_hook=once_each)
    except (safetensors.SafetensorError, struct.error, ValueError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise GateworkError(f"{path} is damaged or cut short: {reason}", fix=DOWNLOAD) from None
    except OSError as error:
        raise GateworkError(f"cannot read {path}: {error.strerror or error}") from None
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    return {
        name: StoredTensor(
            path,
            SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"]),
            tuple(entry["shape"]),
            start + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def _refuse_text(first: bytes, what: str) -> None:
    """Raise where a file of numbers begins with text, as the pointer does that Git LFS has in its place."""
    if first and all(byte in TEXT for byte in first):
        fix = f"{DOWNLOAD}; in a git repository that has it in Git LFS, run git lfs pull"
        raise GateworkError(what, got=f"one that begins with the text {first.decode()!r}", fix=fix)


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object no two of whose names are the same."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("its header has a name twice")
    return fields


def read_torch(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a state dict written by `torch.save` (`.bin`, `.pth`, `.pt`); nothing in its pickle is run.

    A file with anything but tensors in its pickle, a damaged or truncated one, and one in the format of PyTorch before
    1.6 are GateworkErrors that name it.
    """
    try:
        with PatientFile(path) as file:
            _refuse_text(file.read(8), f"{path} is no file of torch.save")
            folder, records = read_records(file)
            order = read_record(file, records.get(f"{folder}/byteorder", (0, 0)))
            if order not in (b"", b"little"):
                raise GateworkError(f"{path} was written on a big-endian machine")
            state = read_state(read_record(file, records[f"{folder}/data.pkl"]))
    except ForeignGlobal as error:
        fix = "use only tensors, such as the safetensors files of the same model"
        raise GateworkError(f"{path} holds more than tensors and was not loaded", got=error, fix=fix) from None
    except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
        fix = f"{DOWNLOAD}; if it is from PyTorch before 1.6, save it again with torch.save"
        raise GateworkError(f"{path} is cut short or was not written by torch.save: {error}", fix=fix) from None
    except ValueError as error:
        raise GateworkError(f"{path} is damaged: {error}", fix=DOWNLOAD) from None
    except OSError as error:
        raise GateworkError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(state, dict):
        raise GateworkError(f"{path} is no state dict", got=type(state).__name__, expected="a dict of tensors")
    return {name: locate(path, name, tensor, folder, records) for name, tensor in state.items()}


class PatientFile(FileIO):
    """A file of which nothing large is read at once: zipfile takes a directory of any size that the file names."""

    def read(self, size: int | None = -1) -> bytes:
        """At most MAX_DIRECTORY_BYTES, or ValueError."""
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise ValueError(f"it asks for {size} bytes at once, and at most {MAX_DIRECTORY_BYTES} are read")
        return super().read(size) or b""


def read_records(file: FileIO) -> tuple[str, dict[str, tuple[int, int]]]:
    """The folder of a `torch.save` archive, and position and size of every record, all of which are uncompressed."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    size = file.seek(0, 2)
    records: dict[str, tuple[int, int]] = {}
    for entry in entries:
        file.seek(entry.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
        start = entry.header_offset + 30 + name_bytes + extra_bytes
        stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1  # nor encrypted
        if not stored or entry.compress_size != entry.file_size or start + entry.file_size > size:
            raise ValueError(f"record {entry.filename!r} is not whole, or not as torch.save writes it")
        if entry.filename in records:
            raise ValueError(f"record {entry.filename!r} is there twice")
        records[entry.filename] = start, entry.file_size
    folders = {name.partition("/")[0] for name in records}
    folder = next(iter(folders), "")
    if len(folders) != 1 or f"{folder}/data.pkl" not in records:
        raise ValueError("it has not one folder with a data.pkl")
    return folder, records


def read_record(file: FileIO, place: tuple[int, int]) -> bytes:
    """The content of a small record."""
    start, size = place
    if size > MAX_PICKLE_BYTES:
        raise ValueError(f"its description of the tensors has {size} bytes, and at most {MAX_PICKLE_BYTES} are read")
    file.seek(start)
    return file.read(size)


def locate(path: Path, name: Any, tensor: Any, folder: str, records: dict[str, tuple[int, int]]) -> StoredTensor:
    """Where the bytes of a tensor lie."""
    if not isinstance(name, str) or not isinstance(tensor, PickledTensor):
        got = f"{name!r}: {type(tensor).__name__}"
        raise GateworkError(f"{path} holds something that is no tensor", got=got, expected="a flat dict of tensors")
    if not tensor.is_contiguous():
        raise GateworkError(f"tensor {name} in {path} is not stored row by row", fix="save it with .contiguous()")
    start, size = records.get(f"{folder}/data/{tensor.key}", (0, 0))
    first = tensor.offset * tensor.item_bytes
    nbytes = math.prod(tensor.shape) * tensor.item_bytes
    if nbytes and first + nbytes > size:
        raise GateworkError(f"tensor {name} in {path} lies outside its record", fix=DOWNLOAD)
    return StoredTensor(path, tensor.dtype, tensor.shape, start + first)
