"""Weights in MXFP4: 4-bit floats, 32 of which share a power of two (OCP Microscaling Formats, version 1.0).

NAME_blocks  [E, rows, groups, 16]  uint8   two numbers a byte, the even column in its low nibble
NAME_scales  [E, rows, groups]      uint8   the exponent of two, plus 127; 255 is no number
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gatework.export.stored import Stored, StoredTensor
from gatework.plugins.errors import GateworkError

BLOCKS, SCALES = "_blocks", "_scales"
GROUP, BLOCK_BYTES = 32, 16
BIAS, NO_NUMBER = 127, 255
BYTE = "U8"  # what safetensors calls it
_HALF = (0, 1, 2, 3, 4, 6, 8, 12)  # twice the numbers of 1 sign bit, 2 of exponent, 1 of mantissa
CODES = torch.tensor([*_HALF, *(-x for x in _HALF)], dtype=torch.int8)


@dataclass(frozen=True, slots=True)
class MxCodes:
    """Twice the 4-bit floats of blocks: [E, rows, columns] int8."""

    blocks: StoredTensor
    dtype: str = "int8"

    @property
    def shape(self) -> tuple[int, ...]:
        *rows, groups, _ = self.blocks.shape
        return (*rows, groups * GROUP)

    def read_into(self, out: Tensor, start: int) -> None:
        blocks = torch.empty((len(out), *self.blocks.shape[1:]), dtype=torch.uint8)
        self.blocks.read_into(blocks, start)
        out.copy_(codes_of(blocks))


@dataclass(frozen=True, slots=True)
class MxScales:
    """Half of what multiplies the 4-bit floats: [E, rows, groups] bfloat16, which holds every such power of two."""

    exponents: StoredTensor
    dtype: str = "bfloat16"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.exponents.shape

    def read_into(self, out: Tensor, start: int) -> None:
        exponents = torch.empty(out.shape, dtype=torch.uint8)
        self.exponents.read_into(exponents, start)
        if bool((exponents == NO_NUMBER).any()):
            got, expected = f"{NO_NUMBER} in {self.exponents.path}", f"0 to {NO_NUMBER - 1}"
            raise GateworkError("a scale in MXFP4 is no number", got=got, expected=expected)
        out.copy_(scales_of(exponents))


@dataclass(frozen=True, slots=True)
class MxTensor:
    """A weight [E, rows, columns] of codes and scales, read as bfloat16, which holds every such number."""

    codes: MxCodes
    scales: MxScales

    @property
    def dtype(self) -> str:
        return "bfloat16"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def read_into(self, out: Tensor, start: int) -> None:
        codes = torch.empty(out.shape, dtype=torch.int8)
        scales = torch.empty((len(out), *self.scales.shape[1:]), dtype=torch.bfloat16)
        self.codes.read_into(codes, start)
        self.scales.read_into(scales, start)
        out.copy_(products(codes, scales))


def codes_of(blocks: Tensor) -> Tensor:
    """[..., groups * 32] int8 of blocks [..., groups, 16]."""
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-3)
    return CODES[nibbles.int()]


def scales_of(exponents: Tensor) -> Tensor:
    """[..., groups] float32 of what the file calls scales: half of the power of two."""
    return torch.ldexp(torch.ones(exponents.shape), exponents.int() - BIAS - 1)


def products(codes: Tensor, scales: Tensor) -> Tensor:
    """[..., groups * 32] float32."""
    return (codes.float().unflatten(-1, (-1, GROUP)) * scales.float()[..., None]).flatten(-2)


def is_packed(tensors: Mapping[str, Stored]) -> bool:
    """Whether a checkpoint holds weights in MXFP4."""
    return any(name.endswith(BLOCKS) for name in tensors)


def unpacked(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors with each pair of blocks and scales as one, under the name that both begin with.

    Raises GateworkError for a pair that is not whole or does not fit together.
    """
    rest = dict(tensors)
    for name in [name for name in tensors if name.endswith(BLOCKS)]:
        stem = name.removesuffix(BLOCKS)
        if f"{stem}{SCALES}" not in rest:
            raise GateworkError(f"tensor {stem}{SCALES} is missing, which belongs to {name}")
        if stem in rest:
            raise GateworkError(f"tensor {stem} is there in MXFP4 and in floats", fix="keep one of the two")
        rest[stem] = _pair(stem, rest.pop(name), rest.pop(f"{stem}{SCALES}"))
    return rest


def _pair(stem: str, blocks: Stored, scales: Stored) -> MxTensor:
    fit = len(scales.shape) == 3 and blocks.shape == (*scales.shape, BLOCK_BYTES)
    if not fit or {blocks.dtype, scales.dtype} != {BYTE}:
        got = f"{blocks.dtype} {blocks.shape} and {scales.dtype} {scales.shape}"
        expected = f"{BYTE} [E, rows, groups, {BLOCK_BYTES}] and [E, rows, groups]"
        raise GateworkError(f"blocks and scales of {stem} do not fit together", got=got, expected=expected)
    assert isinstance(blocks, StoredTensor) and isinstance(scales, StoredTensor)
    return MxTensor(MxCodes(blocks), MxScales(scales))
