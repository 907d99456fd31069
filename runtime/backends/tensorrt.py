"""TensorRT backend: a plan of `tensorrt` or `tensorrt_rtx` on the first GPU, with everything that it reads bound to it.

A plan has two optimisation profiles, prefill (one sequence, up to a chunk of tokens) and decode (up to max_batch sequences,
one token each). Prefill has one execution context; every decode batch size has one of its own, as a captured graph belongs to
its context. They run one after the other, so all share one block of scratch memory, and all steps share the same buffers.
An encoder has a plan of its own, with one context; see `plan_source`.

No plan has run yet: no GPU with its TensorRT was at hand. What can be checked without one is: see
tests/runtime/test_tensorrt.py and tests/contract.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gatework.plugins.engine_format import CACHE_DTYPE, CROSS, ENCODER_PLAN, KERNELS, PLAN, SOURCE_LENGTHS
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.launcher import Launcher
from gatework.plugins.moe.tensorrt import MoECreator, register
from gatework.plugins.tensorrt_module import load_toolchain
from gatework.runtime.backends.device import Device
from gatework.runtime.backends.experts import EXPERTS, upload
from gatework.runtime.backends.kv import ALIGNMENT, Cache, DeviceCache, KVLayout, align, cache_names, cached_rows
from gatework.runtime.backends.plan import (
    bind,
    check_addresses,
    check_types,
    execute,
    is_capturable,
    load_plan,
    new_context,
    scratch_bytes,
    share_scratch,
    tensor_names,
)
from gatework.runtime.backends.plan_source import PlanSource
from gatework.runtime.backends.plan_taps import PlanTaps, tap_widths
from gatework.runtime.engine import Engine

PREFILL, DECODE = 0, 1  # optimisation profiles, in the order in which the builder adds them
_KV_ITEMSIZE = 2  # bytes: plans compute in bfloat16 or float16
_INT64 = 8


class Buffers(NamedTuple):
    """Byte offsets of a step's inputs in the block that is copied to the device at once, and its size."""

    position_ids: int
    write_indices: int
    source_lengths: int
    total: int


def buffers(batch: int, tokens: int) -> Buffers:
    """input_ids [B, S] first, then position_ids [B, S], write_indices [B] and source_lengths [B], all int64, each aligned.

    The last are for decoders behind an encoder; other plans do not read them.
    """
    each, row = align(batch * tokens * _INT64), align(batch * _INT64)
    return Buffers(each, 2 * each, 2 * each + row, 2 * each + 2 * row)


def largest_buffers(max_batch: int, prefill_chunk: int) -> int:
    """Bytes that the inputs of any step fit in."""
    return max(buffers(1, prefill_chunk).total, buffers(max_batch, 1).total)


def fill(block: np.ndarray, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray | None = None) -> int:
    """Write a step's inputs into a block of bytes; returns how many of them count. tokens [B, S], starts [B], int64.

    lengths: of the prompts that an encoder read, [B] int64.
    """
    batch, count = tokens.shape
    places = buffers(batch, count)
    positions = starts[:, None] + np.arange(count)
    rows = {0: tokens, places.position_ids: positions, places.write_indices: starts}
    for offset, values in (rows | ({places.source_lengths: lengths} if lengths is not None else {})).items():
        data = np.ascontiguousarray(values, np.int64).view(np.uint8).ravel()
        block[offset : offset + data.size] = data
    return places.total


def kv_layout(model: dict[str, Any], max_seq: int, slots: int) -> KVLayout:
    """Of a plan's caches. Raises GateworkError where slots would not be aligned as TensorRT demands of tensors."""
    names = cache_names(model["num_layers"])
    layout = KVLayout(names, slots, model["num_kv_heads"], max_seq, model["head_dim"], _KV_ITEMSIZE)
    if slots > 1 and layout.slot_bytes % ALIGNMENT:
        fix = "build it with a --max-seq that is a multiple of 16, or load it in Python with max_batch=1"
        got, expected = f"slots of {layout.slot_bytes} bytes", f"multiples of {ALIGNMENT}"
        raise GateworkError(
            "the engine's cache cannot be shared by several sequences", got=got, expected=expected, fix=fix
        )
    return layout


