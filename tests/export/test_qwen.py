"""Qwen's first generation against its own code, by golden vectors (tests/golden/qwen), and against Qwen2 where they agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

from gatework import LLM, SamplingParams
from gatework.export.build import build_engine, export_onnx
from gatework.export.calibrate import calibrate
from gatework.export.reference import Reference, load_decoder
from gatework.plugins.errors import GateworkError
from gatework.runtime.backends.ort import OrtBackend
from gatework.runtime.engine import Engine
from gatework.runtime.verify import verify
from tests.checkpoints import make_checkpoint, reference_model

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen"
TRAINED, PROMPTS = 16, (12, 20, 40)
RELATIVE = 1e-5  # float32, sums in another order; the wrong base or no scaling of queries shows at 1e-1


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "logits.npz"))


@pytest.fixture(scope="module", params=["cpu", "onnx"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("qwen") / "engine"
    if request.param == "onnx":
        return export_onnx(GOLDEN, out, max_seq=48)
    return build_engine(GOLDEN, out, precision="fp32", max_seq=48, max_batch=2, prefill_chunk=8)


def assert_close(got: np.ndarray, want: np.ndarray, what: str) -> None:
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= RELATIVE, f"{what}: max |d| / max |x| = {error:.2e}, tolerance {RELATIVE:.0e}"


def test_the_cases_differ(golden: dict[str, np.ndarray]) -> None:
    """Each prompt length has a rotary base of its own, and a tolerance that would not tell them apart is none."""
    for one, other in ((12, 20), (20, 40), (12, 40)):
        error = np.abs(golden[f"prompt_{one}"] - golden[f"prompt_{other}"])[TRAINED:].max()
        assert error > 1e3 * RELATIVE * np.abs(golden[f"prompt_{one}"]).max()


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.inference_mode()
def test_reference_equals_the_original(golden: dict[str, np.ndarray], prompt: int) -> None:
    decoder, lengths = load_decoder(GOLDEN, 48, all_logits=True), torch.tensor([prompt])
    tokens = torch.from_numpy(golden["tokens"])
    cache, parts = decoder.empty_cache(1), []
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, 40))]:
        positions = torch.arange(start, stop)[None]
        logits, *cache = decoder(tokens[None, start:stop], positions, positions[:, 0], cache, lengths)
        parts.append(logits[0].numpy())
    assert_close(np.concatenate(parts), golden[f"prompt_{prompt}"], f"prompt of {prompt}")


@pytest.mark.parametrize(("long", "short"), [(40, 12), (20, 12)])
def test_engine_equals_the_original(engine: Path, golden: dict[str, np.ndarray], long: int, short: int) -> None:
    """Prefill in chunks that do not tell the length, rows of two bases in one batch, and a row that changes its slot."""
    backend, tokens = OrtBackend(Engine.open(engine), max_batch=2), golden["tokens"].tolist()
    at = []
    for slot, prompt in enumerate((long, short)):
        for start in range(0, prompt, 8):
            chunk = tokens[start : min(start + 8, prompt)]
            got = backend.prefill(slot, chunk, start, prompt)
            assert_close(got, golden[f"prompt_{prompt}"][start + len(chunk) - 1], f"prefill of {prompt}")
        at.append(prompt)
    while at[0] < len(tokens):
        rows = backend.decode([tokens[i] for i in at], at)
        for prompt, position, row in zip((long, short), at, rows, strict=True):
            assert_close(row, golden[f"prompt_{prompt}"][position], f"decode at {position} after {prompt}")
        at = [position + 1 for position in at]
    backend.move(1, 0, at[1])
    for position in range(at[1], len(tokens)):
        row = backend.decode([tokens[position]], [position])[0]
        assert_close(row, golden[f"prompt_{short}"][position], f"decode at {position}, moved")


def test_generation_and_verification(engine: Path, golden: dict[str, np.ndarray]) -> None:
    prompts = [golden["tokens"][:n].tolist() for n in (20, 5, 33)]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    reference = Reference.load(GOLDEN, 48)
    for prompt, completion in zip(prompts, LLM(engine).generate(prompts, params), strict=True):
        assert completion.token_ids == reference.greedy(prompt, 12)
    report = verify(engine, GOLDEN, tokens=8)
    assert report.passed, report.summary


@torch.inference_mode()
def test_up_to_the_trained_length_it_is_qwen2(tmp_path: Path) -> None:
    """The weights of a Qwen2 model under Qwen's names; an engine that is no longer than that has no dynamic NTK."""
    path = make_checkpoint(tmp_path, "qwen2", num_kv_heads=4, max_position_embeddings=TRAINED)
    config = json.loads((GOLDEN / "config.json").read_text())
    config |= {"vocab_size": 128, "rotary_emb_base": 10000, "seq_length": TRAINED, "max_position_embeddings": TRAINED}
    other = tmp_path / "qwen"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    save_file(as_qwen(load_file(path / "model.safetensors")), other / "model.safetensors")
    tokens = np.random.default_rng(0).integers(0, 128, TRAINED).tolist()
    want = reference_model(path)(torch.tensor([tokens])).logits[0].numpy()
    assert_close(Reference.load(other, TRAINED).logits(tokens), want, "reference")
    engine = build_engine(other, tmp_path / "engine", precision="fp32")
    inputs = {value.name for value in ort.InferenceSession(engine / "model.onnx").get_inputs()}
    assert "prompt_lengths" not in inputs
    assert_close(OrtBackend(Engine.open(engine), max_batch=1).prefill(0, tokens, 0), want[-1], "engine")


def as_qwen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "model.layers": "transformer.h"}
    names |= {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj"}
    names |= {"mlp.gate_proj": "mlp.w2", "mlp.up_proj": "mlp.w1", "mlp.down_proj": "mlp.c_proj"}
    found: dict[str, torch.Tensor] = {}
    for name in tensors:
        parts = (
            [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"] if "q_proj" in name else [tensors[name]]
        )
        for theirs, ours in (names | {"self_attn.q_proj": "attn.c_attn"}).items():
            name = name.replace(theirs, ours)
        if "k_proj" not in name and "v_proj" not in name:
            found[name] = torch.cat(parts)
    return found


def test_calibration_takes_windows_beyond_the_trained_length(golden: dict[str, np.ndarray]) -> None:
    """Range of the head's input, from the reference's own run of one long window."""
    found = calibrate(GOLDEN, golden["tokens"].tolist(), window=40)
    inputs: list[torch.Tensor] = []
    reference = Reference.load(GOLDEN, 48)
    reference.decoder.norm.register_forward_hook(lambda *call: inputs.append(call[2]))
    reference.logits(golden["tokens"].tolist())
    assert found.ranges["lm_head.weight"].absmax == pytest.approx(inputs[0].abs().max().item(), rel=RELATIVE)


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        ("cuda", "bf16", r"dynamic NTK has not been tried on this target; .* fix: --max-seq 16, or --target cpu"),
        ("a100", "bf16", r"plans have no dynamic NTK, .*; got a context of 64; fix: --max-seq 16, or --target cpu"),
    ],
)
def test_longer_engines_for_gpus_are_refused(tmp_path: Path, target: str, precision: str, message: str) -> None:
    if target == "a100":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: its refusal is not seen")
    with pytest.raises(GateworkError, match=message):
        build_engine(GOLDEN, tmp_path / "engine", target=target, precision=precision)
    assert not (tmp_path / "engine").exists()
