"""Hostile files of Grok-1's `ckpt-0`: what is done to a sound checkpoint, and what the refusal says."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests import hostile
from tests.golden.grok1 import weights as grok1

FORM = "ckpt"
EMBEDDINGS, EXPERTS = "ckpt-0/tensor00000_000", "ckpt-0/tensor00002_000"
DAMAGED = r"tensor0000\d_000 is damaged"
MORE = r"tensor0000\d_000 holds more than an array"
DOUBLING = b")\x94" + b"h\0h\0\x86\x94" * 40  # tuples of tuples: hashing one takes for ever


class Shell:
    """Makes a file beside the checkpoint when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def make(folder: Path) -> Path:
    """A sound checkpoint of two layers."""
    return grok1.write_ckpt(folder / FORM, grok1.tensors(layers=2), grok1.CONFIG | {"num_hidden_layers": 2})


def raw(content: bytes, name: str = EMBEDDINGS) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(content)


def array(value: Any, name: str = EMBEDDINGS) -> Callable[[Path], object]:
    return raw(pickle.dumps(value, protocol=4), name)


def edited(before: bytes, after: bytes, name: str = EMBEDDINGS) -> Callable[[Path], object]:
    """The first bytes of that kind become others."""

    def craft(path: Path) -> None:
        content = (path / name).read_bytes()
        assert before in content
        (path / name).write_bytes(content.replace(before, after, 1))

    return craft


def scaled(codes: tuple[int, ...], scales: tuple[int, ...]) -> Callable[[Path], object]:
    """Codes and scales of other shapes."""

    def craft(path: Path) -> None:
        value = grok1.QuantizedWeight8bit(np.ones(codes, np.int8), np.ones(scales, ml_dtypes.bfloat16))
        other = grok1.write_ckpt(path.parent / "other", {("", ""): value}, None)
        (other / EMBEDDINGS).replace(path / EXPERTS)

    return craft


V, D = grok1.V, grok1.D
SHAPE = b"M" + V.to_bytes(2, "little") + b"K" + bytes([D])
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda path: array(Shell(path.parent / "ran"))(path), MORE + ".*system"),
    "code as the class of a weight": (edited(b"__main__", b"builtins", EXPERTS), MORE),
    "no array": (array([1, 2]), DAMAGED),
    "no array but a number": (array(7), DAMAGED),
    "nothing": (raw(b""), DAMAGED),
    "no end": (raw(b"\x80\x04}"), DAMAGED),
    "a million dicts": (raw(b"\x80\x04" + b"}" * 1_000_000 + b"."), DAMAGED),
    "bytes of 4 TB": (raw(b"\x80\x04\x8e" + (1 << 42).to_bytes(8, "little")), "is cut short"),
    "bytes of 2^63": (raw(b"\x80\x04\x8e" + b"\xff" * 8), "is cut short"),
    "text of 4 GB": (raw(b"\x80\x04X\xff\xff\xff\xff"), DAMAGED),
    "memo with a far place": (raw(b"\x80\x04h\x07."), DAMAGED),
    "tuples that double, as a name": (raw(b"\x80\x04" + DOUBLING + b"}(h\x28K\x01u."), DAMAGED),
    "tuples that double, as a type": (
        raw(b"\x80\x04" + DOUBLING + b"0\x8c\x05numpy\x8c\x05dtype\x93h\x28\x88\x88\x87R."),
        DAMAGED,
    ),
    "cut short": (lambda path: os.truncate(path / EMBEDDINGS, 1000), "is cut short"),
    "rows that are not there": (edited(SHAPE, b"M\xff\xffK" + bytes([D])), DAMAGED),
    "negative size": (edited(SHAPE, b"J\xff\xff\xff\xffK" + bytes([D])), DAMAGED),
    "no axes": (array(np.ones((), np.float32)), DAMAGED),
    "five axes": (array(np.ones((1, 1, 1, 1, 1), np.float32)), DAMAGED),
    "columns first": (array(np.asfortranarray(np.ones((V, D), np.float32))), "is not stored row by row"),
    "big-endian": (array(np.ones((V, D), ">f4")), "not little-endian"),
    "float64": (array(np.ones((V, D))), "float32 was expected"),
    "objects": (array(np.array([{}, {}])), DAMAGED),
    "another shape": (array(np.ones((V, D + 1), np.float32)), "embeddings .* has the wrong shape"),
    "scales of other columns": (scaled((8, 64, 88), (8, 1, 87)), "do not fit its codes"),
    "scales of other experts": (scaled((8, 64, 88), (7, 1, 88)), "do not fit its codes"),
    "scales that do not divide": (scaled((8, 64, 88), (8, 3, 88)), "do not divide its codes"),
    "more scales than codes": (scaled((8, 64, 88), (8, 128, 88)), "do not divide its codes"),
    "experts of another shape": (
        scaled((8, 64, 80), (8, 1, 80)),
        "decoder_layer_0/moe/linear/w .* has the wrong shape",
    ),
    "missing": (lambda path: (path / EXPERTS).unlink(), "is not whole; got 25 files"),
    "missing in between": (lambda path: (path / EXPERTS).rename(path / "ckpt-0/tensor00099_000"), "is missing"),
    "a pipe": (lambda path: hostile.pipe(path / EXPERTS), "is missing"),
    "leads outside": (lambda path: hostile.link(path / EXPERTS, "/etc/passwd"), "leads outside"),
    "of another number of layers": (
        lambda path: (path / "config.json").unlink(),
        "another number of layers; got files of 2; expected 64",
    ),
}
