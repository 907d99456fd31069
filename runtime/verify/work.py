"""A verification's folder: what is done is kept in it, so that a run that was stopped goes on where it was.

It holds the recording (`gatework.runtime.verify.record`), and after every layer of the reference the hidden states of its own
run and what has been found so far.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gatework.plugins.errors import GateworkError
from gatework.runtime.verify.feed import Case
from gatework.runtime.verify.record import Recording
from gatework.runtime.verify.routing import Experts
from gatework.runtime.verify.stages import Stage

_PREFIX, _SUFFIX = "gatework-verify-", ".partial"  # of temporary folders, whose owners hold their locks
_KEY, _ENGINE, _REFERENCE = "verification.json", "engine.npz", "reference.npz"


class Work:
    """Keeps and finds again what is done.

    Args:
        folder: exists.
        key: what makes this verification: one of another key is not gone on with.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder = folder
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        file = folder / _KEY
        if file.is_file():
            if file.read_text() != digest:
                fix = "give a new folder, or the engine, checkpoint, text and options that it was begun with"
                raise GateworkError(f"{folder} holds another verification", fix=fix)
        elif any(folder.iterdir()):
            raise GateworkError(f"{folder} is not empty, and no verification was begun in it", fix="give a new folder")
        else:
            file.write_text(digest)

    def recording(self, cases: list[Case]) -> tuple[Recording, float | None] | None:
        """The finished recording of these cases, whose tokens it completes, and `changed` as it was kept."""
        stored = self._load(_ENGINE)
        if stored is None:
            return None
        for i, case in enumerate(cases):
            case.ids[:] = stored[f"ids.{i}"].tolist()
        changed = float(stored["changed"])
        return Recording.restored(self.folder, cases, stored), None if np.isnan(changed) else changed

    def keep_recording(self, recording: Recording, changed: float | None) -> None:
        """The engine is through; changed: by how much observing it changed its logits."""
        ids = {f"ids.{i}": np.array(case.ids) for i, case in enumerate(recording.cases)}
        self._save(_ENGINE, recording.state() | ids | {"changed": np.array(np.nan if changed is None else changed)})

    def reference(self) -> tuple[int, np.ndarray, list[Stage], dict[str, Any] | None] | None:
        """Layers that are through, the own run's hidden states after them, and what was found."""
        stored = self._load(_REFERENCE)
        if stored is None:
            return None
        found = json.loads(str(stored["found"]))
        return int(stored["layers"]), stored["hidden"], [Stage(**each) for each in found["stages"]], found["experts"]

    def keep_reference(self, layers: int, hidden: np.ndarray, stages: list[Stage], experts: Experts | None) -> None:
        """So many layers are through."""
        found = {"stages": [asdict(stage) for stage in stages], "experts": None if experts is None else asdict(experts)}
        self._save(_REFERENCE, {"layers": np.array(layers), "hidden": hidden, "found": np.array(json.dumps(found))})

    def _load(self, name: str) -> dict[str, np.ndarray] | None:
        path = self.folder / name
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)

    def _save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Complete or not at all."""
        partial = self.folder / f"partial.{name}"
        np.savez(partial, **arrays)  # type: ignore[arg-type]
        partial.replace(self.folder / name)


@contextmanager
def work_folder(folder: Path | None) -> Iterator[Path]:
    """The folder, made if there is none; without one a temporary folder, which is removed in the end.

    What runs of this user that were killed left of theirs goes first.
    """
    if folder is None:
        from gatework.export.staging import hold, remove_abandoned

        remove_abandoned(Path(tempfile.gettempdir()), f"{_PREFIX}*{_SUFFIX}")
        with tempfile.TemporaryDirectory(prefix=_PREFIX, suffix=_SUFFIX) as made, hold(Path(made)):
            yield Path(made)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GateworkError(f"cannot write to {folder}", got=error.strerror, fix="choose another folder") from None
    yield folder
