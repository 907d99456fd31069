"""The pickle of a `torch.save` archive read as data: what it says of its tensors, with nothing imported, called or allocated.

torch's own weights_only unpickler runs no foreign code either, but it makes what a pickle asks for, such as a bytearray of
any size, and hashes a tuple of tuples for ever.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_PICKLE_BYTES = 4 << 20  # some 200 bytes describe a tensor
MAX_STEPS = 500_000  # some 30 make a tensor
_MAX_STACK = 10_000  # torch.save puts a thousand names and tensors on it at most

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
}
_STORAGES |= {"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"}
_STORAGES |= {"ByteStorage": "uint8", "BoolStorage": "bool"}
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2}
_DTYPES = {*_STORAGES.values(), "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"}
_DICT, _PARAMETER = "collections OrderedDict", "torch._utils _rebuild_parameter"
_TENSOR, _TENSOR_OF_DTYPE = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"
_UNTYPED = "torch.storage UntypedStorage"
_GLOBALS = {_DICT, _PARAMETER, _TENSOR, _TENSOR_OF_DTYPE, _UNTYPED}
_GLOBALS |= {f"torch {name}" for name in (*_STORAGES, *_DTYPES)}


class ForeignGlobal(Exception):  # noqa: N818
    """The pickle names a class or function that no tensor needs."""


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor over the record `data/{key}`: offset and strides in elements."""

    dtype: str
    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return _ITEM_BYTES.get(self.dtype, 1)

    def is_contiguous(self) -> bool:
        """Whether the elements lie row by row."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class _Global:
    name: str  # "module name"


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str | None
    key: str


_MARK = object()


def read_state(data: bytes) -> Any:
    """The pickled object: dicts, lists, tuples, texts, numbers, and PickledTensors.

    Raises ForeignGlobal for anything else that it would make, and ValueError for a pickle that is damaged or makes no sense.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name == "STOP":
                return stack[-1]
            _step(opcode.name, argument, stack, memo)
            if len(stack) > _MAX_STACK or step > MAX_STEPS:
                raise ValueError("its pickle is nested too deeply or too long")
    except (IndexError, KeyError, TypeError, AttributeError):
        raise ValueError("its pickle makes no sense") from None
    raise ValueError("its pickle has no end")


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """Run one opcode (the comments of CPython's Lib/pickletools.py define them)."""
    if name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
        stack.append(argument)
    elif name == "GLOBAL":
        if argument not in _GLOBALS:
            raise ForeignGlobal(argument.replace(" ", "."))
        stack.append(_Global(argument))
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name]())
    elif name in _TUPLES:
        items = [stack.pop() for _ in range(_TUPLES[name])]
        stack.append(tuple(reversed(items)))
    elif name == "TUPLE":
        stack.append(tuple(_to_mark(stack)))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "REDUCE":
        arguments = stack.pop()
        stack.append(_call(stack.pop(), arguments))
    elif name == "APPEND":
        _add_to_list(stack, [stack.pop()])
    elif name == "APPENDS":
        _add_to_list(stack, _to_mark(stack))
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _add_to_dict(stack, [key, value])
    elif name == "SETITEMS":
        _add_to_dict(stack, _to_mark(stack))
    elif name == "BUILD":  # an OrderedDict's attributes: a module's `_metadata`
        stack.pop()
    elif name != "PROTO":
        raise ValueError(f"its pickle has the opcode {name}, which torch.save does not write")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _to_mark(stack: list[Any]) -> list[Any]:
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _add_to_list(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], list):
        raise TypeError
    stack[-1].extend(items)


def _add_to_dict(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], dict):
        raise TypeError
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):  # a tuple's hash can take for ever
            raise ValueError(f"its pickle has a {type(key).__name__} for a name")
        stack[-1][key] = value


def _storage(description: Any) -> _Storage:
    kind, storage, key, _location, _size = description
    if kind != "storage" or not isinstance(key, str):
        raise TypeError
    return _Storage(None if storage.name == _UNTYPED else _STORAGES[storage.name.removeprefix("torch ")], key)


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What the function would make of the arguments."""
    if function.name == _DICT and arguments == ():
        return {}
    if function.name == _PARAMETER and isinstance(arguments[0], PickledTensor):
        return arguments[0]
    if function.name not in (_TENSOR, _TENSOR_OF_DTYPE):
        raise TypeError
    storage, offset, shape, strides = arguments[:4]
    dtype = storage.dtype
    if function.name == _TENSOR_OF_DTYPE:
        dtype = arguments[6].name.removeprefix("torch ")
    numbers = (offset, *shape, *strides)
    if dtype not in _DTYPES or len(shape) != len(strides):
        raise TypeError
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError("its pickle has a tensor of impossible sizes")
    return PickledTensor(dtype, storage.key, offset, shape, strides)
