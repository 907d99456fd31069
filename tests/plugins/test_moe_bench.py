"""The benchmark's own arithmetic, and its peers, on the CPU: what it compares must compute the same operator."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gatework.plugins.moe import bench, bench_layers, measure, peers, reference, torch_op, tune
from gatework.plugins.moe.kernels.launches import Tile, launches
from gatework.plugins.moe.spec import MoEAttributes, MoESizes
from gatework.plugins.moe.workspace import HIDDEN_CODES
from tests.plugins.moe_cases import assert_close, random_inputs

# Two bfloat16 roundings of u and h and one of each expert's output.
BFLOAT16 = 3 * 2**-8


@pytest.mark.parametrize("peer", [peers.grouped, peers.loop])
@pytest.mark.parametrize(
    "attributes", [bench_layers.SHAPES[name].attributes for name in ("mixtral", "grok-1")], ids=["a", "b"]
)
def test_peers_compute_the_operator(peer: Any, attributes: MoEAttributes) -> None:
    inputs = random_inputs(attributes, 9, D=32, E=5, I=48)
    narrow = {k: torch.from_numpy(v) for k, v in inputs.items()}
    narrow = {k: v if k == "router_logits" else v.bfloat16() for k, v in narrow.items()}
    want = reference.moe(attributes=attributes, **{k: v.float().numpy() for k, v in narrow.items()})
    assert_close(peer(attributes=attributes, **narrow).float().numpy(), want, BFLOAT16)


@pytest.mark.parametrize("name", bench_layers.FORMATS)
def test_dequantised_weights_are_the_definitions(name: str) -> None:
    attributes = bench_layers.with_format(MoEAttributes(top_k=2), name)
    inputs = random_inputs(attributes, 1, D=256, E=3, I=16)
    weights = {k: v for k, v in inputs.items() if k.startswith("w_")}
    given = {
        k: torch.from_numpy(v.view(np.uint8)).view(torch.float8_e4m3fn)
        if v.dtype.itemsize == 1 and name.startswith("fp8")
        else torch.from_numpy(v)
        for k, v in weights.items()
    }
    got = bench_layers.dequantized(given, "w_in", attributes).numpy()
    want = reference.dequantize(weights["w_in"], weights.get("w_in_scale"), attributes, columns=256, dtype=np.float32)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's own code on small sizes: every measured function runs once and takes a millisecond."""

    def once(run: Callable[[], object], **_: Any) -> float:
        run()
        return 1e-3

    def moe(x: Tensor, logits: Tensor, attributes: MoEAttributes, **weights: Tensor) -> Tensor:
        dense = bench_layers.with_format(attributes, "bf16")
        wide = {name: bench_layers.dequantized(weights, name, attributes) for name in ("w_in", "w_out")}
        return operator(x.float(), logits, attributes=dense, **wide).to(x.dtype)

    operator = torch_op.moe
    small = {name: each._replace(sizes=MoESizes(1, 128, 5, 256)) for name, each in bench_layers.SHAPES.items()}
    monkeypatch.setattr(bench_layers, "DEVICE", "cpu")
    patches = {"seconds_of": once, "captured": lambda run: run, "SHAPES": small}
    for name, value in (
        patches
        | {"kernel_seconds": once, "COPIED": 1 << 20, "WIDTH": 512, "STACK_LAYERS": 2, "ONE_CODE": ("mixtral", 64)}
    ).items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(torch_op, "moe", moe)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1e12, 1e12))


