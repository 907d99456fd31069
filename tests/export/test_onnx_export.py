"""The canonical ONNX model: valid, portable, and equal to transformers on runtimes that know nothing of Gatework."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors import safe_open

from gatework.export.build import export_onnx
from gatework.export.checkpoint import Checkpoint
from gatework.plugins.errors import GateworkError
from tests.checkpoints import make_checkpoint, reference_model

MODELS = ["llama2", "mistral", "mixtral", "dbrx", "gpt-oss"]

# Runs in a process of its own: prefill of two rows, then one decoded token, with only the runtime named on the command line.
STRANGER = """
import json, sys
import numpy as np
runtime, path, out = sys.argv[1:]
if runtime == "onnxruntime":
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    run, inputs = session.run, {i.name: i.shape for i in session.get_inputs()}
else:
    import onnx, onnx.reference
    session = onnx.reference.ReferenceEvaluator(onnx.load(path))
    shape = lambda value: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    run, inputs = session.run, {i.name: shape(i) for i in session.proto_.graph.input}
ids = np.arange(2, 20).reshape(2, 9)
feeds = {n: np.zeros((2, *s[1:]), np.float32) for n, s in inputs.items() if n.startswith("past.")}
feeds |= {"input_ids": ids[:, :8], "position_ids": np.tile(np.arange(8), (2, 1)), "write_indices": np.zeros(2, np.int64)}
logits, *cache = run(None, feeds)
past = dict(zip([n for n in inputs if n.startswith("past.")], cache))
feeds = past | {"input_ids": ids[:, 8:], "position_ids": np.full((2, 1), 8), "write_indices": np.full(2, 8)}
last = run(None, feeds)[0]
np.savez(out, prefill=logits, decode=last)
loaded = [m for m in sys.modules if m.split(".")[0] in ("gatework", "torch", "onnxscript")]
assert not loaded, loaded
"""


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, ONNX folder) of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    path = make_checkpoint(folder, request.param)
    return path, export_onnx(path, folder / "onnx", max_seq=32, all_logits=True)


def test_passes_the_full_check(exported: tuple[Path, Path]) -> None:
    path = exported[1] / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    assert opsets.pop("") == 24
    assert opsets in ({}, {"gatework": 1})
    assert {node.domain for node in model.graph.node} <= {"", "gatework"}


def test_interface(exported: tuple[Path, Path]) -> None:
    """Names, shapes and types of the canonical graph's inputs and outputs."""
    graph = onnx.load(exported[1] / "model.onnx", load_external_data=False).graph

    def shapes(values: list[onnx.ValueInfoProto]) -> dict[str, list[object]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    inputs, outputs = shapes(list(graph.input)), shapes(list(graph.output))
    width = Checkpoint.open(exported[0]).config.head_dim
    cache = {f"{i}.{x}": ["batch", 2, 32, width] for i in range(2) for x in "kv"}
    steps = {"input_ids": ["batch", "seq"], "position_ids": ["batch", "seq"], "write_indices": ["batch"]}
    assert inputs == steps | {f"past.{name}": shape for name, shape in cache.items()}
    assert outputs == {"logits": ["batch", "seq", 128]} | {f"present.{name}": shape for name, shape in cache.items()}


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx.reference"])
@torch.inference_mode()
def test_equals_transformers_without_gatework(exported: tuple[Path, Path], runtime: str, tmp_path: Path) -> None:
    checkpoint, folder = exported
    script, out = tmp_path / "stranger.py", tmp_path / "logits.npz"
    script.write_text(STRANGER)
    subprocess.run([sys.executable, script, runtime, folder / "model.onnx", out], check=True, cwd=tmp_path)
    got = np.load(out)
    want = reference_model(checkpoint)(torch.arange(2, 20).reshape(2, 9)).logits.numpy()
    for name, expected in (("prefill", want[:, :8]), ("decode", want[:, 8:])):
        error = np.abs(got[name] - expected).max() / np.abs(expected).max()
        assert error <= 1e-5, f"{name}: {error:.2e}"  # float32 rounding over 2 layers


def test_weights_are_external_and_canonical(exported: tuple[Path, Path]) -> None:
    """Every weight lies in a safetensors file under its canonical name; the graph file holds none."""
    checkpoint, folder = exported
    assert (folder / "model.onnx").stat().st_size < 100_000
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    external = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data}
    assert "layers.0.attn.q.weight" in external
    for file in {entry["location"] for entry in external.values()}:
        with safe_open(folder / file, "np") as stored:
            names = {name for name in stored.keys() if not name.startswith("__pad")}  # noqa: SIM118 - not a dict
        assert names == {name for name, entry in external.items() if entry["location"] == file}
    loaded = {t.name: onnx.numpy_helper.to_array(t, str(folder)) for t in graph.initializer if t.name in external}

    weights = Checkpoint.open(checkpoint)
    for name in weights.weights:
        np.testing.assert_array_equal(loaded[name], weights.read(name).numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path: Path, dtype: str) -> None:
    """Weights, activations and cache take the dtype; routers and logits stay float32."""
    path = export_onnx(make_checkpoint(tmp_path, "mixtral"), tmp_path / "onnx", dtype=dtype, max_seq=16)  # type: ignore[arg-type]
    onnx.checker.check_model(path / "model.onnx", full_check=True)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path / "model.onnx")).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    kind = onnx.TensorProto.DataType.Value(dtype.upper())
    assert kinds["past.0.k"] == kinds["present.1.v"] == kind
    assert kinds["logits"] == onnx.TensorProto.FLOAT
    routed = [node for node in graph.node if node.op_type == "MoE"]
    assert [kinds[node.input[1]] for node in routed] == [onnx.TensorProto.FLOAT] * 2
    assert {t.data_type for t in graph.initializer if t.name.endswith("moe.w_in")} == {kind}