def tensor_addresses(
    inputs: int,
    logits: int,
    cache: Cache,
    experts: dict[str, int],
    slot: int,
    shape: tuple[int, int],
    source: Cache | None = None,
) -> dict[str, int]:
    """Where a step of `shape` [B, S] on the slots from `slot` on finds every tensor. present is past: updated in place.

    source: what the encoder made of the prompts, if there is one.
    """
    places = buffers(*shape)
    found = {
        "input_ids": inputs,
        "position_ids": inputs + places.position_ids,
        "write_indices": inputs + places.write_indices,
        "logits": logits,
    }
    for name in cache.layout.names:
        found[f"past.{name}"] = found[f"present.{name}"] = cache.address(name, slot)
        if source is not None:
            found[f"{CROSS}.{name}"] = source.address(name, slot)
    if source is not None:
        found[SOURCE_LENGTHS] = inputs + places.source_lengths
    return found | experts


def input_shapes(layout: KVLayout, batch: int, tokens: int, *, encoded: bool = False) -> dict[str, tuple[int, ...]]:
    """Of the inputs whose dimensions the plan leaves open; encoded: it is that of a decoder behind an encoder."""
    shapes: dict[str, tuple[int, ...]] = {
        "input_ids": (batch, tokens),
        "position_ids": (batch, tokens),
        "write_indices": (batch,),
    }
    caches = ("past", CROSS) if encoded else ("past",)
    shapes |= {SOURCE_LENGTHS: (batch,)} if encoded else {}
    return shapes | {f"{cache}.{name}": layout.shape(batch) for cache in caches for name in layout.names}


class _DecodeStep(NamedTuple):
    """One batch size: its context, bound to the first slots, and the graph that was captured of it, which it has to outlive.

    graph: None where TensorRT says that this context cannot be captured.
    """

    context: Any
    graph: Any


