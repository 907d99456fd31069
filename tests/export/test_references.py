"""Graphs that read weights from the checkpoint's own files give the numbers of those that have copies, to the last bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from gatework import LLM, SamplingParams
from gatework.export import sharing
from gatework.export.build import export_onnx
from gatework.export.checkpoint import Checkpoint
from gatework.export.config import Dtype
from gatework.export.materialize import write_model
from gatework.export.packing import identity_pack, set_pack
from gatework.export.references import References, refer
from gatework.plugins.engine_format import IN_PLACE
from gatework.plugins.errors import GateworkError
from gatework.runtime.engine import Engine
from tests.checkpoints import TABLE, make_checkpoint
from tests.formats import convert
from tests.golden.grok1 import weights as grok1
from tests.golden.openmoe import weights as openmoe
from tests.mxfp4_format import write_release
from tests.originals import ORIGINALS
from tests.switch import make_switch
from tests.t5x_format import write_t5x

QWEN = Path(__file__).parents[1] / "golden" / "qwen"
IDS = np.arange(2, 20).reshape(2, 9)
SAME_CODE = ("llama1", "codellama", "orca2", "zephyr", "mpt")  # as another entry of the table, with other sizes


def logits(folder: Path) -> np.ndarray:
    """Of a prefill of two rows."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    caches = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past.")}
    feeds = {name: np.zeros((2, *shape[1:]), np.float32) for name, shape in caches.items()}
    feeds |= {"input_ids": IDS, "position_ids": np.tile(np.arange(9), (2, 1)), "write_indices": np.zeros(2, np.int64)}
    return session.run(["logits"], feeds)[0]


def check_weights(path: Path, dtype: Dtype = "float32") -> References:
    """A graph of all weights and nothing else, run by ONNX Runtime, gives those that the checkpoint's reader gives."""
    checkpoint = Checkpoint.open(path)
    values = []
    for name, shape in checkpoint.config.tensor_shapes().items():
        kind = ir.DataType[{"float32": "FLOAT"}.get(dtype, dtype.upper())]
        values.append(ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape)))
        set_pack(values[-1:], identity_pack(values[-1]))
    nodes = [ir.node("Cast", [value], {"to": ir.DataType.FLOAT}) for value in values]
    for node, value in zip(nodes, values, strict=True):
        node.outputs[0].name, node.outputs[0].shape = f"out.{value.name}", value.shape
        node.outputs[0].dtype = ir.DataType.FLOAT
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 24}, name="weights")
    model = ir.Model(graph, ir_version=11)
    found = refer([model], checkpoint, "in place", lambda file: file.relative_to(path).as_posix())
    write_model(model, checkpoint, path, files=IN_PLACE[:2])
    onnx.checker.check_model(path / "model.onnx", full_check=True)
    session = ort.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    for name, got in zip(checkpoint.weights, session.run(None, {}), strict=True):
        want = checkpoint.read(name).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(got, want, err_msg=name)
    return found


@pytest.mark.parametrize("model", [model for model in (*TABLE, *ORIGINALS) if model not in SAME_CODE])
def test_every_family(tmp_path: Path, model: str) -> None:
    path = make_checkpoint(tmp_path, model)
    found = check_weights(path)
    assert found.written == {}
    assert found.nbytes == Checkpoint.open(path).nbytes


def test_qwen(tmp_path: Path) -> None:
    assert check_weights(shutil.copytree(QWEN, tmp_path / "qwen")).written == {}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("model", "file_format", "stored"),
    [
        ("llama2", "meta-mp2", torch.float16),
        ("mixtral", "sharded-bin", torch.bfloat16),
        ("mixtral", "stacked", torch.bfloat16),
        ("mistral", "consolidated", torch.float32),
    ],
)
def test_every_layout(tmp_path: Path, model: str, file_format: str, stored: torch.dtype, dtype: Dtype) -> None:
    """Shards joined by rows and columns, rows reordered for rotary positions, matrices turned, types changed."""
    path = convert(make_checkpoint(tmp_path, model, dtype=stored), file_format)
    assert check_weights(path, dtype).written == {}


