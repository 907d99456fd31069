"""What TensorRT receives, without a GPU: the lowered float32 graph on ONNX Runtime's CPU against transformers, fake-quantised.

Prefill, then decoding with the cache. Both sides round the same numbers (see `FakeQuantised.logits`), so no code may differ,
and what is left is float32's rounding of sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from gatework.export.calibrate import calibrate
from gatework.export.calibration import Calibration, dense_products
from gatework.export.checkpoint import Checkpoint
from gatework.export.lower import experts, lower_to_tensorrt, products
from gatework.export.materialize import write_model
from gatework.export.onnx_export import add_function_body, trace
from gatework.export.quantize import quantize_fp8, quantize_int8_rows
from gatework.export.tensorrt.scales import StaticScales
from tests.checkpoints import DENSE_FIRST, make_checkpoint
from tests.fake_quantised import FakeQuantised

# float32 over 2 layers: rounding of sums in another order stays below 3e-6 of the largest value. One int8 code off by one
# moves a product of 64 terms by some 1e-3 of it, a planted fault all of them.
RELATIVE = 1e-5
FAULT = 1e-3
GROUP = 128
BATCH, PROMPT, LENGTH, MAX_SEQ = 2, 9, 14, 16
IDS = np.random.default_rng(0).integers(0, 128, 128)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama2", {}),
    "tied": ("llama2", {"tie_embeddings": True, "intermediate_size": 172}),  # rows of w_out that no int4 group divides
    "mistral": ("mistral", {}),  # with a window of 4
    "mixtral": ("mixtral", {}),
    "odd mixtral": ("mixtral", {"hidden_size": 144, "intermediate_size": 151, "vocab_size": 131}),
    "dbrx": ("dbrx", {}),
    "phi": ("phi", {}),
    "qwen2_moe": ("qwen2_moe", DENSE_FIRST),
    "mpt": ("mpt-clip", {}),
    "gpt-oss": ("gpt-oss", {}),
}
WEIGHT_ONLY = "fp8 weight-only"
PRECISIONS = ("bf16", "fp8", "int8", "int8 smoothed", "int4")


@dataclass(frozen=True)
class Case:
    """A checkpoint, its canonical float32 graph, and its calibrations."""

    checkpoint: Checkpoint
    traced: ir.Model
    calibrations: dict[str, Calibration]

    @classmethod
    def make(cls, folder: Path, name: str) -> Case:
        model, options = CASES[name]
        checkpoint = Checkpoint.open(make_checkpoint(folder, model, seed=5, **options))
        plain, smoothed = (calibrate(checkpoint, IDS.tolist(), window=32, smooth=alpha) for alpha in (None, 0.5))
        by_precision = {"fp8": plain, "int8": plain, "int8 smoothed": smoothed}
        return cls(checkpoint, trace(checkpoint.config, MAX_SEQ), by_precision)

    def oracle(self, precision: str) -> FakeQuantised:
        kind: Any = precision.split()[0]
        settings: dict[str, Any] = {"group": GROUP, "weight_only": precision == WEIGHT_ONLY}
        return FakeQuantised(self.checkpoint.path, kind, calibration=self.calibrations.get(precision), **settings)

    def write(self, folder: Path, precision: str) -> onnx.ModelProto:
        """The lowered graph, written to `folder`; it is returned without its weights."""
        kind: Any = precision.split()[0]
        scales = StaticScales(self.checkpoint, self.calibrations.get(precision))
        settings: dict[str, Any] = {"group": GROUP if kind == "int4" else 0, "weight_only": precision == WEIGHT_ONLY}
        model = lower_to_tensorrt(self.traced.clone(), kind, scales=scales, **settings)
        add_function_body(model)
        write_model(model, self.checkpoint, folder)
        return onnx.load(folder / "model.onnx", load_external_data=False)


class Graph:
    """A lowered graph that runs on the CPU and shows the inputs of its products as they are before rounding."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self.inputs = inputs_before_rounding(model.graph)
        for value in dict.fromkeys(self.inputs.values()):
            model.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))
        onnx.save(model, folder / "simulated.onnx")
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # no fusion into integer kernels
        options.log_severity_level = 3
        self.session = ort.InferenceSession(folder / "simulated.onnx", options, providers=["CPUExecutionProvider"])

    def run(self, ids: np.ndarray) -> tuple[dict[int, np.ndarray], dict[str, torch.Tensor]]:
        """Logits [B, V] by position, and inputs [B, S, D] by product, NaN where the graph does not compute them."""
        past = {i.name: np.zeros((BATCH, *i.shape[1:]), np.float32) for i in self.session.get_inputs()[3:]}
        names = [output.name for output in self.session.get_outputs()]
        logits, parts = {}, {name: [] for name in self.inputs}
        for start, stop in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, LENGTH))]:
            steps = {"input_ids": ids[:, start:stop], "position_ids": np.tile(np.arange(start, stop), (BATCH, 1))}
            values = self.session.run(None, steps | {"write_indices": np.full(BATCH, start)} | past)
            found = dict(zip(names, values, strict=True))
            past = {name: found[name.replace("past", "present")] for name in past}
            logits[stop - 1] = found["logits"][:, 0]
            for name, value in self.inputs.items():
                missing = stop - start - found[value].shape[1]  # all but the last position
                parts[name].append(np.pad(found[value], ((0, 0), (missing, 0), (0, 0)), constant_values=np.nan))
        return logits, {name: torch.from_numpy(np.concatenate(found, 1)) for name, found in parts.items()}


