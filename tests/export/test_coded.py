"""Weights that a checkpoint stores as 8-bit codes times scales stay what they are in engines that can hold them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors import safe_open

from gatework.export import engine_writer
from gatework.export.build import build_engine
from gatework.export.checkpoint import Checkpoint
from gatework.export.ckpt import ScaledTensor
from gatework.export.coded import stored_blocks
from gatework.export.lower import lower_to_tensorrt
from gatework.export.materialize import write_model
from gatework.export.onnx_export import trace
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe import cpu_ops
from gatework.plugins.moe.reference import moe
from gatework.plugins.moe.spec import MoEAttributes
from gatework.runtime.cli import main
from gatework.runtime.verify import verify
from tests.golden.grok1 import weights as grok1
from tests.plugins.moe_cpu_model import model_of, session
from tests.test_simulated_parity import MAX_SEQ
from tests.test_written_weights import check

D, E, WIDTH, SHARDS = grok1.D, grok1.E, 256, 4
Parameters = dict[tuple[str, str], grok1.Tensor]
Array = np.ndarray


def parameters() -> Parameters:
    """Two layers whose blocks groups divide, with what a quantiser hardly writes: -128, scales of 0 and below."""
    found = grok1.tensors(layers=2, width=WIDTH, shards=SHARDS)
    for tensor in found.values():
        if isinstance(tensor, grok1.QuantizedWeight8bit):
            tensor.weight[..., ::7, 3] = -128
            tensor.scales[..., 0, 5] = 0
            tensor.scales[..., 0, 6] *= -1
    return found


def positive(found: Parameters) -> Parameters:
    """With no scale below 0."""
    for tensor in found.values():
        if isinstance(tensor, grok1.QuantizedWeight8bit):
            tensor.scales[...] = np.abs(tensor.scales)
    return found


def write(folder: Path, found: Parameters, width: int = WIDTH) -> Path:
    return grok1.write_ckpt(folder / "ckpt", found, grok1.CONFIG | {"num_hidden_layers": 2, "intermediate_size": width})


def stored(found: Parameters, layer: int, module: str) -> tuple[Array, Array]:
    """Codes and scales as rows [..., out, in] and [..., out, groups of in] of one of xAI's matrices."""
    tensor = found[f"transformer/decoder_layer_{layer}/{module}", "w"]
    assert isinstance(tensor, grok1.QuantizedWeight8bit)
    return tensor.weight.swapaxes(-1, -2), tensor.scales.swapaxes(-1, -2)


def expected(found: Parameters, layer: int) -> dict[str, tuple[Array, Array]]:
    """By the names that engines have."""
    gate, up = (stored(found, layer, f"moe/{name}") for name in ("linear", "linear_v"))
    qkv = [stored(found, layer, f"multi_head_attention/{name}") for name in ("query", "key", "value")]
    return {
        "moe.w_in": (np.concatenate([gate[0], up[0]], 1), np.concatenate([gate[1], up[1]], 1)),
        "moe.w_out": stored(found, layer, "moe/linear_1"),
        "attn.qkv.weight": (np.concatenate([part[0] for part in qkv]), np.concatenate([part[1] for part in qkv])),
        "attn.o.weight": stored(found, layer, "multi_head_attention/linear"),
    }


def read(engine: Path, name: str) -> Array:
    """A tensor of an engine; bfloat16 as such."""
    for file in ("experts", "weights"):
        with safe_open(engine / f"{file}.safetensors", "pt") as tensors:
            names = tensors.keys()
            if name in names:
                found = tensors.get_tensor(name)
                is_half = found.dtype == torch.bfloat16
                return found.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if is_half else found.numpy()
    raise AssertionError(name)


def unpacked(engine: Path, name: str) -> tuple[Array, Array]:
    """Signed codes [..., rows, columns] and scales [..., rows, groups] out of the kernels' layout (cpu/layout.h), 8 bits."""
    codes, scales = read(engine, f"{name}.codes"), read(engine, f"{name}.scales")
    blocks, steps = codes.shape[-4:-2]
    rows = codes.swapaxes(-2, -3).reshape(*codes.shape[:-4], blocks * 16, steps * 4)
    scale_rows = scales.swapaxes(-1, -2).reshape(*scales.shape[:-3], blocks * 16, -1)
    if name.endswith("w_in"):  # gate and up are matrices of their own
        rows, scale_rows = (x.reshape(x.shape[0], -1, x.shape[-1]) for x in (rows, scale_rows))
    return (rows.astype(np.int16) - 128).astype(np.int8), scale_rows


def kept(engine: Path) -> dict[str, int]:
    """Of the first layer."""
    found = json.loads((engine / "manifest.json").read_text())["kept"]
    return {name.removeprefix("layers.0."): group for name, group in found.items() if name.startswith("layers.0.")}


ATTENTION = {"attn.q.weight": 64, "attn.k.weight": 64, "attn.v.weight": 64, "attn.o.weight": 16}
EXPERTS = {"moe.w_in": 64, "moe.w_out": 64}


