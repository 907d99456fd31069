"""Grok-1's `ckpt-0` in its true shapes, without its content: files with holes, of the sizes that xAI's have."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from tests.golden.grok1 import weights as grok1

BLOCK = 4096  # bytes
D, I, V, E, KV, LAYERS, SHARDS = 6144, 32768, 131072, 8, 1024, 64, 8
# Kind of file -> shape of the array or of its codes, blocks that share a scale, and bytes of the released file, as a public
# survey lists them. A NumPy of version 2 writes "numpy._core" instead of "numpy.core" into each, a byte more.
KINDS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "embeddings": ((V, D), 0, 3_221_225_637),
    "norm": ((D,), 0, 24_727),
    "gate, up": ((E, D, I), 1, 1_611_137_347),
    "down": ((E, I, D), SHARDS, 1_611_399_491),
    "key, value": ((D, KV), 1, 6_293_814),
    "output": ((D, D), SHARDS, 37_847_359),
    "query": ((D, D), 1, 37_761_334),
    "router": ((D, E), 0, 196_770),
}
_LAYER = ["gate, up", "down", "gate, up", "key, value", "output", "query", "key, value", *["norm"] * 4, "router"]
FILES = ["embeddings", "norm", *_LAYER * LAYERS]


def write_sparse_ckpt(folder: Path, *, linked: bool = True) -> dict[str, Path]:
    """Write the folder's 770 files; returns one of each kind. linked: those of one kind are links to one file."""
    written: dict[str, Path] = {}
    for i, kind in enumerate(FILES):
        path = folder / f"tensor{i:05d}_000"
        if kind in written and linked:
            os.link(written[kind], path)
        else:
            write_sparse(path, *KINDS[kind][:2])
            written[kind] = path
    return written


def write_sparse(path: Path, shape: tuple[int, ...], groups: int) -> None:
    """The pickle of a smaller array whose axes take as many bytes, its axes exchanged, and a hole where its content was."""
    dtype = np.int8 if groups else np.float32
    small = [n if n < 256 else 256 + n % 255 if n < 65536 else 65536 for n in shape]
    large = int(np.prod(shape)) * np.dtype(dtype).itemsize > 1 << 20
    content = np.zeros(small if large else shape, dtype)
    tensor: grok1.Tensor = content
    if groups:
        scales = np.zeros((*shape[:-2], groups, shape[-1]), ml_dtypes.bfloat16)
        tensor = grok1.QuantizedWeight8bit(content, scales)
    pickled = grok1.dumps(tensor)
    with path.open("wb") as file:
        if large:
            mark, nbytes = b"B" + struct.pack("<I", content.nbytes), int(np.prod(shape)) * content.itemsize
            start = pickled.index(mark) + len(mark)
            file.write(
                pickled[: start - len(mark)].replace(axes(small), axes(shape)) + b"B" + struct.pack("<I", nbytes)
            )
            file.seek(nbytes, 1)
            pickled = pickled[start + content.nbytes :]
        write_with_holes(file, pickled)


def write_with_holes(file: BinaryIO, content: bytes) -> None:
    """Write at the file's position, and leave out what is zero."""
    for start in range(0, len(content), BLOCK):
        block = content[start : start + BLOCK]
        if any(block) or start + BLOCK >= len(content):
            file.write(block)
        else:
            file.seek(len(block), 1)


def axes(shape: tuple[int, ...] | list[int]) -> bytes:
    """Sizes as a pickle spells them."""
    forms = [("K", "<B") if n < 256 else ("M", "<H") if n < 65536 else ("J", "<i") for n in shape]
    return b"".join(code.encode() + struct.pack(form, n) for (code, form), n in zip(forms, shape, strict=True))
