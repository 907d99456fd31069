"""What the launcher passes to the GPU kernels, against the kernels' own parameters as their cubins have them. No GPU."""

from __future__ import annotations

from ctypes import string_at
from functools import cache
from typing import Any

import pytest

from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import gpu_capability
from gatework.plugins.moe.kernels.compile import Compiled, compile_variant
from gatework.plugins.moe.kernels.launches import Launch, Variant
from gatework.plugins.moe.kernels.registry import KERNELS
from gatework.plugins.moe.launcher import Arguments, Call, Kind, Launcher, served_by
from gatework.plugins.moe.spec import MoEAttributes, MoESizes
from gatework.plugins.moe.tensorrt import input_names
from gatework.plugins.moe.workspace import layout
from tests.plugins.cubin import signature

D, E, I = 96, 5, 64
CASES: list[tuple[int, Any, int, bool]] = [
    (80, "dense", 0, True),
    (80, "int4", 32, False),
    (89, "fp8_e4m3", 0, False),
    (90, "fp8_e4m3", 0, True),
    (90, "int8", 0, False),
    (120, "int8", 16, True),
]
EIGHT_BIT = ("*i8", "*fp8e4nv")


def call_of(kind: Kind, start: int = 1 << 40) -> Call:
    """Every tensor at an address of its own that 32 bits do not hold."""
    inputs = {name: start + (i << 33) for i, name in enumerate(kind.inputs)}
    return Call(kind.attributes, kind.sizes, kind.dtype, inputs, start + (20 << 33), start + (30 << 33), 0)


@cache
def compiled(variant: Variant, sm: int) -> Compiled:
    return compile_variant(variant, sm)


def expected_bytes(launch: Launch, call: Call) -> list[bytes]:
    """What each parameter of the Triton function should get: told by its name, but for integers and the quantiser's."""
    workspace = layout(call.sizes, call.attributes, 2)
    places = dict(call.inputs) | {"y": call.y}
    places |= {name: call.workspace + offset for name, offset in workspace.offsets.items()}
    kinds = dict(launch.variant.arguments)
    side = "hidden" if "hidden" in launch.values else "x"
    renamed = {"values": side, "codes": f"{side}_codes", "scales": f"{side}_scale"}
    given = dict(zip(kinds, launch.values, strict=True))
    expected = []
    for name in (name for name in KERNELS[launch.variant.kernel].arg_names if name in kinds):
        if kinds[name] == "i32":
            expected.append(int(given[name]).to_bytes(4, "little"))
            continue
        if launch.variant.kernel == "quantize":
            name = renamed[name]
        elif name in ("x", "hidden") and kinds[name] in EIGHT_BIT:
            name = f"{name}_codes"
        expected.append(places[name].to_bytes(8, "little"))
    return [*expected, bytes(8), bytes(8)]


@pytest.mark.parametrize(("sm", "weight_format", "group_size", "has_bias"), CASES)
def test_arguments_are_what_the_compiled_kernels_take(
    sm: int, weight_format: Any, group_size: int, has_bias: bool
) -> None:
    attributes = MoEAttributes(top_k=2, weight_format=weight_format, group_size=group_size, capacity_factor=1.0)
    inputs = input_names(attributes, has_bias=has_bias)
    for T in (3, 40, 400):
        kind = Kind(attributes, MoESizes(T, D, E, I), "bfloat16", inputs)
        call, arguments = call_of(kind), Arguments(sm, kind)
        arguments.bind(call)
        assert len(arguments.launches) == len(arguments.pointers) > 5
        for launch, pointers in zip(arguments.launches, arguments.pointers, strict=True):
            kernel = compiled(launch.variant, sm)
            takes = signature(kernel.cubin, kernel.entry)
            assert takes.block == kernel.block
            assert len(pointers) == len(takes.parameters) == len(kernel.arguments)
            passed = [string_at(at, each.size) for at, each in zip(pointers, takes.parameters, strict=True)]
            assert passed == expected_bytes(launch, call), launch.variant.kernel


def test_a_second_call_passes_its_own_addresses() -> None:
    attributes = MoEAttributes(top_k=2)
    kind = Kind(attributes, MoESizes(7, D, E, I), "float16", input_names(attributes, has_bias=False))
    arguments = Arguments(90, kind)
    for start in (1 << 40, 1 << 44):
        call = call_of(kind, start)
        arguments.bind(call)
        combine, pointers = arguments.launches[-1], arguments.pointers[-1]
        passed = [string_at(at, 8) for at in pointers]
        assert passed == expected_bytes(combine, call)


def test_no_tokens_launch_nothing() -> None:
    attributes = MoEAttributes(top_k=2)
    kind = Kind(attributes, MoESizes(0, D, E, I), "float16", input_names(attributes, has_bias=False))
    arguments = Arguments(80, kind)
    arguments.bind(call_of(kind))
    assert arguments.launches == ()


def test_what_the_kernels_cannot_take_is_refused() -> None:
    attributes = MoEAttributes(top_k=2)
    kind = Kind(attributes, MoESizes(7, D, E, I), "float16", ("x", "router_logits", "w_in", "w_out"))
    arguments = Arguments(80, kind)
    with pytest.raises(GateworkError, match=r"lies at an odd address; got .*; expected multiples of 16"):
        arguments.bind(call_of(kind)._replace(y=(1 << 40) + 8))
    with pytest.raises(GateworkError, match="both biases or none"):
        Arguments(80, kind._replace(inputs=(*kind.inputs, "b_in")))


def test_kernels_for_devices_without_ones_of_their_own() -> None:
    assert {sm: served_by(sm) for sm in (80, 86, 87, 89, 90, 120)} == {80: 80, 86: 80, 87: 80, 89: 89, 90: 90, 120: 120}


def test_cuda_bindings_have_what_is_used() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="no cuda-bindings: the names used are not checked")
    functions = ("cuInit", "cuCtxGetCurrent", "cuCtxGetDevice", "cuCtxSetCurrent", "cuDeviceGetAttribute")
    functions += ("cuDevicePrimaryCtxRetain", "cuFuncSetAttribute", "cuLaunchKernel", "cuModuleGetFunction")
    for name in (*functions, "cuModuleLoadData"):
        assert callable(getattr(driver, name))
    assert driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == 8
    for part, value in (("MAJOR", 75), ("MINOR", 76)):
        assert getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}") == value
    assert not driver.CUresult.CUDA_SUCCESS
    parameters = driver.cuLaunchKernel.__doc__.split("\n")[0]
    assert parameters.index("sharedMemBytes") < parameters.index("hStream") < parameters.index("kernelParams")


@pytest.mark.skipif(gpu_capability() is not None, reason="there is a GPU: tests/plugins/test_moe_gpu.py launches on it")
def test_without_a_gpu_there_is_no_launcher() -> None:
    with pytest.raises(GateworkError, match=r"need a GPU and NVIDIA's driver|cuda.bindings does not load"):
        Launcher()
