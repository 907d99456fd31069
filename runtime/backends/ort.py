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
from gatework.plugins.engine_format import ENCODER_TAPS, TAP_OUTPUT, stage_folder, stage_input
from gatework.plugins.errors import GateworkError, GateworkWarning
from gatework.plugins.machine import usable_cpus
from gatework.plugins.moe import cpu_ops
from gatework.runtime.backends.huge_pages import HugePages
from gatework.runtime.backends.kv import Cache, DeviceCache, HostCache, KVLayout, cached_rows
from gatework.runtime.backends.source import Source
from gatework.runtime.backends.steps import Steps
from gatework.runtime.engine import Engine, Stage

_GRAPH = "model.onnx"
_CUDA = "CUDAExecutionProvider"
_WARNING, _FATAL = 2, 4  # severities of its log; the first is its default
# Types of what goes in and out: ONNX's number for each, and NumPy's type that holds it; bfloat16 is passed on as it is.
_FLOAT, _FLOAT16, _BFLOAT16 = 1, 10, 16
_TYPES: dict[str, tuple[int, type[np.generic]]] = {
    "tensor(int64)": (7, np.int64),
    "tensor(float)": (_FLOAT, np.float32),
    "tensor(float16)": (_FLOAT16, np.float16),
    "tensor(bfloat16)": (_BFLOAT16, np.uint16),
}
_CACHE_NAMES = {_FLOAT: "float32", _FLOAT16: "float16", _BFLOAT16: "bfloat16"}


@dataclass(frozen=True, slots=True)
class _Port:
    """What a graph takes or gives: its name, the size of a row, ONNX's number for its type, and NumPy's type."""

    name: str
    row: tuple[int, ...]
    kind: int
    dtype: type[np.generic]

    def buffer(self, *shape: int) -> np.ndarray:
        """Zeros for [B, S] rows."""
        return np.zeros((*shape, *self.row), self.dtype)


@dataclass(slots=True)
class _Step:
    """Buffers of one step's shape [B, S], bound to the session once and refilled in place."""

    x: np.ndarray  # [B, S] int64 tokens, or the stream [B, S, D] that the stage before gave
    positions: np.ndarray  # [B, S] int64
    write_indices: np.ndarray  # [B] int64
    prompts: np.ndarray  # [B] int64, lengths of the rows' prompts
    y: np.ndarray  # [B, 1 or S, V] float32 logits, or the stream [B, S, D] for the stage behind
    binding: ort.IOBinding

    def bind_inputs(self, x: _Port, names: list[str]) -> None:
        """Bind those inputs that the graph has. Where a GPU computes, this is also what copies them there."""
        self.binding.bind_input(x.name, "cpu", 0, x.kind, self.x.shape, self.x.ctypes.data)
        arrays = {"position_ids": self.positions, "write_indices": self.write_indices, "prompt_lengths": self.prompts}
        for name, array in arrays.items():
            if name in names:
                self.binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)

    def fill(self, x: np.ndarray, starts: np.ndarray) -> None:
        """x: tokens or stream, at positions from starts [B] on."""
        self.x[:] = x
        self.write_indices[:] = starts
        self.positions[:] = starts[:, None] + np.arange(x.shape[1])


