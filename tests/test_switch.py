"""Encoder-decoder engines on the CPU against transformers: greedy tokens, logits, batches of prompts of any length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoTokenizer

from gatework import LLM, SamplingParams
from gatework.export.build import build_engine, export_onnx
from gatework.export.checkpoint import Checkpoint
from gatework.export.groups import DEFAULT_GROUPS
from gatework.export.layerwise import LayerwiseReference
from gatework.export.options import BuildOptions
from gatework.export.reference import load_decoder, load_encoder
from gatework.export.sizes import weight_bytes
from gatework.export.steps.compared import Compared
from gatework.export.steps.stack import Stack
from gatework.plugins.errors import GateworkError
from gatework.runtime.backends.ort import OrtBackend
from gatework.runtime.cli import main
from gatework.runtime.engine import Engine
from gatework.runtime.verify import Bounds, compare_engines, verify
from gatework.runtime.verify.junit import to_junit
from tests.switch import Oracle, make_switch
from tests.test_quantized_parity import ROUNDED, round_weights
from tests.tiny_tokenizers import make_t5

RELATIVE = 1e-5  # float32, as in test_parity
PROMPTS = [np.random.default_rng(n).integers(2, 128, n).tolist() for n in (21, 5, 1, 31, 9, 17)]


@pytest.mark.parametrize("target", ["cpu", "onnx"])
@torch.inference_mode()
def test_engine_equals_transformers(tmp_path: Path, target: str, capsys: pytest.CaptureFixture) -> None:
    """Six prompts in three slots, so that rows join, leave and move; logits along targets, row by row and together; text."""
    path = make_t5(make_switch(tmp_path, vocab_size=320))
    if target == "cpu":
        engine = build_engine(path, tmp_path / "engine", precision="fp32", max_seq=32, max_batch=3)
    else:
        engine = export_onnx(path, tmp_path / "engine", max_seq=32)
        for name in ("model.onnx", "encoder.onnx"):
            onnx.checker.check_model(engine / name, full_check=True)
    oracle = Oracle(path)
    found = LLM(engine, max_batch=3).generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0))
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert completion.token_ids == oracle.greedy(prompt, 24)
        assert completion.prompt_token_ids == prompt
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 1 else "length")

    backend = OrtBackend(Engine.open(engine), max_batch=2)
    targets = torch.randint(0, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    want = [
        oracle.decode(torch.tensor([prompt]), torch.tensor([len(prompt)]), targets[row : row + 1])[0].numpy()
        for row, prompt in enumerate(PROMPTS[:2])
    ]
    for row, prompt in enumerate(PROMPTS[:2]):
        backend.encode(row, prompt)
        assert_close(backend.prefill(row, targets[row, :1].tolist(), 0), want[row][0])
    for at in range(1, targets.shape[1]):
        rows = backend.decode(targets[:, at].tolist(), [at, at])
        for row in range(2):
            assert_close(rows[row], want[row][at])

    capsys.readouterr()
    text, tokenizer = "The wrapped <extra_id_0> of lines.", AutoTokenizer.from_pretrained(path)
    assert main(["generate", str(engine), "--prompt", text, "--max-tokens", "12"]) == 0
    tokens = oracle.greedy(tokenizer(text)["input_ids"], 12)
    assert capsys.readouterr().out == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(got - want).max() <= RELATIVE * np.abs(want).max()


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@torch.inference_mode()
def test_verification_passes(tmp_path: Path, precision: str) -> None:
    """Quantised engines also equal the reference with equally rounded weights, as in test_quantized_parity."""
    path = make_switch(tmp_path, tie_word_embeddings=False, expert_capacity=64)
    engine = build_engine(path, tmp_path / "engine", precision=precision, max_seq=32, max_batch=3)
    report = verify(engine, path, tokens=16)
    assert report.passed, str(report)
    assert "random prompt 3 of 32" in str(report)  # as long as the engine takes, whatever is decoded
    both = {"embedding", "key", "value", "context", "attention", "residual", "mlp", "router", "experts", "output"}
    cross = {f"cross_{name}" for name in ("key", "value", "context", "attention", "residual")}
    encoder = {f"encoder.{name}" for name in both | {"norm"}}
    assert {stage.tensor for stage in report.stages} == both | cross | encoder | {"logits"}
    built = json.loads((engine / "manifest.json").read_text())["weight_bytes"]["total"]
    checkpoint = Checkpoint.open(path)
    assert weight_bytes(checkpoint.config, precision) == built  # type: ignore[arg-type]
    if precision == "fp32":
        return
    encoder, decoder = load_encoder(checkpoint), load_decoder(checkpoint, 32, all_logits=True)
    biases = [part.relative_bias for part in (encoder.encoder, decoder)]
    tables = [bias.weight.clone() for bias in biases]  # type: ignore[union-attr]
    for part in (encoder, decoder):
        round_weights(part, int(precision[3:]), DEFAULT_GROUPS[precision])  # type: ignore[arg-type]
    for bias, kept in zip(biases, tables, strict=True):
        bias.weight.data = kept  # type: ignore[union-attr]

    prompt, lengths = torch.tensor([PROMPTS[0]]), torch.tensor([len(PROMPTS[0])])
    backend = OrtBackend(Engine.open(engine), max_batch=1)
    backend.encode(0, PROMPTS[0])
    assert backend._source is not None
    cross = [torch.from_numpy(kept[:, :, : len(PROMPTS[0])].copy()) for kept in backend._source._values.values()]
    for got, want in zip(cross, encoder(prompt, lengths), strict=True):  # of some tokens a router flips
        assert ((got - want).norm(dim=(1, 3)) / want.norm(dim=(1, 3))).median() <= ROUNDED

    targets = torch.randint(0, 128, (1, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16)[None]
    logits, *_ = decoder(
        targets, positions, positions[:, 0], decoder.empty_cache(1), cross=cross, source_lengths=lengths
    )
    rows = np.stack([backend.decode([token], [at])[0].copy() for at, token in enumerate(targets[0].tolist())])
    errors = np.abs(rows - logits[0].numpy()).max(1) / logits.abs().max().item()
    assert np.median(errors) <= ROUNDED, errors


def test_a_stopped_verification_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before every layer: none is run twice, and the report is that of one go."""
    path = make_switch(tmp_path)
    engine = build_engine(path, tmp_path / "engine", precision="int8", max_seq=32)
    want = verify(engine, path, tokens=4)
    layer, seen = LayerwiseReference._layer, list[str]()

    def stopping(self: LayerwiseReference, stack: Stack, i: int) -> Iterator[Compared]:
        seen.append(f"{stack.prefix}{i}")
        if seen.count(seen[-1]) == 1:
            raise KeyboardInterrupt
        return layer(self, stack, i)

    monkeypatch.setattr(LayerwiseReference, "_layer", stopping)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            verify(engine, path, tokens=4, work=tmp_path / "work")
    report = verify(engine, path, tokens=4, work=tmp_path / "work")
    assert seen == [name for name in ("encoder.0", "encoder.1", "0", "1") for _ in range(2)]
    assert report.to_dict() | {"seconds": 0} == want.to_dict() | {"seconds": 0}