def test_codes_and_scales_of_grok_1(tmp_path: Path) -> None:
    """int8 stays int8; what begins at an odd place in its file is copied."""
    path = grok1.write_ckpt(tmp_path, grok1.tensors())
    found = check_weights(path)
    graph = onnx.load(path / "model.onnx", load_external_data=False).graph
    codes = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert len(codes) == grok1.LAYERS * (4 + 3 * grok1.E)
    assert sum(node.op_type == "Mul" for node in graph.node) == len(codes)
    places = {t.name: {e.key: e.value for e in t.external_data} for t in codes}
    assert all(place["location"].startswith("ckpt-0/tensor") for place in places.values())
    (copied,) = found.written.values()
    assert "it begins at no multiple of 4 bytes in its file" in found.written
    assert copied
    assert not any(".attn." in name or ".moe.w_" in name for name in copied)


def test_compressed_files_are_copied(tmp_path: Path) -> None:
    found = check_weights(write_t5x(tmp_path / "t5x", *openmoe.make(num_layers=2)))
    assert found.written.keys() == {"its file holds it in pieces or compressed"}
    assert found.nbytes == 0


@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "bfloat16"])
def test_experts_of_gpt_oss(tmp_path: Path, packed: bool) -> None:
    """Experts stored (in, out) with gate and up in turn are put in order; blocks of 4 bits are unpacked into copies."""
    released, floats = write_release(tmp_path)
    found = check_weights(released if packed else floats)
    assert all(".moe." in name for names in found.written.values() for name in names)
    assert bool(found.written) == packed


def test_switch(tmp_path: Path) -> None:
    """Encoder and decoder read the same files, and onnx takes both graphs."""
    path, params = make_switch(tmp_path), SamplingParams(max_tokens=8, temperature=0)
    found: list[References] = []
    copied, linked = (export_onnx(path, tmp_path / f"{link}", max_seq=16, link=link) for link in (False, True))
    want = LLM(copied).generate([[5, 6, 7]], params)[0].token_ids
    assert LLM(linked).generate([[5, 6, 7]], params)[0].token_ids == want
    shutil.rmtree(linked)
    export_onnx(path, None, max_seq=16, report=found.append)
    assert found[0].written == {}
    assert found[0].nbytes == Checkpoint.open(path).nbytes
    for name in ("model.onnx", "encoder.onnx"):
        onnx.checker.check_model(path / name, full_check=True)


@pytest.mark.parametrize("model", ["mixtral", "grok1", "ckpt-0"])
def test_logits(tmp_path: Path, model: str) -> None:
    """The same graph after weights that are the same."""
    if model == "ckpt-0":
        path = grok1.write_ckpt(tmp_path / model, grok1.tensors(layers=1), grok1.CONFIG | {"num_hidden_layers": 1})
    else:
        path = make_checkpoint(tmp_path, model, num_layers=1)
    want = logits(export_onnx(path, tmp_path / "copied", max_seq=16))
    assert np.isfinite(want).all()
    assert np.ptp(want) > 0.1
    np.testing.assert_array_equal(logits(export_onnx(path, tmp_path / "linked", max_seq=16, link=True)), want)


def test_in_the_checkpoints_own_folder(tmp_path: Path) -> None:
    """onnx takes it, and the checkpoint is what it was."""
    path = make_checkpoint(tmp_path, "mixtral", dtype=torch.bfloat16, num_layers=1)
    before = Checkpoint.open(path).fingerprint()
    old = {file.name for file in path.iterdir()}
    found: list[References] = []
    assert export_onnx(path, None, max_seq=32, report=found.append) == path
    assert found[0].how == "in place"
    assert {file.name for file in path.iterdir()} - old == {"model.onnx"}
    onnx.checker.check_model(path / "model.onnx", full_check=True)
    assert Checkpoint.open(path).fingerprint() == before
    loaded = onnx.load(path / "model.onnx").graph
    w1 = next(t for t in loaded.initializer if t.name.endswith("experts.3.w1.weight"))
    want = Checkpoint.open(path).read("layers.0.moe.w_in")[3, :96]
    assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(w1).astype(np.float32)), want.float())
    with pytest.raises(GateworkError, match=r"model\.onnx exists; fix: pass --force"):
        export_onnx(path, None)
    export_onnx(path, None, max_seq=16, dtype="bfloat16", force=True)
    assert {file.name for file in path.iterdir()} - old == {"model.onnx"}


