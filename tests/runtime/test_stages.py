"""Engines in stages: the unsplit engine's tokens to the last bit, in one process and in several, and what if one ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import pytest

from gatework import LLM, GateworkError, SamplingParams
from gatework.export.build import build_engine
from gatework.runtime.backends.open import open_backend
from gatework.runtime.backends.processes import ProcessBackend
from gatework.runtime.cli import main
from gatework.runtime.engine import Engine
from gatework.runtime.llm import Completion
from gatework.runtime.verify import verify
from tests.checkpoints import make_checkpoint

T = TypeVar("T")
QWEN = Path(__file__).parents[1] / "golden" / "qwen"  # 16 positions are its trained length
LAYERS = 4
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=1)
PROMPTS = [np.random.default_rng(length).integers(0, 128, length).tolist() for length in (1, 19, 5, 30)]
Build = Callable[[str, int], Path]

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")


def limits(stages: int = 1) -> dict[str, int]:
    return {"max_seq": 64, "max_batch": 3, "prefill_chunk": 8, "stages": stages}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dbrx"), "dbrx", num_layers=LAYERS)


@pytest.fixture(scope="module")
def build(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """An engine of a precision, in so many stages; made once."""
    folder = tmp_path_factory.mktemp("engines")

    @cache
    def make(precision: str, stages: int) -> Path:
        return build_engine(checkpoint, folder / f"{precision}-{stages}", precision=precision, **limits(stages))

    return make


@pytest.fixture(scope="module")
def whole(build: Build) -> Callable[[str], list[Completion]]:
    """What the unsplit engine makes of the prompts, which are more than it has slots."""
    return cache(lambda precision: LLM(build(precision, 1)).generate(PROMPTS, GREEDY))


def within(seconds: float, call: Callable[[], T]) -> T:
    """What the call gives, or raises; a failure instead of a wait where it takes longer."""
    found: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            found.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        pytest.fail(f"it took longer than {seconds} s")
    if raised:
        raise raised[0]
    return found[0]


def all_gone(pids: list[int], seconds: float = 5) -> bool:
    """Whether the processes end within that time."""
    end = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("stages", [2, LAYERS])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_stages_change_no_bit(build: Build, whole: Callable, precision: str, stages: int) -> None:
    """Several prompts, longer than a chunk, more than slots: rows join, finish and move."""
    llm = LLM(build(precision, stages))
    assert [(stage.first, stage.end) for stage in llm.engine.stages][:: stages - 1] in (
        [(0, 2), (2, 4)],
        [(0, 1), (3, 4)],
    )
    assert llm.generate(PROMPTS, GREEDY) == whole(precision)


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ("mixtral", "int8"),
        ("qwen3", "int4"),
        ("phi", "int8"),
        ("mpt", "int8"),
        (None, "fp32"),
        ("grok1", "int8"),
        ("gpt-oss", "int4"),
    ],
)
def test_every_kind_of_layer(tmp_path: Path, model: str | None, precision: str) -> None:
    """RMS norms fused over the cut, tied tables in both ends, parallel layers, ALiBi, dynamic NTK, sandwich norms, sinks."""
    source = QWEN if model is None else make_checkpoint(tmp_path, model)
    prompts = [[token % 96 for token in prompt] for prompt in PROMPTS]  # Qwen's has the smallest vocabulary
    engines = [build_engine(source, tmp_path / str(n), precision=precision, **limits(n)) for n in (1, 2)]
    found = [LLM(engine).generate(prompts, GREEDY) for engine in engines]
    assert found[0] == found[1]


# In fp16 the CPU provider leaves out casts to it between operators, but not the one at a cut.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0), ("fp16", 4e-3)])
def test_stages_for_gpus_give_the_same(tmp_path: Path, checkpoint: Path, precision: str, tolerance: float) -> None:
    """On ONNX Runtime's CPU kernels: logits, and values given up on both sides of the cut."""
    found = []
    for stages in (1, 2):
        out = tmp_path / str(stages)
        engine = Engine.open(build_engine(checkpoint, out, target="cuda", precision=precision, **limits(stages)))
        engine = replace(engine, manifest=engine.manifest | {"target": "cpu", "precision": "fp32"})
        backend = open_backend(engine, max_batch=1, taps=["embedding", "layers.1.output", "layers.2.context"])
        found.append([backend.prefill(0, PROMPTS[1], 0), *backend.tapped.values()])  # type: ignore[attr-defined]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(one).max())


