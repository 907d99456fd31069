"""What the TensorRT backend decides without a GPU: which bytes go where."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from gatework import GateworkError
from gatework.export.build import build_engine
from gatework.export.checkpoint import Checkpoint
from gatework.export.options import BuildOptions
from gatework.export.tensorrt.compile import Graph, write_graphs
from gatework.export.tensorrt.scales import load_scales
from gatework.plugins.engine_format import ENCODER_PLAN, PLAN
from gatework.runtime.backends import tensorrt
from gatework.runtime.backends.device import Device
from gatework.runtime.backends.experts import Place, chunks, span
from gatework.runtime.backends.kv import ALIGNMENT, HostCache, align, cache_names
from gatework.runtime.backends.plan import new_context
from gatework.runtime.backends.plan_source import PlanSource
from gatework.runtime.backends.plan_taps import PlanTaps
from gatework.runtime.backends.tensorrt import (
    TensorRTBackend,
    buffers,
    fill,
    input_shapes,
    kv_layout,
    largest_buffers,
    tensor_addresses,
)
from gatework.runtime.backends.weight_file import read_header
from tests.checkpoints import make_checkpoint
from tests.switch import make_switch

MODEL = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16}


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (1, 7), (3, 1), (8, 1), (1, 512)])
def test_inputs_lie_aligned_behind_each_other(batch: int, count: int) -> None:
    rng = np.random.default_rng(0)
    tokens, starts = rng.integers(0, 100, (batch, count)), rng.integers(0, 50, batch)
    block = np.full(largest_buffers(8, 512), 255, np.uint8)
    places, used = buffers(batch, count), fill(block, tokens, starts)
    assert used == places.total <= len(block)
    assert places.position_ids % ALIGNMENT == places.write_indices % ALIGNMENT == 0
    numbers = block.view(np.int64)
    np.testing.assert_array_equal(numbers[: tokens.size].reshape(tokens.shape), tokens)
    positions = numbers[places.position_ids // 8 :][: tokens.size].reshape(tokens.shape)
    np.testing.assert_array_equal(positions, starts[:, None] + np.arange(count))
    np.testing.assert_array_equal(numbers[places.write_indices // 8 :][:batch], starts)
    lengths = rng.integers(0, 50, batch)
    assert fill(block, tokens, starts, lengths) == used
    np.testing.assert_array_equal(numbers[places.write_indices // 8 :][:batch], starts)
    np.testing.assert_array_equal(numbers[places.source_lengths // 8 :][:batch], lengths)


def test_every_tensor_has_an_address_and_the_cache_is_updated_in_place() -> None:
    cache = HostCache(kv_layout(MODEL, 12, 4))
    found = tensor_addresses(0x1000, 0x2000, cache, {"layers.0.moe.w_in": 0x3000}, 2, (1, 40))
    places = buffers(1, 40)
    assert found["input_ids"] == 0x1000
    assert found["position_ids"] == 0x1000 + places.position_ids
    assert found["write_indices"] == 0x1000 + places.write_indices
    assert found["logits"] == 0x2000
    assert found["layers.0.moe.w_in"] == 0x3000
    for name in cache_names(2):
        assert found[f"past.{name}"] == found[f"present.{name}"] == cache.address(name, 2)
    assert len(set(found.values())) == len(found) - 4
    source = HostCache(kv_layout(MODEL, 12, 4))
    encoded = tensor_addresses(0x1000, 0x2000, cache, {"layers.0.moe.w_in": 0x3000}, 2, (1, 40), source)
    more = {f"cross.{name}": source.address(name, 2) for name in cache_names(2)}
    assert encoded == found | more | {"source_lengths": 0x1000 + places.source_lengths}


def test_slots_that_tensorrt_would_not_take() -> None:
    with pytest.raises(
        GateworkError, match=r"got slots of 640 bytes; expected multiples of 256; fix: .*multiple of 16"
    ):
        kv_layout(MODEL, 10, 2)
    assert kv_layout(MODEL, 10, 1).slot_bytes == 640


def test_open_shapes() -> None:
    shapes = input_shapes(kv_layout(MODEL, 12, 4), 3, 1)
    assert shapes["input_ids"] == shapes["position_ids"] == (3, 1)
    assert shapes["write_indices"] == (3,)
    assert {shapes[f"past.{name}"] for name in cache_names(2)} == {(3, 2, 12, 16)}
    assert len(shapes) == 3 + 4


@pytest.mark.parametrize("make", [partial(make_checkpoint, model="mixtral"), make_switch], ids=["mixtral", "switch"])
def test_a_graphs_names_are_those_of_the_plan(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """The backend binds what the exporter's graphs read: the names are those of the files that TensorRT parses."""
    options = BuildOptions(target="a100", precision="int4", max_seq=16)
    opened = Checkpoint.open(make(tmp_path))
    model = write_graphs(opened, tmp_path, options, load_scales(opened, options))
    experts = {spec.name: 0 for pack in model.experts for spec in pack.outputs}
    layout, encoded = kv_layout(opened.config.to_dict(), 16, 2), ENCODER_PLAN in model.graphs
    cache = HostCache(layout)
    names = tensor_names_of(model.graphs[PLAN])
    used = {name: 0 for name in experts if name in names}
    known = tensor_addresses(0, 0, cache, used, 0, (1, 1), cache if encoded else None)
    assert names == set(known)
    assert_shapes(model.graphs[PLAN], input_shapes(layout, 2, 1, encoded=encoded))
    if encoded:
        names = tensor_names_of(model.graphs[ENCODER_PLAN])
        assert experts.keys() == {name for name in (*names, *used) if ".moe.w_" in name}
        context = FakeContext()
        source = PlanSource(HostDevice(), context, layout, sorted(names), experts)  # type: ignore[arg-type]
        assert names == set(source.addresses(3))
        source.encode(0, [1, 2, 3], lambda _: None)
        assert context.addresses.keys() == names
        assert_shapes(model.graphs[ENCODER_PLAN], context.shapes)