@pytest.mark.parametrize(
    ("precision", "group_size", "want"),
    [
        ("int8", None, EXPERTS | ATTENTION),
        ("int8", 16, dict.fromkeys(EXPERTS | ATTENTION, 16)),
        ("int8", 64, EXPERTS | {name: group for name, group in ATTENTION.items() if group == 64}),
        ("int4", None, ATTENTION),  # which has 8 bits in such engines
    ],
)
def test_cpu_engines_hold_the_stored_numbers(
    tmp_path: Path,
    precision: str,
    group_size: int | None,
    want: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = parameters()
    path = write(tmp_path, found)
    if precision == "int8" and group_size != 64:  # nothing of what is stored so is ever multiplied
        monkeypatch.setattr(Checkpoint, "check_small", lambda _: None)  # which reads all of so small a checkpoint
        monkeypatch.delattr(ScaledTensor, "read_into")
    engine = build_engine(path, tmp_path / "engine", precision=precision, group_size=group_size)
    assert kept(engine) == want
    assert main(["inspect", str(engine)]) == 0
    matrices = 2 * sum(name in ATTENTION for name in want)
    expected_words = f"{matrices} matrices" if precision == "int4" else f"4 stacks of experts and {matrices} matrices"
    assert re.search(rf"as stored +codes and scales of {expected_words}\n", capsys.readouterr().out)
    groups = want | {"attn.qkv.weight": want["attn.q.weight"]}
    for layer in range(2):
        for name, (codes, scales) in expected(found, layer).items():
            if name not in groups:
                continue
            got, got_scales = unpacked(engine, f"layers.{layer}.{name}")
            np.testing.assert_array_equal(got, codes, err_msg=name)
            assert got_scales.dtype == scales.dtype
            repeats = got_scales.shape[-1] // scales.shape[-1]
            assert codes.shape[-1] // got_scales.shape[-1] == groups[name]
            np.testing.assert_array_equal(got_scales, scales.repeat(repeats, -1), err_msg=name)


def test_what_no_group_divides_is_rounded(tmp_path: Path) -> None:
    """Blocks of 11 and of 8 beside rows of 64, in one engine; a mixed one passes as well."""
    found = grok1.tensors(layers=2)
    path = write(tmp_path, found, grok1.I)
    engine = build_engine(path, tmp_path / "engine", precision="int8", prefill_chunk=16, max_batch=3)
    assert kept(engine) == {"moe.w_in": 64, "attn.q.weight": 64, "attn.k.weight": 64, "attn.v.weight": 64}
    report = verify(engine, path, tokens=16, threads=1)
    assert report.passed, str(report)


def test_verification_expects_no_error_of_kept_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes; keys and values are off by what rounding to 16 bits costs alone; and an engine that lies about it fails."""
    path = write(tmp_path, parameters())
    settings: dict[str, Any] = {"precision": "int8", "prefill_chunk": 16, "max_batch": 3}
    report = verify(build_engine(path, tmp_path / "kept", **settings), path, tokens=16, threads=1)
    assert report.passed, str(report)
    errors = {stage.tensor: stage.local for stage in report.stages}
    assert errors["attention"] < 1e-4
    assert max(errors["key"], errors["value"]) < 3e-4  # float16's, in the cache
    monkeypatch.setattr(engine_writer, "stored_blocks", lambda *_: {})
    rounded = build_engine(path, tmp_path / "rounded", **settings)
    assert kept(rounded) == {}
    manifest, honest = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("rounded", "kept"))
    (rounded / "manifest.json").write_text(json.dumps(manifest | {"kept": honest["kept"]}))
    report = verify(rounded, path, tokens=16, threads=1)
    failed = {stage.tensor for stage in report.stages if not stage.passed}
    assert {"key", "value", "attention"} <= failed, str(report)


def run_experts(engine: Path, x: Array, logits: Array) -> Array:
    """The first layer's experts, by the kernels, of an engine's numbers; groups of 64."""
    inputs = {"x": x, "router_logits": logits}
    for name in ("w_in", "w_out"):
        inputs[name] = read(engine, f"layers.0.moe.{name}.codes")
        inputs[f"{name}_scale"] = read(engine, f"layers.0.moe.{name}.scales").view(np.uint16)
    attributes = MoEAttributes(top_k=2, renormalize=False, activation="gelu_tanh")
    settings = {name: value for name, value in attributes.to_onnx().items() if name != "weight_format"}
    settings |= {"bits": 8, "group_size": 64, "hidden_size": D, "expert_width": WIDTH, "num_experts": E}
    library = cpu_ops.find_library()
    assert library is not None
    (y,) = session(model_of("PackedMoE", inputs, settings, D), library).run(None, {"x": x, "router_logits": logits})
    return np.asarray(y)


def test_experts_are_as_near_as_their_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of activations that are codes themselves: what is left is the rounding to 16 bits inside; rounded weights bring more."""
    found = parameters()
    path = write(tmp_path, found)
    rng = np.random.default_rng(0)
    x, logits = rng.integers(-127, 128, (24, D)).astype(np.float32), rng.standard_normal((24, E), np.float32)
    x[:, ::64] = 127
    names = [found["transformer/decoder_layer_0/moe/" + part, "w"] for part in ("linear", "linear_v", "linear_1")]
    gate, up, down = (grok1.dequantized(each).swapaxes(1, 2) for each in names)  # type: ignore[arg-type]
    attributes = MoEAttributes(top_k=2, renormalize=False, activation="gelu_tanh")
    want = moe(x, logits, np.concatenate([gate, up], 1), down, attributes=attributes)

    def error(engine: Path) -> float:
        return float(np.linalg.norm(run_experts(engine, x, logits) - want) / np.linalg.norm(want))

    bound = 1e-4
    assert error(build_engine(path, tmp_path / "kept", precision="int8")) < bound
    monkeypatch.setattr(engine_writer, "stored_blocks", lambda *_: {})
    assert error(build_engine(path, tmp_path / "rounded", precision="int8")) > 10 * bound


@pytest.mark.parametrize("scale", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["moe/linear_1", "multi_head_attention/key"])
def test_scales_that_are_no_numbers_are_refused(tmp_path: Path, part: str, scale: float) -> None:
    found = parameters()
    tensor = found[f"transformer/decoder_layer_1/{part}", "w"]
    assert isinstance(tensor, grok1.QuantizedWeight8bit)
    tensor.scales[..., 0, 2] = scale
    path = write(tmp_path, found)
    with pytest.raises(GateworkError, match=f"tensor decoder_layer_1/{part}/w in .* has weights that are not finite"):
        build_engine(path, tmp_path / "engine", precision="int8")
    assert not (tmp_path / "engine").exists()


class FixedScales:
    """smooth: by norm weight."""

    def __init__(self, smooth: dict[str, list[float]]) -> None:
        self.smooth = smooth

    def activation(self, product: str, largest: float) -> float:
        return 1 / largest

    def weight_absmax(self, weight: str, factors: object) -> float:
        raise AssertionError("int8 has a scale per row")


def written(path: Path, folder: Path, smooth: dict[str, list[float]]) -> dict[str, Array]:
    """What TensorRT gets of an int8 plan."""
    checkpoint = Checkpoint.open(path)
    model = trace(checkpoint.config, MAX_SEQ, dtype="bfloat16")
    scales, blocks = FixedScales(smooth), stored_blocks(checkpoint)
    write_model(lower_to_tensorrt(model, "int8", scales=scales, blocks=blocks), checkpoint, folder)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(folder / "model.onnx").graph.initializer}


