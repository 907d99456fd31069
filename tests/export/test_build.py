"""Building: complete or not at all, the same bytes every time, and a manifest that tells the truth."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gatework import LLM, SamplingParams
from gatework.export import materialize
from gatework.export.build import build_engine
from gatework.export.checkpoint import Checkpoint
from gatework.export.packing import TensorSpec
from gatework.export.quantize import dequantize_rows
from gatework.export.safetensors_writer import SafetensorsWriter
from gatework.plugins.engine_format import sha256
from gatework.plugins.errors import GateworkError
from gatework.runtime.engine import Engine
from tests.checkpoints import make_checkpoint

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny-mixtral"


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(CHECKPOINT, tmp_path_factory.mktemp("engine") / "tiny", precision="int8", max_seq=64)


def test_manifest(engine: Path) -> None:
    manifest = json.loads((engine / "manifest.json").read_text())
    config = Checkpoint.open(CHECKPOINT).config
    assert manifest["model"] == config.to_dict()
    assert manifest["limits"] == {"max_batch": 8, "max_seq": 64, "prefill_chunk": 64}
    assert manifest["checkpoint"]["fingerprint"] == Checkpoint.open(CHECKPOINT).fingerprint()
    assert manifest["toolchain"]["onnxruntime"]
    on_disk = {path.name for path in engine.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == on_disk
    sizes = {"uint8": 1, "bfloat16": 2, "float32": 4}
    nbytes = {n: math.prod(t["shape"]) * sizes[t["dtype"]] for n, t in manifest["tensors"].items()}
    assert manifest["weight_bytes"]["total"] == sum(nbytes.values())
    experts = sum(size for name, size in nbytes.items() if ".moe.w_" in name)
    embedding = sum(size for name, size in nbytes.items() if name.startswith("embed."))
    per_token = sum(nbytes.values()) - experts * 6 / 8 - embedding * (1 - 1 / config.vocab_size)
    assert manifest["weight_bytes"]["per_token"] == round(per_token)


def test_codes_are_the_checkpoint_rounded(engine: Path) -> None:
    """Gate and up rows expert by expert, q, k and v rows one after the other, in blocks of 16."""
    checkpoint, config = Checkpoint.open(CHECKPOINT), Checkpoint.open(CHECKPOINT).config
    D, I = config.hidden_size, config.intermediate_size
    packed = load_file(engine / "experts.safetensors") | load_file(engine / "weights.safetensors")

    def unpacked(name: str) -> torch.Tensor:
        codes, scales = packed[f"{name}.codes"].flatten(0, -4), packed[f"{name}.scales"].flatten(0, -3)
        groups = scales.shape[1]  # of [blocks, groups, 16]; codes are [blocks, steps, 16, 4]
        rows = codes.transpose(1, 2).reshape(len(codes) * 16, groups, -1)
        return dequantize_rows(rows, scales.transpose(1, 2).reshape(-1, groups).float(), 8, rows[0].numel())

    for i in range(config.num_layers):
        w_in = checkpoint.read(f"layers.{i}.moe.w_in").float()
        got = unpacked(f"layers.{i}.moe.w_in").view(config.moe.num_experts, 2, I, D)  # type: ignore[union-attr]
        step = w_in.abs().max() / 127
        assert (got[:, 0] - w_in[:, :I]).abs().max() <= step
        assert (got[:, 1] - w_in[:, I:]).abs().max() <= step
        qkv = torch.cat([checkpoint.read(f"layers.{i}.attn.{x}.weight").float() for x in "qkv"])
        assert (unpacked(f"layers.{i}.attn.qkv.weight") - qkv).abs().max() <= qkv.abs().max() / 127


def test_builds_are_reproducible(engine: Path, tmp_path: Path) -> None:
    again = build_engine(CHECKPOINT, tmp_path / "again", precision="int8", max_seq=64)
    assert contents(again) == contents(engine)


def test_a_failed_build_leaves_nothing_and_keeps_the_old_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path, "mixtral")
    out = build_engine(checkpoint, tmp_path / "engines" / "one", precision="fp32")
    before = contents(out)

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(materialize.ir, "save", fail)  # after all weights are written
    for target in (out, out.parent / "two"):
        with pytest.raises(KeyboardInterrupt):
            build_engine(checkpoint, target, precision="int8", force=True)
    assert [path.name for path in out.parent.iterdir()] == ["one"]
    assert contents(out) == before


def heed_interrupts() -> None:
    """In a new process: the tests may have been started by a shell that had SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_build_leaves_nothing(tmp_path: Path, number: int) -> None:
    """The signal arrives at a random moment of a real build in a process of its own."""
    out = tmp_path / "engines" / "one"
    command = [sys.executable, "-m", "gatework.runtime.cli", "build", CHECKPOINT, "--precision", "int4", "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=heed_interrupts)
    deadline = time.monotonic() + 60
    while not out.parent.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (128 + number, -number)
    assert b"Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []  # nor the parent folder that was made for it


def test_force_replaces_an_engine_only(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama2", num_layers=1)
    out = build_engine(checkpoint, tmp_path / "engine", precision="int8")
    with pytest.raises(GateworkError, match="--force"):
        build_engine(checkpoint, out, precision="int4")
    build_engine(checkpoint, out, precision="int4", force=True)
    assert Engine.open(out).manifest["precision"] == "int4"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    for name in ("file", "folder"):
        target = tmp_path / name
        if name == "file":
            target.write_text("mine")
        else:
            target.mkdir()
            (target / "notes.txt").write_text("mine")
        with pytest.raises(GateworkError):
            build_engine(checkpoint, target, force=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "v100", "precision": "fp8"}, "cpu: fp32"),
        ({"precision": "fp8"}, "cpu: fp32"),
        ({"group_size": 48}, "--group-size cannot be used; got 48"),
        ({"max_seq": 65}, "--max-seq is out of range; got 65"),
        ({"max_seq": 0}, "--max-seq is out of range; got 0"),
        ({"max_batch": 0}, "--max-batch is out of range; got 0"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama2", num_layers=1)
    with pytest.raises(GateworkError, match=message):
        build_engine(checkpoint, tmp_path / "out" / "engine", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_experts_of_odd_width_are_refused_or_padded(tmp_path: Path) -> None:
    odd = make_checkpoint(tmp_path, "mixtral", hidden_size=72)  # 72 is no multiple of 16
    with pytest.raises(GateworkError, match="multiple of 16"):
        build_engine(odd, tmp_path / "one", precision="int8")
    assert not (tmp_path / "one").exists()
    build_engine(odd, tmp_path / "two", precision="fp32")
    padded = build_engine(
        make_checkpoint(tmp_path, "mixtral", intermediate_size=50), tmp_path / "three", precision="int4"
    )
    tensors = json.loads((padded / "manifest.json").read_text())["tensors"]
    assert tensors["layers.0.moe.w_in.codes"]["shape"] == [8, 2, 4, 64 // 8, 16, 4]


def test_writer_places_every_tensor(tmp_path: Path) -> None:
    """Aligned, readable by the safetensors library, whatever the dtypes and parts."""
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randint(0, 255, (7,), dtype=torch.uint8),
        "c": torch.randn(4, 2).bfloat16(),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "out.safetensors"
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(path, specs, align=64) as writer:
        for name, tensor in tensors.items():
            for part in tensor.split(2):
                writer.append(name, part)
        assert all(writer.location(name)[0] % 64 == 0 for name in tensors)
    loaded = load_file(path)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_writer_writes_blocks_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order and sizes of parts: the system is asked to write once per 2 MiB, of which it can make a huge page."""
    torch.manual_seed(0)
    tensors = {
        name: torch.randint(0, 255, (rows, 10_007), dtype=torch.uint8)
        for name, rows in (("a", 700), ("b", 90), ("c", 3))
    }
    path = tmp_path / "out.safetensors"
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    sizes = []
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: (sizes.append(len(data)), pwrite(fd, data, offset))[1])
    with SafetensorsWriter(path, specs, align=4096) as writer:
        writer.append("c", tensors["c"])
        for rows in range(10):
            for name in ("a", "b"):
                writer.append(name, tensors[name].tensor_split(10)[rows])
    assert sum(sizes) == path.stat().st_size
    assert len(sizes) == math.ceil(path.stat().st_size / (2 << 20))
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_writer_refuses_a_disk_that_is_too_small(tmp_path: Path) -> None:
    spec = TensorSpec("huge", torch.float32, (1 << 44,))
    with pytest.raises(GateworkError, match="no room"):
        SafetensorsWriter(tmp_path / "out.safetensors", [spec])


@pytest.mark.parametrize("max_seq", [1, 3])
def test_the_shortest_contexts_can_be_built(tmp_path: Path, max_seq: int) -> None:
    checkpoint = make_checkpoint(tmp_path, "mixtral")
    engine = build_engine(checkpoint, tmp_path / "engine", precision="fp32", max_seq=max_seq)
    (completion,) = LLM(engine).generate([1], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    assert len(completion.token_ids) == max_seq
    assert completion.finish_reason == "length"