def test_links_in_the_checkpoint(tmp_path: Path) -> None:
    """As in the Hugging Face cache: onnx follows none, so that the graph cannot go there; another folder can share them."""
    snapshot, blobs = tmp_path / "snapshots" / "x", tmp_path / "blobs"
    shutil.move(make_checkpoint(tmp_path, "llama2", num_layers=1), snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    with pytest.raises(GateworkError, match=r"is a link, which ONNX's readers do not follow; fix: .*--link"):
        export_onnx(snapshot, None)
    assert not (snapshot / "model.onnx").exists()
    out = export_onnx(snapshot, tmp_path / "out", link=True, max_seq=16)
    assert not (out / "checkpoint" / "model.safetensors").is_symlink()
    assert np.isfinite(logits(out)).all()


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, folder that shares its files)."""
    folder = tmp_path_factory.mktemp("linked")
    path = make_checkpoint(folder, "mixtral", num_layers=1)
    return path, export_onnx(path, folder / "out", link=True)


def test_a_folder_that_shares_files_is_an_engine(linked: tuple[Path, Path], tmp_path: Path) -> None:
    path, out = linked
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["shared"]["bytes"] == Checkpoint.open(path).nbytes
    assert manifest["shared"]["written"] == {}
    facts = manifest["files"]["checkpoint/model.safetensors"]
    assert facts["size"] == (path / "model.safetensors").stat().st_size > 100 * facts["head"]
    params = SamplingParams(max_tokens=8, temperature=0)
    want = LLM(export_onnx(path, tmp_path / "copy")).generate([[3, 4, 5]], params)[0].token_ids
    assert LLM(out, check="full").generate([[3, 4, 5]], params)[0].token_ids == want


def test_it_outlives_the_checkpoint(linked: tuple[Path, Path], tmp_path: Path) -> None:
    path = shutil.copytree(linked[0], tmp_path / "checkpoint")
    out = export_onnx(path, tmp_path / "out", link=True, max_seq=16)
    want = logits(out)
    shutil.rmtree(path)
    np.testing.assert_array_equal(logits(out), want)
    onnx.checker.check_model(out / "model.onnx", full_check=True)  # which refuses files with two names


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def rename_tensor(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content.replace(b"lm_head.weight", b"lm_tail.weight"))


@pytest.mark.parametrize("harm", [cut, rename_tensor])
def test_another_file_in_its_place(linked: tuple[Path, Path], tmp_path: Path, harm: Callable[[Path], None]) -> None:
    out = shutil.copytree(linked[1], tmp_path / "out")
    harm(out / "checkpoint" / "model.safetensors")
    with pytest.raises(GateworkError, match=r"checkpoint/model\.safetensors is damaged"):
        Engine.open(out)


@pytest.mark.parametrize("head", [-1, 1 << 40, "8", True])
def test_a_manifest_with_an_impossible_head(linked: tuple[Path, Path], tmp_path: Path, head: Any) -> None:
    out = shutil.copytree(linked[1], tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["checkpoint/model.safetensors"]["head"] = head
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(GateworkError, match=r"does not tell the size and SHA-256 of checkpoint/model\.safetensors"):
        Engine.open(out)


def test_where_files_cannot_be_shared_they_are_copied(
    linked: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(sharing, "_clone", lambda source, target: False)
    monkeypatch.setattr(os, "link", refuse)
    found: list[References] = []
    out = export_onnx(linked[0], tmp_path / "out", link=True, report=found.append)
    assert found[0].how == "copied, since the files cannot be shared: Invalid cross-device link"
    assert not (out / "checkpoint").exists()
    assert (out / "experts.safetensors").exists()


def test_clones(linked: tuple[Path, Path], tmp_path: Path) -> None:
    """Where the disk has them, a change made to one does not show in the other, and onnx takes the folder at once."""
    path = shutil.copytree(linked[0], tmp_path / "checkpoint")
    stored = path / "model.safetensors"
    if sharing.share({stored: tmp_path / "clone"}) != sharing.CLONES:
        pytest.skip("this file system has no clones: shared extents are not tried")
    out = export_onnx(path, tmp_path / "out", link=True, max_seq=16)
    onnx.checker.check_model(out / "model.onnx", full_check=True)
    want = logits(out)
    with stored.open("r+b") as file:
        file.seek(-100_000, os.SEEK_END)
        file.write(bytes(100_000))
    np.testing.assert_array_equal(logits(out), want)
