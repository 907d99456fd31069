"""The tensors that TensorRT gets, in their true types, read back by onnx and by the MoE operator's NumPy definition.

Every weight of a bfloat16 graph lies within half a step of the checkpoint's, wherever its codes do not end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from gatework.export.calibrate import calibrate
from gatework.export.calibration import Calibration
from gatework.export.checkpoint import Checkpoint
from gatework.export.lower import lower_to_tensorrt
from gatework.export.lower.experts import attributes_of, moe_nodes
from gatework.export.materialize import write_model
from gatework.export.onnx_export import trace
from gatework.export.smoothing import balanced_products
from gatework.export.tensorrt.scales import StaticScales
from gatework.plugins.moe import reference
from gatework.plugins.moe.spec import MoEAttributes
from tests.checkpoints import make_checkpoint

GROUP = 128
SLACK = 1.0001  # of half a step: float32's division by the scale
BF16 = ml_dtypes.bfloat16
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama2", {"intermediate_size": 172}),
    "mixtral": (
        "mixtral",
        {"hidden_size": 144, "intermediate_size": 151},
    ),  # groups of 16; the last one of experts is short
}
# A row, a group and a whole matrix of zeros, by the ends of transformers' names.
ZEROS = {
    "layers.0.self_attn.q_proj.weight": np.s_[3],
    "layers.0.self_attn.o_proj.weight": np.s_[5, :64],
    "layers.1.self_attn.k_proj.weight": np.s_[:],
    "layers.0.block_sparse_moe.experts.1.w1.weight": np.s_[2],
    "layers.0.block_sparse_moe.experts.2.w2.weight": np.s_[4, :128],
}


@dataclass(frozen=True)
class Source:
    checkpoint: Checkpoint
    traced: ir.Model
    calibrations: dict[str, Calibration]

    @classmethod
    def make(cls, folder: Path, name: str) -> Source:
        model, options = MODELS[name]
        path = make_checkpoint(folder, model, seed=7, **options)
        tensors = load_file(path / "model.safetensors")
        for end, place in ZEROS.items():
            found = [tensor for name, tensor in tensors.items() if name.endswith(end)]
            assert len(found) == (".experts." not in end or model == "mixtral"), end
            for tensor in found:
                tensor[place] = 0
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        checkpoint = Checkpoint.open(path)
        ids = np.random.default_rng(0).integers(0, 128, 64).tolist()
        plain, smoothed = (calibrate(checkpoint, ids, smooth=alpha) for alpha in (None, 0.5))
        by_precision = {"fp8": plain, "int8": plain, "int8 smoothed": smoothed}
        return cls(checkpoint, trace(checkpoint.config, 16, dtype="bfloat16"), by_precision)

    def weight(self, name: str) -> np.ndarray:
        return self.checkpoint.read("embed.weight" if name not in self.checkpoint.weights else name).float().numpy()


@dataclass(frozen=True)
class Written:
    """A lowered graph as onnx reads it back."""

    source: Source
    precision: str
    graph: onnx.GraphProto
    tensors: dict[str, np.ndarray]
    experts: MoEAttributes | None

    @classmethod
    def make(cls, source: Source, folder: Path, precision: str) -> Written:
        kind: Any = precision.split()[0]
        scales = StaticScales(source.checkpoint, source.calibrations.get(precision))
        model = lower_to_tensorrt(source.traced.clone(), kind, group=GROUP if kind == "int4" else 0, scales=scales)
        experts = [attributes_of(node) for node in moe_nodes(model)]
        write_model(model, source.checkpoint, folder)
        graph = onnx.load(folder / "model.onnx").graph
        tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        return cls(source, precision, graph, tensors, experts[0] if experts else None)

    def factors(self) -> dict[str, np.ndarray]:
        """SmoothQuant's, by the weights whose columns they multiply."""
        calibration = self.source.calibrations.get(self.precision)
        found = calibration.smooth if calibration is not None else {}
        fed = balanced_products(self.source.checkpoint.config)
        return {name: np.array(found[norm], np.float32) for norm in found for name in fed[norm]}


_sources: dict[str, Source] = {}  # tracing takes seconds
ALL = [(name, precision) for name in MODELS for precision in ("fp8", "int8", "int8 smoothed", "int4")]


@pytest.fixture(params=ALL, ids="-".join)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    name, precision = request.param
    if name not in _sources:
        _sources[name] = Source.make(tmp_path_factory.mktemp(name), name)
    return Written.make(_sources[name], tmp_path_factory.mktemp("written"), precision)


def dequantise(node: onnx.NodeProto, tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, codes and the scale of each, by the words of ONNX's DequantizeLinear-24."""
    codes, scale = (tensors[name].astype(np.float32) for name in node.input[:2])
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if "block_size" in attributes:
        scale = np.repeat(scale, attributes["block_size"], attributes["axis"])
    elif scale.ndim:
        scale = np.expand_dims(scale, [axis for axis in range(codes.ndim) if axis != attributes["axis"]])
    return codes * scale, codes, np.broadcast_to(scale, codes.shape)


def check(name: str, want: np.ndarray, codes: np.ndarray, scale: np.ndarray, ends: tuple[int, int] | None) -> None:
    """Every weight within half a step, or beyond the codes' ends where the scale clips.

    ends: of integer codes. fp8 e4m3 has steps of 1/8 of a power of two, and of 2^-9 below 2^-6.
    """
    exact = want / scale
    if ends is None:
        half = np.maximum(2.0 ** np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-6))) / 16, 2.0**-10)
        low, high = -448.0, 448.0
    else:
        half, (low, high) = np.float32(0.5), ends
    error = np.abs(codes - np.clip(exact, low, high))
    assert (error <= half * SLACK).all(), (
        f"{name}: {error.max()} steps off at {np.unravel_index(error.argmax(), error.shape)}"
    )


