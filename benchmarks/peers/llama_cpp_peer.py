"""llama.cpp as a peer, through llama-cpp-python's low-level interface; its own defaults but for threads and sizes."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np

LONGEST = 2048  # prompt tokens in one call, which llama.cpp itself splits into steps of 512
COPIED = 1024  # a longer context is made of copies of its first tokens' cache
FILLED = 128  # tokens that fill a cache in one call, times sequences
ROOM = 64  # positions decoded after a context


class LlamaCppPeer:
    def __init__(self, path: str) -> None:
        self._silence = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._silence, None)
        llama.llama_backend_init()
        self._model: Any = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._batch = llama.llama_batch_init(LONGEST, 0, 1)
        self._contexts: dict[tuple[int, int], Any] = {}  # (sequences, positions) -> context, its cache filled
        self._prompt = self._context(1, LONGEST)
        self._current, self._position = self._prompt, 0
        self.vocab_size: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self.bytes_per_token: int = json.loads(Path(path).with_suffix(".json").read_text())["bytes_per_token"]
        system = llama.llama_print_system_info().decode().strip()
        self.versions = {"llama-cpp-python": llama.__version__, "llama.cpp system": system}

    def prefill(self, ids: list[int]) -> np.ndarray:
        llama.llama_memory_clear(llama.llama_get_memory(self._prompt), True)
        return self._step(self._prompt, [(token, i, 0) for i, token in enumerate(ids)], 1)[0]

    def fill(self, batch: int, context: int) -> None:
        key = batch, context
        if key not in self._contexts:
            self._contexts[key] = self._filled(batch, context)
        self._current, self._position = self._contexts[key], min(context, COPIED)
        for sequence in range(batch):  # what earlier rounds decoded
            llama.llama_memory_seq_rm(llama.llama_get_memory(self._current), sequence, self._position, -1)

    def decode(self, ids: list[int]) -> np.ndarray:
        rows = [(token, self._position, sequence) for sequence, token in enumerate(ids)]
        self._position += 1
        return self._step(self._current, rows, len(rows))

    def _context(self, sequences: int, positions: int, unified: bool = False) -> Any:
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = positions * (1 if unified else sequences), sequences, LONGEST
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.kv_unified = unified
        context = llama.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp gives no context of {sequences} x {positions}")
        return context

    def _filled(self, batch: int, context: int) -> Any:
        """A context whose sequences hold `context` positions each, or copies that amount to as many."""
        copied = context > COPIED
        made = self._context(2 if copied else batch, context + ROOM, unified=copied)
        first = min(context, COPIED)
        for sequence in range(batch):
            for start in range(0, first, FILLED):
                end = min(first, start + FILLED)
                self._step(made, [(3 + i, i, sequence) for i in range(start, end)], 1)
        if copied:
            self._multiply(made, context // COPIED)
        return made

    def _multiply(self, context: Any, times: int) -> None:
        """Give sequence 0 its cache `times` over, through its saved state; positions repeat, which costs nothing else."""
        memory, size = llama.llama_get_memory(context), llama.llama_state_seq_get_size(context, 0)
        state = (ctypes.c_uint8 * size)()
        llama.llama_state_seq_get_data(context, state, size, 0)
        for _ in range(times - 1):
            if not llama.llama_state_seq_set_data(context, state, size, 1):
                raise RuntimeError("llama.cpp does not take its own state")
            llama.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            llama.llama_memory_seq_rm(memory, 1, -1, -1)

    def _step(self, context: Any, rows: list[tuple[int, int, int]], outputs: int) -> np.ndarray:
        """Run (token, position, sequence) rows; logits of the last `outputs` of them, [outputs, V]."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i >= len(rows) - outputs
        if status := llama.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode gave {status}")
        return np.ctypeslib.as_array(llama.llama_get_logits(context), (outputs, self.vocab_size))


load = LlamaCppPeer
