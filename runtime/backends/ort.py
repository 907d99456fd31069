"""ONNX Runtime backend, on CPUs and on NVIDIA GPUs: one session, and a KV cache that the graph updates in place.

The cache holds `max_batch` slots, each a row of every layer's [slots, Hkv, S_max, Dh] tensors, in the memory of the device
that computes. Prefill runs one slot's prompt in chunks; decode advances slots 0..n-1 by one token each. Rows never see each
other.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from gatework.plugins import engine_format
from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import usable_cpus
from gatework.plugins.moe import cpu_ops
from gatework.runtime.backends.kv import Cache, DeviceCache, HostCache, KVLayout
from gatework.runtime.engine import Engine

_GRAPH = "model.onnx"
_CUDA = "CUDAExecutionProvider"
_WARNING, _FATAL = 2, 4  # severities of its log; the first is its default
# Type of a cache: ONNX's number for it, which NumPy's lack of bfloat16 calls for, and bytes.
_BFLOAT16 = 16
_CACHE_TYPES = {"tensor(float)": (1, 4), "tensor(float16)": (10, 2), "tensor(bfloat16)": (_BFLOAT16, 2)}
_CONVERTED = ".float32"  # follows the name of a tap that is of another type


@dataclass(slots=True)
class _Step:
    """Buffers of one step's shape [B, S], bound to the session once and refilled in place."""

    ids: np.ndarray  # [B, S] int64
    positions: np.ndarray  # [B, S] int64
    write_indices: np.ndarray  # [B] int64
    prompts: np.ndarray  # [B] int64, lengths of the rows' prompts
    logits: np.ndarray  # [B, 1 or S, V] float32
    binding: ort.IOBinding

    def bind_inputs(self, names: list[str]) -> None:
        """Bind those inputs that the graph has. Where a GPU computes, this is also what copies them there."""
        arrays = {"input_ids": self.ids, "position_ids": self.positions, "write_indices": self.write_indices}
        arrays["prompt_lengths"] = self.prompts
        for name, array in arrays.items():
            if name in names:
                self.binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)

    def fill(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        """tokens [B, S] at positions from starts [B] on."""
        self.ids[:] = tokens
        self.write_indices[:] = starts
        self.positions[:] = starts[:, None] + np.arange(tokens.shape[1])


class OrtBackend:
    """Runs an engine's model.onnx.

    Args:
        engine: an opened engine directory, for the target cpu, onnx or cuda.
        max_batch: cache slots; on CPUs memory is touched only as slots fill.
        threads: of ONNX Runtime's pool; default: one for each CPU that this process may use.
        profile: ONNX Runtime times every operator and `session.end_profiling()` writes them to a file of this name's beginning.
        taps: values inside the graph that every step leaves in `tapped`, float32 with the graph's shapes.

    Raises:
        GateworkError: no GPU, or no package, that the engine needs; a graph that ONNX Runtime cannot load.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int,
        threads: int | None = None,
        profile: Path | None = None,
        taps: Sequence[str] = (),
    ) -> None:
        self.max_batch, self.max_seq = max_batch, engine.limits.max_seq
        self._on_gpu = engine.manifest["target"] == "cuda"
        device = _open_gpu() if self._on_gpu else None
        self.session, native = _open_session(engine, threads, on_gpu=self._on_gpu, profile=profile, taps=taps)
        inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = {output.name: output for output in self.session.get_outputs()}
        self._all_logits = outputs["logits"].shape[1] != 1
        self._taps = {tap: tap if tap in outputs else tap + _CONVERTED for tap in taps}  # and their outputs
        self.tapped: dict[str, np.ndarray] = {}
        self._input_names = list(inputs)
        self._vocab_size: int = engine.model["vocab_size"]
        names = tuple(name.removeprefix("past.") for name in inputs if name.startswith("past."))
        past = inputs[f"past.{names[0]}"]
        self._cache_type, itemsize = _CACHE_TYPES[past.type]
        heads, positions, width = past.shape[1:]
        layout = KVLayout(names, max_batch, heads, positions, width, itemsize)
        self._cache: Cache = HostCache(layout) if device is None else DeviceCache(layout, device)
        self._prompts = np.ones(max_batch, np.int64)  # lengths, by slot
        self._decode_steps: dict[tuple[int, int], _Step] = {}  # (first slot, slots)
        # ONNX Runtime's 4-bit CPU kernels round one row otherwise than several, so rows together would not give the tokens
        # that they give alone.
        self._one_by_one = engine.manifest["precision"] == "int4" and not self._on_gpu and not native

    def prefill(self, slot: int, tokens: list[int], start: int, prompt: int | None = None) -> np.ndarray:
        """Run `tokens` at positions start.. of a slot; returns the logits, [V] (or [S, V] from an all-logits graph).

        prompt: length of the whole prompt, if it does not end with these tokens; models with dynamic NTK depend on it.
        """
        self._check_room(start + len(tokens))
        self._prompts[slot] = start + len(tokens) if prompt is None else prompt
        step = self._bind(slot, 1, len(tokens))
        step.prompts[:] = self._prompts[slot]
        logits = self._run(step, np.array([tokens], np.int64), np.array([start], np.int64))[0]
        return logits if self._all_logits else logits[0]

    def decode(self, tokens: list[int], positions: list[int]) -> np.ndarray:
        """Advance slot i by tokens[i] at positions[i]; returns logits [n, V], overwritten by the next call of this size."""
        self._check_room(max(positions) + 1)
        ids, starts = np.array(tokens, np.int64)[:, None], np.array(positions, np.int64)
        if not self._one_by_one:
            return self._decode(0, ids, starts)
        rows, tapped = [], []
        for i in range(len(tokens)):
            rows.append(self._decode(i, ids[i : i + 1], starts[i : i + 1]))
            tapped.append(self.tapped)
        self.tapped = {tap: np.concatenate([values[tap] for values in tapped]) for tap in self._taps}
        return np.concatenate(rows)

    def _decode(self, slot: int, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Advance the slots from `slot` on; ids [n, 1], starts [n]."""
        key = slot, len(ids)
        if key not in self._decode_steps:
            self._decode_steps[key] = self._bind(slot, len(ids), 1)
        step, prompts = self._decode_steps[key], self._prompts[slot : slot + len(ids)]
        prompts[starts == 0] = 1  # a sequence that begins with decoding
        step.prompts[:] = prompts
        return self._run(step, ids, starts)[:, -1]

    def _run(self, step: _Step, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Fill, run, and return the step's logits, which its next run overwrites."""
        step.fill(ids, starts)
        if self._on_gpu:
            step.bind_inputs(self._input_names)
            step.binding.synchronize_inputs()
        self.session.run_with_iobinding(step.binding)
        if self._on_gpu:
            step.binding.synchronize_outputs()
        if self._taps:  # bound last
            values = step.binding.get_outputs()[-len(self._taps) :]
            self.tapped = {tap: value.numpy() for tap, value in zip(self._taps, values, strict=True)}
        return step.logits

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot's cache to another slot."""
        self._cache.move(source, target, length)
        self._prompts[target] = self._prompts[source]

    @property
    def cache_names(self) -> tuple[str, ...]:
        """`0.k`, `0.v`, `1.k`, ..."""
        return self._cache.layout.names

    def cached(self, name: str, slot: int, length: int) -> np.ndarray:
        """A copy of the keys or values at a slot's first positions, [Hkv, length, Dh] float32; name as in "0.k"."""
        rows = self._cache.read(name, slot)[:, :length]
        if self._cache_type == _BFLOAT16:
            return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return rows.view(np.float16 if rows.shape[-1] == 2 * self._cache.layout.width else np.float32).astype(
            np.float32
        )

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
            prompts=np.ones(batch, np.int64),
            logits=np.zeros((batch, width, self._vocab_size), np.float32),
            binding=binding,
        )
        step.bind_inputs(self._input_names)
        shape = self._cache.layout.shape(batch)
        for name in self._cache.layout.names:
            place = (self._cache.device, 0, self._cache_type, shape, self._cache.address(name, first_slot))
            binding.bind_input(f"past.{name}", *place)
            binding.bind_output(f"present.{name}", *place)
        binding.bind_output("logits", "cpu", 0, np.float32, step.logits.shape, step.logits.ctypes.data)
        for output in self._taps.values():
            binding.bind_output(output, "cpu")
        return step


def _open_gpu() -> Any:
    """The GPU, once it is known that this ONNX Runtime can use one."""
    from gatework.runtime.backends.device import Device

    if _CUDA not in ort.get_available_providers():
        fix = "install the extra cuda, and onnxruntime-gpu in the place of onnxruntime, as README.md shows"
        got = "the package for CPUs"
        raise GateworkError("this engine needs ONNX Runtime for NVIDIA GPUs", got=got, fix=fix)
    return Device()


def _open_session(
    engine: Engine, threads: int | None, *, on_gpu: bool, profile: Path | None, taps: Sequence[str]
) -> tuple[ort.InferenceSession, bool]:
    """The session, and whether it uses this package's CPU kernels."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable_cpus()
    options.inter_op_num_threads = 1
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    packed = engine.manifest["target"] == "cpu" and engine.manifest["precision"] != "fp32"
    native = packed and _register_kernels(options, engine)
    path = engine.path / (engine_format.FALLBACK if packed and not native else _GRAPH)
    providers: list[Any] = ["CPUExecutionProvider"]
    if on_gpu:
        providers.insert(0, (_CUDA, {"device_id": 0, "use_tf32": 0}))  # float32 means float32
        with redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls(directory="")
        ort.set_default_logger_severity(_FATAL)  # why a GPU was not taken is told below, in one line
    model: Path | bytes = path
    if taps:
        model = _with_outputs(path, taps)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(engine.path))
    try:
        session = ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises many unrelated types
        raise GateworkError(f"ONNX Runtime cannot load {path}: {error}") from error
    finally:
        if on_gpu:
            ort.set_default_logger_severity(_WARNING)
    if on_gpu and session.get_providers()[0] != _CUDA:  # it goes on without the GPU, silently
        fix = "install a GPU driver, and CUDA and cuDNN of the version that onnxruntime-gpu names"
        got = session.get_providers()[0]
        raise GateworkError("ONNX Runtime did not take the GPU", got=got, expected=_CUDA, fix=fix)
    return session, native


def _with_outputs(path: Path, taps: Sequence[str]) -> bytes:
    """The graph of a file, its weights left where they are, with more outputs."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    made = {name for node in graph.node for name in node.output}
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    for tap in taps:
        if tap not in made:
            fix = "build the engine again"
            raise GateworkError(f"{path} has no value of this name to compare", expected=tap, fix=fix)
        output = tap
        if types[tap] != onnx.TensorProto.FLOAT:
            output = tap + _CONVERTED
            graph.node.append(onnx.helper.make_node("Cast", [tap], [output], to=onnx.TensorProto.FLOAT))
        graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    content: bytes = model.SerializeToString()
    return content


def _register_kernels(options: ort.SessionOptions, engine: Engine) -> bool:
    """Let a session find this package's CPU kernels; says so once if it has to do without, and raises if it cannot."""
    library = cpu_ops.usable_library(ort.__version__)
    if library is not None:
        cpu_ops.chosen_path(library)
        options.register_custom_ops_library(str(library))
        return True
    if cpu_ops.find_library() is None:
        reason = "gatework was installed without a C++ compiler, so it has no CPU kernels of its own"
    else:
        tested = " and ".join(cpu_ops.ORT_VERSIONS)
        reason = f"gatework's CPU kernels were tested with ONNX Runtime {tested}, and this is {ort.__version__}"
    if engine_format.FALLBACK not in engine.manifest["files"]:
        fix = "install a C++ compiler and gatework again, or build with --precision fp32"
        raise GateworkError(f"{engine.path} needs gatework's CPU kernels: {reason}", fix=fix)
    warnings.warn(f"{reason}; ONNX Runtime's are used, which are slower", stacklevel=2)  # shown once
    return False
