"""What engines can be built for: one table of targets, with what each device and its toolchains can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gatework.export.groups import DEFAULT_GROUPS, GPU_GROUPS, GROUP_SIZES
from gatework.plugins.errors import GateworkError

Toolchain = Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A kind of device.

    toolchains: in order of preference; tensorrt compiles only on such a device, tensorrt_rtx on any machine. onnxruntime
    compiles nothing: it loads the lowered graph.
    groups: weights that share a scale, by precision, where they are stored in groups. group_sizes: those to choose from.
    capability: CUDA compute capability, (major, minor), that TensorRT compiles for; None for ONNX Runtime's targets.
    memory: bytes of the device; None where it is not a fixed size.
    """

    name: str
    precisions: tuple[str, ...]
    toolchains: tuple[Toolchain, ...]
    groups: Mapping[str, int]
    group_sizes: tuple[int, ...] = GROUP_SIZES
    capability: tuple[int, int] | None = None
    memory: int | None = None

    @property
    def sm(self) -> str:
        """Such as "SM80"."""
        assert self.capability is not None
        return "SM{}{}".format(*self.capability)


def _gpu(
    name: str, precisions: tuple[str, ...], toolchains: tuple[Toolchain, ...], capability: tuple[int, int], memory: int
) -> Target:
    return Target(
        name=name,
        precisions=precisions,
        toolchains=toolchains,
        groups=GPU_GROUPS,
        capability=capability,
        memory=memory,
    )


_SM80 = ("bf16", "fp16", "int8", "int4")  # no float8 arithmetic before SM89
_SM89 = ("bf16", "fp16", "fp8", "int8", "int4")
_ANY: tuple[Toolchain, ...] = ("tensorrt", "tensorrt_rtx")
_ORT: tuple[Toolchain, ...] = ("onnxruntime",)
TARGETS = {
    target.name: target
    for target in (
        Target(name="cpu", precisions=("fp32", "int8", "int4"), toolchains=_ORT, groups=DEFAULT_GROUPS),
        Target(
            name="cuda",
            precisions=("fp32", "bf16", "fp16", "int8", "int4"),
            toolchains=_ORT,
            groups=DEFAULT_GROUPS,
            group_sizes=(128, 64, 32),
        ),
        _gpu("a100", _SM80, _ANY, (8, 0), 80 << 30),
        _gpu("h100", _SM89, ("tensorrt",), (9, 0), 80 << 30),
        _gpu("h200", _SM89, ("tensorrt",), (9, 0), 141 * 10**9),
        _gpu("ada", _SM89, _ANY, (8, 9), 48 << 30),
        _gpu("rtx50", _SM89, _ANY, (12, 0), 32 << 30),
    )
}
ALL_BUT_CUDA = " or ".join(", ".join(name for name in TARGETS if name != "cuda").rsplit(", ", 1))


def target_for(name: str, precision: str) -> Target:
    """The target of that name, which has to support the precision."""
    target = TARGETS.get(name)
    if target is None or precision not in target.precisions:
        pairs = ", ".join(f"{each.name}: {'|'.join(each.precisions)}" for each in TARGETS.values())
        raise GateworkError("this --target and --precision cannot be built", got=f"{name} {precision}", expected=pairs)
    return target
