"""The Python modules that build TensorRT engines: loaded by name, and mended where that takes no change to them."""

from __future__ import annotations

import ctypes
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from gatework.export.targets import Target
from gatework.plugins.errors import GateworkError

# Module: what pip installs for it.
REQUIREMENTS = {"tensorrt": "tensorrt>=10.16,<12", "tensorrt_rtx": "tensorrt-rtx>=1.7,<1.8"}
_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR; MINOR follows
LIBRARY, PARSER = "libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"


def load_toolchain(name: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`, imported and ready to parse plugins."""
    if name not in REQUIREMENTS:
        raise GateworkError("unknown TensorRT toolchain", got=name, expected=" or ".join(REQUIREMENTS))
    try:
        if name == "tensorrt_rtx":
            link_rtx_library()
            import tensorrt_rtx as trt
        else:
            import tensorrt as trt
    except ImportError as error:
        fix = f"pip install '{REQUIREMENTS[name]}'"
        raise GateworkError(f"the Python module {name} does not load", got=error, fix=fix) from error
    return trt


_links: list[tempfile.TemporaryDirectory[str]] = []


def link_rtx_library() -> None:
    """Let TensorRT-RTX's parser find the core library, or it ends the process at the first plugin node.

    It opens the library as libtensorrt_rtx.so, a name that the Linux wheel lacks, and looks where it was itself loaded
    from (its RPATH is $ORIGIN, taken as the path is spelt). So it is loaded here first, from a folder of
    two links, one of them under the missing name; whoever opens either file later gets the one in memory. If
    TensorRT-RTX is already imported, the link is put beside the library instead.
    """
    spec = find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:  # the libraries come from elsewhere, or are not installed
        return
    folder = Path(spec.origin).parent
    parser, library = (next(folder.glob(f"{name}.*"), None) for name in (PARSER, LIBRARY))
    if parser is None or library is None or (folder / LIBRARY).exists() or _links:
        return
    if spec.name in sys.modules:
        try:
            (folder / LIBRARY).symlink_to(library.name)
        except OSError as error:
            fix = "import it by gatework.export.tensorrt.toolchain.load_toolchain, or make the folder writable"
            raise GateworkError(
                "tensorrt_rtx was imported before its library was linked", got=error, fix=fix
            ) from error
        return
    links = tempfile.TemporaryDirectory(prefix="gatework-")
    _links.append(links)  # kept until the process ends
    (Path(links.name) / parser.name).symlink_to(parser)
    (Path(links.name) / LIBRARY).symlink_to(library)
    ctypes.CDLL(str(Path(links.name) / parser.name))


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
            got=wanted,
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


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of the first GPU, from the CUDA driver; None without driver or GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    calls = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MAJOR + 1, device),
    )
    return None if any(call() for call in calls) else (major.value, minor.value)
