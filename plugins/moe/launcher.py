"""Puts the kernels of `gatework::MoE` on a CUDA stream, through the driver API of cuda-bindings.

    launcher = Launcher()                      in a current CUDA context, whose device it serves
    launcher.add(engine / "kernels")           loads compiled kernels
    launcher(Call(...))                        enqueues; what a CUDA graph captures is then all kernels

A call allocates nothing on the device, waits for nothing and reads no data. All that depends on a call's sizes is worked
out once and kept (`Arguments`); later calls of those sizes only write their addresses and launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import addressof, c_uint64, sizeof
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.kernels.compile import HIDDEN, Compiled, compile_variant, load
from gatework.plugins.moe.kernels.launches import Variant, launches
from gatework.plugins.moe.spec import MoEAttributes, MoESizes
from gatework.plugins.moe.workspace import layout

REQUIREMENT = "cuda-bindings>=12.9,<14"
ACTIVATION_BYTES = 2
ALIGNED = 16  # bytes; kernels are compiled for addresses that are multiples of it
_UNASKED_SHARED = 48 << 10  # bytes of shared memory that a function may use without being told
_KEPT = 4096  # kinds of calls


class Call(NamedTuple):
    """One execution: device addresses as integers, inputs by their names in `spec.INPUTS`.

    `workspace` is laid out by `gatework.plugins.moe.workspace`. All addresses are multiples of 16.
    """

    attributes: MoEAttributes
    sizes: MoESizes
    dtype: Literal["float16", "bfloat16"]
    inputs: Mapping[str, int]
    y: int
    workspace: int
    stream: int


class Kind(NamedTuple):
    """All of a call but its addresses and its stream."""

    attributes: MoEAttributes
    sizes: MoESizes
    dtype: Literal["float16", "bfloat16"]
    inputs: tuple[str, ...]


class Arguments:
    """The launches of one kind of call, and what they are passed, in memory as cuLaunchKernel reads it.

    slots: 8 bytes each: the inputs' addresses, the workspace's buffers', y's; then a zero and the launches' integers.
    pointers: for each launch, the address of the slot of each of its kernel's parameters, the two hidden ones included.
    """

    def __init__(self, sm: int, kind: Kind) -> None:
        attributes, sizes, dtype, inputs = kind
        if ("b_in" in inputs) != ("b_out" in inputs):
            raise GateworkError("MoE kernels take both biases or none", got=", ".join(inputs))
        self.launches = launches(sm, sizes, attributes, dtype, has_bias="b_in" in inputs)
        offsets = layout(sizes, attributes, ACTIVATION_BYTES).offsets
        self.offsets = tuple(offsets.values())
        values: dict[str | int, int] = {name: i for i, name in enumerate((*inputs, *offsets, "y"))}
        self.addresses = len(values)
        passed = (value for launch in self.launches for value in launch.values if isinstance(value, int))
        for number in (0, *passed):
            values.setdefault(number, len(values))
        self.slots = (c_uint64 * len(values))(*(key if isinstance(key, int) else 0 for key in values))
        start = addressof(self.slots)
        self.pointers = []
        for launch in self.launches:
            keys = (*launch.values, *(0 for _ in HIDDEN))
            self.pointers.append((c_uint64 * len(keys))(*(start + sizeof(c_uint64) * values[key] for key in keys)))

    def bind(self, call: Call) -> None:
        """Write the addresses of a call of this kind."""
        workspace = call.workspace
        addresses = [*call.inputs.values(), *(workspace + offset for offset in self.offsets), call.y]
        if any(address % ALIGNED for address in addresses):
            raise GateworkError(
                "a MoE tensor lies at an odd address", expected=f"multiples of {ALIGNED}", got=addresses
            )
        self.slots[: self.addresses] = addresses  # type: ignore[assignment]


class _Step(NamedTuple):
    """cuLaunchKernel's arguments before the stream, and the address of the parameters' pointers after it."""

    function: Any
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    pointers: int


class Launcher:
    """Serves calls on the device of the context that is current when it is made, from any thread in which it is current.

    Where none is current, the primary one of device 0 becomes so, which torch and TensorRT use too.

    compiling: Triton compiles kernels that were not added, when a call first needs them; never while a graph is captured.
    """

    def __init__(self, *, compiling: bool = False) -> None:
        self.driver = _driver()
        self.sm = served_by(_current_sm(self.driver))
        self.compiling = compiling
        self._functions: dict[str, tuple[Any, Compiled]] = {}
        self._lock = Lock()
        self._prepare = lru_cache(maxsize=_KEPT)(self._prepared)

    def add(self, directory: Path) -> None:
        """Load all kernels of an engine's folder onto the device."""
        sm, kernels = load(directory)
        # Code for sm_80 runs on all of the 8.x devices; that for later ones uses what no other device has.
        if not (sm == self.sm or sm == 80 < self.sm < 90):
            fix = "build the engine for this device"
            raise GateworkError(f"{directory} holds kernels for another GPU", got=f"sm_{sm}, on sm_{self.sm}", fix=fix)
        for kernel in kernels.values():
            self._load(kernel)

    def __call__(self, call: Call) -> None:
        """Enqueue a call's kernels on its stream."""
        attributes, sizes, dtype, inputs, _, _, stream = call
        with self._lock:  # the driver reads the arguments before cuLaunchKernel returns
            arguments, steps = self._prepare(Kind(attributes, sizes, dtype, tuple(inputs)))
            arguments.bind(call)
            launch = self.driver.cuLaunchKernel
            for function, grid, block, shared, pointers in steps:
                (status,) = launch(function, *grid, *block, shared, stream, pointers, 0)
                if status:
                    _check(self.driver, "cuLaunchKernel", status)

    def _prepared(self, kind: Kind) -> tuple[Arguments, list[_Step]]:
        arguments = Arguments(self.sm, kind)
        steps = []
        for launch, pointers in zip(arguments.launches, arguments.pointers, strict=True):
            function, kernel = self._function(launch.variant)
            steps.append(_Step(function, launch.grid, kernel.block, kernel.shared, addressof(pointers)))
        return arguments, steps

    def _function(self, variant: Variant) -> tuple[Any, Compiled]:
        if variant.name not in self._functions:
            if not self.compiling:
                fix = "stay within the engine's limits, or build it again with this version"
                raise GateworkError(f"no kernel {variant.kernel} was compiled for this call", got=variant.name, fix=fix)
            self._load(compile_variant(variant, self.sm))
        return self._functions[variant.name]

    def _load(self, kernel: Compiled) -> None:
        if kernel.name in self._functions:
            return
        driver = self.driver
        module = _check(driver, "cuModuleLoadData", *driver.cuModuleLoadData(kernel.cubin))
        function = _check(driver, "cuModuleGetFunction", *driver.cuModuleGetFunction(module, kernel.entry.encode()))
        if kernel.shared > _UNASKED_SHARED:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver, "cuFuncSetAttribute", *driver.cuFuncSetAttribute(function, attribute, kernel.shared))
        self._functions[kernel.name] = function, kernel


