"""Plans of an encoder-decoder model: both really compiled for a GPU that is not here, and their graphs against transformers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors import safe_open

from gatework import LLM
from gatework.export.build import build_engine
from gatework.export.calibrate import calibrate
from gatework.export.calibration import Calibration
from gatework.export.checkpoint import Checkpoint
from gatework.export.lower import lower_to_tensorrt
from gatework.export.materialize import write_model
from gatework.export.onnx_export import add_function_body, trace, trace_encoder
from gatework.export.options import BuildOptions
from gatework.export.sizes import gpu_weight_bytes
from gatework.export.smoothing import balanced_products
from gatework.export.tensorrt.preflight import Preflight
from gatework.export.tensorrt.scales import StaticScales
from gatework.export.uptodate import is_current
from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import gpu_capability
from gatework.plugins.moe.kernels.compile import load
from gatework.plugins.moe.kernels.launches import launches
from gatework.plugins.moe.spec import MoEAttributes, MoESizes
from gatework.runtime.commands.build import _report
from tests.export.test_calibrate import switch_product
from tests.fake_quantised import round_groups, round_rows, round_to
from tests.plan_text import compiled_products
from tests.switch import Oracle, make_switch

MAX_SEQ = 32
IDS = np.random.default_rng(0).integers(2, 128, 160).tolist()
PARTS = ("encoder.", "")  # begin the names of their files
FILES = {f"{part}{name}" for part in PARTS for name in ("layers.json", "builder.log")} | {"encoder.plan", "model.plan"}
LIMITS: dict[str, Any] = {"max_seq": MAX_SEQ, "max_batch": 3, "prefill_chunk": 4}
FORMATS: dict[str, Any] = {"bf16": ("dense", 0), "int4": ("int4", 128)}
needs_compiler = pytest.mark.tensorrt


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_switch(tmp_path_factory.mktemp("switch"))


@pytest.fixture(scope="module", params=FORMATS)
def engine(request: pytest.FixtureRequest, checkpoint: Path) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no plan is built")
    out = checkpoint.parent / request.param
    return build_engine(checkpoint, out, target="a100", precision=request.param, **LIMITS)


def listings(engine: Path) -> list[dict[str, Any]]:
    return [json.loads((engine / f"{part}layers.json").read_text()) for part in PARTS]


def manifest_of(engine: Path) -> dict[str, Any]:
    return json.loads((engine / "manifest.json").read_text())


@needs_compiler
def test_tensorrt_understood_every_layer_of_both(engine: Path) -> None:
    """Attention with its bias, and to the encoder's output, in TensorRT's own layers; the capacity as a running sum."""
    kinds = ("PLUGIN_V3", "ATTENTION_INPUT", "ATTENTION_OUTPUT", "KV_CACHE_UPDATE", "CUMULATIVE")
    counts = [[listing["counts"].get(kind, 0) for kind in kinds] for listing in listings(engine)]
    assert counts == [[1, 2, 2, 0, 1], [1, 4, 4, 4, 1]]
    outputs = [{name for name, *_ in listing["outputs"]} for listing in listings(engine)]
    caches = [f"{i}.{kind}" for i in range(2) for kind in "kv"]
    assert outputs == [{f"cross.{name}" for name in caches}, {"logits", *(f"present.{name}" for name in caches)}]


@needs_compiler
def test_every_product_has_the_precision_asked_for(engine: Path) -> None:
    precision = manifest_of(engine)["precision"]
    spared, mlp = (
        ("BF16", "BF16" if precision == "bf16" else "INT8"),
        ("BF16", "BF16" if precision == "bf16" else "INT4"),
    )
    for listing, others in zip(listings(engine), (2 * 4 + 2 * 2, 2 * 4 + 2 * 2 + 1), strict=True):
        expected = Counter({spared: others}) + Counter({mlp: 2}) + Counter({("FLOAT", "FLOAT"): 1})
        assert Counter(map(tuple, listing["products"].values())) == expected
    for plan in ("encoder.plan", "model.plan"):
        assert set(compiled_products(engine / plan)) == {("bf16", "bf16"), ("float", "float")}


@needs_compiler
def test_the_engine_holds_what_both_plans_need(engine: Path, checkpoint: Path) -> None:
    manifest, config = manifest_of(engine), Checkpoint.open(checkpoint).config
    precision, (weight_format, group) = manifest["precision"], FORMATS[manifest["precision"]]
    kernels = {name for name in manifest["files"] if name.startswith("kernels/")}
    assert manifest["files"].keys() == FILES | {"experts.safetensors"} | kernels
    assert sum(gpu_weight_bytes(config, precision, group)) == manifest["weight_bytes"]["total"]
    with safe_open(engine / "experts.safetensors", "pt") as file:
        names = {name for name in set(file.keys()) if not name.startswith("__pad")}
    scales = ("", "_scale") if precision == "int4" else ("",)
    assert names == {
        f"{stack}layers.1.moe.{matrix}{scale}" for stack in PARTS for matrix in ("w_in", "w_out") for scale in scales
    }
    sm, listed = load(engine / "kernels")
    attributes = MoEAttributes(
        top_k=1, renormalize=False, activation="relu", glu="none", weight_format=weight_format, group_size=group
    )
    used = {
        launch.variant.name
        for T in range(1, MAX_SEQ + 1)  # an encoder reads a prompt in one step
        for launch in launches(sm, MoESizes(T, 64, 4, 96), attributes, "bfloat16")
    }
    assert set(listed) == used
    settings: dict[str, Any] = {"target": "a100", "precision": precision, **LIMITS}
    assert is_current(checkpoint, engine, BuildOptions(**settings))
    assert not is_current(checkpoint, engine, BuildOptions(**settings | {"max_batch": 2}))
    if gpu_capability() is None:
        with pytest.raises(GateworkError, match="this engine runs on an NVIDIA GPU"):
            LLM(engine)


@needs_compiler
@pytest.mark.parametrize(
    ("target", "precision", "sizes"),
    [
        ("a100", "fp16", {"d_kv": 24, "tie_word_embeddings": False, "expert_capacity": 0}),
        ("ada", "fp8", {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}),  # no static scales
        ("a100", "int8", {}),
    ],
)
def test_plans_alone(
    tmp_path: Path, target: str, precision: str, sizes: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no plan is built")
    found: list[Preflight] = []
    path = make_switch(tmp_path, **sizes)
    settings: dict[str, Any] = {"target": target, "precision": precision, "max_seq": MAX_SEQ, "plan_only": True}
    if precision == "int8":
        settings["calibration"] = tmp_path / "calibration.json"
        calibrate(path, IDS, window=16, smooth=0.5).save(settings["calibration"])
    engine = build_engine(path, tmp_path / "engine", report=found.append, **settings)
    assert {file.name for file in engine.iterdir()} == FILES | {"manifest.json"}
    config = Checkpoint.open(path).config
    per_layer = 2 * config.num_heads * config.head_dim * 2
    _report(found[0])
    plugins = "2 MoE plugins" if "num_sparse_encoder_layers" in sizes else "1 MoE plugin"
    assert re.search(rf"^encoder +2 +{plugins}, a plan of its own$", capsys.readouterr().out, re.MULTILINE)
    assert found[0].kv_cache == 2 * 8 * MAX_SEQ * config.num_layers * per_layer  # its own, and of the prompts
    dense, experts = gpu_weight_bytes(config, precision, 0)
    assert (found[0].plan, found[0].experts) == (dense + 2 * config.vocab_size * config.hidden_size, experts)
    assert sum((dense, experts)) == manifest_of(engine)["weight_bytes"]["total"]


@torch.inference_mode()
@pytest.mark.parametrize(("capacity", "precision"), [(3, "bf16"), (0, "bf16"), (3, "int4"), (8, "int8")])
def test_what_tensorrt_gets_equals_transformers(tmp_path: Path, capacity: int, precision: str) -> None:
    """In float32, on the CPU: two prompts of their own lengths, one by one through the encoder, then decoded together.

    Under int4 and int8 transformers' weights, and activations, are rounded by formulas of the tests' own. Where a number lies
    between two codes of int8, float32's last bits decide, and what follows differs by as much as a code, or an expert, does.
    """
    path = make_switch(tmp_path, expert_capacity=capacity)
    oracle = Oracle(path, **({} if capacity else {"expert_capacity": 1000}))
    if precision == "int4":
        round_to_int4(oracle.model)
    ranges = calibrate(Checkpoint.open(path), IDS, window=16, smooth=0.5) if precision == "int8" else None
    if ranges is not None:
        round_to_int8(oracle.model, ranges, balanced_products(Checkpoint.open(path).config))
    encode, decode = (session(path, tmp_path, name, precision, ranges) for name in ("encoder", "model"))
    prompts = [np.random.default_rng(n).integers(2, 128, (1, n)) for n in (24, 13)]
    found = [encode({"input_ids": ids, "source_lengths": np.array([ids.shape[1]])}) for ids in prompts]
    lengths = np.array([ids.shape[1] for ids in prompts])
    room = {name: np.full((2, 4, MAX_SEQ, 16), 7, np.float32) for name in found[0]}  # what lies behind is not read
    for row, values in enumerate(found):
        for name, value in values.items():
            room[name][row, :, : lengths[row]] = value[0]
    targets = np.random.default_rng(0).integers(0, 128, (2, 20))
    past = {f"past.{i}.{kind}": np.zeros((2, 4, MAX_SEQ, 16), np.float32) for i in range(2) for kind in "kv"}
    given = [(torch.from_numpy(ids), torch.tensor([ids.shape[1]])) for ids in prompts]
    want = [oracle.decode(*given[row], torch.from_numpy(targets[row : row + 1]))[0].numpy() for row in range(2)]
    errors: list[float] = []
    for at in range(20):
        places = {"position_ids": np.full((2, 1), at), "write_indices": np.full(2, at), "source_lengths": lengths}
        values = decode({"input_ids": targets[:, at : at + 1]} | places | past | room)
        past = {name: values[name.replace("past", "present")] for name in past}
        now, then = values["logits"][:, 0], np.stack([want[row][at] for row in range(2)])
        errors += (np.abs(now - then).max(1) / np.abs(then).max(1)).tolist()
    assert (np.median(errors) <= 1e-3) if precision == "int8" else (max(errors) <= 1e-5), errors


def round_to_int4(model: torch.nn.Module) -> None:
    """What an int4 plan stores: 8 bits of attention and head, 4 of the feed-forward parts, routers as they are."""
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.clone())  # tied ones part
    for name, weight in model.named_parameters():
        if re.search(r"Attention\.[qkvo]\.weight|lm_head", name):
            weight.copy_(round_rows(weight, "int8"))
        elif ".experts." in name:
            weight.copy_(round_groups(weight, 128, positive=False))
        elif re.search(r"mlp\.w[io]\.weight", name):
            group = {64: 64, 96: 32}[weight.shape[1]]  # the largest that divides a row
            weight.copy_(round_groups(weight, group, positive=True))


def round_to_int8(model: torch.nn.Module, ranges: Calibration, fed: dict[str, tuple[str, ...]]) -> None:
    """What an int8 plan stores, and what its products read: balanced, and in codes of a static scale."""
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.clone())
    norms = {name: norm for norm, names in fed.items() for name in names}
    for module_name, module in model.named_modules():
        if ".experts.expert_" in module_name and isinstance(module, torch.nn.Linear):
            module.weight.copy_(round_rows(module.weight, "int8"))
        if (name := switch_product(module_name)) is None:
            continue
        factors = torch.tensor(ranges.smooth[norms[name]]) if name in norms else torch.tensor(1.0)
        module.weight.copy_(round_rows(module.weight * factors, "int8"))
        if name == "lm_head.weight":  # transformers scales its input, not the logits
            factors = factors / 8
        step = torch.tensor(ranges.ranges[name].absmax / 127)
        by = 8 if name == "lm_head.weight" else 1
        module.register_forward_pre_hook(
            lambda module, args, f=factors, step=step, by=by: (round_to(args[0] / f, step, "int8") / by,)
        )


def session(
    path: Path, folder: Path, name: str, precision: str, ranges: Calibration | None
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Runs a lowered graph, and gives its outputs by name."""
    checkpoint = Checkpoint.open(path)
    graph = trace_encoder(checkpoint.config)
    if name == "model":
        graph = trace(checkpoint.config, MAX_SEQ, fixed_source=True)
    group = 128 if precision == "int4" else 0
    scales = StaticScales(checkpoint, ranges)
    lowered = lower_to_tensorrt(graph, precision, group=group, scales=scales)  # type: ignore[arg-type]
    add_function_body(lowered)
    (folder / name).mkdir()
    write_model(lowered, checkpoint, folder / name)
    onnx.checker.check_model(folder / name / "model.onnx", full_check=True)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # no fusion into integer kernels
    running = ort.InferenceSession(folder / name / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [output.name for output in running.get_outputs()]
    return lambda feeds: dict(zip(names, running.run(None, feeds), strict=True))