class OrtBackend(Steps):
    """Runs an engine's model.onnx, or that of one of its stages.

    What a stage takes and gives, but at the ends of the engine, is the stream [B, S, D].

    Args:
        engine: an opened engine directory, for the target cpu, onnx or cuda.
        max_batch: cache slots; on CPUs memory is touched only as slots fill.
        threads: of ONNX Runtime's pool; default: one for each CPU that this process may use.
        profile: ONNX Runtime times every operator and `session.end_profiling()` writes them to a file of this name's beginning.
        taps: values inside the graph that every step leaves in `tapped`, float32 with the graph's shapes; those of the
            encoder's graph `encode` leaves there.
        stage: one of the engine's.
        share_weights: map the weight files, which all processes then share that run the engine, instead of copying them into
            huge pages, which are faster. For int8 and int4 on CPUs; others map them always.

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
        stage: Stage | None = None,
        share_weights: bool = False,
    ) -> None:
        self._on_gpu = engine.manifest["target"] == "cuda"
        device = _open_gpu() if self._on_gpu else None
        inside = [tap for tap in taps if not tap.startswith(ENCODER_TAPS)]
        folder = engine.path if stage is None else engine.path / stage_folder(stage.number)
        self._weights = None if share_weights else HugePages(engine, folder)
        common = {"folder": folder, "on_gpu": self._on_gpu, "weights": self._weights}
        self.session = _open_session(engine, threads, **common, profile=profile, taps=inside, stage=stage)
        inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = {output.name: output for output in self.session.get_outputs()}
        self._taps = _tap_outputs(self.session, inside)
        self._input_names = list(inputs)
        names = tuple(name.removeprefix("past.") for name in inputs if name.startswith("past."))
        past = inputs[f"past.{names[0]}"]
        self._source: Source | None = None
        if engine.has_encoder:
            before = [tap for tap in taps if tap.startswith(ENCODER_TAPS)]
            encoder = _open_session(engine, threads, **common, taps=before, graph=engine_format.ENCODER)
            seen = _tap_outputs(encoder, before)
            self._source = Source(encoder, inputs, max_batch, engine.limits.max_seq, seen)
        first = 0 if stage is None else stage.first
        end = engine.model["num_layers"] if stage is None else stage.end
        self._x = _port(inputs, stage_input(first) if first > 0 else "input_ids")
        self._y = _port(outputs, stage_input(end) if end < engine.model["num_layers"] else "logits")
        self._cache_type, dtype = _TYPES[past.type]
        heads, positions, width = past.shape[1:]
        layout = KVLayout(names, max_batch, heads, positions, width, np.dtype(dtype).itemsize)
        self._cache: Cache = HostCache(layout) if device is None else DeviceCache(layout, device)
        self._decode_steps: dict[tuple[int, int], _Step] = {}  # (first slot, slots)
        all_positions = outputs[self._y.name].shape[1] != 1
        super().__init__(max_batch, engine.limits.max_seq, all_logits=all_positions, one_by_one=rows_differ(engine))

    @property
    def takes(self) -> tuple[tuple[int, ...], type[np.generic]]:
        """Shape and type of one position of what `forward` takes: a token, or the stream [D]; uint16 are bfloat16's bits."""
        return self._x.row, self._x.dtype

    def forward(self, slot: int, x: np.ndarray, starts: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """See `Steps`; a stage takes and gives what lies between stages."""
        batch, length = x.shape[:2]
        if length > 1:
            step = self._bind(slot, batch, length)
        elif (slot, batch) in self._decode_steps:
            step = self._decode_steps[slot, batch]
        else:
            step = self._decode_steps[slot, batch] = self._bind(slot, batch, 1)
        step.prompts[:] = prompts
        return self._run(step, x, starts)

    def _run(self, step: _Step, x: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Fill, run, and return what the step gives, which its next run overwrites."""
        step.fill(x, starts)
        if self._on_gpu:
            step.bind_inputs(self._x, self._input_names)
            step.binding.synchronize_inputs()
        self.session.run_with_iobinding(step.binding)
        if self._on_gpu:
            step.binding.synchronize_outputs()
        if self._taps:  # bound last
            values = step.binding.get_outputs()[-len(self._taps) :]
            self.tapped = {tap: value.numpy() for tap, value in zip(self._taps, values, strict=True)}
        return step.y

    def encode(self, slot: int, tokens: list[int]) -> None:
        """Let the encoder read a prompt, for the sequence that begins in this slot."""
        assert self._source is not None
        self._source.encode(slot, tokens)
        self.tapped = self._source.tapped

    def encoded(self, name: str, slot: int) -> np.ndarray:
        """A copy of what a slot has of the encoder, keys or values, [Hkv, L, Dh] float32; name as in "0.k"."""
        assert self._source is not None
        return self._source.read(name, slot)

    def _copy(self, source: int, target: int, length: int) -> None:
        self._cache.move(source, target, length)
        if self._source is not None:
            self._source.move(source, target)

    @property
    def cache_names(self) -> tuple[str, ...]:
        """`0.k`, `0.v`, `1.k`, ..."""
        return self._cache.layout.names

    def cached(self, name: str, slot: int, length: int) -> np.ndarray:
        """A copy of the keys or values at a slot's first positions, [Hkv, length, Dh] float32; name as in "0.k"."""
        return cached_rows(self._cache, name, slot, length, _CACHE_NAMES[self._cache_type])

    def _bind(self, first_slot: int, batch: int, length: int) -> _Step:
        """Bind inputs, outputs and the cache rows [first_slot, first_slot + batch) to one step's buffers."""
        binding = self.session.io_binding()
        step = _Step(
            x=self._x.buffer(batch, length),
            positions=np.zeros((batch, length), np.int64),
            write_indices=np.zeros(batch, np.int64),
            prompts=np.ones(batch, np.int64),
            y=self._y.buffer(batch, length if self._all_logits else 1),
            binding=binding,
        )
        step.bind_inputs(self._x, self._input_names)
        shape = self._cache.layout.shape(batch)
        for name in self._cache.layout.names:
            place = (self._cache.device, 0, self._cache_type, shape, self._cache.address(name, first_slot))
            binding.bind_input(f"past.{name}", *place)
            binding.bind_output(f"present.{name}", *place)
        binding.bind_output(self._y.name, "cpu", 0, self._y.kind, step.y.shape, step.y.ctypes.data)
        if self._source is not None:
            self._source.bind(binding, first_slot, batch)
        for output in self._taps.values():
            binding.bind_output(output, "cpu")
        return step


def _port(values: dict[str, Any], name: str) -> _Port:
    """One of a session's inputs or outputs [B, S, ...]."""
    return _Port(name, tuple(values[name].shape[2:]), *_TYPES[values[name].type])


def _open_gpu() -> Any:
    """The GPU, once it is known that this ONNX Runtime can use one."""
    from gatework.runtime.backends.device import Device

    if _CUDA not in ort.get_available_providers():
        fix = "install the extra cuda, and onnxruntime-gpu in the place of onnxruntime, as README.md shows"
        got = "the package for CPUs"
        raise GateworkError("this engine needs ONNX Runtime for NVIDIA GPUs", got=got, fix=fix)
    return Device()


def _open_session(
    engine: Engine,
    threads: int | None,
    *,
    folder: Path,
    on_gpu: bool,
    weights: HugePages | None,
    profile: Path | None = None,
    taps: Sequence[str] = (),
    stage: Stage | None = None,
    graph: str = _GRAPH,
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable_cpus()
    options.inter_op_num_threads = 1
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    packed = engine.manifest["target"] == "cpu" and engine.manifest["precision"] != "fp32"
    native = packed and _register_kernels(options, engine)
    if native and weights is not None:
        weights.give(options)
    if stage is not None or graph != _GRAPH:
        # Stages compute in turn: the threads of one must not spin while another works. So do encoder and decoder.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    path = folder / (engine_format.FALLBACK if packed and not native else graph)
    providers: list[Any] = ["CPUExecutionProvider"]
    if on_gpu:
        providers.insert(0, (_CUDA, {"device_id": 0, "use_tf32": 0}))  # float32 means float32
        with redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls(directory="")
        ort.set_default_logger_severity(_FATAL)  # why a GPU was not taken is told below, in one line
    model: Path | bytes = path
    if taps:
        model = _with_outputs(path, taps)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
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
    return session


def _tap_outputs(session: ort.InferenceSession, taps: Sequence[str]) -> dict[str, str]:
    """The output that gives each value."""
    outputs = {output.name for output in session.get_outputs()}
    return {tap: tap + TAP_OUTPUT if tap + TAP_OUTPUT in outputs else tap for tap in taps}


def _with_outputs(path: Path, taps: Sequence[str]) -> bytes:
    """The graph of a file, its weights left where they are, with more outputs."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    made = {name for node in graph.node for name in node.output}
    given = {value.name for value in graph.output}
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    for tap in taps:
        if tap not in made:
            fix = "build the engine again"
            raise GateworkError(f"{path} has no value of this name to compare", expected=tap, fix=fix)
        output = tap
        if types[tap] != onnx.TensorProto.FLOAT or tap in given:
            output = tap + TAP_OUTPUT
            graph.node.append(onnx.helper.make_node("Cast", [tap], [output], to=onnx.TensorProto.FLOAT))
        graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    content: bytes = model.SerializeToString()
    return content


def rows_differ(engine: Engine) -> bool:
    """Whether rows together would not give the tokens that they give alone.

    ONNX Runtime's 4-bit CPU kernels, which run where there are none of this package's, round one row otherwise than several.
    """
    if engine.manifest["precision"] != "int4" or engine.manifest["target"] == "cuda":
        return False
    library = cpu_ops.find_library()
    return library is None or not ort.__version__.startswith(cpu_ops.ORT_VERSIONS)


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
    if not any(Path(name).name == engine_format.FALLBACK for name in engine.manifest["files"]):
        fix = "install a C++ compiler and gatework again, or build with --precision fp32"
        raise GateworkError(f"{engine.path} needs gatework's CPU kernels: {reason}", fix=fix)
    warnings.warn(f"{reason}; ONNX Runtime's are used, which are slower", GateworkWarning, stacklevel=2)  # shown once
    return False
