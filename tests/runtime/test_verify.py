"""verify: healthy engines pass, planted faults fail, and its numbers are what they are called."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from gatework.export.build import build_engine, export_onnx
from gatework.export.layerwise import LayerwiseReference
from gatework.export.quantize import quantize_fp8
from gatework.export.rounding import UNITS, Format
from gatework.export.steps.compared import CONTEXT_DRAWS, Compared
from gatework.plugins.errors import GateworkError
from gatework.runtime.cli import main
from gatework.runtime.verify import DEFAULT_BOUNDS, Bounds, Check, VerifyReport, checks, compare_engines, verify
from gatework.runtime.verify.compare import Comparison, Place, kl_divergence, relative_error, top_overlap
from gatework.runtime.verify.feed import Case, feed
from gatework.runtime.verify.findings import Findings
from gatework.runtime.verify.perplexity import negative_log_likelihood, perplexity, windows
from gatework.runtime.verify.record import Recording
from gatework.runtime.verify.stages import Stage, judge
from gatework.runtime.verify.work import work_folder
from tests.checkpoints import EXPERTS_LAST, make_checkpoint, reference_model

TINY = Path(__file__).parents[2] / "examples" / "tiny-mixtral"
TEXT = (TINY / "heldout.txt").read_text()[:3000]


def named(report: VerifyReport, name: str) -> Check:
    (check,) = [check for check in report.checks if check.name == name]
    return check


# ---- healthy engines


@pytest.mark.parametrize("model", ["llama2", "mistral", "mixtral", "dbrx"])
def test_fp32_engines_pass(tmp_path: Path, model: str) -> None:
    path = make_checkpoint(tmp_path, model, max_position_embeddings=160)
    engine = build_engine(path, tmp_path / "engine", precision="fp32", prefill_chunk=16, max_batch=3)
    report = verify(engine, path)
    assert report.passed, str(report)
    assert re.fullmatch(r"(\d+) of \1 tokens the same", named(report, "greedy tokens: margin of a flip").note)
    assert named(report, "greedy tokens: margin of a flip").compared >= 3 * 64
    assert named(report, "decode: max relative error").compared >= 3 * 63 + 4 * 160
    assert named(report, "prefill: max relative error").compared >= 5 + 4 * 160 // 16
    assert "not_covered" not in report.facts


def test_a_row_may_be_off_by_one_number(tmp_path: Path) -> None:
    """What attention reads, where a query is torn between two keys: 200,000 sound rows pass, and one far beyond fails."""
    rng = np.random.default_rng(0)
    rows, width = 200_000, 16
    along, want = (torch.from_numpy(rng.standard_normal((rows, width), np.float32)) for _ in range(2))
    along /= along.norm(dim=1, keepdim=True)
    draws = torch.from_numpy(rng.standard_normal((CONTEXT_DRAWS + 1, rows), np.float32)) * 0.01
    noise, bias = draws[1:].square().mean(0).sqrt(), draws[1:].square().mean(0).sqrt()
    got = want + draws[0][:, None] * along
    recording = Recording(tmp_path, [Case("one", list(range(rows)), 0, 1, rows, tapped=True)])
    step = Compared(0, "context", torch.arange(rows), got, want, noise, bias, want)
    assert judge(step, recording).passed
    got[7] += 0.3 * along[7]
    assert not judge(step, recording).passed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines of the bundled checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    return {p: build_engine(TINY, folder / p, precision=p, max_seq=300) for p in ("int8", "int4")}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_engines_pass(tiny: dict[str, Path], precision: str) -> None:
    report = verify(tiny[precision], TINY, text=TEXT)
    assert report.passed, str(report)
    assert report.precision == precision
    judged = [check.name for check in report.checks if check.bound is not None]
    steps = ["steps: share of the rounding bound", "steps: logits changed by observing them"]
    assert judged == [*steps, "prefill: mean KL", "decode: mean KL", "perplexity change"]
    assert named(report, "top-1 disagreement").observed < 0.15


def test_layers_without_experts_pass(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3_moe", **EXPERTS_LAST)
    report = verify(build_engine(path, tmp_path / "engine", precision="int8", prefill_chunk=16), path, tokens=16)
    assert report.passed, str(report)
    assert sum(stage.tensor == "mlp" for stage in report.stages) == 3
    assert sum(stage.tensor == "experts" for stage in report.stages) == 1


def test_fp8_of_experts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan's place takes a float32 engine of e4m3 experts: their error is explained, and nothing is allowed beside it."""
    path, rounded = make_checkpoint(tmp_path, "mixtral"), tmp_path / "rounded"
    shutil.copytree(path, rounded)
    weights = load_file(path / "model.safetensors")
    for name in (name for name in weights if ".experts." in name):
        codes, scales = quantize_fp8(weights[name], weights[name].abs().amax(-1, keepdim=True))
        weights[name] = codes.float() * scales
    save_file(weights, rounded / "model.safetensors", {"format": "pt"})
    engine = build_engine(rounded, tmp_path / "engine", precision="fp32", prefill_chunk=16)
    for fp8, off in ((True, set()), (False, {"experts"})):
        form = Format(UNITS["float32"], experts=True, fp8=fp8)
        monkeypatch.setattr(checks, "_format", lambda engine, form=form: form)
        report = verify(engine, path, tokens=4, window=16, check_fingerprint=False, bounds=Bounds(mean_kl=1.0))
        assert {stage.tensor for stage in report.stages if not stage.passed} == off, str(report)


