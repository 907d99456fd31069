"""What engines can be built for: one table of targets, with what each device and its toolchains can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gatework.plugins.errors import GateworkError

Toolchain = Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A kind of device.

    toolchains: in order of preference; tensorrt compiles only on such a device, tensorrt_rtx on any machine.
    capability: CUDA compute capability, (major, minor); None for CPUs.
    memory: bytes of the device; None where it is not a fixed size.
    """

    name: str
    precisions: tuple[str, ...]
    toolchains: tuple[Toolchain, ...]
    capability: tuple[int, int] | None = None
    memory: int | None = None

    @property
    def sm(self) -> str:
        """Such as "SM80"."""
        assert self.capability is not None
        return "SM{}{}".format(*self.capability)


_SM80 = ("bf16", "fp16", "int8", "int4")  # no float8 arithmetic before SM89
_SM89 = ("bf16", "fp16", "fp8", "int8", "int4")
_ANY: tuple[Toolchain, ...] = ("tensorrt", "tensorrt_rtx")
TARGETS = {
    target.name: target
    for target in (
        Target(name="cpu", precisions=("fp32", "int8", "int4"), toolchains=("onnxruntime",)),
        Target(name="a100", precisions=_SM80, toolchains=_ANY, capability=(8, 0), memory=80 << 30),
        Target(name="h100", precisions=_SM89, toolchains=("tensorrt",), capability=(9, 0), memory=80 << 30),
        Target(name="h200", precisions=_SM89, toolchains=("tensorrt",), capability=(9, 0), memory=141 * 10**9),
        Target(name="ada", precisions=_SM89, toolchains=_ANY, capability=(8, 9), memory=48 << 30),
        Target(name="rtx50", precisions=_SM89, toolchains=_ANY, capability=(12, 0), memory=32 << 30),
    )
}


def target_for(name: str, precision: str) -> Target:
    """The target of that name, which has to support the precision."""
    target = TARGETS.get(name)
    if target is None or precision not in target.precisions:
        pairs = ", ".join(f"{each.name}: {'|'.join(each.precisions)}" for each in TARGETS.values())
        raise GateworkError("this target and precision cannot be built", got=f"{name} {precision}", expected=pairs)
    return target
