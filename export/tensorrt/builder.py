"""From an ONNX file to a TensorRT plan: parse, check what was understood, compile. One code for tensorrt and tensorrt_rtx."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from tqdm import tqdm

from gatework.export.tensorrt.listing import Listing, list_network
from gatework.plugins.errors import GateworkError
from gatework.plugins.tensorrt_module import process_logger


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What to compile.

    graph: the ONNX file, its weights beside it. plan: the file to write.
    sm: compute capability to compile for ahead of time, such as "SM80"; None: the GPU at hand.
    layers: expected counts by layer kind; a network with others is refused.
    profiles: the largest step of each optimisation profile, sequences and tokens of each.
    timing_cache: file to read and to update; strip_weights: leave dense weights out of the plan, to be put in by
    `refit`.
    log: file that receives the builder's messages.
    """

    graph: Path
    plan: Path
    sm: str | None
    layers: dict[str, int]
    profiles: tuple[tuple[int, int], ...]
    log: Path
    timing_cache: Path | None = None
    strip_weights: bool = False
    progress: bool = False


def build_plan(trt: Any, request: PlanRequest) -> Listing:
    """Compile; returns the layers that the parser made. `trt` is the module, tensorrt or tensorrt_rtx.

    Raises GateworkError with TensorRT's own words when it cannot parse or compile the graph.
    """
    logger = process_logger(trt)
    with logger.writing_to(request.log, hide=os.fspath(request.graph.parent) + os.sep):
        builder = trt.Builder(logger)
        network = builder.create_network(_network_flags(trt))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(os.fspath(request.graph)):
            reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise GateworkError(f"{trt.__name__} cannot parse the graph", got=_first(reasons, logger))
        listing = list_network(network)
        _check_layers(listing, request.layers)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default; routers are to stay in float32
        if request.sm is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, request.sm), 0)
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            # Without it TensorRT-RTX may allocate while it runs, which no stream capture allows.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if request.strip_weights:
            config.set_flag(trt.BuilderFlag.REFIT)
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        for batch, chunk in request.profiles:
            config.add_optimization_profile(_profile(builder, network, batch, chunk))
        cache = _load_timing_cache(config, request.timing_cache)
        _compile(trt, builder, network, config, logger, request)
        if cache is not None and request.timing_cache is not None:
            _save(request.timing_cache, config.get_timing_cache().serialize())
    return listing


def _network_flags(trt: Any) -> int:
    """Strongly typed networks: the only kind from version 11 on, a flag before."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _check_layers(listing: Listing, expected: dict[str, int]) -> None:
    counts = listing.counts()
    for kind, count in expected.items():
        if counts[kind] != count:
            raise GateworkError(
                f"the parsed network has the wrong number of {kind} layers", got=counts[kind], expected=count
            )


def _profile(builder: Any, network: Any, batch: int, chunk: int) -> Any:
    """Shapes from one token of one sequence to `chunk` tokens of `batch` sequences, the largest being the one to tune for."""
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        shape = tuple(tensor.shape)
        if -1 in shape:  # [B, S], [B] or [B, Hkv, S_max, Dh]: dynamic dimensions are batch, then tokens
            low, high = (
                [dims[axis] if dim == -1 else dim for axis, dim in enumerate(shape)]
                for dims in ((1, 1), (batch, chunk))
            )
            profile.set_shape(tensor.name, low, high, high)
    return profile


def _compile(trt: Any, builder: Any, network: Any, config: Any, logger: Any, request: PlanRequest) -> None:
    writer_class = _writer_class(trt)
    with request.plan.open("wb") as file, _interruptible() as stop:
        monitor = _make_monitor(trt, stop, request.progress)
        config.progress_monitor = monitor
        writer = writer_class(file)
        done = builder.build_serialized_network_to_stream(network, config, writer)
        monitor.close()
    if writer.error is not None:
        raise writer.error
    if not done:
        raise GateworkError(f"{trt.__name__} cannot compile the graph", got=_first([], logger))


def _first(reasons: list[str], logger: Any) -> str:
    return next(iter([*reasons, *logger.errors]), "no reason")


def _writer_class(trt: Any) -> Any:
    """A trt.IStreamWriter into a file, so that no copy of the plan is held; an error stops the build and is kept."""

    class PlanWriter(trt.IStreamWriter):
        def __init__(self, file: IO[bytes]) -> None:
            trt.IStreamWriter.__init__(self)
            self.file = file
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return self.file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return PlanWriter


@dataclass(slots=True)
class _Stop:
    """Set by a signal while the compiler runs."""

    signal: int | None = None


@contextmanager
def _interruptible() -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM are noted, so that the compiler stops at its next step; then they take their usual course.

    One that the process ignores, as it does in the background of a shell, stays ignored.
    """
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = number

    heeded = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.signal is not None:
        signal.raise_signal(stop.signal)


def _make_monitor(trt: Any, stop: _Stop, progress: bool) -> Any:
    """A trt.IProgressMonitor with one bar per phase; it tells the compiler to stop once a signal was noted."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.bars: dict[str, tqdm] = {}
            self.lock = threading.Lock()  # called from the compiler's threads

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.bars[phase_name] = tqdm(total=num_steps, desc=phase_name, disable=not progress, leave=False)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                if (bar := self.bars.get(phase_name)) is not None:
                    bar.update(step + 1 - bar.n)
            return stop.signal is None

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                if (bar := self.bars.pop(phase_name, None)) is not None:
                    bar.close()

        def close(self) -> None:
            for bar in self.bars.values():
                bar.close()

    return Monitor()


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    """Attach the measured kernel times of earlier builds; a cache of another version or device is ignored by TensorRT."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save(path: Path, data: Any) -> None:
    """Write whole or not at all: builds side by side may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)