def tensor_names_of(graph: Graph) -> set[str]:
    written = onnx.load(graph.path, load_external_data=False).graph
    return {value.name for value in (*written.input, *written.output)}


def assert_shapes(graph: Graph, shapes: dict[str, tuple[int, ...]]) -> None:
    """That they are the inputs with open dimensions, in agreement with those that are not."""
    dims = {
        value.name: tuple(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim)
        for value in onnx.load(graph.path, load_external_data=False).graph.input
    }
    assert {name for name, sizes in dims.items() if -1 in sizes} == set(shapes)
    for name, shape in shapes.items():
        assert len(shape) == len(dims[name])
        assert all(dim in (-1, size) for dim, size in zip(dims[name], shape, strict=True))


class FakeContext:
    """Notes what it is given."""

    def __init__(self) -> None:
        self.addresses, self.shapes = dict[str, int](), dict[str, tuple[int, ...]]()

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True


def test_what_the_encoder_makes_goes_to_the_slot() -> None:
    """Dense as a prompt is long in the encoder's room, with gaps in the cache; and from slot to slot."""
    device, context, layout = HostDevice(), FakeContext(), kv_layout(MODEL, 16, 3)
    names = ["input_ids", "source_lengths", "encoder.layers.1.moe.w_in"]
    source = PlanSource(device, context, layout, names, {names[2]: 5, "layers.1.moe.w_in": 6})  # type: ignore[arg-type]
    rng, made = np.random.default_rng(0), dict[str, np.ndarray]()

    def run(asked: Any) -> None:
        assert asked is context
        assert {address % ALIGNMENT for name, address in context.addresses.items() if name != names[2]} == {0}
        (count,) = read(context.addresses["source_lengths"], 1)
        assert context.shapes == {"input_ids": (1, count), "source_lengths": (1,)}
        assert read(context.addresses["input_ids"], count) == prompt
        for name in layout.names:
            made[name] = rng.integers(0, 1 << 16, (2, count, 16)).astype(np.uint16)
            ctypes.memmove(context.addresses[f"cross.{name}"], made[name].ctypes.data, made[name].nbytes)

    def read(address: int, count: int) -> list[int]:
        return np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(address)).tolist()

    for slot, prompt in ((1, [9, 8, 7, 6, 5]), (0, [4] * 16), (2, [3])):
        source.encode(slot, prompt, run)
        assert source.lengths[slot] == len(prompt)
        for name in layout.names:
            kept = source.cache.read(name, slot).view(np.uint16)
            np.testing.assert_array_equal(kept[:, : len(prompt)], made[name])
    assert context.addresses.keys() == {*names, *(f"cross.{name}" for name in layout.names)}
    source.move(2, 0)
    assert source.lengths.tolist() == [1, 5, 1]
    for name in layout.names:
        kept = source.cache.read(name, 0).view(np.uint16)
        np.testing.assert_array_equal(kept[:, :1], made[name])
        assert kept.shape == (2, 16, 16)


def test_chunks_cover_a_range_once() -> None:
    assert list(chunks(4096, 4196, 40)) == [Place(4096, 40), Place(4136, 40), Place(4176, 20)]
    assert list(chunks(0, 40, 40)) == [Place(0, 40)]


def test_what_is_copied_holds_every_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.arange(7, dtype=torch.int16), "b": torch.randn(3, 5)}
    save_file(tensors, path, metadata={"format": "pt"})
    places = read_header(path)
    start, end = span(places)
    block = path.read_bytes()[start:end]
    for name, values in load_file(path).items():
        place = places[name]
        assert block[place.start - start :][: place.nbytes] == values.tobytes()


def test_written_experts_are_aligned_on_the_device(engine: Path) -> None:
    places = read_header(engine / "experts.safetensors")
    start, _ = span(places)
    assert sum(not name.startswith("__pad") for name in places) == 8
    assert start % 4096 == 0
    assert all((place.start - start) % 4096 == 0 for name, place in places.items() if not name.startswith("__pad"))


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_damaged_expert_file_is_refused(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "experts.safetensors"
    path.write_bytes(damage)
    with pytest.raises(GateworkError, match="is damaged: it names no tensors inside it"):
        read_header(path)


def test_a_tensor_beyond_the_expert_file_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "I8", "shape": [9], "data_offsets": [0, 9]}}).encode()
    path = tmp_path / "experts.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(GateworkError, match="is damaged"):
        read_header(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "mixtral")


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Path:
    """An int8 CPU engine: its experts lie as those of any target do."""
    return build_engine(checkpoint, checkpoint.parent / "engine", precision="int8", max_seq=16)


