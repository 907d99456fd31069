"""A pickled NumPy array, or one in 8 bits with its scales, read as data: nothing is imported, called or allocated.

Every byte string is stepped over and only its place kept, so that a file of any size costs a few reads.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from gatework.export.torch_pickle import ForeignGlobal

MAX_STEPS = 1_000  # some 150 make an array in 8 bits
_DTYPES = {"f4": "float32", "i1": "int8"}
_RECONSTRUCT = (
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct",
)  # before NumPy 2, and since
_ARRAY, _DTYPE, _BFLOAT16 = "numpy ndarray", "numpy dtype", "ml_dtypes bfloat16"
_QUANTIZED = "__main__ QuantizedWeight8bit"
_GLOBALS = {*_RECONSTRUCT, _ARRAY, _DTYPE, _BFLOAT16, _QUANTIZED}


@dataclass(slots=True)
class PickledArray:
    """Row-major elements, little-endian, `nbytes` bytes from `start` on in the file."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    start: int = 0
    nbytes: int = 0


@dataclass(slots=True)
class PickledWeight:
    """An object of class QuantizedWeight8bit."""

    weight: Any = None
    scales: Any = None


@dataclass(frozen=True, slots=True)
class _Global:
    name: str  # "module name"


@dataclass(slots=True)
class _Dtype:
    name: str


@dataclass(frozen=True, slots=True)
class _Bytes:
    start: int
    nbytes: int


_MARK = object()
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}
_NUMBERS = {ord("J"): "<i", ord("K"): "<B", ord("M"): "<H"}
_BYTES = {ord("C"): "<B", ord("B"): "<I", 0x8E: "<Q"}  # how the length of a byte string is written
_SKIPPED = {0x80: 1, 0x95: 8}  # protocol, frame: bytes of their argument


def read_array(file: BinaryIO, size: int) -> PickledArray | PickledWeight:
    """What a file of `size` bytes holds, at its start.

    Raises ForeignGlobal for anything else that it would make, and ValueError for a pickle that is damaged or makes no sense.
    """
    machine = _Machine(file, size)
    try:
        for _ in range(MAX_STEPS):
            if machine.step():
                found = machine.stack.pop()
                if isinstance(found, PickledArray | PickledWeight):
                    return found
                raise ValueError(f"it holds a {type(found).__name__} and no array")
    except (IndexError, KeyError, TypeError, AttributeError, struct.error):
        raise ValueError("its pickle makes no sense") from None
    raise ValueError("its pickle is too long")


class _Machine:
    """The pickle machine, with the opcodes that an array takes in protocol 4 (Lib/pickletools.py defines them)."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def step(self) -> bool:
        """Run one opcode; whether it was the last."""
        (code,) = self.read("<B")
        stack = self.stack
        if code in _SKIPPED:
            self.file.seek(_SKIPPED[code], 1)
        elif code in _BYTES:
            (length,) = self.read(_BYTES[code])
            stack.append(_Bytes(self.file.tell(), length))
            if self.file.tell() + length > self.size:
                raise ValueError("it is cut short")
            self.file.seek(length, 1)
        elif code in _NUMBERS:
            stack.extend(self.read(_NUMBERS[code]))
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _TUPLES:
            stack.append(tuple(reversed([stack.pop() for _ in range(_TUPLES[code])])))
        elif code == 0x8C:  # SHORT_BINUNICODE
            (length,) = self.read("<B")
            stack.append(self.read(f"{length}s")[0].decode("utf-8", "replace"))
        elif code == 0x8A:  # LONG1
            (length,) = self.read("<B")
            stack.append(int.from_bytes(self.read(f"{length}s")[0], "little", signed=True))
        elif code == 0x94:  # MEMOIZE
            self.memo.append(stack[-1])
        elif code == ord("h"):  # BINGET
            stack.append(self.memo[self.read("<B")[0]])
        elif code == ord("("):
            stack.append(_MARK)
        elif code == ord(")"):
            stack.append(())
        elif code == ord("}"):
            stack.append({})
        elif code == ord("t"):
            stack.append(tuple(self.to_mark()))
        elif code == ord("u"):  # SETITEMS
            items = self.to_mark()
            for key, value in zip(items[::2], items[1::2], strict=True):
                if not isinstance(key, str):  # a tuple's hash can take for ever
                    raise TypeError
                stack[-1][key] = value
        elif code == 0x93:  # STACK_GLOBAL
            name, module = stack.pop(), stack.pop()
            stack.append(_global(module, name))
        elif code in (ord("R"), 0x81):  # REDUCE, NEWOBJ
            arguments = stack.pop()
            stack.append(_made(stack.pop(), arguments))
        elif code == ord("b"):  # BUILD
            state = stack.pop()
            _build(stack[-1], state)
        elif code == ord("."):
            return True
        else:
            raise ValueError(f"its pickle has the opcode {code:#04x}, which no array needs")
        return False

    def read(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.file.read(struct.calcsize(form)))

    def to_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]


def _global(module: Any, name: Any) -> _Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError
    if f"{module} {name}" not in _GLOBALS:
        raise ForeignGlobal(f"{module}.{name}")
    return _Global(f"{module} {name}")


def _made(function: _Global, arguments: tuple[Any, ...]) -> Any:
    """What calling it would give."""
    if function.name in _RECONSTRUCT:
        return PickledArray()
    if function.name == _QUANTIZED and arguments == ():
        return PickledWeight()
    if function.name != _DTYPE:
        raise TypeError
    kind = arguments[0]
    if kind == _Global(_BFLOAT16):
        return _Dtype("bfloat16")
    if not isinstance(kind, str):
        raise TypeError
    return _Dtype(_DTYPES.get(kind, kind))


def _build(made: Any, state: Any) -> None:
    """Give an object the attributes that were pickled with it."""
    if isinstance(made, _Dtype):
        if state[1] not in ("<", "|"):
            raise ValueError("its numbers are not little-endian")
    elif isinstance(made, PickledArray):
        _, shape, dtype, by_columns, data = state
        if by_columns is not False:
            raise ValueError("its array is not stored row by row")
        if not 1 <= len(shape) <= 3 or not all(type(n) is int and 0 < n < 2**48 for n in shape):
            raise ValueError("its array has impossible sizes")
        made.dtype, made.shape, made.start, made.nbytes = dtype.name, shape, data.start, data.nbytes
    elif isinstance(made, PickledWeight):
        made.weight, made.scales = state["weight"], state["scales"]
    else:
        raise TypeError