@torch.inference_mode()
def test_perplexity_is_transformers(tiny: dict[str, Path]) -> None:
    """Windows of 256 tokens, each alone, every token but the first scored: computed here from scratch."""
    report = verify(tiny["int8"], TINY, text=TEXT, tokens=1)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(TINY)(TEXT)["input_ids"]
    oracle, losses = reference_model(TINY), []
    for start in range(0, len(ids), 256):
        window = torch.tensor(ids[start : start + 256])
        losses.append(F.cross_entropy(oracle(window[None]).logits[0, :-1].double(), window[1:], reduction="none"))
    assert named(report, "perplexity change").compared == len(ids) - len(losses)
    # float32 logits, rounded in another order: 1e-6
    assert report.facts["perplexity_reference"] == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-5)


# ---- what is refused


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, fp32 engine)."""
    folder = tmp_path_factory.mktemp("mixtral")
    path = make_checkpoint(folder, "mixtral")
    return path, build_engine(path, folder / "engine", precision="fp32", prefill_chunk=8)


def test_another_checkpoint_is_refused(sound: tuple[Path, Path], tmp_path: Path) -> None:
    _, engine = sound
    other = make_checkpoint(tmp_path, "mixtral", seed=1)
    with pytest.raises(GateworkError, match=r"was not built from .*; fix: give the checkpoint"):
        verify(engine, other)
    other = make_checkpoint(tmp_path, "mixtral", vocab_size=131)
    with pytest.raises(GateworkError, match="differ in vocab_size; got 128 and 131"):
        verify(engine, other, check_fingerprint=False)


def test_requests_that_cannot_be_met(sound: tuple[Path, Path]) -> None:
    path, engine = sound
    with pytest.raises(GateworkError, match="has no tokenizer"):
        verify(engine, path, text="text")
    with pytest.raises(GateworkError, match="has no tokenizer"):
        verify(engine, path, prompts=["text"])
    with pytest.raises(GateworkError, match="a prompt does not fit; got 60 tokens; expected 1 to 57"):
        verify(engine, path, prompts=[[1] * 60], tokens=8)
    with pytest.raises(GateworkError, match="out of range; expected 0 to 127"):
        verify(engine, path, prompts=[[128]])
    with pytest.raises(GateworkError, match="--tokens or --window is too small"):
        verify(engine, path, tokens=0)


def test_prompts_and_bounds_of_ones_own(sound: tuple[Path, Path]) -> None:
    path, engine = sound
    report = verify(engine, path, prompts=[[1, 2, 3], [4]], tokens=5, bounds=Bounds(mean_kl=1e-9))
    assert report.passed
    assert report.facts["prompts"] == "prompt 1 of 3, prompt 2 of 1"
    assert named(report, "greedy tokens: margin of a flip").compared == 10
    strict = verify(engine, path, prompts=[[1, 2, 3]], tokens=5, bounds=Bounds(relative=1e-12))
    check = named(strict, "decode: max relative error")
    assert not strict.passed
    assert check.would_pass is not None
    assert check.observed <= check.would_pass <= 1.1 * check.observed
    loose = Bounds(relative=max(c.would_pass or 0 for c in strict.checks if "relative" in c.name))
    assert verify(engine, path, prompts=[[1, 2, 3]], tokens=5, bounds=loose).passed


@pytest.mark.parametrize(
    ("passed", "stage_bound", "amplified", "bound"),
    [(True, 1.0, 4.0, 8e-5), (False, 1.0, 4.0, 1e-5), (True, math.inf, 4.0, 1e-5), (True, 1.0, None, 1e-5)],
)
def test_logits_may_be_off_as_rounding_makes_those_that_it_explains(
    tmp_path: Path, passed: bool, stage_bound: float, amplified: float | None, bound: float
) -> None:
    """Where every step of them was judged, and passed, and a model's own bounds are used."""
    found = Findings(Recording(tmp_path, []), {}, amplified=2e-5)
    numbers = dict.fromkeys(("local", "expected", "accumulated", "observed"), 0.0)
    found.stages.append(Stage(0, "key", **numbers, bound=stage_bound, compared=1, passed=passed, row=0, note=""))
    rows = np.ones((1, 8), np.float32)
    found.rows["decode"].add(rows, rows * (1 + 5e-5), [Place(0, "window 1")])
    bounds = Bounds(relative=1e-5, amplified=amplified)
    (check,) = (c for c in found.logit_checks(bounds, has_text=False) if c.name == "decode: max relative error")
    assert check.bound == pytest.approx(bound)
    assert check.passed == (bound > 5e-5)