def test_dense_products(written: Written) -> None:
    seen, factors = 0, written.factors()
    for node in written.graph.node:
        if node.op_type != "DequantizeLinear" or not node.input[0].endswith(".codes"):
            continue
        name = node.input[0].removesuffix(".codes")
        want = written.source.weight(name) * factors.get(name, np.float32(1))
        values, codes, scale = dequantise(node, written.tensors)
        kind = written.tensors[node.input[0]].dtype.name
        assert written.tensors[node.input[1]].dtype == BF16
        assert (scale > 0).all()
        assert codes.shape == want.shape
        check(name, want, codes, scale, {"int8": (-127, 127), "int4": (-8, 7), "float8_e4m3fn": None}[kind])
        assert (values[want == 0] == 0).all()
        # what the scale clips: nothing but its own rounding, or 0.3 of the largest weight for int4
        beyond = np.abs(want - values).max() / np.abs(want).max() if want.any() else 0
        assert beyond <= (0.35 if kind == "int4" else 0.04), name
        seen += 1
    kept = 1 + 8 * bool(written.experts) if written.precision == "fp8" else 0
    assert seen == 2 * (4 if written.experts else 6) + 1 - kept


def test_experts(written: Written) -> None:
    attributes = written.experts
    if attributes is None:
        return
    for name in (f"layers.{i}.moe.{part}" for i in range(2) for part in ("w_in", "w_out")):
        want = written.source.weight(name)
        stored, scale = written.tensors[name], written.tensors[f"{name}_scale"]
        assert scale.dtype == np.float32
        columns = want.shape[-1]
        values = reference.dequantize(stored, scale, attributes, columns=columns)
        each = np.repeat(scale, attributes.group_size or columns, -1)[..., :columns]
        safe = np.where(each == 0, 1, each)
        ends = {"fp8_e4m3": None, "int8": (-127, 127), "int4": (-8, 7)}[attributes.weight_format]
        check(name, want, values / safe, safe, ends)
        assert (values[want == 0] == 0).all()


def test_the_rest_keeps_its_type(written: Written) -> None:
    """Norms and the embedding table in bfloat16, divided norms rounded once; routers in float32, untouched."""
    calibration = written.source.calibrations.get(written.precision)
    smooth = calibration.smooth if calibration is not None else {}
    names = [name for name in written.source.checkpoint.weights if name in written.tensors and ".moe.w_" not in name]
    assert sum("norm" in name for name in names) == 5
    for name in names:
        want, got = written.source.weight(name), written.tensors[name]
        if name in smooth:
            want = want / np.array(smooth[name], np.float32)
        np.testing.assert_array_equal(got, want.astype(np.float32 if ".router." in name else BF16), err_msg=name)


def test_static_scales(written: Written) -> None:
    """Each rounded activation has the scale of its product's range, in bfloat16; q, k and v share one pair."""
    calibration = written.source.calibrations.get(written.precision)
    maker = {output: node for node in written.graph.node for output in node.output}
    quantisers = [node for node in written.graph.node if node.op_type == "QuantizeLinear"]
    if calibration is None:
        assert not quantisers
        return
    inputs = 2 * (2 if written.experts else 4) + 1
    kept = 1 + 4 * bool(written.experts) if written.precision == "fp8" else 0
    assert len(quantisers) == inputs - kept
    largest = torch.tensor(448.0 if written.precision == "fp8" else 127.0)
    for node in (node for node in written.graph.node if node.op_type == "MatMul"):
        weight = maker.get(maker[node.input[1]].input[0]) if node.input[1] in maker else None
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        dequantiser = maker[node.input[0]]
        quantiser = maker[dequantiser.input[0]]
        assert quantiser.op_type == "QuantizeLinear"
        assert list(quantiser.input[1:]) == list(dequantiser.input[1:])
        absmax = calibration.ranges[weight.input[0].removesuffix(".codes")].absmax
        want = (torch.tensor(absmax) / largest).bfloat16().float().numpy()
        np.testing.assert_array_equal(written.tensors[quantiser.input[1]].astype(np.float32), want)
        assert written.tensors[quantiser.input[2]].dtype.name == (
            "float8_e4m3fn" if written.precision == "fp8" else "int8"
        )


def exchange_neighbours(written: Written) -> None:
    codes = written.tensors["layers.0.attn.v.weight.codes"]
    written.tensors["layers.0.attn.v.weight.codes"] = codes.reshape(len(codes), -1, 2)[..., ::-1].reshape(codes.shape)


def move_scales(written: Written) -> None:
    scales = written.tensors["layers.1.mlp.w_out.scales"]
    written.tensors["layers.1.mlp.w_out.scales"] = np.roll(scales, 1, 0)


def double_step(written: Written) -> None:
    written.tensors["layers.0.mlp.w_in.codes"] = written.tensors["layers.0.mlp.w_in.codes"] & ~np.int8(1)


def forget_columns(written: Written) -> None:
    factors = written.factors()["layers.0.attn.q.weight"]
    codes = written.tensors["layers.0.attn.q.weight.codes"]
    written.tensors["layers.0.attn.q.weight.codes"] = (codes / factors).round().astype(np.int8)


FAULTS = {exchange_neighbours: "int4", move_scales: "int8", double_step: "int8", forget_columns: "int8 smoothed"}


@pytest.mark.parametrize(
    ("written", "fault"),
    [pytest.param(("llama2", precision), fault, id=fault.__name__) for fault, precision in FAULTS.items()],
    indirect=["written"],
)
def test_faults_are_seen(written: Written, fault: Callable[[Written], None]) -> None:
    fault(written)
    with pytest.raises(AssertionError, match="steps off at"):
        test_dense_products(written)
