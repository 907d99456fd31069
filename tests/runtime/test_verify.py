"""verify: healthy engines pass, planted faults fail, and its numbers are what they are called."""

from __future__ import annotations

import ctypes
import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from gatework.export.build import build_engine
from gatework.plugins.errors import GateworkError
from gatework.runtime.backends.ort import OrtBackend
from gatework.runtime.cli import main
from gatework.runtime.verify import DEFAULT_BOUNDS, Bounds, Check, VerifyReport, verify
from gatework.runtime.verify.compare import Comparison, Place, kl_divergence, relative_error, top_overlap
from gatework.runtime.verify.feed import Case, feed
from gatework.runtime.verify.perplexity import negative_log_likelihood, perplexity, windows
from tests.checkpoints import make_checkpoint, reference_model

TINY = Path(__file__).parents[2] / "examples" / "tiny-mixtral"
TEXT = (TINY / "heldout.txt").read_text()[:6000]


def named(report: VerifyReport, name: str) -> Check:
    (check,) = [check for check in report.checks if check.name == name]
    return check


def alter(checkpoint: Path, folder: Path, fault: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> Path:
    """A copy of a checkpoint, in `folder`, whose config or weights `fault` has changed."""
    out = folder / "altered"
    out.mkdir()
    config, tensors = json.loads((checkpoint / "config.json").read_text()), load_file(checkpoint / "model.safetensors")
    fault(config, tensors)
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors")
    return out


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


# ---- planted faults: engine and reference of checkpoints that differ in one thing


def swap_gate_and_up(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    gate, up = (next(n for n in tensors if "layers.1." in n and f".experts.3.{part}." in n) for part in ("w1", "w3"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def rotate_experts(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    name = next(n for n in tensors if "layers.0." in n and n.endswith("gate.weight"))
    tensors[name] = tensors[name].roll(1, 0).contiguous()


def swap_halves_of_q(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    q = tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.cat(q.chunk(2)[::-1])


def scale_one_row(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.self_attn.o_proj.weight"][5] *= 1.01


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any], dict[str, Tensor]], object]]] = {
    "gate and up of one expert swapped": ("mixtral", swap_gate_and_up),
    "router rows rotated": ("mixtral", rotate_experts),
    "query heads swapped": ("llama2", swap_halves_of_q),
    "one row of 64 larger by 1 %": ("llama2", scale_one_row),
    "RoPE base": ("llama2", lambda config, tensors: config["rope_parameters"].update(rope_theta=1.1e4)),
    "norm epsilon": ("mixtral", lambda config, tensors: config.update(rms_norm_eps=1e-6)),
    "window one too long": ("mistral", lambda config, tensors: config.update(sliding_window=5)),
    "one expert more per token": ("mixtral", lambda config, tensors: config.update(num_experts_per_tok=3)),
}


@pytest.fixture(scope="module")
def sound_engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """model -> (checkpoint, fp32 engine), each made once."""

    @functools.cache
    def make(model: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(model)
        path = make_checkpoint(folder, model)
        return path, build_engine(path, folder / "engine", precision="fp32", prefill_chunk=8)

    return make


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_the_model_fail(
    tmp_path: Path, sound_engines: Callable[[str], tuple[Path, Path]], fault: str
) -> None:
    """The sound engine is judged by the altered reference: as far apart as the other way round, and quicker to make."""
    model, change = FAULTS[fault]
    path, engine = sound_engines(model)
    report = verify(engine, alter(path, tmp_path, change), tokens=16, check_fingerprint=False)
    check = named(report, "decode: max relative error")
    assert not report.passed
    assert not check.passed
    assert check.observed > 1e-4  # far from the bound of 1e-5: no near miss
    assert "first beyond the bound" in check.note


def swap_gates_and_ups(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Of all experts of two layers."""
    for name in [name for name in tensors if ".w1." in name and ("layers.1." in name or "layers.2." in name)]:
        other = name.replace(".w1.", ".w3.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def set_rope_base(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["rope_parameters"]["rope_theta"] = 1e4


@pytest.mark.parametrize("fault", [swap_gates_and_ups, set_rope_base])
def test_faults_in_quantised_engines_fail(tmp_path: Path, fault: Callable[..., None]) -> None:
    engine = build_engine(alter(TINY, tmp_path, fault), tmp_path / "engine", precision="int8", max_seq=256)
    report = verify(engine, TINY, check_fingerprint=False, tokens=8)
    assert not report.passed
    assert not named(report, "steps: share of the rounding bound").passed


# ---- planted faults: a sound engine, run wrongly


@pytest.fixture(scope="module")
def sound(sound_engines: Callable[[str], tuple[Path, Path]]) -> tuple[Path, Path]:
    """(checkpoint, fp32 engine)."""
    return sound_engines("mixtral")


def decode_position_late(self: OrtBackend, tokens: list[int], positions: list[int]) -> np.ndarray:
    ids, starts = np.array(tokens)[:, None], np.array([max(position - 1, 0) for position in positions])
    return self._decode(0, ids, starts)


def prefill_without_the_past(self: OrtBackend, slot: int, tokens: list[int], start: int) -> np.ndarray:
    layout = self._cache.layout
    for name in layout.names:
        block = (ctypes.c_uint8 * layout.slot_bytes).from_address(self._cache.address(name, slot))
        np.frombuffer(block, np.float32).reshape(layout.shape(1)[1:])[:, :start] = 0
    return self._run(self._bind(slot, 1, len(tokens)), np.array([tokens]), np.array([start]))[0, 0]


def prefill_into_slot_0(self: OrtBackend, slot: int, tokens: list[int], start: int) -> np.ndarray:
    return self._run(self._bind(0, 1, len(tokens)), np.array([tokens]), np.array([start]))[0, 0]


def decode_nothing_but_nan(self: OrtBackend, tokens: list[int], positions: list[int]) -> np.ndarray:
    logits = self._decode(0, np.array(tokens)[:, None], np.array(positions))
    return np.full_like(logits, np.nan)


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        ("decode", decode_position_late),
        ("prefill", prefill_without_the_past),
        ("prefill", prefill_into_slot_0),
        ("decode", decode_nothing_but_nan),
    ],
)
def test_faults_in_the_run_fail(
    sound: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, method: str, fault: Callable[..., np.ndarray]
) -> None:
    path, engine = sound
    monkeypatch.setattr(OrtBackend, method, fault)
    report = verify(engine, path, tokens=8)
    assert not report.passed
    assert any(not check.passed and check.compared for check in report.checks)
    json.dumps(report.to_dict(), allow_nan=False)
    assert "FAILED" in str(report)


# ---- what is refused


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
    with pytest.raises(GateworkError, match="nothing to compare"):
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


@pytest.mark.parametrize("text", ["", "import os\n"])
def test_a_text_too_short_to_judge_by_is_refused(tiny: dict[str, Path], text: str) -> None:
    with pytest.raises(
        GateworkError, match=r"the text is too short to verify with; got \d tokens; expected at least 256"
    ):
        verify(tiny["int8"], TINY, text=text, tokens=2)


def test_a_report_without_bounds_does_not_pass(sound: tuple[Path, Path]) -> None:
    path, engine = sound
    report = verify(engine, path, tokens=2, bounds=Bounds())
    assert report.passed  # the steps have bounds of their own
    assert not replace(report, checks=tuple(check for check in report.checks if check.bound is None)).passed


def test_window_that_no_sequence_reaches_is_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "mistral", num_layers=1, sliding_window=40)
    engine = build_engine(path, tmp_path / "engine", precision="fp32", max_seq=32)
    assert "sliding window of 40" in verify(engine, path, tokens=4).facts["not_covered"]


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

    def prefill(self, slot: int, tokens: list[int], start: int) -> np.ndarray:
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