@pytest.mark.parametrize("text", ["", "import os\n"])
def test_a_text_too_short_to_judge_by_is_refused(tiny: dict[str, Path], text: str) -> None:
    with pytest.raises(
        GateworkError, match=r"the text is too short to verify with; got \d tokens; expected at least 256"
    ):
        verify(tiny["int8"], TINY, text=text, tokens=2)


def test_a_stopped_run_goes_on(sound: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is not run again, nor the layers that were through, and the report is that of one go."""
    path, engine = sound
    want = verify(engine, path, tokens=4)
    layer, seen = LayerwiseReference._layer, []

    def stopping(self: LayerwiseReference, stack: Any, i: int) -> Any:
        seen.append(i)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return layer(self, stack, i)

    monkeypatch.setattr(LayerwiseReference, "_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        verify(engine, path, tokens=4, work=tmp_path)
    monkeypatch.setattr("gatework.runtime.verify.checks.open_backend", None)
    report = verify(engine, path, tokens=4, work=tmp_path)
    assert seen == [0, 1, 1]
    assert report.to_dict() | {"seconds": 0} == want.to_dict() | {"seconds": 0}
    with pytest.raises(GateworkError, match="holds another verification"):
        verify(engine, path, tokens=5, work=tmp_path)


def test_engines_against_each_other(sound: tuple[Path, Path], tmp_path: Path) -> None:
    path, engine = sound
    same = compare_engines(engine, engine, tokens=4)
    assert same.passed
    assert named(same, "steps that differ").observed == 0
    assert named(same, "decode: max relative error").observed == 0
    other = build_engine(path, tmp_path / "int8", precision="int8")
    report = compare_engines(other, engine, tokens=4, bounds=Bounds(mean_kl=10))
    assert report.passed
    assert report.stages[0].tensor == "embedding"
    assert 0 < report.stages[0].accumulated < 0.02
    assert "the first is embedding" in named(report, "steps that differ").note
    most = max(stage.accumulated for stage in report.stages if stage.tensor == "experts")
    (row,) = (line.split() for line in str(report).splitlines() if line.startswith("experts "))
    assert row[:3] == ["experts", "2", f"{most:.2g}"]
    assert row[-1] != "ok"  # there is nothing to judge it by
    json.dumps(report.to_dict(), allow_nan=False)
    assert not compare_engines(other, engine, tokens=4, bounds=Bounds(mean_kl=1e-9)).passed
    with pytest.raises(GateworkError, match="the engines differ in num_layers; got 2 and 1"):
        compare_engines(engine, build_engine(make_checkpoint(tmp_path, "mixtral", num_layers=1), tmp_path / "one"))


def test_an_engine_that_takes_less_is_to_be_named_first(sound: tuple[Path, Path], tmp_path: Path) -> None:
    _, engine = sound
    less = Path(shutil.copytree(engine, tmp_path / "less"))
    manifest = json.loads((less / "manifest.json").read_text())
    manifest["limits"]["max_seq"] = 16
    (less / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(GateworkError, match=f"got 16; .*; fix: gatework verify {less} --against {engine}$"):
        compare_engines(engine, less)


def test_portable_onnx_is_verified_too(sound: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = sound
    report = verify(export_onnx(path, tmp_path / "onnx"), path, tokens=4)
    assert report.passed
    assert report.target == "onnx"
    assert {stage.tensor for stage in report.stages} >= {"key", "context", "router", "experts", "output", "logits"}


def test_a_report_without_bounds_does_not_pass(sound: tuple[Path, Path]) -> None:
    path, engine = sound
    report = verify(engine, path, tokens=2, bounds=Bounds())
    assert report.passed  # the steps have bounds of their own
    assert report.summary.endswith("steps explained by rounding; quality was not judged (no --text)")
    assert not replace(report, checks=tuple(check for check in report.checks if check.bound is None)).passed


def test_window_that_no_sequence_reaches_is_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "mistral", num_layers=1, sliding_window=40)
    engine = build_engine(path, tmp_path / "engine", precision="fp32", max_seq=32)
    assert "sliding window of 40" in verify(engine, path, tokens=4).facts["not_covered"]


# ---- temporary folders


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not locked there, and so not removed")
def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with work_folder(None) as first:
        os.utime(first, (0, 0))
        with work_folder(None):
            assert first.exists()  # at work, however old
    assert list(tmp_path.iterdir()) == []
    first.mkdir()
    os.utime(first, (0, 0))
    with work_folder(None):
        assert not first.exists()


# ---- the command


def test_command(
    tiny: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, report = tmp_path / "text.txt", tmp_path / "report.json"
    text.write_text(TEXT[:1500])
    command = ["verify", tiny["int8"], "--reference", TINY, "--text", text, "--tokens", 8, "--json", report]
    argv = [str(word) for word in command]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "\n\npassed: " in out
    assert "not judged" not in out
    assert json.loads(report.read_text())["seconds"] > 0
    assert "perplexity change" in out
    assert json.loads(report.read_text())["passed"] is True
    monkeypatch.setitem(DEFAULT_BOUNDS, "int8", Bounds(mean_kl=1e-9))
    assert main(argv) == 1
    assert "\n\nFAILED: prefill: mean KL, decode: mean KL" in capsys.readouterr().out
    written = json.loads(report.read_text())
    assert written["passed"] is False
    failed = [check for check in written["checks"] if not check["passed"]]
    assert {check["name"] for check in failed} == {"prefill: mean KL", "decode: mean KL"}
    assert all(check["would_pass"] > check["bound"] for check in failed)


# ---- the numbers


def test_metrics_against_torch() -> None:
    rng = np.random.default_rng(0)
    want = rng.normal(0, 3, (6, 50)).astype(np.float32)
    got = (want + rng.normal(0, 0.5, want.shape)).astype(np.float32)
    p, q = (F.log_softmax(torch.from_numpy(x).double(), -1) for x in (want, got))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert kl_divergence(want, got) == pytest.approx(kl.numpy(), rel=1e-12)
    targets = [3, 1, 4, 1, 5, 9]
    losses = F.nll_loss(p, torch.tensor(targets), reduction="none")
    assert negative_log_likelihood(want, targets) == pytest.approx(losses.numpy(), rel=1e-12)
    top = [set(torch.from_numpy(x).topk(5).indices[row].tolist()) for row in range(6) for x in (want, got)]
    assert top_overlap(want, got) == pytest.approx([len(a & b) / 5 for a, b in zip(top[::2], top[1::2], strict=True)])
    assert top_overlap(want[:, :3], got[:, :3]) == pytest.approx([1.0] * 6)  # a vocabulary of three


def test_metrics_by_hand() -> None:
    want = np.array([[0.0, math.log(3)], [2.0, -4.0]], np.float32)  # p = 1/4, 3/4
    got = np.array([[0.0, 0.0], [2.5, -4.0]], np.float32)  # q = 1/2, 1/2
    assert kl_divergence(want, got)[0] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6)
    assert relative_error(want, got) == pytest.approx([1.0, 0.125])
    assert kl_divergence(want, want).tolist() == [0, 0]
    comparison = Comparison()
    comparison.add(want, got, [Place(7, "a"), Place(3, "b")])
    assert comparison.top1 == [False, True]
    assert comparison.worst_token == [1, 0]
    assert str(min(comparison.places)) == "b, position 3"


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_metrics_of_broken_logits_never_pass(broken: float) -> None:
    want, got = np.ones((1, 4), np.float32), np.array([[1, broken, 1, 1]], np.float32)
    comparison = Comparison()
    comparison.add(want, got, [Place(0, "a")])
    for value in (comparison.relative[0], comparison.kl[0]):
        check = Check("x", value, 1e9, 1)
        assert not check.passed
        assert check.would_pass is None
        assert check.to_dict()["observed"] is None


@pytest.mark.parametrize(
    ("observed", "bound", "compared", "passed"),
    [(0.5, 1.0, 3, True), (1.0, 1.0, 3, True), (1.1, 1.0, 3, False), (9.0, None, 3, True), (0.0, 1.0, 0, False)],
)
def test_check(observed: float, bound: float | None, compared: int, passed: bool) -> None:
    assert Check("x", observed, bound, compared).passed is passed


@pytest.mark.parametrize("observed", [1.234e-7, 0.0123, 9.99, 1.0, 0.0, 5e-324])
def test_the_bound_that_would_pass_passes(observed: float) -> None:
    needed = Check("x", observed, 1e-99, 1).would_pass
    assert needed is not None
    assert Check("x", observed, needed, 1).passed
    assert needed <= observed * 1.11 + 1e-300


def test_windows() -> None:
    assert windows(range(10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert windows(range(9), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows([], 4) == windows([1], 4) == []
    assert perplexity(negative_log_likelihood(np.zeros((5, 32)), [1, 2, 3, 4, 5]).tolist()) == pytest.approx(32)
    assert math.isnan(perplexity([]))


@dataclass
class Recorder:
    """A backend that only notes what it is asked."""

    max_batch: int = 2
    max_seq: int = 99
    calls: list[tuple] = field(default_factory=list)

    def prefill(self, slot: int, tokens: list[int], start: int, prompt: int | None = None) -> np.ndarray:
        self.calls.append(("prefill", slot, tokens, start))
        return np.zeros(4)

    def decode(self, tokens: list[int], positions: list[int]) -> np.ndarray:
        self.calls.append(("decode", tokens, positions))
        return np.zeros((len(tokens), 4))

    def move(self, source: int, target: int, length: int) -> None:
        raise AssertionError


def test_feed() -> None:
    """The longest rest in slot 0, the others leave from the end; groups as large as the backend takes."""
    backend = Recorder()
    cases = [
        Case("a", [10, 11, 12], 2, 2, 3),
        Case("b", [20, 21, 22, 23, 24], 3, 2, 5),
        Case("c", [30, 31], 2, 2, 2),
    ]
    through: list[tuple[int, int]] = []
    fed = list(feed(backend, cases, lambda slot, i: through.append((slot, i))))
    assert backend.calls == [
        ("prefill", 0, [20, 21], 0),
        ("prefill", 0, [22], 2),
        ("prefill", 1, [10, 11], 0),
        ("decode", [23, 12], [3, 2]),
        ("decode", [24], [4]),
        ("prefill", 0, [30, 31], 0),
    ]
    assert [(step.phase, step.cases, step.positions, step.tokens) for step in fed] == [
        ("prefill", [1], [1], 2),
        ("prefill", [1], [2], 1),
        ("prefill", [0], [1], 2),
        ("decode", [1, 0], [3, 2], 2),
        ("decode", [1], [4], 1),
        ("prefill", [2], [1], 2),
    ]
    assert all(step.logits.shape == (len(step.cases), 4) for step in fed)
    assert through == [(0, 1), (1, 0), (0, 2)]


def test_feed_goes_on_by_the_engines_own_choice() -> None:
    backend = Recorder()
    case = Case("a", [10, 11], 2, 8, 5, greedy=True)
    fed = list(feed(backend, [case], lambda slot, i: None))
    assert len(case.ids) == 5
    assert case.ids[2:] == [int(step.logits[0].argmax()) for step in fed[:3]]
    assert [step.positions for step in fed] == [[1], [2], [3], [4]]
