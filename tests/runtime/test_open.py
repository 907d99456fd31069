"""Which engines are refused before anything of them is loaded, and what is said on a machine without a GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from gatework import LLM, GateworkError
from gatework.export.build import build_engine
from gatework.plugins.machine import gpu_capability
from tests.checkpoints import make_checkpoint
from tests.refusals import Refuse

without_gpu = pytest.mark.skipif(
    gpu_capability() is not None, reason="this machine has a GPU: what is said without one is not seen"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "mixtral")


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Path:
    return build_engine(checkpoint, checkpoint.parent / "engine", precision="int8", max_seq=16)


@pytest.fixture
def as_plan(engine: Path, tmp_path: Path) -> Any:
    """A copy that says of itself that it holds a plan; nothing reads further before it is refused."""

    def make(**settings: Any) -> Path:
        path = tmp_path / "plan"
        shutil.copytree(engine, path)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["target"] = "a100"
        manifest["toolchain"] = {settings.pop("tool", "tensorrt_rtx"): "1.7"}
        manifest["inputs"]["settings"] |= settings
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path

    return make


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"strip_weights": True},
            "--strip-weights; got a plan without weights; fix: put them in with `gatework refit`",
        ),
        ({"plan_only": True}, "--plan-only; got no experts beside the plan; fix: build it again without that option"),
        ({"tool": "iree"}, "by no toolchain that is known here; got iree; expected onnxruntime or tensorrt or"),
    ],
)
@pytest.mark.parametrize("command", [("generate", "--prompt-ids", "1,2"), ("bench",), ("verify", "--reference")])
def test_engines_that_cannot_run_are_refused(
    as_plan: Any, checkpoint: Path, refused: Refuse, settings: dict[str, Any], words: str, command: tuple[str, ...]
) -> None:
    path = as_plan(**settings)
    name, *rest = command
    rest += [str(checkpoint)] if name == "verify" else []
    assert words in refused(name, path, *rest)


def test_more_slots_than_the_plan_has(as_plan: Any) -> None:
    with pytest.raises(GateworkError, match="max_batch is beyond the plan's; got 9; expected at most 8; fix: build"):
        LLM(as_plan(), max_batch=9)


@without_gpu
@pytest.mark.parametrize("tool", ["tensorrt", "tensorrt_rtx"])
def test_without_a_gpu_a_plan_is_refused_in_one_line(
    as_plan: Any, checkpoint: Path, refused: Refuse, tool: str
) -> None:
    plan = as_plan(tool=tool)
    line = refused("generate", plan, "--prompt-ids", "1,2")
    assert "this engine runs on an NVIDIA GPU; got cudaError" in line
    assert "; expected a GPU and its driver; fix: run it on a machine with an NVIDIA GPU" in line
    assert refused("verify", plan, "--reference", checkpoint) == line  # though without a text nothing could be judged


@without_gpu
def test_without_a_gpu_a_cuda_engine_is_refused_in_one_line(checkpoint: Path, refused: Refuse) -> None:
    engine = build_engine(checkpoint, checkpoint.parent / "cuda", target="cuda", precision="bf16", max_seq=32)
    line = refused("generate", engine, "--prompt-ids", "1,2")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        assert "this engine runs on an NVIDIA GPU; got cudaError" in line
    else:
        assert "needs ONNX Runtime for NVIDIA GPUs; got the package for CPUs; fix: install the extra cuda" in line