def inputs_before_rounding(graph: onnx.GraphProto) -> dict[str, str]:
    """Names of the values that Q/DQ pairs in front of quantised products round, by product."""
    maker = {output: node for node in graph.node for output in node.output}

    def walk(value: str, *ops: str) -> str | None:
        for op in ops:
            if value not in maker or maker[value].op_type != op:
                return None
            value = maker[value].input[0]
        return value

    found = {}
    for node in graph.node:
        codes = walk(node.input[1], "Transpose", "DequantizeLinear") if node.op_type == "MatMul" else None
        x = walk(node.input[0], "DequantizeLinear", "QuantizeLinear") if codes is not None else None
        if codes is not None and x is not None:
            found[codes.removesuffix(".codes")] = x
    return found


def differences(graph: Graph, oracle: FakeQuantised) -> dict[str, float]:
    """The largest differences over the largest magnitudes: of every product's input, and of the logits by position."""
    ids = IDS[: BATCH * LENGTH].reshape(BATCH, LENGTH)
    logits, inputs = graph.run(ids)
    want = oracle.logits(torch.from_numpy(ids), inputs).numpy()
    assert inputs.keys() == oracle.errors.keys()
    found = dict(oracle.errors)
    for at, got in logits.items():
        what = "prefill" if at < PROMPT else f"decode at {at}"
        found[what] = float(np.abs(got - want[:, at]).max() / np.abs(want[:, at]).max())
    return found


_made: dict[str, Case] = {}  # tracing takes seconds; pytest would keep one parameter's fixture at a time


@pytest.fixture(scope="module", params=CASES)  # groups the tests by case
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if request.param not in _made:
        _made[request.param] = Case.make(tmp_path_factory.mktemp("case"), request.param)
    return _made[request.param]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lowered_graph_equals_fake_quantised_transformers(case: Case, precision: str, tmp_path: Path) -> None:
    oracle = case.oracle(precision)
    found = differences(Graph(case.write(tmp_path, precision), tmp_path), oracle)
    products = dense_products(case.checkpoint.config) if precision in case.calibrations else ()
    rounded = [name for name in products if not oracle.kept(name)]
    steps = ["prefill", *(f"decode at {at}" for at in range(PROMPT, LENGTH))]
    assert found.keys() == {*rounded, *steps}
    worst = max(found, key=lambda what: found[what])
    assert all(error <= RELATIVE for error in found.values()), f"{worst}: {found[worst]:.2e}, tolerance {RELATIVE:.0e}"


@pytest.mark.parametrize("case", ["qwen2_moe"], indirect=True)
def test_fp8_of_experts_alone(case: Case, tmp_path: Path) -> None:
    """Beside a dense layer and a shared expert, which are not rounded."""
    found = differences(Graph(case.write(tmp_path, WEIGHT_ONLY), tmp_path), case.oracle(WEIGHT_ONLY))
    assert found.keys() == {"prefill", *(f"decode at {at}" for at in range(PROMPT, LENGTH))}
    assert max(found.values()) <= RELATIVE, found


