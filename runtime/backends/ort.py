"""ONNX Runtime backend, on CPUs and on NVIDIA GPUs: one session, and a KV cache that the graph updates in place.

The cache holds `max_batch` slots, each a row of every layer's [slots, Hkv, S_max, Dh] tensors, in the memory of the device
that computes. Prefill runs one slot's prompt in chunks; decode advances slots 0..n-1 by one token each. Rows never see each
other.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import usable_cpus
from gatework.runtime.backends.kv import Cache, DeviceCache, HostCache, KVLayout
from gatework.runtime.engine import Engine

_GRAPH = "model.onnx"
_CUDA = "CUDAExecutionProvider"
_WARNING, _FATAL = 2, 4  # severities of its log; the first is its default
# Type of a cache: ONNX's number for it, which NumPy's lack of bfloat16 calls for, and bytes.
_CACHE_TYPES = {"tensor(float)": (1, 4), "tensor(float16)": (10, 2), "tensor(bfloat16)": (16, 2)}


@dataclass(slots=True)
class _Step:
    """What stays bound from run to run of one step: the cache rows, and the logits."""

    logits: np.ndarray  # [B, 1 or S, V] float32
    binding: ort.IOBinding

    def run(self, session: ort.InferenceSession, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Run on arrays of int64, and return the logits buffer, which the next run of this step overwrites."""
        for name, array in inputs.items():  # where the device is a GPU, binding is what copies them there
            self.binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        session.run_with_iobinding(self.binding)
        return self.logits


class OrtBackend:
    """Runs an engine's model.onnx.

    Args:
        engine: an opened engine directory, for the target cpu or cuda.
        max_batch: cache slots; on CPUs memory is touched only as slots fill.
        threads: of ONNX Runtime's pool; default: one for each CPU that this process may use.

    Raises:
        GateworkError: no GPU, or no package, that the engine needs; a graph that ONNX Runtime cannot load.
    """

    def __init__(self, engine: Engine, *, max_batch: int, threads: int | None = None) -> None:
        self.max_batch, self.max_seq = max_batch, engine.limits.max_seq
        on_gpu = engine.manifest["target"] != "cpu"
        device = _open_gpu() if on_gpu else None
        self.session = _open_session(engine, threads, on_gpu=on_gpu)
        inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = {output.name: output for output in self.session.get_outputs()}
        self._all_logits = outputs["logits"].shape[1] != 1
        self._input_names = list(inputs)
        self._vocab_size: int = engine.model["vocab_size"]
        names = tuple(name.removeprefix("past.") for name in inputs if name.startswith("past."))
        past = inputs[f"past.{names[0]}"]
        self._cache_type, itemsize = _CACHE_TYPES[past.type]
        heads, positions, width = past.shape[1:]
        layout = KVLayout(names, max_batch, heads, positions, width, itemsize)
        self._cache: Cache = HostCache(layout) if device is None else DeviceCache(layout, device)
        self._decode_steps: dict[tuple[int, int], _Step] = {}  # (first slot, slots)
        # ONNX Runtime's 4-bit CPU kernels round one row otherwise than several, so rows together would not give the tokens
        # that they give alone.
        self._one_by_one = engine.manifest["precision"] == "int4" and not on_gpu

    def prefill(self, slot: int, tokens: list[int], start: int) -> np.ndarray:
        """Run `tokens` at positions start.. of a slot; returns the logits, [V] (or [S, V] from an all-logits graph)."""
        self._check_room(start + len(tokens))
        step = self._bind(slot, 1, len(tokens))
        logits = step.run(self.session, self._inputs(np.array([tokens], np.int64), np.array([start], np.int64)))[0]
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
        return self._decode_steps[key].run(self.session, self._inputs(ids, starts))[:, -1]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot's cache to another slot."""
        self._cache.move(source, target, length)

    def _check_room(self, end: int) -> None:
        assert end <= self.max_seq, f"{end} positions in a cache of {self.max_seq}"

    def _inputs(self, ids: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
        """Those that the graph has, of ids [B, S] that begin at the positions starts [B]."""
        positions = starts[:, None] + np.arange(ids.shape[1])
        values = {"input_ids": ids, "position_ids": positions, "write_indices": starts}
        return {name: value for name, value in values.items() if name in self._input_names}

    def _bind(self, first_slot: int, batch: int, length: int) -> _Step:
        """Bind the cache rows [first_slot, first_slot + batch), and logits of the step's own."""
        binding = self.session.io_binding()
        width = length if self._all_logits else 1
        logits = np.zeros((batch, width, self._vocab_size), np.float32)
        shape = self._cache.layout.shape(batch)
        for name in self._cache.layout.names:
            place = (self._cache.device, 0, self._cache_type, shape, self._cache.address(name, first_slot))
            binding.bind_input(f"past.{name}", *place)
            binding.bind_output(f"present.{name}", *place)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        return _Step(logits, binding)


def _open_gpu() -> Any:
    """The GPU, once it is known that this ONNX Runtime can use one."""
    from gatework.runtime.backends.device import Device

    if _CUDA not in ort.get_available_providers():
        fix = "pip uninstall onnxruntime, then pip install --force-reinstall 'onnxruntime-gpu[cuda,cudnn]'"
        got = "the package for CPUs"
        raise GateworkError("this engine needs ONNX Runtime for NVIDIA GPUs", got=got, fix=fix)
    return Device()


def _open_session(engine: Engine, threads: int | None, *, on_gpu: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable_cpus()
    options.inter_op_num_threads = 1
    providers: list[Any] = ["CPUExecutionProvider"]
    if on_gpu:
        providers.insert(0, (_CUDA, {"device_id": 0, "use_tf32": 0}))  # float32 means float32
        with redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls(directory="")
        ort.set_default_logger_severity(_FATAL)  # why a GPU was not taken is told below, in one line
    try:
        session = ort.InferenceSession(engine.path / _GRAPH, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises many unrelated types
        raise GateworkError(f"ONNX Runtime cannot load {engine.path / _GRAPH}: {error}") from error
    finally:
        if on_gpu:
            ort.set_default_logger_severity(_WARNING)
    if on_gpu and session.get_providers()[0] != _CUDA:  # it goes on without the GPU, silently
        fix = "install a GPU driver, and CUDA and cuDNN of the version that onnxruntime-gpu names"
        got = session.get_providers()[0]
        raise GateworkError("ONNX Runtime did not take the GPU", got=got, expected=_CUDA, fix=fix)
    return session