def test_another_encoder_is_found(tmp_path: Path) -> None:
    """An engine against its own checkpoint's encoder, and against another's; and against itself."""
    path, other = make_switch(tmp_path), make_switch(tmp_path, seed=1)
    engines = [build_engine(each, tmp_path / f"engine{i}", precision="fp32") for i, each in enumerate((path, other))]
    report = verify(engines[1], path, tokens=8, check_fingerprint=False)
    assert str(report.first_divergence).startswith("encoder embedding, random prompt 1, position 0 (encode)")
    assert "encoder embedding" in to_junit(report.to_dict())
    for pair, differing in ((engines[:1] * 2, 0), (engines, 35)):
        report = compare_engines(*pair, tokens=4, bounds=Bounds(relative=10))
        (check,) = (check for check in report.checks if check.name == "steps that differ")
        assert check.observed == differing


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"target": "cuda", "precision": "fp32"},
            "encoders do not run on this target; got --target cuda; fix: use --target cpu, a100, .* or rtx50",
        ),
        (
            {"target": "cpu", "precision": "fp32", "stages": 2},
            "--stages is for models without an encoder; got a model with one; fix: leave --stages out",
        ),
        (
            {"target": "cpu", "precision": "int4", "calibration_text": Path("text.txt")},
            "got a model with an encoder; fix: leave --calibration-text out",
        ),
        (
            {"target": "a100", "precision": "bf16", "strip_weights": True},
            "--strip-weights is for models without an encoder",
        ),
        (
            {"target": "a100", "precision": "bf16", "taps": True},
            "--taps is for models without an encoder",
        ),
    ],
)
def test_what_an_encoder_cannot_have_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    config = Checkpoint.open(make_switch(tmp_path)).config
    with pytest.raises(GateworkError, match=words):
        BuildOptions(**settings).fitted_to(config)


def test_what_is_for_decoders_alone_says_so(tmp_path: Path) -> None:
    path = make_switch(tmp_path)
    with pytest.raises(GateworkError, match="--golden is for models without an encoder"):
        export_onnx(path, tmp_path / "onnx", golden=tmp_path / "golden")
