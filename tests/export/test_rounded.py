"""A text that rounds a checkpoint: what every weight is rounded for, and that engines hold it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gatework.export import rounded
from gatework.export.build import build_engine
from gatework.export.checkpoint import Checkpoint
from gatework.export.gptq import Grid
from gatework.export.lower import (
    CUDA_DTYPES,
    experts,
    linear,
    lower_to_cpu,
    lower_to_cuda,
    lower_to_tensorrt,
    moe,
    packed,
    products,
)
from gatework.export.onnx_export import trace
from gatework.export.options import BuildOptions
from gatework.export.packing import is_weight, pack_of
from gatework.export.quantize import dequantize_rows, quantize_fp8, quantize_rows
from gatework.export.rounded import FEW_TOKENS, RoundedCheckpoint, Rounder, rounded_grids
from gatework.plugins.errors import GateworkError, GateworkWarning
from gatework.runtime.engine import Engine
from gatework.runtime.verify import verify
from tests.checkpoints import make_checkpoint, reference_model
from tests.export.test_build import CHECKPOINT, contents
from tests.switch import make_switch

pytestmark = pytest.mark.filterwarnings("ignore:the calibration text has")
IDS = np.random.default_rng(0).integers(0, 128, 80).tolist()


def rounded_checkpoint(path: Path, target: str, kind: str) -> tuple[RoundedCheckpoint, BuildOptions]:
    """kind: a precision, or "int4 pure"."""
    checkpoint = Checkpoint.open(path)
    precision, _, pure = kind.partition(" ")
    options = BuildOptions(target=target, precision=precision, max_seq=32, pure=bool(pure))
    return RoundedCheckpoint.of(checkpoint, options, IDS), options


def lowered(checkpoint: Checkpoint, options: BuildOptions) -> Any:
    if options.device.capability is not None:
        model = trace(checkpoint.config, 32, dtype="bfloat16")
        return lower_to_tensorrt(model, options.precision, group=options.group)  # type: ignore[arg-type]
    lower = lower_to_cuda if options.target == "cuda" else lower_to_cpu
    model = trace(checkpoint.config, 32, dtype=CUDA_DTYPES["int4"] if options.target == "cuda" else "float32")
    return lower(model, checkpoint.config, options.precision, options.group, pure=options.pure)  # type: ignore[arg-type]


# Odd widths, shared experts, extra and parallel MLPs, biases, three-way gates.
@pytest.mark.parametrize(
    ("model", "target", "kind", "sizes"),
    [
        ("mixtral", "cpu", "int4", {"intermediate_size": 50}),
        ("llama1", "cpu", "int4", {}),
        ("phi", "cpu", "int4", {}),
        ("qwen2_moe", "cpu", "int4", {}),
        ("gpt-oss", "cpu", "int4", {"intermediate_size": 50}),
        ("openmoe", "cpu", "int4", {}),
        ("mixtral", "cpu", "int4 pure", {"vocab_size": 131}),
        ("qwen3", "cpu", "int4 pure", {}),  # a tied head
        ("llama2", "cuda", "int4 pure", {}),
        ("mixtral", "cuda", "int4", {"intermediate_size": 96}),
        ("mixtral", "a100", "int4", {}),
        ("llama1", "a100", "int4", {}),
        ("dbrx", "ada", "fp8", {"intermediate_size": 50}),
    ],
)
def test_engines_hold_exactly_the_rounded_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, target: str, kind: str, sizes: dict[str, Any]
) -> None:
    """Every encoder, of every target, finds codes and scales again that give each rounded weight."""
    source, options = rounded_checkpoint(make_checkpoint(tmp_path, model, **sizes), target, kind)
    seen = 0

    def check(same: bool) -> None:
        nonlocal seen
        assert same
        seen += 1

    def rows(w: Tensor, bits: int, group: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        codes, scales = quantize_rows(w, bits, group, *args, **kwargs)
        if bits == 4:
            check(torch.equal(dequantize_rows(codes, scales.float(), 4, w.shape[1]), w))
        return codes, scales

    def fp8(w: Tensor, ranges: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        codes, scales = quantize_fp8(w, ranges, *args)
        check(torch.equal(codes.float() * scales.float(), w))
        return codes, scales

    for module in (packed, moe, linear, experts, products):
        monkeypatch.setattr(module, "quantize_rows", rows)
    monkeypatch.setattr(experts, "quantize_fp8", fp8)
    graph = lowered(source, options).graph
    packs = {pack_of(value): None for value in graph.initializers.values() if is_weight(value)}
    given = [(pack, name) for pack in packs for name in pack.sources if name in source.rounder.grids]
    assert {name for _, name in given} == set(source.rounder.grids) != set()
    for pack, name in given:
        for part in source.parts(name):
            pack.encode(part)
    assert seen >= len(given)
    name = given[0][1]
    assert not torch.equal(torch.stack([*source.parts(name)]).view(-1), source.read(name).view(-1))


def captured(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """By layer, weights and the moments that they are rounded for, where rounding changes nothing."""
    checkpoint = Checkpoint.open(path)
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    layer = 0

    def keep(w: Tensor, moments: Tensor, grid: Grid) -> Tensor:
        found.setdefault(layer, []).append((w.clone(), moments))
        return w

    monkeypatch.setattr(rounded, "round_matrix", keep)
    grids = rounded_grids(checkpoint.config, BuildOptions(target="cpu", precision="int4", pure=True))
    rounder = Rounder(checkpoint, grids, IDS, progress=False)
    for layer in range(checkpoint.config.num_layers):
        list(rounder.parts(next(name for name in grids if name.startswith(f"layers.{layer}."))))
    layer += 1
    list(rounder.parts("lm_head.weight"))
    return found


def hooked(path: Path, module: Callable[[Any], Any]) -> list[Tensor]:
    """What goes into a module of each layer of transformers' model: [T, D] float64."""
    model, parts = reference_model(path), []
    for layer in model.model.layers:
        module(layer).register_forward_pre_hook(lambda _, args: parts.append(args[0].flatten(0, -2)))
    with torch.inference_mode():
        for start in range(0, len(IDS), 64):
            model(torch.tensor([IDS[start : start + 64]]))
    layers = len(model.model.layers)
    return [torch.cat(parts[i::layers]).double() for i in range(layers)]