@pytest.mark.parametrize("smooth", [False, True])
def test_plans_hold_the_stored_numbers(tmp_path: Path, smooth: bool) -> None:
    """Where rows have one scale each; blocks of rows, and what smoothing changes, are rounded anew."""
    found = positive(parameters())
    factors = {"layers.0.attn_norm.weight": [2.0] * D} if smooth else {}
    tensors = written(write(tmp_path, found), tmp_path, factors)
    want = expected(found, 0)
    gate_up, scales = want["moe.w_in"]
    np.testing.assert_array_equal(tensors["layers.0.moe.w_in"], gate_up)
    np.testing.assert_array_equal(tensors["layers.0.moe.w_in_scale"], scales.astype(np.float32))
    codes, scales = want["moe.w_out"]
    values = codes * scales.astype(np.float32).repeat(WIDTH // SHARDS, -1)
    steps = tensors["layers.0.moe.w_out_scale"]
    check("w_out", values, tensors["layers.0.moe.w_out"], np.broadcast_to(steps, values.shape), (-127, 127))
    codes, scales = stored(found, 0, "multi_head_attention/query")
    got, steps = (tensors[f"layers.0.attn.q.weight.{part}"] for part in ("codes", "scales"))
    zero = scales == 0
    assert (
        np.array_equal(got, np.where(zero, 0, codes)),
        np.array_equal(steps[:, None], np.where(zero, 1, scales)),
    ) == (
        not smooth,
        not smooth,
    )


@pytest.mark.tensorrt
def test_an_int8_plan_is_compiled_of_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no plan is built")
    path = write(tmp_path, positive(parameters()))
    settings: dict[str, Any] = {"target": "a100", "precision": "int8", "max_seq": 32, "plan_only": True}
    engine = build_engine(path, tmp_path / "engine", **settings)
    assert kept(engine) == dict.fromkeys(("attn.q.weight", "attn.k.weight", "attn.v.weight", "moe.w_in"), 0)
    assert json.loads((engine / "layers.json").read_text())["counts"]["PLUGIN_V3"] == 2


def test_tensorrt_refuses_negative_scales(tmp_path: Path) -> None:
    path = write(tmp_path, parameters())
    with pytest.raises(
        GateworkError, match=r"TensorRT takes no weights with negative scales; got -.* in layers\.0\.attn"
    ):
        written(path, tmp_path, {})
