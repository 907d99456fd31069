"""Grok-1's own files: `ckpt-0/tensorNNNNN_000`, a pickled array each, numbered in the order of JAX's sorted names.

Matrices are stored (in, out), those of a layer's experts as one [E, in, out]; in 8 bits they have scales [..., groups, out],
each for the rows of one of `groups` equal blocks: one, or eight where the rows were split over eight devices.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gatework.export import folder as folders
from gatework.export.families.grok1 import tensor_names
from gatework.export.numpy_pickle import PickledArray, read_array
from gatework.export.stored import StoredTensor
from gatework.export.torch_pickle import ForeignGlobal
from gatework.plugins.errors import GateworkError

FOLDER, FIRST = "ckpt-0", "tensor00000_000"
MAX_FILES = 20_000
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_DOWNLOAD = "download the file again"


@dataclass(frozen=True, slots=True)
class ScaledTensor:
    """codes [rows, columns] int8, times scales [blocks of rows, columns] bfloat16: exact in float32."""

    codes: StoredTensor
    scales: StoredTensor
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def offset(self) -> int:
        """Of the codes, from the file's start."""
        return self.codes.offset

    def read_into(self, out: Tensor, start: int) -> None:
        codes = torch.empty(out.shape, dtype=torch.int8)
        self.codes.read_into(codes, start)
        out.copy_(codes)
        size, stop = self.shape[0] // self.scales.shape[0], start + out.shape[0]
        blocks = range(start // size, -(-stop // size))
        scales = torch.empty((len(blocks), self.shape[1]), dtype=torch.bfloat16)
        self.scales.read_into(scales, blocks.start)
        for block, scale in zip(blocks, scales.float(), strict=True):
            out[max(block * size - start, 0) : (block + 1) * size - start] *= scale


def has_ckpt(folder: Path) -> bool:
    """Whether a folder is `ckpt-0`, or holds it."""
    return folders.exists(folder, FIRST) or folders.exists(folder, f"{FOLDER}/{FIRST}")


def read_ckpt(folder: Path) -> dict[Path, dict[str, StoredTensor | ScaledTensor]]:
    """Every file with its one tensor, named after its module; experts as matrices [E * in, out].

    Only what describes the arrays is read. Raises GateworkError for a file that is missing, damaged, or holds anything else.
    """
    prefix = "" if folders.exists(folder, FIRST) else f"{FOLDER}/"
    home = folder / prefix
    count = sum(re.fullmatch(r"tensor\d{5}_000", path.name, re.ASCII) is not None for path in home.iterdir())
    layers, rest = divmod(count - 2, 12)
    if rest or layers < 1 or count > MAX_FILES:
        expected = "2 files, and 12 for every layer: 770 in xAI's release"
        raise GateworkError(f"{home} is not whole", got=f"{count} files", expected=expected, fix="download all of them")
    files: dict[Path, dict[str, StoredTensor | ScaledTensor]] = {}
    for i, name in enumerate(tensor_names(layers)):
        path = folders.member(folder, f"{prefix}tensor{i:05d}_000")
        if not path.is_file():
            raise GateworkError(f"{path} is missing", fix="download it")
        files[path] = {name: read_tensor(path)}
    return files


def read_tensor(path: Path) -> StoredTensor | ScaledTensor:
    """The tensor of one file."""
    try:
        with path.open("rb") as file:
            found = read_array(file, path.stat().st_size)
        if isinstance(found, PickledArray):
            return _matrix(path, found, "float32")
        codes, scales = found.weight, found.scales
        if not isinstance(codes, PickledArray) or not isinstance(scales, PickledArray):
            raise ValueError("its codes or scales are no array")
        return _scaled(path, codes, scales)
    except ForeignGlobal as error:
        fix = "use only the files that xAI published"
        raise GateworkError(f"{path} holds more than an array and was not loaded", got=error, fix=fix) from None
    except ValueError as error:
        raise GateworkError(f"{path} is damaged: {error}", fix=_DOWNLOAD) from None
    except OSError as error:
        raise GateworkError(f"cannot read {path}: {error.strerror}") from None


def _scaled(path: Path, codes: PickledArray, scales: PickledArray) -> ScaledTensor:
    if codes.shape[:-2] != scales.shape[:-2] or len(codes.shape) < 2 or codes.shape[-1:] != scales.shape[-1:]:
        raise ValueError(f"its scales {scales.shape} do not fit its codes {codes.shape}")
    if not 1 <= scales.shape[-2] <= codes.shape[-2] or codes.shape[-2] % scales.shape[-2]:
        raise ValueError(f"its scales {scales.shape} do not divide its codes {codes.shape}")
    return ScaledTensor(_matrix(path, codes, "int8"), _matrix(path, scales, "bfloat16"))


def _matrix(path: Path, array: PickledArray, dtype: str) -> StoredTensor:
    """An array of up to three axes, the first two as one."""
    if array.dtype != dtype:
        raise ValueError(f"its array has the type {array.dtype!r}, and {dtype} was expected")
    if math.prod(array.shape) * _ITEM_BYTES[dtype] != array.nbytes:
        raise ValueError(f"its array {array.shape} has {array.nbytes} bytes")
    shape = (math.prod(array.shape[:-1]), array.shape[-1]) if len(array.shape) == 3 else array.shape
    return StoredTensor(path, dtype, shape, array.start)
