"""Running an engine and writing down what it computed, in files, so that memory holds no more than one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gatework.plugins.engine_format import kept_choices, of_source, tap_name, tap_place
from gatework.plugins.moe import reference
from gatework.plugins.moe.spec import MoEAttributes
from gatework.runtime.verify.feed import Case, Fed, feed

if TYPE_CHECKING:
    from torch import Tensor

    from gatework.runtime.scheduler import Backend

_KINDS = {"k": "key", "v": "value"}


class Spot(NamedTuple):
    """A token of a case, and how it was run: "prefill", "decode", or "encode", where it is one that the encoder reads."""

    case: int
    position: int
    phase: str


class Rows:
    """A file of up to `count` float32 rows, written in any order."""

    def __init__(self, path: Path, count: int) -> None:
        self._path, self._width = path, 0
        self._seen = np.zeros(count, bool)
        path.write_bytes(b"")

    @classmethod
    def restored(cls, path: Path, seen: np.ndarray) -> Rows:
        """The file as it is, of which these rows were written."""
        rows = cls.__new__(cls)
        rows._path, rows._seen = path, seen.astype(bool)
        count = int(np.flatnonzero(seen)[-1]) + 1 if seen.any() else 1
        rows._width = path.stat().st_size // 4 // count
        return rows

    @property
    def seen(self) -> np.ndarray:
        """Whether each row was written."""
        return self._seen

    def write(self, start: int, rows: np.ndarray) -> None:
        """Rows [n, d] from `start` on."""
        self._width = rows.shape[1]
        with self._path.open("r+b") as file:
            file.seek(start * rows.shape[1] * 4)
            file.write(np.ascontiguousarray(rows, np.float32).tobytes())
        self._seen[start : start + len(rows)] = True

    def read(self, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Which rows from `start` to `stop` were written, [n] int64, ascending, and those, [n, d]."""
        found = np.flatnonzero(self._seen[start:stop])
        if not len(found):
            return found + start, np.empty((0, self._width), np.float32)
        count = int(found[-1]) + 1
        whole = np.fromfile(self._path, np.float32, count * self._width, offset=start * self._width * 4)
        return found + start, whole.reshape(count, self._width)[found]