class TensorRTBackend:
    """Runs an engine's model.plan, and its encoder.plan if it has one.

    Args:
        engine: an opened engine directory that is whole (see `open.check_runnable`).
        module: "tensorrt" or "tensorrt_rtx", the one that made the plan.
        max_batch: cache slots.
        tapped: leave what is computed inside in `tapped` after every step; the engine was built with taps.

    Raises:
        GateworkError: no GPU, a package missing, a plan that does not load, too little memory.
    """

    def __init__(self, engine: Engine, module: str, *, max_batch: int, tapped: bool = False) -> None:
        self.max_batch, self.max_seq = max_batch, engine.limits.max_seq
        self._device = Device()  # before the module: its libraries need a driver
        self._trt = trt = load_toolchain(module)
        self._creator = register(trt)
        attach_kernels(self._creator, engine)
        files = (name for name in (PLAN, ENCODER_PLAN) if name in engine.manifest["files"])
        plans = {name: load_plan(trt, self._creator, engine.path / name) for name in files}
        for plan in plans.values():
            check_types(trt, plan)
        self._plan = plans[PLAN]
        self._vocab_size: int = engine.model["vocab_size"]
        self._chunk = engine.limits.prefill_chunk
        nbytes = largest_buffers(max_batch, self._chunk)
        self._inputs, self._host_inputs = self._device.allocate(nbytes, "inputs"), self._device.pinned(nbytes)
        nbytes = max_batch * self._vocab_size * 4
        self._logits, self._host_logits = self._device.allocate(nbytes, "logits"), self._device.pinned(nbytes)
        self._cache = DeviceCache(kv_layout(engine.model, self.max_seq, max_batch), self._device)
        names = tensor_names(self._plan)
        path = engine.path / EXPERTS
        experts = upload(self._device, path) if path.is_file() else {}
        self._experts = {name: experts[name] for name in names if name in experts}
        self._scratch_bytes = max(map(scratch_bytes, plans.values()))
        self._scratch = self._device.allocate(self._scratch_bytes, "scratch")
        encoder = plans.get(ENCODER_PLAN)
        self._source = None if encoder is None else self._open_source(encoder, experts)
        widths = tap_widths(self._plan, names)
        self._taps = PlanTaps(self._device, widths, max(max_batch, self._chunk)) if widths else None
        self._cache_dtype: str = engine.manifest[CACHE_DTYPE]
        self._reads_taps, self.tapped = tapped, dict[str, np.ndarray]()
        check_addresses(self._plan, self._addresses(0, (1, 1)))
        self._prefill_context = self._new_context(self._plan, PREFILL)
        self._decode_steps: dict[int, _DecodeStep] = {}  # by batch size

    def prefill(self, slot: int, tokens: list[int], start: int, prompt: int | None = None) -> np.ndarray:
        """Run `tokens` at positions start.. of a slot; returns the logits [V] of the last one."""
        assert len(tokens) <= self._chunk and start + len(tokens) <= self.max_seq
        self._bind(self._prefill_context, 1, len(tokens), slot)
        lengths = None if self._source is None else self._source.lengths[slot : slot + 1]
        nbytes = fill(self._host_inputs, np.array([tokens], np.int64), np.array([start], np.int64), lengths)
        self._enqueue(self._prefill_context, nbytes, 1)
        return self._read(self._prefill_context, 1)[0]

    def decode(self, tokens: list[int], positions: list[int]) -> np.ndarray:
        """Advance slot i by tokens[i] at positions[i]; returns logits [n, V]."""
        assert max(positions) < self.max_seq
        batch = len(tokens)
        lengths = None if self._source is None else self._source.lengths[:batch]
        nbytes = fill(self._host_inputs, np.array(tokens, np.int64)[:, None], np.array(positions, np.int64), lengths)
        if (step := self._decode_steps.get(batch)) is not None:
            if step.graph is None:
                self._enqueue(step.context, nbytes, batch)
            else:
                self._device.launch(step.graph)
            return self._read(step.context, batch)
        context = self._new_context(self._plan, DECODE)
        self._bind(context, batch, 1, 0)
        self._enqueue(context, nbytes, batch)  # TensorRT wants a run before a capture
        logits = self._read(context, batch)
        graph = None
        if is_capturable(self._trt, context, self._device.stream_address):
            graph = self._device.capture(lambda: self._enqueue(context, nbytes, batch))
        self._decode_steps[batch] = _DecodeStep(context, graph)
        return logits

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot's cache to another slot."""
        self._cache.move(source, target, length)
        if self._source is not None:
            self._source.move(source, target)

    def encode(self, slot: int, tokens: list[int]) -> None:
        """Let the encoder read a prompt, for the sequence that begins in this slot."""
        assert self._source is not None and len(tokens) <= self.max_seq
        self._source.encode(slot, tokens, self._run)

    def _run(self, context: Any) -> None:
        """Queue a plan."""
        with self._creator.raising_errors():
            execute(self._trt, context, self._device.stream_address)

    def _enqueue(self, context: Any, nbytes: int, batch: int) -> None:
        """Queue the inputs' copy, the plan, and the copy of the logits."""
        self._device.to_device(self._inputs, self._host_inputs, nbytes)
        self._run(context)
        self._device.to_host(self._host_logits, self._logits, batch * self._vocab_size * 4)

    @property
    def cache_names(self) -> tuple[str, ...]:
        """`0.k`, `0.v`, `1.k`, ..."""
        return self._cache.layout.names

    def cached(self, name: str, slot: int, length: int) -> np.ndarray:
        """A copy of the keys or values at a slot's first positions, [Hkv, length, Dh] float32; name as in "0.k"."""
        return cached_rows(self._cache, name, slot, length, self._cache_dtype)

    def _read(self, context: Any, batch: int) -> np.ndarray:
        """Wait for the logits [B, V] float32, and the taps; the next step overwrites where they land, so this is a copy."""
        self._device.synchronize()
        if self._taps is not None and self._reads_taps:
            self.tapped = self._taps.read(context)
        nbytes = batch * self._vocab_size * 4
        return self._host_logits[:nbytes].view(np.float32).reshape(batch, self._vocab_size).copy()

    def _open_source(self, encoder: Any, experts: dict[str, int]) -> PlanSource:
        """Of the encoder's plan, which has one profile."""
        context, layout = self._new_context(encoder, 0), self._cache.layout
        source = PlanSource(self._device, context, layout, tensor_names(encoder), experts)
        check_addresses(encoder, source.addresses(1))
        return source

    def _new_context(self, plan: Any, profile: int) -> Any:
        context = new_context(self._trt, plan, profile, self._device.stream_address)
        self._device.synchronize()
        share_scratch(context, self._scratch, self._scratch_bytes)
        return context

    def _bind(self, context: Any, batch: int, tokens: int, slot: int) -> None:
        encoded = self._source is not None
        shapes = input_shapes(self._cache.layout, batch, tokens, encoded=encoded)
        bind(context, self._addresses(slot, (batch, tokens)), shapes)

    def _addresses(self, slot: int, shape: tuple[int, int]) -> dict[str, int]:
        """Of all that the decoder's plan reads and writes."""
        source = None if self._source is None else self._source.cache
        found = tensor_addresses(self._inputs, self._logits, self._cache, self._experts, slot, shape, source)
        return found | (self._taps.addresses if self._taps is not None else {})


def attach_kernels(creator: MoECreator, engine: Engine) -> None:
    """Give the plugin the engine's kernels, before a plan with it is loaded; dense models need none.

    One launcher serves all engines of a process, so kernels are added to those it has.
    """
    if engine.model["moe"] is None:
        return
    if not isinstance(creator.launcher, Launcher):
        creator.launcher = Launcher()
    creator.launcher.add(engine.path / KERNELS)
