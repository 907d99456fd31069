"""The process of one stage: python -m gatework.runtime.backends.worker SETTINGS, started by `Crew`.

Standard input is the line to the process that started this one: when it closes, this process ends. Standard output takes one
line, why the stage failed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gatework.plugins.errors import GateworkError
from gatework.runtime.backends.ort import OrtBackend
from gatework.runtime.backends.wire import LostError, Message, Wire, meeting_place
from gatework.runtime.engine import Engine


@dataclass(frozen=True, slots=True)
class Settings:
    """What a worker is told: engine, stage, and the folder where all meet."""

    engine: str
    stage: int
    folder: str
    max_batch: int
    threads: int | None
    share_weights: bool

    def to_json(self) -> str:
        """As an argument of the command."""
        return json.dumps(asdict(self))


def ready(stage: int) -> str:
    """The key in the store that says that a stage is loaded."""
    return f"ready.{stage}"


def serve(settings: Settings) -> None:
    """Load the stage, and compute what it is told until a neighbour is lost."""
    engine = Engine.open(settings.engine, check="sizes")  # whoever started this process checks the weights
    stage, count = engine.stages[settings.stage], len(engine.stages)
    backend = OrtBackend(
        engine,
        max_batch=settings.max_batch,
        threads=settings.threads,
        stage=stage,
        share_weights=settings.share_weights,
    )
    store = meeting_place(Path(settings.folder), count + 1)
    store.set(ready(stage.number), "1")
    wire = Wire(store, stage.number, count + 1, settings.max_batch)
    while True:
        message = wire.hear()
        if message.move:
            backend.move(*message.numbers)
            wire.tell(message)
        else:
            y = _step(backend, wire, message)
            wire.tell(message)
            wire.send(y)


def _step(backend: OrtBackend, wire: Wire, message: Message) -> np.ndarray:
    slot, batch, length = message.numbers
    row, dtype = backend.takes
    x = wire.receive((batch, length, *row), dtype)
    return backend.forward(slot, x, message.starts, message.prompts)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


def main() -> int:
    """Run one stage; what libraries print goes to standard error."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        serve(Settings(**json.loads(sys.argv[1])))
    except LostError:  # the process that ended first is the one to be named; this one waits to be told to end
        threading.Event().wait()
    except GateworkError as error:
        print(error, file=report, flush=True)
        return 2
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=report, flush=True)
    return 1


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # at once: nothing of Gloo's can hold it up
