"""Runs the launch table of `gatework::MoE` under Triton's interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when it is first imported, and what it then makes of a kernel cannot be compiled.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any, Literal

import ml_dtypes
import numpy as np

from gatework.plugins.moe.kernels.launches import launches
from gatework.plugins.moe.spec import MoEAttributes
from tests.plugins import ptx
from tests.plugins.moe_cases import Array
from tests.plugins.moe_memory import CallMemory

ARRAYS = {"*fp16": "float16", "*bf16": "bfloat16", "*fp32": "float32", "*i32": "int32", "*i8": "int8", "*u8": "uint8"}
ALL = ("route", "drop", "dispatch", "quantize", "gemm_in", "gemm_out", "combine")
ARRAYS |= {"*fp8e4nv": "float8_e4m3fn"}


@contextmanager
def interpreter() -> Iterator[Executor]:
    """An executor whose one process interprets kernels."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin) as pool:
        yield pool


def _begin() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    _mend_interpreter()


def _mend_interpreter() -> None:
    """Make conversions to and from bfloat16 and float8, and products in them, what GPUs make of them.

    Triton 3.7's interpreter keeps both as bits in integers: it cuts float32 off instead of rounding it to bfloat16, drops
    the carry when it rounds to float8, makes a bfloat16 of an integer's bits, and multiplies bfloat16's bits as integers. It
    has no inline assembly.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    numbers = {tl.bfloat16: np.dtype(ml_dtypes.bfloat16), tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn)}
    builder = interpreter.InterpreterBuilder
    original_dot, original_multiply = builder.create_dot, builder.create_fmul

    def cast(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        have, want = source.dtype.scalar, target.scalar
        values = source.data.view(numbers.get(have, source.data.dtype))
        bits = interpreter._get_np_dtype(want)
        return interpreter.TensorHandle(values.astype(numbers.get(want, bits)).view(bits), want)

    def dot(self: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
        if a.dtype.scalar in numbers:
            a, b = (cast(self, each, tl.float32) for each in (a, b))
        return original_dot(self, a, b, total, *options)

    def multiply(self: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar not in numbers:
            return original_multiply(self, a, b)
        return cast(self, original_multiply(self, *(cast(self, each, tl.float32) for each in (a, b))), a.dtype.scalar)

    def inline_asm(self: Any, text: str, _: str, operands: Any, results: Any, pure: bool, pack: int) -> Any:
        """With `pack` elements in 32 bits of the first operand, and a result of 32 bits for each element."""
        if not text:
            return SimpleNamespace(get_result=lambda index: operands[0])
        words = [np.ascontiguousarray(each.data).reshape(-1).view(np.uint32) for each in operands]
        found = ptx.evaluate(text, pack, words).view(np.int32).reshape(operands[0].data.shape)
        handle = interpreter.TensorHandle(found, results[0].scalar)
        return SimpleNamespace(get_result=lambda index: handle)

    casts = [name for name in vars(builder) if name.startswith("create_") and "_to_" in name and "ptr" not in name]
    for name in (*casts, "create_int_cast", "create_fp_trunc", "create_fp_ext", "cast_impl"):
        setattr(builder, name, cast)
    builder.create_dot = dot
    builder.create_fmul = multiply
    builder.create_inline_asm = inline_asm


def interpret(
    sm: int,
    attributes: MoEAttributes,
    inputs: dict[str, Array],
    dtype: Literal["float16", "bfloat16"],
    kernels: Container[str] = ALL,
) -> dict[str, Array]:
    """y and the workspace's buffers, by name, after all launches of `kernels`."""
    memory = CallMemory(attributes, inputs, dtype)
    for launch in launches(sm, memory.sizes, attributes, dtype, has_bias="b_in" in inputs):
        if launch.variant.kernel in kernels:
            _run(launch, memory.buffers())
    return memory.results()


def _run(launch: Any, memory: dict[str, Array]) -> None:
    import torch

    from gatework.plugins.moe.kernels.registry import KERNELS

    types = {"float8_e4m3fn": torch.float8_e4m3fn}
    given: dict[str, Any] = dict(launch.variant.constants)
    for (name, kind), value in zip(launch.variant.arguments, launch.values, strict=True):
        if kind == "i32":
            assert isinstance(value, int)
            given[name] = value
            continue
        block = torch.from_numpy(memory[str(value)])
        dtype = types.get(ARRAYS[kind]) or getattr(torch, ARRAYS[kind])
        given[name] = block[: len(block) // dtype.itemsize * dtype.itemsize].view(dtype)
    KERNELS[launch.variant.kernel][launch.grid](**given)