def rewrite(model: onnx.ModelProto, folder: Path, tensor: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the bytes of a written tensor."""
    (found,) = (value for value in model.graph.initializer if value.name == tensor)
    place = {entry.key: entry.value for entry in found.external_data}
    shape, offset = (int(place["length"]),), int(place["offset"])
    stored = np.memmap(folder / place["location"], np.uint8, "r+", offset, shape)
    stored[:] = change(stored)
    stored.flush()


def swap_nibbles(stored: np.ndarray) -> np.ndarray:
    return stored << np.uint8(4) | stored >> np.uint8(4)


def turn_scales(model: onnx.ModelProto, folder: Path) -> None:
    """Scales of the square matrix of o along its columns."""
    (node,) = (node for node in model.graph.node if "layers.0.attn.o.weight.codes" in node.input)
    (axis,) = (attribute for attribute in node.attribute if attribute.name == "axis")
    axis.i = 1


def borrow_scale(model: onnx.ModelProto, folder: Path) -> None:
    """The second rounded activation, o's input, takes the scale of the first."""
    first, second = [node for node in model.graph.node if node.op_type == "QuantizeLinear"][:2]
    (reader,) = (node for node in model.graph.node if second.output[0] in node.input)
    for node in (second, reader):
        node.input[1] = first.input[1]


def borrow_weight_scale(model: onnx.ModelProto, folder: Path) -> None:
    """The weight of o takes the scale of q's."""
    q, o = (
        next(node for node in model.graph.node if f"layers.0.attn.{name}.weight.codes" in node.input) for name in "qo"
    )
    o.input[1] = q.input[1]


WRITTEN_FAULTS: dict[str, tuple[str, str, Callable[[onnx.ModelProto, Path], None]]] = {
    "scales along the wrong axis": ("llama2", "int8", turn_scales),
    "scale of another activation": ("llama2", "int8", borrow_scale),
    "scale of another fp8 weight": ("llama2", "fp8", borrow_weight_scale),
    "nibbles exchanged": ("llama2", "int4", lambda *at: rewrite(*at, "layers.0.attn.k.weight.codes", swap_nibbles)),
    "nibbles unsigned": ("llama2", "int4", lambda *at: rewrite(*at, "layers.1.mlp.w_out.codes", lambda x: x ^ 0x88)),
    "experts' nibbles exchanged": ("mixtral", "int4", lambda *at: rewrite(*at, "layers.1.moe.w_out", swap_nibbles)),
    "experts' nibbles signed": ("mixtral", "int4", lambda *at: rewrite(*at, "layers.1.moe.w_in", lambda x: x ^ 0x88)),
    "experts' scales a row off": (
        "mixtral",
        "int8",
        lambda *at: rewrite(*at, "layers.1.moe.w_in_scale", lambda x: np.roll(x, 4)),
    ),
}
PASS_FAULTS: dict[str, tuple[str, str, Any, str, Callable[..., Any]]] = {
    "norm not divided": ("llama2", "int8 smoothed", products, "_divide", lambda part, factors, dtype: (part,)),
    "columns not multiplied": (
        "llama2",
        "int8 smoothed",
        products,
        "_encode_int8",
        lambda part, factors, dtype: quantize_int8_rows(part, dtype),
    ),
    "range of another product": (
        "llama2",
        "fp8",
        StaticScales,
        "activation",
        lambda self, product, largest: self.calibration.scale("lm_head.weight", largest),
    ),
    "fp8 weight clipped": ("llama2", "fp8", StaticScales, "weight_absmax", lambda self, weight, factors: 0.2),
    "one scale per expert": (
        "mixtral",
        "fp8",
        experts,
        "encode_expert",
        lambda part, attributes: quantize_fp8(part, part.abs().max().expand(len(part), 1)),
    ),
}


@pytest.mark.parametrize(("case", "precision", "fault"), WRITTEN_FAULTS.values(), ids=WRITTEN_FAULTS, indirect=["case"])
def test_fault_in_what_is_written(
    case: Case, precision: str, fault: Callable[[onnx.ModelProto, Path], None], tmp_path: Path
) -> None:
    model = case.write(tmp_path, precision)
    fault(model, tmp_path)
    assert max(differences(Graph(model, tmp_path), case.oracle(precision)).values()) > FAULT


@pytest.mark.parametrize(
    ("case", "precision", "owner", "name", "fault"), PASS_FAULTS.values(), ids=PASS_FAULTS, indirect=["case"]
)
def test_fault_in_the_pass(
    case: Case,
    precision: str,
    owner: Any,
    name: str,
    fault: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, fault)
    graph = Graph(case.write(tmp_path, precision), tmp_path)
    assert max(differences(graph, case.oracle(precision)).values()) > FAULT
