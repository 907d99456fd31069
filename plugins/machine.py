"""What this machine offers to this process."""

from __future__ import annotations

import ctypes
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MOST_THREADS = 256  # ONNX Runtime takes ever longer to start more
_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR; MINOR follows


def usable_cpus() -> int:
    """CPUs that this process may run on, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_huge_pages(root: Path = Path("/")) -> bool:
    """Whether this is Linux, and gives huge pages to who asks for them."""
    try:
        return "[never]" not in (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can take before the system swaps or ends it; 0 where that is not known, as beyond Linux.

    What the system caches counts as available, in control groups (version 2) with a limit as well.
    """
    try:
        available = 1024 * _numbers(root / "proc/meminfo")["MemAvailable:"]
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, KeyError):
        return 0
    group = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    for folder in [] if group is None else [(top := root / "sys/fs/cgroup") / group, *(top / group).parents]:
        try:
            limit = int((folder / "memory.max").read_text())  # "max": there is none
            used, kinds = int((folder / "memory.current").read_text()), _numbers(folder / "memory.stat")
            available = min(available, limit - used + kinds["active_file"] + kinds["inactive_file"])
        except (OSError, ValueError, KeyError):
            continue
    return max(available, 0)


def _numbers(path: Path) -> dict[str, int]:
    """Of a file of lines `name number ...`."""
    return {name: int(number) for name, number, *_ in map(str.split, path.read_text().splitlines())}


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


def gpu_count() -> int:
    """GPUs that this process sees; 0 without a driver."""
    count = ctypes.c_int()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    return 0 if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) else count.value


def onnxruntime_version() -> str:
    """Of the package that provides the module `onnxruntime`: for CPUs, or for NVIDIA GPUs."""
    try:
        return version("onnxruntime")
    except PackageNotFoundError:
        return version("onnxruntime-gpu")
