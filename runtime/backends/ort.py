"""ONNX Runtime backend: one session, and a KV cache that the graph updates in place.

The cache holds `max_batch` slots, each a row of every layer's [slots, Hkv, S_max, Dh] tensors. Prefill runs one slot's
prompt in chunks; decode advances slots 0..n-1 by one token each. Rows never see each other.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from gatework.plugins import engine_format
from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import usable_cpus
from gatework.plugins.moe import cpu_ops
from gatework.runtime.engine import Engine

_GRAPH = "model.onnx"
_ELEMENT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(slots=True)
class _Step:
    """Buffers of one step's shape [B, S], bound to the session once and refilled in place."""

    ids: np.ndarray  # [B, S] int64
    positions: np.ndarray  # [B, S] int64
    write_indices: np.ndarray  # [B] int64
    logits: np.ndarray  # [B, 1 or S, V] float32
    binding: ort.IOBinding

    def run(self, session: ort.InferenceSession, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Fill, run, and return the logits buffer, which the next run of this shape overwrites."""
        self.ids[:] = tokens
        self.write_indices[:] = starts
        self.positions[:] = starts[:, None] + np.arange(tokens.shape[1])
        session.run_with_iobinding(self.binding)
        return self.logits


class OrtBackend:
    """Runs an engine's model.onnx on the CPU.

    Args:
        engine: an opened engine directory.
        max_batch: cache slots; memory is touched only as slots fill.
        threads: of ONNX Runtime's pool; default: one for each CPU that this process may use.
    """

    def __init__(self, engine: Engine, *, max_batch: int, threads: int | None = None) -> None:
        if (target := engine.manifest["target"]) != "cpu":
            fix = "build one with --target cpu"
            raise GateworkError("this version runs CPU engines only", got=f"an engine for {target}", fix=fix)
        self.max_batch, self.max_seq = max_batch, engine.limits.max_seq
        self.session, native = _open_session(engine, threads)
        outputs = {output.name: output for output in self.session.get_outputs()}
        self._all_logits = outputs["logits"].shape[1] != 1
        self._input_names = [value.name for value in self.session.get_inputs()]
        self._vocab_size: int = engine.model["vocab_size"]
        self._cache: dict[str, np.ndarray] = {}  # "0.k" -> [slots, Hkv, S_max, Dh]
        for value in self.session.get_inputs():
            if value.name.startswith("past."):
                shape = (max_batch, *value.shape[1:])
                self._cache[value.name.removeprefix("past.")] = np.zeros(shape, _ELEMENT_TYPES[value.type])
        self._decode_steps: dict[tuple[int, int], _Step] = {}  # (first slot, slots)
        # ONNX Runtime's 4-bit kernels round one row otherwise than several, so rows together would not give the tokens
        # that they give alone.
        self._one_by_one = engine.manifest["precision"] == "int4" and not native

    def prefill(self, slot: int, tokens: list[int], start: int) -> np.ndarray:
        """Run `tokens` at positions start.. of a slot; returns the logits, [V] (or [S, V] from an all-logits graph)."""
        self._check_room(start + len(tokens))
        step = self._bind(slot, 1, len(tokens))
        logits = step.run(self.session, np.array([tokens], np.int64), np.array([start], np.int64))[0]
        return logits if self._all_logits else logits[0]

    def decode(self, tokens: list[int], positions: list[int]) -> np.ndarray:
        """Advance slot i by tokens[i] at positions[i]; returns logits [n, V], overwritten by the next call of this size."""
        self._check_room(max(positions) + 1)
        ids, starts = np.array(tokens, np.int64)[:, None], np.array(positions, np.int64)
        if not self._one_by_one:
            return self._decode(0, ids, starts)
        return np.concatenate([self._decode(i, ids[i : i + 1], starts[i : i + 1]) for i in range(len(tokens))])

    def _decode(self, slot: int, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Advance the slots from `slot` on; ids [n, 1], starts [n]."""
        key = slot, len(ids)
        if key not in self._decode_steps:
            self._decode_steps[key] = self._bind(slot, len(ids), 1)
        return self._decode_steps[key].run(self.session, ids, starts)[:, -1]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot's cache to another slot."""
        for cache in self._cache.values():
            cache[target, :, :length] = cache[source, :, :length]

    def _check_room(self, end: int) -> None:
        assert end <= self.max_seq, f"{end} positions in a cache of {self.max_seq}"

    def _bind(self, first_slot: int, batch: int, length: int) -> _Step:
        """Bind inputs, outputs and the cache rows [first_slot, first_slot + batch) to one step's buffers."""
        binding = self.session.io_binding()
        width = length if self._all_logits else 1
        step = _Step(
            ids=np.zeros((batch, length), np.int64),
            positions=np.zeros((batch, length), np.int64),
            write_indices=np.zeros(batch, np.int64),
            logits=np.zeros((batch, width, self._vocab_size), np.float32),
            binding=binding,
        )
        named = {"input_ids": step.ids, "position_ids": step.positions, "write_indices": step.write_indices}
        for name in self._input_names:
            if name in named:
                binding.bind_input(name, "cpu", 0, np.int64, named[name].shape, named[name].ctypes.data)
        for name, cache in self._cache.items():
            rows = cache[first_slot : first_slot + batch]
            binding.bind_input(f"past.{name}", "cpu", 0, rows.dtype, rows.shape, rows.ctypes.data)
            binding.bind_output(f"present.{name}", "cpu", 0, rows.dtype, rows.shape, rows.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, step.logits.shape, step.logits.ctypes.data)
        return step


def _open_session(engine: Engine, threads: int | None) -> tuple[ort.InferenceSession, bool]:
    """The session, and whether it uses this package's kernels."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable_cpus()
    options.inter_op_num_threads = 1
    native = engine_format.FALLBACK in engine.manifest["files"] and _register_kernels(options)
    graph = _GRAPH if native or engine_format.FALLBACK not in engine.manifest["files"] else engine_format.FALLBACK
    try:
        return ort.InferenceSession(engine.path / graph, options, providers=["CPUExecutionProvider"]), native
    except Exception as error:  # ONNX Runtime raises many unrelated types
        raise GateworkError(f"ONNX Runtime cannot load {engine.path / graph}: {error}") from error


def _register_kernels(options: ort.SessionOptions) -> bool:
    """Let a session find the CPU kernels; says so once if it has to do without."""
    library = cpu_ops.find_library()
    if library is not None and ort.__version__.startswith(cpu_ops.ORT_VERSIONS):
        options.register_custom_ops_library(str(library))
        return True
    if library is None:
        reason = "gatework was installed without a C++ compiler, so it has no CPU kernels of its own"
    else:
        tested = " and ".join(cpu_ops.ORT_VERSIONS)
        reason = f"gatework's CPU kernels were tested with ONNX Runtime {tested}, and this is {ort.__version__}"
    warnings.warn(f"{reason}; ONNX Runtime's are used, which are slower", stacklevel=2)  # shown once
    return False
