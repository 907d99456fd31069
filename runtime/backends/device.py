"""One NVIDIA GPU through cuda-bindings: memory, one stream, copies, events, captured graphs. No torch.

Addresses and sizes are plain integers, in bytes. Whatever goes wrong raises GateworkError with CUDA's own name for it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from gatework.plugins.errors import GateworkError
from gatework.runtime.backends.kv import Copy

BINDINGS = "cuda-bindings>=12.9,<14"


def load_cudart() -> Any:
    """The module cuda.bindings.runtime."""
    try:
        from cuda.bindings import runtime as cudart
    except ImportError as error:
        fix = f"pip install '{BINDINGS}'"
        raise GateworkError("this engine needs cuda-bindings to run", got=error, fix=fix) from error
    return cudart


def require_gpu() -> Any:
    """The module cuda.bindings.runtime, where there is a GPU. Raises GateworkError where package, driver or GPU is missing."""
    cudart = load_cudart()
    error, count = cudart.cudaGetDeviceCount()
    if int(error) or not count:
        got = error.name if int(error) else "no device"
        fix = "run it on a machine with an NVIDIA GPU, or build the engine with --target cpu"
        raise GateworkError("this engine runs on an NVIDIA GPU", got=got, expected="a GPU and its driver", fix=fix)
    return cudart


class Device:
    """The first GPU. Memory that it gave is freed when it goes away.

    Raises:
        GateworkError: no package, no driver, no GPU.
    """

    def __init__(self) -> None:
        self.cudart = cudart = require_gpu()
        _check(cudart.cudaSetDevice(0))
        # Work on the default stream, such as a library's, is not waited for.
        self.stream = _check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self._memory: list[int] = []
        self._pinned: list[int] = []
        self._graphs: list[Any] = []
        weakref.finalize(self, _release, cudart, self.stream, self._memory, self._pinned, self._graphs)

    @property
    def stream_address(self) -> int:
        """For libraries that take a CUDA stream as a number."""
        return int(self.stream)

    def allocate(self, nbytes: int, what: str) -> int:
        """Address of `nbytes` zeros on the device, aligned to 256 bytes."""
        error, address = self.cudart.cudaMalloc(max(nbytes, 1))
        if int(error):
            _, free, _ = self.cudart.cudaMemGetInfo()
            got, expected = f"{free / 1e9:.2f} GB free ({error.name})", f"{nbytes / 1e9:.2f} GB for the {what}"
            raise GateworkError(
                "the GPU's memory is too small",
                got=got,
                expected=expected,
                fix="build the engine with a smaller --max-batch or --max-seq",
            )
        self._memory.append(address)
        _check(self.cudart.cudaMemsetAsync(address, 0, max(nbytes, 1), self.stream))
        return int(address)

    def pinned(self, nbytes: int) -> np.ndarray:
        """Host memory [nbytes] uint8 that asynchronous copies may use."""
        address = int(_check(self.cudart.cudaHostAlloc(nbytes, self.cudart.cudaHostAllocDefault)))
        self._pinned.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def free_pinned(self, block: np.ndarray) -> None:
        """Give pinned memory back, once no copy uses it."""
        self._pinned.remove(block.ctypes.data)
        _check(self.cudart.cudaFreeHost(block.ctypes.data))

    def to_device(self, target: int, source: np.ndarray, nbytes: int) -> None:
        """Queue a copy of the first bytes of pinned memory."""
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        _check(self.cudart.cudaMemcpyAsync(target, source.ctypes.data, nbytes, kind, self.stream))

    def to_host(self, target: np.ndarray, source: int, nbytes: int) -> None:
        """Queue a copy into pinned memory."""
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _check(self.cudart.cudaMemcpyAsync(target.ctypes.data, source, nbytes, kind, self.stream))

    def copy(self, base: int, copies: Iterable[Copy]) -> None:
        """Queue copies inside the block at `base`; source and target do not overlap."""
        for each in copies:
            self.copy_rows(base + each.target, each.pitch, base + each.source, each.pitch, each.width, each.rows)

    def copy_rows(self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Queue a copy of `rows` rows of `width` bytes, which begin so many bytes apart at each end."""
        kind = self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        _check(self.cudart.cudaMemcpy2DAsync(target, pitch, source, source_pitch, width, rows, kind, self.stream))

    def record(self) -> Any:
        """An event behind all that is queued so far."""
        event = _check(self.cudart.cudaEventCreateWithFlags(self.cudart.cudaEventDisableTiming))
        _check(self.cudart.cudaEventRecord(event, self.stream))
        return event

    def wait(self, event: Any) -> None:
        """Until the device has reached the event, which is used up."""
        _check(self.cudart.cudaEventSynchronize(event))
        _check(self.cudart.cudaEventDestroy(event))

    def synchronize(self) -> None:
        """Wait for all that is queued."""
        _check(self.cudart.cudaStreamSynchronize(self.stream))

    def capture(self, work: Callable[[], None]) -> Any:
        """The graph of what `work` queues, which is not run."""
        mode = self.cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _check(self.cudart.cudaStreamBeginCapture(self.stream, mode))
        try:
            work()
        finally:
            ended = self.cudart.cudaStreamEndCapture(self.stream)
        graph = _check(ended)
        executable = _check(self.cudart.cudaGraphInstantiate(graph, 0))
        _check(self.cudart.cudaGraphDestroy(graph))
        self._graphs.append(executable)
        return executable

    def launch(self, graph: Any) -> None:
        """Queue a captured graph."""
        _check(self.cudart.cudaGraphLaunch(graph, self.stream))


def _check(result: tuple[Any, ...]) -> Any:
    """What a call gave besides its status: nothing, or one value."""
    error, *values = result
    if int(error):
        raise GateworkError(f"the GPU reports {error.name}")
    return values[0] if values else None


def _release(cudart: Any, stream: Any, memory: list[int], pinned: list[int], graphs: list[Any]) -> None:
    """Free everything; errors do not matter any more."""
    cudart.cudaStreamSynchronize(stream)
    for graph in graphs:
        cudart.cudaGraphExecDestroy(graph)
    for address in memory:
        cudart.cudaFree(address)
    for address in pinned:
        cudart.cudaFreeHost(address)
    cudart.cudaStreamDestroy(stream)
