"""Which of TensorRT's toolchains can build for a target on this machine."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

from gatework.export.targets import Target
from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import gpu_capability
from gatework.plugins.tensorrt_module import REQUIREMENTS


class Compiler(NamedTuple):
    """Which module compiles, and for which compute capability ahead of time ("SM80"); None: for the GPU at hand."""

    module: str
    sm: str | None
    version: str


def choose_compiler(target: Target, wanted: str | None = None) -> Compiler:
    """The toolchain that can build for the target on this machine: the one wanted, or the first that can.

    Raises GateworkError, saying what each one lacks.
    """
    if wanted is not None and wanted not in target.toolchains:
        raise GateworkError(
            f"{target.name} engines are not built by this toolchain",
            got=f"--toolchain {wanted}",
            expected=" or ".join(target.toolchains),
        )
    lacks = []
    for name in [wanted] if wanted is not None else target.toolchains:
        if find_spec(name) is None:
            lacks.append(f"no {name} (pip install '{REQUIREMENTS[name]}')")
        elif name == "tensorrt" and (found := gpu_capability()) != target.capability:
            lacks.append(f"tensorrt, but {'no GPU' if found is None else 'a GPU of SM{}{}'.format(*found)}")
        else:
            return Compiler(name, target.sm if name == "tensorrt_rtx" else None, version(name.replace("_", "-")))
    expected = f"TensorRT on a GPU of {target.sm}"
    if "tensorrt_rtx" in target.toolchains:
        expected += ", or TensorRT-RTX on any machine"
    raise GateworkError(f"{target.name} engines cannot be built here", got=" and ".join(lacks), expected=expected)


def require_gpu(what: str) -> None:
    """Raise unless there is a GPU."""
    if gpu_capability() is None:
        raise GateworkError(f"{what} needs a GPU", got="none", fix="do it on a machine that has one")
