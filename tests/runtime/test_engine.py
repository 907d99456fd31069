"""Opening an engine directory: whatever was altered is named, and nothing altered is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gatework import LLM
from gatework.export.build import build_engine
from gatework.plugins.errors import GateworkError
from gatework.runtime.engine import Engine
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    return build_engine(make_checkpoint(folder, "mixtral", num_layers=1), folder / "engine", precision="int8")


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "engine"))


def edit(engine: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = engine / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def test_whole_engine(engine: Path) -> None:
    for check in ("auto", "full", "sizes"):
        opened = Engine.open(engine, check=check)  # type: ignore[arg-type]
        assert opened.limits.max_seq == 64
        assert opened.model["num_layers"] == 1


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors", "experts.safetensors"])
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_one_flipped_bit(engine: Path, name: str, place: float) -> None:
    data = bytearray((engine / name).read_bytes())
    data[int(place * len(data)) if place >= 0 else -1] ^= 1
    (engine / name).write_bytes(data)
    with pytest.raises(GateworkError, match=f"{name} is damaged"):
        Engine.open(engine)


def test_llm_refuses_altered_weights(engine: Path) -> None:
    data = bytearray((engine / "experts.safetensors").read_bytes())
    data[-1] ^= 1
    (engine / "experts.safetensors").write_bytes(data)
    for check in ("auto", "full"):
        with pytest.raises(GateworkError, match=r"experts\.safetensors is damaged"):
            LLM(engine, check=check)  # type: ignore[arg-type]
    LLM(engine, check="sizes")  # as asked


def test_truncated_and_missing_files(engine: Path) -> None:
    weights = engine / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for check in ("auto", "sizes"):
        with pytest.raises(GateworkError, match=r"weights\.safetensors is damaged: it has"):
            Engine.open(engine, check=check)  # type: ignore[arg-type]
    weights.unlink()
    with pytest.raises(GateworkError, match=r"weights\.safetensors is damaged: it is missing"):
        Engine.open(engine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=3), "a newer engine format"),
        (lambda m: m.update(format_version=1), "an older engine format"),
        (lambda m: m.pop("format_version"), "no format_version"),
        (lambda m: m.pop("model"), "field model"),
        (lambda m: m.update(limits={"max_seq": 4}), "limits"),
        (lambda m: m["limits"].update(max_seq="4"), "limits are not known"),
        (lambda m: m["files"].update({"../outside": {"size": 1, "sha256": ""}}), "plain file name"),
        (
            lambda m: m["files"].update({"kernels/../x": {"size": 1, "sha256": ""}}),
            "names 'kernels/../x', which is not",
        ),
        (lambda m: m["files"].update({"other/x": {"size": 1, "sha256": ""}}), "names 'other/x', which is not"),
        (lambda m: m["files"].update({"kernels/x": {"size": 1, "sha256": ""}}), "kernels/x is damaged: it is missing"),
        (lambda m: m["files"].update({"model.onnx": 5}), "size and SHA-256"),
        (lambda m: m["files"]["model.onnx"].update(sha256="0"), "altered"),
    ],
)
def test_bad_manifest(engine: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(engine, change)
    with pytest.raises(GateworkError, match=message) as caught:
        Engine.open(engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_manifest_that_is_no_object(engine: Path, text: str) -> None:
    (engine / "manifest.json").write_text(text)
    with pytest.raises(GateworkError, match=r"manifest\.json is damaged"):
        Engine.open(engine)


def test_not_an_engine(tmp_path: Path) -> None:
    with pytest.raises(GateworkError, match="no such folder"):
        Engine.open(tmp_path / "nothing")
    with pytest.raises(GateworkError, match=r"no manifest\.json"):
        Engine.open(tmp_path)