def close(got: Tensor, want: Tensor) -> None:
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=0, atol=1e-4 * float(want.abs().max()))  # float32 sums


def test_dense_weights_are_rounded_for_their_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint(tmp_path, "llama2")
    found = captured(path, monkeypatch)
    for which, module in ((0, "self_attn.q_proj"), (3, "self_attn.o_proj"), (4, "mlp.gate_proj"), (5, "mlp.down_proj")):
        for i, x in enumerate(hooked(path, lambda layer, name=module: layer.get_submodule(name))):
            close(found[i][which][1], x.T @ x)
    assert [len(found[i]) for i in found] == [6, 6, 1]
    model, inputs = reference_model(path), []
    model.lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.inference_mode():
        for ids in torch.tensor([IDS]).split(64, 1):
            model(ids)
    x = torch.cat(inputs).double()
    close(found[2][0][1], x.T @ x)


def test_experts_are_rounded_for_the_tokens_that_choose_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint(tmp_path, "mixtral")
    found, model = captured(path, monkeypatch), reference_model(path)
    for i, x in enumerate(hooked(path, lambda layer: layer.mlp)):
        scores = (x @ model.model.layers[i].mlp.gate.weight.detach().double().T).softmax(-1)
        best = scores.topk(2)
        shares = torch.zeros_like(scores).scatter(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
        found[i] = found[i][4:]  # attention's, which come first
        assert len(found[i]) == 16
        for e, ((w_in, first), (_, second)) in enumerate(zip(found[i][::2], found[i][1::2], strict=True)):
            weighed = shares[:, e, None] * x
            close(first, weighed.T @ weighed)
            gate, up = (x @ w_in.double().T).chunk(2, -1)
            hidden = shares[:, e, None] * F.silu(gate) * up
            close(second, hidden.T @ hidden)


def test_engine_passes_its_gate_and_is_the_same_again(tmp_path: Path) -> None:
    text = tmp_path / "sample.txt"
    text.write_text((CHECKPOINT / "calibration.txt").read_text()[:3000])
    settings: dict[str, Any] = {"precision": "int4", "max_seq": 64, "calibration_text": text}
    first, second = (build_engine(CHECKPOINT, tmp_path / name, **settings) for name in ("first", "second"))
    plain = build_engine(CHECKPOINT, tmp_path / "plain", precision="int4", max_seq=64)
    files = contents(first)
    assert files == contents(second)
    assert {name for name, digest in contents(plain).items() if files[name] != digest} == {
        "experts.safetensors",
        "manifest.json",
    }
    assert verify(first, CHECKPOINT, tokens=16).passed


@pytest.mark.parametrize("model", ["mixtral", "qwen3"])
def test_pure_engines_have_4_bits_where_others_have_8(tmp_path: Path, model: str) -> None:
    path = make_checkpoint(tmp_path, model)
    engine, other = (
        build_engine(path, tmp_path / str(pure), precision="int4", pure=pure, max_seq=64) for pure in (True, False)
    )
    read = [Engine.open(each).weight_bytes["per_token"] for each in (engine, other)]
    config = Checkpoint.open(path).config
    head = config.vocab_size * config.hidden_size
    heads = config.num_heads + config.num_kv_heads
    attention = 2 * heads * config.head_dim * config.hidden_size * config.num_layers if model == "mixtral" else 0
    assert read[1] - read[0] == (head + attention) * (8 + 16 / 64 - 4 - 16 / 32) / 8
    report = verify(engine, path, tokens=16)
    assert report.passed
    assert max(stage.share for stage in report.stages) < 0.8


def test_pure_is_for_int4_on_onnx_runtime(tmp_path: Path) -> None:
    for target, precision in (("cpu", "int8"), ("a100", "int4")):
        with pytest.raises(GateworkError, match=f"got {precision} for {target}; expected int4 for cpu or cuda"):
            BuildOptions(target=target, precision=precision, pure=True)


def test_a_short_text_is_warned_of(tmp_path: Path) -> None:
    """Before it goes through any layer."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "llama2"))
    options = BuildOptions(target="cpu", precision="int4")
    with pytest.warns(GateworkWarning, match=f"the calibration text has {FEW_TOKENS - 1} tokens, and so few"):
        RoundedCheckpoint.of(checkpoint, options, [1] * (FEW_TOKENS - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RoundedCheckpoint.of(checkpoint, options, [1] * FEW_TOKENS)


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("llama2", {"precision": "int8"}, "a text helps no weights of this precision; got int8"),
        ("llama2", {"precision": "fp8", "target": "ada"}, "rounded without a text; got fp8 without experts"),
        ("llama2", {"precision": "int4"}, "has no tokenizer"),
        ("switch", {"precision": "int4"}, "rounded without a text; got a model with an encoder"),
    ],
)
def test_what_is_refused(tmp_path: Path, model: str, settings: dict[str, Any], words: str) -> None:
    text = tmp_path / "sample.txt"
    text.write_text("some words")
    path = make_switch(tmp_path) if model == "switch" else make_checkpoint(tmp_path, model)
    with pytest.raises(GateworkError, match=words):
        build_engine(path, tmp_path / "engine", calibration_text=text, **settings)
    assert not (tmp_path / "engine").exists()