def test_one_process_loads_no_torch(build: Build) -> None:
    code = "import sys; from gatework import LLM; llm = LLM(sys.argv[1]); llm.generate([[1, 2]]); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, build("int8", 2)], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "False\n", ran.stderr


@pytest.mark.parametrize("stages", [2, LAYERS])
def test_processes_change_no_bit(build: Build, whole: Callable, stages: int) -> None:
    def run() -> None:
        with LLM(build("int8", stages), stage_processes=True) as llm:
            assert len(set(llm.stage_pids)) == stages
            assert llm.generate(PROMPTS, GREEDY) == whole("int8")
            pids = llm.stage_pids
        assert all_gone(pids)
        with pytest.raises(GateworkError, match="closed"):
            llm.generate(PROMPTS[0], GREEDY)

    within(60, run)


@pytest.fixture
def running(build: Build) -> Iterator[LLM]:
    llm = within(30, lambda: LLM(build("int8", 2), stage_processes=True))
    yield llm
    within(10, llm.close)


@pytest.mark.parametrize("when", ["idle", "decode"])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_stage_is_an_error_and_no_hang(running: LLM, stage: int, when: str) -> None:
    stream = running.stream(PROMPTS[1], GREEDY)
    next(stream)
    pids = running.stage_pids
    os.kill(pids[stage], signal.SIGKILL)
    if when == "idle":
        assert all_gone(pids)
    with pytest.raises(GateworkError, match=rf"stage {stage} \(layers .*\) has ended; got killed by SIGKILL"):
        within(5, lambda: list(stream))
    assert all_gone(pids)
    with pytest.raises(GateworkError, match=f"stage {stage} "):
        within(5, lambda: running.generate(PROMPTS, GREEDY))


def test_a_stage_killed_while_it_computes(running: LLM) -> None:
    """A stage that stands still is killed in the middle of a step."""
    pid = running.stage_pids[1]
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(GateworkError, match=r"stage 1 \(layers 2 to 3\) has ended; got killed by SIGKILL"):
        within(5, lambda: running.generate(PROMPTS, GREEDY))
    assert all_gone(running.stage_pids)


