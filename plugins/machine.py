"""What this machine offers to this process."""

from __future__ import annotations

import ctypes
import os
from importlib.metadata import PackageNotFoundError, version

MOST_THREADS = 256  # ONNX Runtime takes ever longer to start more
_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR; MINOR follows


def usable_cpus() -> int:
    """CPUs that this process may run on, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