class Recording:
    """What an engine computed: the logits of every case, by position, and every step of the tapped ones.

    Rows of steps count from the first token of the first tapped case; those of an encoder's, from the first that it read.

    Args:
        routing: of experts that drop tokens. Then of the tapped ones `kept_choices` are written down as well, by the operator's
            definition and the router's logits of all tokens of their step.
    """

    def __init__(
        self,
        folder: Path,
        cases: Sequence[Case],
        routing: MoEAttributes | None = None,
        *,
        restore: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.cases, self._folder, self._routing = cases, folder, routing
        self.company: list[
            np.ndarray
        ] = []  # by step: case and position of its tokens, [n, 2], in the order of the operator
        self.starts: dict[int, int] = {}  # of the tapped cases
        self._source_starts: dict[int, int] = {}
        self._total = self._source_total = 0
        for i, case in enumerate(cases):
            if case.tapped:
                self.starts[i], self._source_starts[i] = self._total, self._source_total
                self._total += case.length
                self._source_total += len(case.source or ())
        self._steps: dict[str, Rows] = {}
        files = [(f"logits.{i}", case.length) for i, case in enumerate(cases)]
        if restore is None:
            self.logits = [Rows(folder / name, length) for name, length in files]
        else:
            self.logits = [Rows.restored(folder / name, restore[name]) for name, _ in files]

    def state(self) -> dict[str, np.ndarray]:
        """What `restored` needs besides the files."""
        steps = {f"step.{name}": rows.seen for name, rows in self._steps.items()}
        company = {"company": np.concatenate(self.company), "tokens": np.array([len(step) for step in self.company])}
        return steps | company | {f"logits.{i}": rows.seen for i, rows in enumerate(self.logits)}

    @classmethod
    def restored(cls, folder: Path, cases: Sequence[Case], state: dict[str, np.ndarray]) -> Recording:
        """A recording whose files are there."""
        recording = cls(folder, cases, restore=state)
        recording.company = np.split(state["company"], np.cumsum(state["tokens"])[:-1])
        for key in state:
            if key.startswith("step."):
                name = key.removeprefix("step.")
                recording._steps[name] = Rows.restored(folder / name, state[key])
        return recording

    def rows(self, name: str) -> tuple[Tensor, Tensor]:
        """See `gatework.export.steps.compared.Recorded`."""
        import torch

        if name == "logits":
            parts = [
                (found + start, rows) for i, start in self.starts.items() for found, rows in [self.logits[i].read()]
            ]
            found, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
        else:
            found, rows = self._steps[name].read()
        return torch.from_numpy(found), torch.from_numpy(rows)

    def spot(self, tensor: str, row: int) -> Spot:
        """Where a row of a step stands."""
        source = of_source(tensor)
        starts = self._source_starts if source else self.starts
        i = max((i for i, start in starts.items() if start <= row), key=starts.__getitem__)
        position = row - starts[i]
        return Spot(i, position, "encode" if source else self.phase(i, position))

    def phase(self, case: int, position: int) -> str:
        """How the position was run."""
        return "prefill" if position < self.cases[case].prompt else "decode"

    def run(self, backend: Backend, chosen: Sequence[int], done: Callable[[int], object]) -> None:
        """Run cases, by number, and keep what comes; `done` gets the tokens that a step ran."""
        cases = [self.cases[i] for i in chosen]

        def finished(slot: int, at: int) -> None:
            if cases[at].tapped:
                self._add_cache(backend, slot, chosen[at])

        def encoded(at: int) -> None:
            if cases[at].tapped:
                for name, values in getattr(backend, "tapped", {}).items():
                    self._step(name).write(self._source_starts[chosen[at]], values.reshape(-1, values.shape[-1]))

        for fed in feed(backend, cases, finished, encoded):
            for at, position, row in zip(fed.cases, fed.positions, fed.logits, strict=True):
                self.logits[chosen[at]].write(position, row[None])
            numbers = [chosen[at] for at in fed.cases]
            self.company.append(_company(fed, numbers))
            for name, values in getattr(backend, "tapped", {}).items():
                rows = values.reshape(-1, values.shape[-1])
                self._add_step(name, fed, numbers, rows)
                if (
                    self._routing is not None
                    and name.endswith(".router")
                    and not self.starts.keys().isdisjoint(numbers)
                ):
                    self._add_step(kept_choices(name), fed, numbers, self._kept(rows))
            done(fed.tokens)

    def _kept(self, logits: np.ndarray) -> np.ndarray:
        """1 for each choice [n, K] of a step's tokens that has a place at its expert, else 0; logits: the router's, [n, E]."""
        assert self._routing is not None
        chosen, _ = reference.route(logits, self._routing)
        return reference.kept(chosen, logits.shape[1], self._routing).astype(np.float32)

    def _add_step(self, name: str, fed: Fed, cases: list[int], rows: np.ndarray) -> None:
        """Rows [tokens, d] of a step; of prefill the last one alone may have been computed."""
        for at, (i, position) in enumerate(zip(cases, fed.positions, strict=True)):
            if i in self.starts:
                own = rows if fed.phase == "prefill" else rows[at : at + 1]
                self._step(name).write(self.starts[i] + position + 1 - len(own), own)

    def _add_cache(self, backend: Any, slot: int, i: int) -> None:
        for name in backend.cache_names:
            layer, kind = name.split(".")
            rows = {_KINDS[kind]: (self.starts, backend.cached(name, slot, len(self.cases[i].ids)))}
            if self.cases[i].source is not None:
                rows[f"cross_{_KINDS[kind]}"] = (self._source_starts, backend.encoded(name, slot))
            for tensor, (starts, heads) in rows.items():  # [Hkv, n, Dh]
                flat = heads.transpose(1, 0, 2).reshape(heads.shape[1], -1)
                self._step(tap_name(int(layer), tensor)).write(starts[i], flat)

    def _step(self, name: str) -> Rows:
        if name not in self._steps:
            count = self._source_total if of_source(tap_place(name)[1]) else self._total
            self._steps[name] = Rows(self._folder / name, count)
        return self._steps[name]


def _company(fed: Fed, cases: list[int]) -> np.ndarray:
    """Case and position of every token of a step, [n, 2]; cases: numbers of the step's."""
    positions = np.array(fed.positions)
    if fed.phase == "prefill":
        positions = np.arange(1 - fed.tokens, 1) + positions
    return np.stack([np.broadcast_to(cases, positions.shape), positions], axis=1)
