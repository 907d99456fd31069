"""An engine in stages, each in a process of its own.

The processes live as long as the backend: they end when it is closed or collected, when this process ends, however it
does, and when one of them ends. Then the next step raises an error that names the one.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import gpu_count
from gatework.runtime.backends.ort import rows_differ
from gatework.runtime.backends.steps import Steps
from gatework.runtime.backends.wire import LostError, Message, Wire, meeting_place, require_gloo
from gatework.runtime.backends.worker import Settings, ready
from gatework.runtime.engine import Engine, Stage

_POLL = 0.02  # seconds, while stages load
_GRACE = 2.0  # seconds for a process to end by itself


class Crew:
    """The stages' processes, and a thread that waits for the first of them to end.

    failure: how that happened, once it has. After `close` it says so.
    """

    def __init__(self, engine: Engine, folder: Path, max_batch: int, threads: int | None, share_weights: bool) -> None:
        self.failure: GateworkError | None = None
        self._ended = threading.Event()
        self._processes: list[subprocess.Popen[str]] = []
        self._stages = engine.stages
        for stage in engine.stages:
            settings = Settings(str(engine.path), stage.number, str(folder), max_batch, threads, share_weights)
            command = [sys.executable, "-P", "-m", "gatework.runtime.backends.worker", settings.to_json()]
            self._processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for the user's process
                    env=_environment(engine, stage),
                )
            )
        threading.Thread(target=self._watch, name="gatework-stages", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """Of the processes, in the order of the stages."""
        return [process.pid for process in self._processes]

    def check(self) -> None:
        """Raise if a process has ended."""
        if self.failure is not None:
            raise self.failure

    def lost(self, why: LostError) -> GateworkError:
        """The error to raise when a process cannot be reached."""
        self._ended.wait(_GRACE)
        return self.failure or GateworkError(f"the stages cannot be reached: {why}")

    def close(self) -> None:
        """End the processes."""
        self.failure = self.failure or GateworkError("the processes of this engine's stages were closed")
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        end = time.monotonic() + _GRACE
        for process in self._processes:
            try:
                process.wait(max(end - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self) -> None:
        """Wait for a process's standard output to close, which is when it ends, and then end the others."""
        with selectors.DefaultSelector() as selector:
            for stage, process in zip(self._stages, self._processes, strict=True):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, (stage, process))
            key = selector.select()[0][0]
        stage, process = key.data
        report = process.stdout.read()
        process.wait()
        if self.failure is None:
            self.failure = _failure(stage, report.strip(), process.returncode)
        for other in self._processes:
            other.kill()
        for other in self._processes:
            other.wait()
        self._ended.set()


class ProcessBackend(Steps):
    """Runs an engine's stages in processes on this machine; arguments as of `OrtBackend`.

    Raises:
        GateworkError: no torch, or a stage that cannot load.
    """

    def __init__(
        self, engine: Engine, *, max_batch: int, threads: int | None = None, share_weights: bool = False
    ) -> None:
        require_gloo()
        super().__init__(max_batch, engine.limits.max_seq, one_by_one=rows_differ(engine))
        self._vocab_size = engine.model["vocab_size"]
        with tempfile.TemporaryDirectory(prefix="gatework-stages-") as folder:
            self._crew = crew = Crew(engine, Path(folder), max_batch, threads, share_weights)
            self.close = weakref.finalize(self, crew.close)
            try:
                self._wire = _meet(crew, Path(folder), len(engine.stages) + 1, max_batch)
                self._copy(0, 0, 0)  # once it has gone round, all are connected, and need the folder no more
                crew.check()
            except BaseException:
                self.close()
                raise

    @property
    def pids(self) -> list[int]:
        """Of the stages' processes."""
        return self._crew.pids

    def forward(self, slot: int, x: np.ndarray, starts: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """See `Steps`.

        Raises:
            GateworkError: a process has ended; names its stage.
        """
        self._crew.check()
        with self._in_step():
            self._wire.tell(Message(False, (slot, x.shape[0], x.shape[1]), starts, prompts))
            self._wire.send(x)
            self._wire.hear()
            return self._wire.receive((len(x), 1, self._vocab_size), np.float32)

    def _copy(self, source: int, target: int, length: int) -> None:
        """If a process has ended, the next step says so."""
        none = np.empty(0, np.int64)
        with suppress(GateworkError), self._in_step():
            self._crew.check()
            self._wire.tell(Message(True, (source, target, length), none, none))
            self._wire.hear()

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """What is sent, and what is received in answer. A step that breaks off leaves answers on their way: it is the last."""
        try:
            yield
        except LostError as error:
            raise self._crew.lost(error) from None
        except KeyboardInterrupt:
            self.close()
            raise


def _meet(crew: Crew, folder: Path, size: int, max_batch: int) -> Wire:
    """Connect to the processes once all are loaded."""
    store = meeting_place(folder, size)
    while not store.check([ready(number) for number in range(size - 1)]):
        crew.check()
        time.sleep(_POLL)
    found: list[Wire] = []

    def connect() -> None:
        try:
            found.append(Wire(store, size - 1, size, max_batch))
        except LostError as error:
            lost.append(error)

    lost: list[LostError] = []
    thread = threading.Thread(target=connect, daemon=True)  # a process that ends meanwhile would be waited for
    thread.start()
    while thread.is_alive():
        crew.check()
        thread.join(_POLL)
    if lost:
        raise crew.lost(lost[0])
    return found[0]


def _environment(engine: Engine, stage: Stage) -> dict[str, str] | None:
    """On GPUs each stage sees one, in turn."""
    if engine.manifest["target"] != "cuda":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(gpu_count())]
    return os.environ | ({"CUDA_VISIBLE_DEVICES": devices[stage.number % len(devices)]} if devices else {})


def _failure(stage: Stage, report: str, code: int) -> GateworkError:
    if report:
        return GateworkError(f"{stage.name} failed: {report}")
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return GateworkError(f"the process of {stage.name} has ended", got=how, fix="load the engine again")
