"""Readers of weight files: which tensors a file holds and where, checked against its size, with no data read."""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from gatework.export.stored import TORCH_DTYPES, StoredTensor
from gatework.plugins.errors import GateworkError

SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DOWNLOAD = "download the file again"


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a `.safetensors` file. A damaged or truncated file is a GateworkError that names it."""
    try:
        # The library checks the header's size and JSON, and that the tensors cover the file without overlap.
        with safetensors.safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
    except (safetensors.SafetensorError, ValueError) as error:
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


def read_torch(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a state dict written by `torch.save` (`.bin`, `.pth`, `.pt`), unpickled with weights_only.

    A file with anything but tensors in its pickle, a damaged or truncated one, and one in the format of PyTorch before
    1.6 are GateworkErrors that name it.
    """
    records = storage_records(path)
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        lines = str(error).splitlines()
        reason = next((line for line in lines if "nsupported" in line), lines[0])  # the rest is advice to go unsafe
        fix = "use only tensors, such as the safetensors files of the same model"
        raise GateworkError(f"{path} holds more than tensors and was not loaded: {reason}", fix=fix) from None
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GateworkError(f"{path} is damaged: {reason}", fix=DOWNLOAD) from None
    if not isinstance(state, dict):
        raise GateworkError(f"{path} is no state dict", got=type(state).__name__, expected="a dict of tensors")
    return {name: locate(path, name, tensor, records) for name, tensor in state.items()}


def storage_records(path: Path) -> dict[int, int]:
    """Position and size of every uncompressed record of a `torch.save` archive."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = {}
            for entry in archive.infolist():
                file.seek(entry.header_offset + 26)
                name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
                start = entry.header_offset + 30 + name_bytes + extra_bytes
                if entry.compress_type != zipfile.ZIP_STORED or start + entry.file_size > size:
                    raise GateworkError(f"{path} is damaged: record {entry.filename!r} is not whole", fix=DOWNLOAD)
                records[start] = entry.file_size
                if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                    raise GateworkError(f"{path} was written on a big-endian machine")
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
        fix = f"{DOWNLOAD}; if it is from PyTorch before 1.6, save it again with torch.save"
        raise GateworkError(f"{path} is cut short or was not written by torch.save: {error}", fix=fix) from None
    except OSError as error:
        raise GateworkError(f"cannot read {path}: {error.strerror}") from None
    return records


def locate(path: Path, name: Any, tensor: Any, records: dict[int, int]) -> StoredTensor:
    """Where the bytes of a tensor lie that was loaded to the meta device."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        got = f"{name!r}: {type(tensor).__name__}"
        raise GateworkError(f"{path} holds something that is no tensor", got=got, expected="a flat dict of tensors")
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise GateworkError(f"tensor {name} in {path} is not stored row by row", fix="save it with .contiguous()")
    storage = tensor.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)  # set by torch.load for storages on the meta device
    first = tensor.storage_offset() * tensor.element_size()
    nbytes = math.prod(tensor.shape) * tensor.element_size()
    if nbytes and (start not in records or first + nbytes > records[start]):
        raise GateworkError(f"tensor {name} in {path} lies outside its record", fix=DOWNLOAD)
    dtype = next((word for word, known in TORCH_DTYPES.items() if known == tensor.dtype), str(tensor.dtype))
    return StoredTensor(path, dtype, tuple(tensor.shape), int(start or 0) + int(first))