def test_long_context(tmp_path: Path) -> None:
    """Tables over all positions lie in the weights' file as well: rotary tables and the mask's positions."""
    checkpoint = make_checkpoint(tmp_path, "llama2", num_layers=1, max_position_embeddings=2048)
    path = export_onnx(checkpoint, tmp_path / "onnx")
    assert (path / "model.onnx").stat().st_size < 30_000
    session = ort.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {
        i.name: np.zeros((1, *i.shape[1:]), np.float32) for i in session.get_inputs() if i.name.startswith("past.")
    }
    ids = np.array([[3, 4, 5]])
    feeds |= {"input_ids": ids, "position_ids": np.arange(3)[None], "write_indices": np.zeros(1, np.int64)}
    want = reference_model(checkpoint)(torch.from_numpy(ids)).logits[0, -1].detach().numpy()
    np.testing.assert_allclose(session.run(["logits"], feeds)[0][0, 0], want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    path = export_onnx(make_checkpoint(tmp_path, "llama2", tie_embeddings=True), tmp_path / "onnx")
    names = {t.name for t in onnx.load(path / "model.onnx", load_external_data=False).graph.initializer}
    assert "embed.weight" in names
    assert "lm_head.weight" not in names


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama2", num_layers=1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(GateworkError, match="not empty"):
            export_onnx(checkpoint, out, force=force)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert json.dumps(sorted(p.name for p in out.iterdir())) == '["precious.txt"]'


def test_polygraphy_finds_the_reference_in_it(tmp_path: Path) -> None:
    """The real tool, on the real files; and it says no where a weight is another."""
    checkpoint = make_checkpoint(tmp_path, "mixtral", max_position_embeddings=32)
    folder = export_onnx(checkpoint, tmp_path / "onnx", golden=tmp_path / "golden")
    run = [Path(sys.executable).with_name("polygraphy"), "run", folder / "model.onnx", "--onnxrt"]
    run += [
        "--load-inputs",
        tmp_path / "golden" / "inputs.json",
        "--load-outputs",
        tmp_path / "golden" / "outputs.json",
    ]
    run += ["--atol", "1e-4", "--rtol", "1e-4"]
    found = subprocess.run(run, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "PASSED" in found.stdout
    weights = folder / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4000:] = bytes(4000)
    weights.write_bytes(content)
    assert subprocess.run(run, capture_output=True, check=False).returncode == 1
    with pytest.raises(GateworkError, match="exists and is not empty"):
        export_onnx(checkpoint, tmp_path / "other", golden=tmp_path / "golden")
