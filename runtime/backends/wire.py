"""What goes between the processes of an engine in stages, over torch.distributed's Gloo: messages along a ring.

The user's process, rank N, tells stage 0 what to do; each stage, rank = number, does it and tells the next one; the last one
tells rank N, and gives it the logits.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gatework.plugins.errors import GateworkError

_MEETING = timedelta(seconds=30)  # for all to connect, once all are there
_FOREVER = timedelta(days=10_000)  # an idle stage waits for as long as it has to
_HOST = "127.0.0.1"
_FIELDS = 4


class Message(NamedTuple):
    """A step's shape [B, S], first slot, starts [B] and prompt lengths [B]; or, with `move`, the slots and length of a copy."""

    move: bool
    numbers: tuple[int, int, int]  # slot, B, S; source, target, length
    starts: np.ndarray
    prompts: np.ndarray

    def packed(self, max_batch: int) -> np.ndarray:
        """[4 + 2 max_batch] int64."""
        block = np.zeros(_FIELDS + 2 * max_batch, np.int64)
        block[:_FIELDS] = (self.move, *self.numbers)
        rows = len(self.starts)
        block[_FIELDS : _FIELDS + rows], block[_FIELDS + max_batch :][:rows] = self.starts, self.prompts
        return block

    @classmethod
    def unpacked(cls, block: np.ndarray) -> Message:
        """Inverse of `packed`."""
        move, *numbers = block[:_FIELDS].tolist()
        rows = 0 if move else numbers[1]
        starts, prompts = (half[:rows] for half in np.split(block[_FIELDS:], 2))
        return cls(bool(move), (numbers[0], numbers[1], numbers[2]), starts, prompts)


class LostError(Exception):
    """The process at the other end is gone."""


class Wire:
    """One rank's connections. Everything is sent as bytes whose number both ends know.

    Raises, as all methods do:
        LostError: the other end is gone.
    """

    def __init__(self, store: Any, rank: int, size: int, max_batch: int) -> None:
        from torch import distributed

        gloo: Any = distributed.ProcessGroupGloo  # a group of its own: the program may have a default one
        options = gloo._Options()
        options._timeout = _MEETING
        options._devices = [gloo.create_device(hostname=_HOST)]
        self.rank, self.size, self.max_batch = rank, size, max_batch
        try:
            self._group = gloo(store, rank, size, options)
        except RuntimeError as error:
            raise LostError(str(error)) from error

    def send(self, array: np.ndarray) -> None:
        """To the next rank."""
        import torch

        data = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        try:
            self._group.send([data], (self.rank + 1) % self.size, 0).wait(_FOREVER)
        except RuntimeError as error:
            raise LostError(str(error)) from error

    def receive(self, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        """From the rank before."""
        import torch

        array = np.empty(shape, dtype)
        data = torch.from_numpy(array.reshape(-1).view(np.uint8))
        try:
            self._group.recv([data], (self.rank - 1) % self.size, 0).wait(_FOREVER)
        except RuntimeError as error:
            raise LostError(str(error)) from error
        return array

    def tell(self, message: Message) -> None:
        """Send a message."""
        self.send(message.packed(self.max_batch))

    def hear(self) -> Message:
        """Receive a message."""
        return Message.unpacked(self.receive((_FIELDS + 2 * self.max_batch,), np.int64))


def meeting_place(folder: Path, size: int) -> Any:
    """A store in a file, where the ranks find each other."""
    from torch import distributed

    return distributed.FileStore(str(folder / "store"), size)  # type: ignore[attr-defined]


def require_gloo() -> None:
    """Raise a one-line error where there is no torch, or none with Gloo, or no POSIX system."""
    if sys.platform == "win32":
        fix = "leave --stage-processes out"
        raise GateworkError("stages in processes of their own need Linux or macOS", got=sys.platform, fix=fix)
    try:
        from torch.distributed import ProcessGroupGloo  # noqa: F401
    except ImportError as error:
        fix = "pip install torch, or leave --stage-processes out"
        raise GateworkError("stages in processes of their own need PyTorch", got=error, fix=fix) from None