def served_by(sm: int) -> int:
    """The compute capability whose kernels a device runs: those of sm_80 on all from 8.0 to 8.8, others on their own only."""
    return 80 if 80 <= sm < 89 else sm


def _current_sm(driver: Any) -> int:
    """Compute capability of the current context's device: 90 for 9.0."""
    if not int(_check(driver, "cuCtxGetCurrent", *driver.cuCtxGetCurrent())):
        context = _check(driver, "cuDevicePrimaryCtxRetain", *driver.cuDevicePrimaryCtxRetain(0))
        _check(driver, "cuCtxSetCurrent", *driver.cuCtxSetCurrent(context))
    device = _check(driver, "cuCtxGetDevice", *driver.cuCtxGetDevice())
    names = driver.CUdevice_attribute
    major, minor = (
        _check(driver, "cuDeviceGetAttribute", *driver.cuDeviceGetAttribute(name, device))
        for name in (
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return 10 * major + minor


def _driver() -> Any:
    """The module cuda.bindings.driver, with the driver library behind it."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        fix = f"pip install '{REQUIREMENT}'"
        raise GateworkError("the Python module cuda.bindings does not load", got=error, fix=fix) from error
    try:
        status = driver.cuInit(0)
    except RuntimeError as error:
        raise GateworkError("MoE kernels need a GPU and NVIDIA's driver", got=error) from error
    _check(driver, "cuInit", *status)
    return driver


def _check(driver: Any, function: str, status: Any, *results: Any) -> Any:
    """The call's result; GateworkError with CUDA's name of an error."""
    if status:
        raise GateworkError(f"CUDA's {function} failed", got=driver.CUresult(status).name)
    return results[0] if results else None
