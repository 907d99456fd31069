"""Gatework as a peer: the engine's prefill and decode steps, without scheduler and text."""

from __future__ import annotations

import ctypes

import numpy as np
import onnxruntime

from gatework import __version__
from gatework.runtime.backends.ort import OrtBackend
from gatework.runtime.engine import Engine


class GateworkPeer:
    def __init__(self, path: str) -> None:
        engine = Engine.open(path)
        self._backend = OrtBackend(engine, max_batch=engine.limits.max_batch)
        self._chunk = engine.limits.prefill_chunk
        self._position = 0
        self.bytes_per_token = engine.weight_bytes["per_token"]
        self.vocab_size: int = engine.model["vocab_size"]
        self.versions = {"gatework": __version__, "onnxruntime": onnxruntime.__version__}

    def prefill(self, ids: list[int]) -> np.ndarray:
        for start in range(0, len(ids), self._chunk):
            logits = self._backend.prefill(0, ids[start : start + self._chunk], start)
        return logits

    def fill(self, batch: int, context: int) -> None:
        """Random numbers: pages that nobody wrote would read faster than memory."""
        random = np.random.default_rng(1)
        cache, layout = self._backend._cache, self._backend._cache.layout
        dtype = {2: np.float16, 4: np.float32}[layout.itemsize]
        for name in layout.names:
            block = (ctypes.c_char * (batch * layout.slot_bytes)).from_address(cache.address(name, 0))
            rows = np.frombuffer(block, dtype).reshape(layout.shape(batch))[:, :, :context]
            rows[:] = random.standard_normal(rows.shape, np.float32)
        self._position = context

    def decode(self, ids: list[int]) -> np.ndarray:
        logits = self._backend.decode(ids, [self._position] * len(ids))
        self._position += 1
        return logits


load = GateworkPeer