def test_an_interrupted_step_ends_the_stages(running: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are still on their way: the next step would take them for its own."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gatework.runtime.backends.wire.Wire.hear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        within(5, lambda: running.generate(PROMPTS, GREEDY))
    assert all_gone(running.stage_pids)
    with pytest.raises(GateworkError, match="closed"):
        within(5, lambda: running.generate(PROMPTS, GREEDY))


def test_a_stage_killed_while_it_loads(build: Build) -> None:
    def kill_one() -> None:
        me = psutil.Process()
        while not (
            found := [child for child in me.children() if "gatework.runtime.backends.worker" in child.cmdline()]
        ):
            time.sleep(0.01)
        found[-1].kill()

    build("int8", 2)
    threading.Thread(target=kill_one, daemon=True).start()
    with pytest.raises(GateworkError, match=r"stage \d \(layers .*\) has ended; got killed by SIGKILL"):
        within(10, lambda: LLM(build("int8", 2), stage_processes=True))


def test_a_stage_that_cannot_load_says_why(build: Build, tmp_path: Path) -> None:
    shutil.copytree(build("int8", 2), tmp_path / "engine")
    engine = Engine.open(tmp_path / "engine")
    (tmp_path / "engine" / "stage1" / "model.onnx").unlink()
    with pytest.raises(GateworkError, match=r"stage \d \(.*\) failed: .*model.onnx is damaged: it is missing"):
        within(20, lambda: ProcessBackend(engine, max_batch=1))


def test_stages_end_with_the_program(build: Build) -> None:
    code = "import sys, time; from gatework import LLM; llm = LLM(sys.argv[1], stage_processes=True)"
    code += "; print(*llm.stage_pids, flush=True); time.sleep(60 if sys.argv[2] == 'killed' else 0)"
    for how in ("killed", "ended"):
        command = [sys.executable, "-c", code, build("int8", 2), how]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
            assert program.stdout is not None
            pids = [int(word) for word in within(30, program.stdout.readline).split()]
            assert len(pids) == 2
            if how == "killed":
                program.kill()
            within(10, program.wait)
        assert all_gone(pids)


def test_an_llm_that_is_dropped_ends_its_stages(build: Build) -> None:
    llm = within(30, lambda: LLM(build("int8", 2), stage_processes=True))
    pids = llm.stage_pids
    del llm
    assert all_gone(pids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 0}, "--stages is out of range; got 0"),
        ({"stages": LAYERS + 1}, "more stages than layers; got --stages 5; expected at most 4"),
        (
            {"stages": 2, "target": "a100", "precision": "bf16"},
            "--stages is for ONNX Runtime's targets; got --target a100",
        ),
    ],
)
def test_impossible_stages(checkpoint: Path, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(GateworkError, match=message):
        build_engine(checkpoint, tmp_path / "engine", **settings)
    assert not (tmp_path / "engine").exists()


def test_processes_need_stages_and_torch(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GateworkError, match="has no stages to run in processes"):
        LLM(build("int8", 1), stage_processes=True)
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    with pytest.raises(GateworkError, match=r"need PyTorch.*fix: pip install"):
        LLM(build("int8", 2), stage_processes=True)


@pytest.mark.parametrize("layers", [[[0, 1], [2, 4]], [[0, 2], [2, 3]], [[0, 4], [4, 4]], [[0, 2], None], []])
def test_a_manifest_whose_stages_are_wrong(build: Build, tmp_path: Path, layers: list) -> None:
    shutil.copytree(build("int8", 2), tmp_path / "engine")
    file = tmp_path / "engine" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["stages"] = [{"layers": each, "weight_bytes": {"total": 1, "per_token": 1}} for each in layers]
    file.write_text(json.dumps(manifest))
    with pytest.raises(GateworkError, match="its stages are not known"):
        Engine.open(tmp_path / "engine")


def test_verify_looks_into_every_stage(build: Build, checkpoint: Path) -> None:
    report = verify(build("fp32", 2), checkpoint, tokens=4, window=16)
    assert report.passed, report
    assert {stage.layer for stage in report.stages if stage.tensor == "output"} == set(range(LAYERS))


def test_command_line(
    build: Build, whole: Callable, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = str(tmp_path / "engine")
    command = ["build", str(checkpoint), "--out", out, "--stages", "2", "--max-seq", "64"]
    assert main(command) == 0
    assert main([*command, "--if-changed"]) == 0
    assert capsys.readouterr().out.endswith("is up to date\n")
    assert main(["inspect", out]) == 0
    text = capsys.readouterr().out
    assert "stage 0             embedding, layers 0 to 1: 854.3 kB\n" in text
    assert "stage 1             layers 2 to 3, head: 854.3 kB\n" in text
    ids = ",".join(map(str, PROMPTS[1]))
    generate = ["generate", out, "--prompt-ids", ids, "--max-tokens", "8", "--ignore-eos"]
    for options in ([], ["--stage-processes"]):
        assert within(60, lambda options=options: main([*generate, *options])) == 0
        assert capsys.readouterr().out.split() == [str(token) for token in whole("int8")[1].token_ids[:8]]
    bench = ["bench", out, "--prompt-tokens", "8", "--new-tokens", "4", "--repeat", "1", "--stage-processes"]
    assert within(60, lambda: main(bench)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["decode_tok_s"] > 0
