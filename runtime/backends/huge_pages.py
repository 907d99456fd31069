"""Weights of a CPU engine in huge pages of this process's own, from which they are read faster than from mapped files.

A mapped file has the pages in which the system's cache happens to hold it, small ones for the most part, and these cause misses
of the TLB: decoding was a fifth slower with them (benchmarks/README.md, Results).
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort

from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import available_memory, has_huge_pages, usable_cpus
from gatework.runtime.backends.weight_file import WeightTensor, read_header
from gatework.runtime.engine import Engine

_CHUNK = 32 << 20  # bytes that a thread reads at once
# safetensors' names of types: ONNX's numbers, and NumPy's types of that size.
_TYPES: dict[str, tuple[int, type[np.generic]]] = {
    "F32": (1, np.float32),
    "U8": (2, np.uint8),
    "I8": (3, np.int8),
    "I32": (6, np.int32),
    "I64": (7, np.int64),
    "BOOL": (9, np.bool_),
    "F16": (10, np.float16),
    "BF16": (16, np.uint16),
}


class HugePages:
    """A copy of an engine's weight files, made when the first session asks for it and kept for the next.

    None is made, and sessions map the files, where the system has no huge pages to give, or where copies of the whole engine's
    would take more than half of the memory that is available.

    folder: the engine's, or that of one of its stages, whose files are copied.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        sizes = {engine.path / name: facts["size"] for name, facts in engine.manifest["files"].items()}
        sizes = {path: size for path, size in sizes.items() if path.suffix == ".safetensors"}
        self._needed = sum(sizes.values())
        self._files = [path for path in sizes if path.parent == folder]
        self._tensors: dict[str, ort.OrtValue] | None = None

    def give(self, options: ort.SessionOptions) -> None:
        """Let a session take its weights from here; this object has to outlive it."""
        if self._tensors is None:
            self._tensors = self._copy()
        for name, tensor in self._tensors.items():
            options.add_initializer(name, tensor)

    def _copy(self) -> dict[str, ort.OrtValue]:
        if not has_huge_pages() or 2 * self._needed > available_memory():
            return {}
        try:
            return {name: tensor for file in self._files for name, tensor in _read(file).items()}
        except OSError:  # a limit of this process on its memory
            return {}


def _read(path: Path) -> dict[str, ort.OrtValue]:
    """The tensors of one file, in one block of memory, which lives as long as they do."""
    tensors, size = read_header(path), path.stat().st_size
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    with path.open("rb") as file, ThreadPoolExecutor(usable_cpus()) as pool:
        counts = pool.map(lambda start: _fill(block, file.fileno(), start), range(0, size, _CHUNK))
        whole = sum(counts) == size
    try:
        values = {name: _value(block, tensor) for name, tensor in tensors.items()}
    except (KeyError, ValueError):
        whole = False
    if not whole:
        raise GateworkError(f"{path} is damaged", fix="build the engine again")
    return values


def _fill(block: mmap.mmap, file: int, start: int) -> int:
    with memoryview(block)[start : start + _CHUNK] as place:
        return os.preadv(file, [place], start)


def _value(block: mmap.mmap, tensor: WeightTensor) -> ort.OrtValue:
    kind, dtype = _TYPES[tensor.dtype]
    array = np.frombuffer(block, np.uint8, tensor.nbytes, tensor.start).view(dtype).reshape(tensor.shape)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)
