"""Engines for GPUs, compiled by the real TensorRT-RTX for devices that are not here: what is in them, and what is refused."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from gatework import LLM
from gatework.export.build import build_engine
from gatework.export.calibrate import calibrate
from gatework.export.checkpoint import Checkpoint
from gatework.export.config import ModelConfig
from gatework.export.options import BuildOptions
from gatework.export.sizes import gpu_weight_bytes
from gatework.export.tensorrt import builder
from gatework.export.tensorrt.kernels import largest_call
from gatework.export.tensorrt.preflight import Preflight
from gatework.export.uptodate import is_current
from gatework.plugins.engine_format import TAP_OUTPUT, graph_taps
from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import gpu_capability
from gatework.plugins.moe.kernels import compile
from gatework.plugins.moe.kernels.compile import load
from gatework.plugins.moe.kernels.launches import launches
from gatework.plugins.moe.reference import unpack_int4
from gatework.plugins.moe.spec import MoEAttributes, MoESizes
from gatework.runtime.cli import main
from tests.checkpoints import DENSE_FIRST, EXPERTS_LAST, make_checkpoint
from tests.export.test_build import heed_interrupts
from tests.plan_text import compiled_products

pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT-RTX is not installed: no plan is built, none of its layers counted"
)
pytestmark = pytest.mark.tensorrt

QWEN = Path(__file__).parents[1] / "golden" / "qwen"
MODELS = ["llama2", "mistral", "mixtral", "dbrx"]
PAIRS = {"bf16": "a100", "int8": "a100", "int4": "a100", "fp8": "ada"}
STORED = {"bf16": "BF16", "int8": "INT8", "int4": "INT4", "fp8": "FP8"}
FORMATS: dict[str, Any] = {"bf16": ("dense", 0), "int8": ("int8", 0), "int4": ("int4", 128), "fp8": ("fp8_e4m3", 0)}
SPARED = {"int4": ("BF16", "INT8"), "fp8": ("BF16", "BF16")}
COMPILED = {"bf16": "bf16", "int8": "int8", "int4": "bf16", "fp8": "fp8_e4m3"}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def calibration(checkpoint: Path) -> Path:
    path = checkpoint.parent / "calibration.json"
    calibrate(checkpoint, np.random.default_rng(0).integers(0, 128, 64).tolist(), window=16).save(path)
    return path


@pytest.fixture(scope="module", params=PAIRS)
def engine(request: pytest.FixtureRequest, checkpoint: Path, calibration: Path) -> Path:
    precision = request.param
    out = checkpoint.parent / precision
    ranges = {"calibration": calibration} if precision in ("int8", "fp8") else {}
    return build_engine(checkpoint, out, target=PAIRS[precision], precision=precision, max_seq=32, **ranges)


def manifest_of(engine: Path) -> dict[str, Any]:
    return json.loads((engine / "manifest.json").read_text())


def test_tensorrt_understood_every_layer(engine: Path) -> None:
    counts = json.loads((engine / "layers.json").read_text())["counts"]
    model = manifest_of(engine)["model"]
    layers = model["num_layers"]
    assert counts["KV_CACHE_UPDATE"] == 2 * layers
    assert counts["ATTENTION_INPUT"] == counts["ATTENTION_OUTPUT"] == layers
    assert counts.get("PLUGIN_V3", 0) == (layers if model["moe"] else 0)


OTHERS = {"phi": "int8", "mpt-clip": "bf16", "qwen2_moe": "int4"}
OTHERS |= {"qwen": "int8", "qwen2": "int4", "qwen3": "bf16", "qwen3_moe": "int8", "olmoe": "bf16"}


@pytest.mark.parametrize(("model", "precision"), OTHERS.items(), ids=list(OTHERS))
def test_other_families(tmp_path: Path, model: str, precision: str) -> None:
    """Each in one precision: every layer understood, every product in the precision asked for."""
    path, ranges = QWEN if model == "qwen" else make_checkpoint(tmp_path, model), {}
    if precision == "int8":
        ranges["calibration"] = tmp_path / "calibration.json"
        ids = np.random.default_rng(0).integers(0, 96, 64).tolist()
        calibrate(path, ids, window=16, smooth=0.5).save(ranges["calibration"])
    engine = build_engine(path, tmp_path / "engine", target="a100", precision=precision, max_seq=16, **ranges)
    layers = json.loads((engine / "layers.json").read_text())
    assert layers["counts"]["ATTENTION_INPUT"] == layers["counts"]["ATTENTION_OUTPUT"] == 2
    assert layers["counts"]["KV_CACHE_UPDATE"] == 4
    every = map(tuple, layers["products"].values())
    *products, head = (pair for pair in every if pair != ("FLOAT", "FLOAT"))  # but for routers
    config = Checkpoint.open(path).config
    expected = {(STORED["int8" if precision == "int8" else "bf16"], STORED[precision])}
    if precision == "int4" and config.moe is not None:
        expected.add(("BF16", "INT8"))  # attention beside experts
    assert set(products) == expected
    assert head == {"int8": ("INT8", "INT8"), "bf16": ("BF16", "BF16"), "int4": ("BF16", "INT8")}[precision]
    group = 128 if precision == "int4" else 0
    assert sum(gpu_weight_bytes(config, precision, group)) == manifest_of(engine)["weight_bytes"]["total"]


def test_layers_without_experts(tmp_path: Path) -> None:
    """One plugin in four layers, and the products of three dense ones."""
    path, calibration = make_checkpoint(tmp_path, "qwen3_moe", **EXPERTS_LAST), tmp_path / "calibration.json"
    calibrate(path, np.random.default_rng(0).integers(0, 128, 64).tolist(), window=16, smooth=0.5).save(calibration)
    engine = build_engine(path, tmp_path / "e", target="a100", precision="int8", max_seq=16, calibration=calibration)
    layers = json.loads((engine / "layers.json").read_text())
    assert (layers["counts"]["PLUGIN_V3"], layers["counts"]["KV_CACHE_UPDATE"]) == (1, 8)
    assert Counter(map(tuple, layers["products"].values())) == {
        ("INT8", "INT8"): 4 * 4 + 3 * 2 + 1,
        ("FLOAT", "FLOAT"): 1,
    }
    foretold = gpu_weight_bytes(Checkpoint.open(path).config, "int8", 0)
    assert sum(foretold) == manifest_of(engine)["weight_bytes"]["total"]


def test_fp8_of_experts_alone(tmp_path: Path) -> None:
    """Without a calibration: a dense layer and a shared expert in bf16, and no kernel that rounds activations."""
    path, engine = make_checkpoint(tmp_path, "qwen2_moe", **DENSE_FIRST), tmp_path / "engine"
    settings: dict[str, Any] = {"target": "ada", "precision": "fp8", "weight_only": True, "max_seq": 64}
    command = f"build {path} --out {engine} --target ada --precision fp8 --weight-only --max-seq 64"
    with redirect_stdout(StringIO()) as text:
        assert main(command.split()) == main(["inspect", str(engine)]) == 0
    assert re.search(r"precision +fp8, weight-only +activation ranges: none", text.getvalue())
    assert re.search(r"built for +ada, fp8, weight-only", text.getvalue())
    layers = json.loads((engine / "layers.json").read_text())
    assert layers["counts"]["PLUGIN_V3"] == 1
    assert {tuple(pair) for pair in layers["products"].values()} == {("BF16", "BF16"), ("FLOAT", "FLOAT")}
    assert {kind for pair in compiled_products(engine / "model.plan") for kind in pair} == {"bf16", "float"}
    with safe_open(engine / "experts.safetensors", "pt") as file:
        assert file.get_tensor("layers.1.moe.w_in").dtype == torch.float8_e4m3fn
    options = BuildOptions(**settings)
    assert is_current(path, engine, options)
    assert not is_current(path, engine, replace(options, weight_only=False))
    config = Checkpoint.open(path).config
    sizes, attributes, dtype = largest_call(config, options.fitted_to(config))
    assert attributes.keep_activations
    used = (
        launch.variant for T in range(1, sizes.T + 1) for launch in launches(89, sizes._replace(T=T), attributes, dtype)
    )
    names = {variant.name: variant.kernel for variant in used}
    assert {name: kernel.kernel for name, kernel in load(engine / "kernels")[1].items()} == names
    assert set(names.values()) == {"route", "dispatch", "gemm_in", "gemm_out", "combine"}
    foretold = gpu_weight_bytes(config, "fp8", 0, weight_only=True)
    assert sum(foretold) == manifest_of(engine)["weight_bytes"]["total"]


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_sinks_windows_by_layer_and_biased_experts(tmp_path: Path, precision: str) -> None:
    path = make_checkpoint(tmp_path, "gpt-oss")
    engine = build_engine(path, tmp_path / "engine", target="a100", precision=precision, max_seq=32)
    counts = json.loads((engine / "layers.json").read_text())["counts"]
    assert (counts["PLUGIN_V3"], counts["KV_CACHE_UPDATE"]) == (2, 4)
    assert counts.get("ATTENTION_INPUT", 0) == 0  # sinks are put between plain operators
    with safe_open(engine / "experts.safetensors", "pt") as file:
        assert {"layers.1.moe.b_in", "layers.1.moe.b_out"} <= set(file.keys())
    config = Checkpoint.open(path).config
    foretold = gpu_weight_bytes(config, precision, BuildOptions(target="a100", precision=precision).group)
    assert sum(foretold) == manifest_of(engine)["weight_bytes"]["total"]


def test_the_sizes_foretold_are_those_written(engine: Path) -> None:
    manifest = manifest_of(engine)
    config = ModelConfig.from_dict(manifest["model"])
    group = 128 if manifest["precision"] == "int4" else 0
    assert sum(gpu_weight_bytes(config, manifest["precision"], group)) == manifest["weight_bytes"]["total"]


def test_the_log_names_no_path_of_this_machine(engine: Path, checkpoint: Path) -> None:
    log = (engine / "builder.log").read_text()
    assert "Input filename:   model.onnx" in log
    assert str(checkpoint.parent) not in log + (engine / "manifest.json").read_text()


def test_every_product_is_stored_in_the_precision_asked_for(engine: Path) -> None:
    manifest = manifest_of(engine)
    precision, model = manifest["precision"], manifest["model"]
    products = list(json.loads((engine / "layers.json").read_text())["products"].values())
    layers = model["num_layers"]
    routers = [pair for pair in products if pair == ["FLOAT", "FLOAT"]]
    others = [pair for pair in products if pair != ["FLOAT", "FLOAT"]]
    assert len(routers) == (layers if model["moe"] else 0)
    # q, k, v and o; then gate, up and down of a dense layer, gate and up as one product; the head
    assert len(others) == layers * (4 if model["moe"] else 6) + 1
    activations = {"bf16": "BF16", "int4": "BF16"}.get(precision, STORED[precision])
    spared = SPARED.get(precision, (activations, STORED[precision]))  # the head, and attention beside experts
    assert tuple(others[-1]) == spared
    rest = spared if model["moe"] else (activations, STORED[precision])
    assert Counter(map(tuple, others[:-1])) == {rest: len(others) - 1}


def test_no_product_was_compiled_to_anything_wider(engine: Path) -> None:
    manifest = manifest_of(engine)
    moe, precision = manifest["model"]["moe"] is not None, manifest["precision"]
    kinds = {COMPILED[precision]} if precision != "fp8" else {"bf16"} if moe else {"bf16", COMPILED[precision]}
    kinds |= {"float"} if moe else set()
    assert set(compiled_products(engine / "model.plan")) == {(kind, kind) for kind in kinds}


def test_experts_lie_beside_the_plan_in_the_operators_formats(engine: Path, checkpoint: Path) -> None:
    manifest = manifest_of(engine)
    if manifest["model"]["moe"] is None:
        assert not (engine / "experts.safetensors").exists()
        return
    stored, name = Checkpoint.open(checkpoint).read("layers.1.moe.w_out").float().numpy(), "layers.1.moe.w_out"
    with safe_open(engine / "experts.safetensors", "pt") as file:
        w = file.get_tensor(name)
        scale = None if manifest["precision"] == "bf16" else file.get_tensor(f"{name}_scale").numpy()
    precision = manifest["precision"]
    if precision == "int4":
        scale = np.repeat(scale, 128, axis=-1)[..., : stored.shape[-1]]
        values = unpack_int4(w.numpy()).astype(np.float32)
    else:
        values = w.float().numpy()
    scale = 1 if scale is None else scale
    # bf16 stores 8 bits of a number, e4m3 4; a scale that clips by 30 % moves the opposite end by 4.5 of its steps
    allowed = {
        "bf16": abs(stored) * 2**-8,
        "fp8": abs(stored) * 2**-4 + scale,
        "int8": 0.51 * scale,
        "int4": 4.5 * abs(scale),
    }
    assert (abs(values * scale - stored) <= allowed[precision]).all()
    assert np.corrcoef((values * scale).ravel(), stored.ravel())[0, 1] > 0.98


def test_kernels_for_every_step_lie_in_the_engine(engine: Path) -> None:
    """Those that the launch table names for any number of tokens in the limits, and no others."""
    manifest = manifest_of(engine)
    stored = {name for name in manifest["files"] if name.startswith("kernels/")}
    assert stored == {path.relative_to(engine).as_posix() for path in engine.glob("kernels/*")}
    assert ("triton" in manifest["toolchain"]) == bool(stored) == (manifest["model"]["moe"] is not None)
    if not stored:
        return
    sm, kernels = load(engine / "kernels")
    assert sm == {"a100": 80, "ada": 89}[manifest["target"]]
    shapes = {name: each["shape"] for name, each in manifest["tensors"].items() if name.startswith("layers.0.moe.w_")}
    E, D, _ = shapes["layers.0.moe.w_out"]
    I, K = shapes["layers.0.moe.w_in"][1] // 2, manifest["model"]["moe"]["top_k"]
    weight_format, group = FORMATS[manifest["precision"]]
    attributes = MoEAttributes(
        top_k=K,
        weight_format=weight_format,
        group_size=group,
        renormalize=manifest["model"]["moe"]["renormalize"],
    )
    used = {
        launch.variant.name
        for T in range(1, max(manifest["limits"]["prefill_chunk"], manifest["limits"]["max_batch"]) + 1)
        for launch in launches(sm, MoESizes(T, D, E, I), attributes, "bfloat16")
    }
    assert set(kernels) == used


def test_without_triton_experts_are_refused_before_any_work(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "find_spec", lambda name: None)
    settings = {"target": "a100", "precision": "bf16", "max_seq": 32}
    out = mixtral.parent / "without"
    message = r"an engine with experts for a100 needs the kernels' compiler; got no triton; fix: pip install 'triton>="
    with pytest.raises(GateworkError, match=message):
        build_engine(mixtral, out, **settings)
    assert not list(mixtral.parent.glob("*without*"))


def test_another_triton_counts_as_a_change(mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"target": "a100", "precision": "bf16", "max_seq": 32}
    engine = build_engine(mixtral, tmp_path / "engine", **settings)
    assert is_current(mixtral, engine, BuildOptions(**settings))
    assert [name.split(" ")[0] for name in _files_row(engine)] == [
        "model.plan",
        "layers.json",
        "builder.log",
        "kernels/",
        "experts.safetensors",
    ]
    monkeypatch.setattr(compile, "version", lambda tool: "3.7.0")
    assert not is_current(mixtral, engine, BuildOptions(**settings))


def _files_row(engine: Path) -> list[str]:
    with redirect_stdout(StringIO()) as text:
        main(["inspect", str(engine)])
    (row,) = re.findall(r"^files +(.*)", text.getvalue(), re.MULTILINE)
    return row.split(", ")


def test_a_plan_needs_no_checkpoint_but_cannot_run_here(engine: Path) -> None:
    if gpu_capability() is not None:
        pytest.skip("this machine has a GPU: what is said without one is not seen")
    with pytest.raises(GateworkError, match=r"this engine runs on an NVIDIA GPU; got cudaError\w+; expected a GPU and"):
        LLM(engine)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mixtral"), "mixtral")


def test_plan_only_leaves_the_experts_out(mixtral: Path) -> None:
    found: list[Preflight] = []
    settings = {"target": "rtx50", "precision": "fp8", "plan_only": True, "max_seq": 32}
    out = build_engine(mixtral, mixtral.parent / "plan", report=found.append, **settings)
    assert {file.name for file in out.iterdir()} == {"model.plan", "layers.json", "builder.log", "manifest.json"}
    assert found[0].compiler.sm == "SM120"
    assert found[0].experts > 0


@pytest.mark.parametrize(("model", "precision"), [("mixtral", "int4"), ("mixtral", "fp8"), ("llama2", "bf16")])
def test_a_plan_with_taps_gives_them(tmp_path: Path, model: str, precision: str) -> None:
    """TensorRT compiles a plan whose outputs are what verification compares, in float32, with the widths of the model."""
    settings = {"target": PAIRS[precision], "precision": precision, "plan_only": True, "max_seq": 32, "taps": True}
    settings |= {"weight_only": precision == "fp8"}
    engine = build_engine(make_checkpoint(tmp_path, model), tmp_path / "engine", **settings)
    outputs = {
        name: (dtype, shape) for name, dtype, shape in json.loads((engine / "layers.json").read_text())["outputs"]
    }
    config = manifest_of(engine)["model"]
    taps = {name: outputs.pop(name + TAP_OUTPUT) for name in graph_taps(config)}
    assert {dtype for dtype, _ in taps.values()} == {"FLOAT"}
    D, context = config["hidden_size"], config["num_heads"] * config["head_dim"]
    E = config["moe"]["num_experts"] if config["moe"] else 0
    widths = {"context": context, "router": E}
    assert {name: shape[-1] for name, (_, shape) in taps.items()} == {
        name: widths.get(name.rpartition(".")[2], D) for name in taps
    }
    caches = {f"present.{i}.{kind}" for i in range(config["num_layers"]) for kind in "kv"}
    assert outputs.keys() == {"logits", *caches}
    counts = json.loads((engine / "layers.json").read_text())["counts"]
    assert counts["ATTENTION_INPUT"] == config["num_layers"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target": "a100", "precision": "int8", "taps": True},
            "that rounds activations shows nothing inside; got int8; expected bf16 or fp16 or int4 or fp8 with --weight-only",
        ),
        (
            {"target": "cpu", "precision": "int8", "taps": True},
            "--taps is for TensorRT's targets; got --target cpu; fix: leave --taps out",
        ),
        ({"target": "a100", "precision": "fp8"}, r"got a100 fp8; expected .*ada: bf16\|fp16\|fp8"),
        (
            {"target": "h100", "precision": "fp8"},
            "h100 engines cannot be built here; got .*; expected TensorRT on a GPU of SM90",
        ),
        (
            {"target": "h100", "precision": "fp8", "toolchain": "tensorrt_rtx"},
            "not built by this toolchain; got --toolchain tensorrt_rtx",
        ),
        (
            {"target": "a100", "precision": "int8"},
            "int8 on a100 needs the ranges of activations; fix: gatework calibrate",
        ),
        (
            {"target": "a100", "precision": "int4", "calibration": Path("x")},
            "int4 has no static scales; got --calibration",
        ),
        ({"target": "a100", "precision": "bf16", "strip_weights": True}, "needs a GPU; got none"),
        (
            {"target": "a100", "precision": "bf16", "timing_cache": Path("/")},
            "/ is in the way; got a folder; expected a file to write; fix: choose another --timing-cache",
        ),
        ({"target": "a100", "precision": "bf16", "group_size": 64}, "bf16 on a100 has no groups of weights; got .* 64"),
        ({"target": "cpu", "precision": "int8", "plan_only": True}, "--plan-only is for TensorRT's targets"),
        (
            {"target": "a100", "precision": "int4", "weight_only": True},
            "--weight-only is for fp8; got int4; fix: leave --weight-only out",
        ),
        (
            {"target": "ada", "precision": "fp8", "weight_only": True, "calibration": Path("x")},
            "fp8 with --weight-only has no static scales; got --calibration",
        ),
        (
            {"target": "ada", "precision": "fp8", "weight_only": True, "device_memory": 10**5},
            "not fit the 0.1 MB of ada; got .*: weights",
        ),
        (
            {"target": "a100", "precision": "int4", "group_size": 64, "device_memory": 10**5},
            "not fit the 0.1 MB of a100; got .*: weights",
        ),
    ],
)
def test_impossible_builds_are_refused_before_any_work(mixtral: Path, settings: dict[str, Any], message: str) -> None:
    if settings["target"] == "h100" and gpu_capability() == (9, 0):
        pytest.skip("this machine has an H100: nothing is impossible about it")
    out = mixtral.parent / "refused"
    with pytest.raises(GateworkError, match=message):
        build_engine(mixtral, out, **settings)
    assert not list(mixtral.parent.glob("*refused*"))


def test_weight_only_needs_experts(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target": "ada", "precision": "fp8", "weight_only": True}
    path = make_checkpoint(tmp_path, "llama2")
    with pytest.raises(
        GateworkError, match="--weight-only is for experts; got a model without; fix: leave --weight-only out"
    ):
        build_engine(path, tmp_path / "engine", **settings)


def test_too_long_a_context_is_refused_with_what_would_fit(mixtral: Path) -> None:
    settings = {"target": "a100", "precision": "int4", "max_batch": 64, "device_memory": 1_400_000}
    with pytest.raises(GateworkError, match=r"does not fit .*KV cache .*; fix: .*--max-batch \d+") as error:
        build_engine(mixtral, mixtral.parent / "refused", **settings)
    assert "\n" not in str(error.value)


def test_a_calibration_of_another_checkpoint_is_refused(mixtral: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path, "mixtral", seed=1)
    path = tmp_path / "calibration.json"
    calibrate(other, list(range(32))).save(path)
    with pytest.raises(GateworkError, match="was not made from"):
        build_engine(mixtral, tmp_path / "engine", target="a100", precision="int8", calibration=path)


def test_an_engine_of_another_operator_version_is_refused(mixtral: Path, tmp_path: Path) -> None:
    engine = build_engine(mixtral, tmp_path / "engine", target="a100", precision="bf16", max_seq=32, plan_only=True)
    manifest = manifest_of(engine)
    (engine / "manifest.json").write_text(json.dumps(manifest | {"plugin_version": 2}))
    with pytest.raises(GateworkError, match="another version of the MoE operator; got 2; expected 1; fix: build"):
        LLM(engine)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_build_leaves_nothing(mixtral: Path, tmp_path: Path, number: int) -> None:
    command = [
        sys.executable,
        "-m",
        "gatework.runtime.cli",
        "build",
        mixtral,
        "--target",
        "a100",
        "--precision",
        "bf16",
    ]
    out = tmp_path / "engines" / "stopped"
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen([*map(str, command), "--out", str(out)], preexec_fn=heed_interrupts, **streams)
    while not list(tmp_path.glob("engines/.stopped.*/model.plan")):  # the compiler runs
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (130, 143, 0)  # 0: it was done before the signal reached it
    assert (process.returncode == 0) == out.exists()
    assert [path for path in tmp_path.rglob("*") if path.name.startswith(".")] == []
    assert process.returncode == 0 or not list(tmp_path.iterdir())


def test_an_ignored_signal_does_not_stop_the_compiler() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with builder._interruptible() as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGINT, before)