@pytest.mark.usefixtures("on_cpu")
def test_every_measurement_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "collect", in_this_process)
    tokens = (1, 5, 64)
    shapes = ["mixtral", "openmoe-8b"]
    report = bench.benchmark(tmp_path / "moe.json", {"device": "CPU"}, shapes, list(bench_layers.FORMATS), tokens, 1e9)
    assert not bench.failed(report), report
    wanted = {
        (shape, name, T)
        for shape in shapes
        for name in bench_layers.formats_of(shape, bench_layers.FORMATS)
        for T in tokens
    }
    assert len(wanted) == 3 * (6 + 4)
    assert {(case["shape"], case["format"], case["tokens"]) for case in report["cases"]} == wanted
    for case in report["cases"]:
        assert case.get("passed") == (True if case["tokens"] != 5 else None)
        assert case["speedup"] == 1
        assert case["share_of_limit"] == max(case["share_of_copy"], case["share_of_gemm"])
        assert ("scaled_grouped_mm fp8" in case["peers_us"]) == (case["format"] == "fp8")
    assert report["fp8_one_code"]["tokens"] == 64
    assert HIDDEN_CODES["fp8_e4m3"] == 2
    assert report["mixtral_fp8_stack"]["layers"] == 2
    assert report["tiny_layer"] == {
        "replayed_us": 31.25,
        "kernels_us": 31.25,
        "launch_overhead_us": 0,
        "enqueued_us": report["tiny_layer"]["enqueued_us"],
    }
    assert bench.failed(report | {"cases": [*report["cases"], {"passed": False}]})


def in_this_process(part: bench.Part, report: dict[str, Any], out: Path) -> None:
    for name, value in part():
        if isinstance(report.get(name), list):
            report[name].append(value)
        else:
            report[name] = value


@pytest.mark.usefixtures("on_cpu")
def test_a_failing_case_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor, *_: Any, **__: Any) -> Tensor:
        if len(x) == 5:
            raise ValueError("no kernel")
        return x

    monkeypatch.setattr(torch_op, "moe", fails)
    found = [case for _, case in measure.bench_shape("mixtral", ["bf16"], (4, 5, 6), {"error": ""}, 1e12)]
    assert [case.get("error") for case in found] == [None, "ValueError: no kernel", None]
    monkeypatch.setattr(measure, "lost", lambda: True)
    found = [case for _, case in measure.bench_shape("mixtral", ["bf16"], (4, 5, 6), {"error": ""}, 1e12)]
    assert [case["tokens"] for case in found] == [4, 5]


@pytest.mark.usefixtures("on_cpu")
def test_tiles_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as the tile of one product, beside the table's own for the other."""
    used: list[Tile] = []

    def timed(call: Any) -> float:
        *_, gemm_in, gemm_out, _ = launches(90, MoESizes(5, 128, 5, 256), MoEAttributes(top_k=2), "bfloat16")
        for variant in (gemm_in.variant, gemm_out.variant):
            sizes = (int(str(dict(variant.constants)[name])) for name in ("BM", "BN", "BK"))
            used.append(Tile(*sizes, variant.num_warps, variant.num_stages))
        return 1e-3

    monkeypatch.setattr(tune, "seconds_of", timed)
    monkeypatch.setattr(tune, "SHAPES", measure.SHAPES)
    lines = list(tune.table("mixtral", ["int8"], [5]))
    own, tried = Tile(16, 32, 128, 4, 4), tune.FEW_TILES
    assert list(zip(used[::2], used[1::2], strict=True)) == [
        *[(own, own), *((tile, own) for tile in tried), *((own, tile) for tile in tried)]
    ]
    assert lines[2] == "| mixtral | int8 | 5 | chosen | - | - | - | - | - | 1000.0 |"
    assert lines[3] == "| mixtral | int8 | 5 | in | 16 | 32 | 128 | 4 | 4 | 1000.0 |"
    assert lines[3 + len(tried)] == "| mixtral | int8 | 5 | out | 16 | 32 | 128 | 4 | 4 | 1000.0 |"
    assert len(lines) == 3 + 2 * len(tried)
    assert {line.count("|") for line in lines} == {11}
    assert tune.candidates(5, "int4") != tried


def dies() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "cases", {"us": 1.0}
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_measured_before_a_crash_is_kept(tmp_path: Path) -> None:
    out, report = tmp_path / "results" / "moe.json", {"cases": [], "failed": []}
    bench.collect(dies, report, out)
    assert json.loads(out.read_text()) == report
    assert report == {"cases": [{"us": 1.0}], "failed": [{"error": "exit status -9"}]}
    assert bench.failed(report)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark runs")
def test_without_a_gpu_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 2
    assert capsys.readouterr().err == (
        "the MoE benchmark needs a CUDA GPU; got none; fix: run it on a machine that has one\n"
    )