class FakeDevice:
    """Notes what is asked of it; a captured graph is the work itself."""

    stream_address = 7

    def __init__(self) -> None:
        self.done: list[str] = []

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.done.append("capture")
        return work

    def launch(self, graph: Callable[[], None]) -> None:
        self.done.append("launch")

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@pytest.mark.parametrize(("capturable", "later"), [(None, "launch"), (True, "launch"), (False, "run")])
def test_what_cannot_be_captured_runs_uncaptured(
    monkeypatch: pytest.MonkeyPatch, capturable: bool | None, later: str
) -> None:
    """None: a TensorRT that does not say."""
    backend, device = object.__new__(TensorRTBackend), FakeDevice()
    offered = {} if capturable is None else {"is_stream_capturable": lambda stream: capturable}
    settings = {
        "_device": device,
        "_plan": None,
        "_decode_steps": {},
        "_vocab_size": 3,
        "max_seq": 9,
        "_inputs": 0,
        "_logits": 0,
    }
    settings |= {"_trt": SimpleNamespace(IExecutionContext=SimpleNamespace(**offered)), "_creator": MoECreatorStub()}
    settings |= {"_taps": None, "_source": None}
    settings |= {"_host_inputs": np.zeros(4096, np.uint8), "_host_logits": np.zeros(4096, np.uint8)}
    for name, value in settings.items():
        monkeypatch.setattr(backend, name, value, raising=False)
    monkeypatch.setattr(backend, "_new_context", lambda plan, profile: SimpleNamespace(**offered))
    monkeypatch.setattr(backend, "_bind", lambda *_: None)
    monkeypatch.setattr(tensorrt, "execute", lambda *_: device.done.append("run"))
    for position in range(3):
        assert backend.decode([1, 2], [position, position]).shape == (2, 3)
    assert device.done == ["run", *(["capture"] if later == "launch" else []), later, later]


class HostDevice:
    """Memory of the host that plays the device's."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []

    def allocate(self, nbytes: int, what: str) -> int:
        self.blocks.append(np.zeros(nbytes + ALIGNMENT, np.uint8))
        return align(self.blocks[-1].ctypes.data)

    def pinned(self, nbytes: int) -> np.ndarray:
        return np.zeros(nbytes, np.uint8)

    def free_pinned(self, block: np.ndarray) -> None:
        """It goes by itself."""

    def to_device(self, target: int, source: np.ndarray, nbytes: int) -> None:
        assert nbytes <= source.nbytes
        ctypes.memmove(target, source.ctypes.data, nbytes)

    def to_host(self, target: np.ndarray, source: int, nbytes: int) -> None:
        ctypes.memmove(target.ctypes.data, source, nbytes)

    def copy_rows(self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        for row in range(rows):
            ctypes.memmove(target + row * pitch, source + row * source_pitch, width)

    copy = Device.copy

    def synchronize(self) -> None:
        """Nothing is queued."""


def test_taps_come_in_the_shapes_that_the_context_knows() -> None:
    device: Any = HostDevice()
    taps = PlanTaps(device, {"embedding.float32": 5, "layers.0.router.float32": 3}, rows=4)
    shapes = {"embedding.float32": (1, 4, 5), "layers.0.router.float32": (2, 3)}
    values = {name: np.random.default_rng(0).random(shape, np.float32) for name, shape in shapes.items()}
    for name, array in values.items():
        assert taps.addresses[name] % 4 == 0
        ctypes.memmove(taps.addresses[name], array.ctypes.data, array.nbytes)
    found = taps.read(SimpleNamespace(get_tensor_shape=shapes.__getitem__))
    assert found.keys() == {"embedding", "layers.0.router"}
    for name, array in values.items():
        np.testing.assert_array_equal(found[name.removesuffix(".float32")], array)


class MoECreatorStub:
    raising_errors = staticmethod(nullcontext)


def test_contexts_of_tensorrt_rtx_compile_for_a_shape_before_they_run_it() -> None:
    made: list[Any] = []
    context = SimpleNamespace(set_optimization_profile_async=lambda profile, stream: True)
    runtime_config = SimpleNamespace()
    runtime_config.set_execution_context_allocation_strategy = lambda strategy: made.append(strategy)
    plan = SimpleNamespace(
        create_execution_context=lambda how: made.append(how) or context, create_runtime_config=lambda: runtime_config
    )
    module = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="by user"))
    assert new_context(module, plan, 1, 7) is context
    module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    assert new_context(module, plan, 1, 7) is context
    assert made == ["by user", "by user", runtime_config]
    assert runtime_config.dynamic_shapes_kernel_specialization_strategy == "eager"
