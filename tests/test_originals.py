"""Models that transformers does not have, on every target: engines that verification passes, graphs for TensorRT, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from gatework.export.build import build_engine, export_onnx
from gatework.export.checkpoint import Checkpoint
from gatework.export.lower import lower_to_tensorrt
from gatework.export.materialize import write_model
from gatework.export.onnx_export import add_function_body, trace
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe import cpu_ops
from gatework.runtime.backends.ort import OrtBackend
from gatework.runtime.engine import Engine
from gatework.runtime.verify import verify
from tests.checkpoints import make_checkpoint, reference_model
from tests.originals import ORIGINALS
from tests.test_simulated_parity import BATCH, IDS, LENGTH, MAX_SEQ, RELATIVE, Graph

pytestmark = pytest.mark.parametrize("model", ORIGINALS)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "onnx"])
def test_engines_pass(tmp_path: Path, model: str, precision: str) -> None:
    path = make_checkpoint(tmp_path, model)
    if precision == "onnx":
        engine = export_onnx(path, tmp_path / "engine")
    else:
        engine = build_engine(path, tmp_path / "engine", precision=precision, prefill_chunk=16, max_batch=3)
    report = verify(engine, path, tokens=16)
    assert report.passed, str(report)


@torch.inference_mode()
def test_graph_for_tensorrt(tmp_path: Path, model: str) -> None:
    """What TensorRT gets, in float32 and on the CPU: prefill and decode of a batch."""
    path = make_checkpoint(tmp_path, model)
    checkpoint = Checkpoint.open(path)
    lowered = lower_to_tensorrt(trace(checkpoint.config, MAX_SEQ), "bf16")
    assert not any("softcap" in node.attributes for node in lowered.graph)
    add_function_body(lowered)
    write_model(lowered, checkpoint, tmp_path)
    ids = IDS[: BATCH * LENGTH].reshape(BATCH, LENGTH)
    found, _ = Graph(onnx.load(tmp_path / "model.onnx", load_external_data=False), tmp_path).run(ids)
    oracle = reference_model(path)
    for row in range(BATCH):
        want = oracle(torch.from_numpy(ids[row])[None]).logits[0].numpy()
        for at, got in found.items():
            assert np.abs(got[row] - want[at]).max() <= RELATIVE * np.abs(want).max(), (row, at)


@pytest.mark.tensorrt
def test_plan_for_a100(tmp_path: Path, model: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no plan is built")
    path = make_checkpoint(tmp_path, model)
    engine = build_engine(path, tmp_path / "engine", target="a100", precision="bf16", max_seq=32)
    counts = json.loads((engine / "layers.json").read_text())["counts"]
    config = Checkpoint.open(path).config
    assert counts["PLUGIN_V3"] == config.moe_layers
    assert counts["KV_CACHE_UPDATE"] == 2 * config.num_layers
    assert counts.get("ATTENTION_INPUT", 0) == (0 if config.attn_softcap else config.num_layers)


def test_what_cannot_run_is_refused(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's own kernels for experts have SiLU gates only: none on GPUs, and no fallback for the CPU's."""
    path = make_checkpoint(tmp_path, model)
    with pytest.raises(GateworkError, match=r"no kernels for the model's experts; got softmax scores, .* gates"):
        build_engine(path, tmp_path / "cuda", target="cuda", precision="bf16")
    assert not (tmp_path / "cuda").exists()
    engine = Engine.open(build_engine(path, tmp_path / "engine", precision="int8"))
    assert "fallback.onnx" not in engine.manifest["files"]
    monkeypatch.setattr(cpu_ops, "find_library", lambda: None)
    with pytest.raises(GateworkError, match="needs gatework's CPU kernels"):
        OrtBackend(engine, max_batch=1)
