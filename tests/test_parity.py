"""The gate: float32 CPU engines against transformers, for every family and odd size.

The same 64 greedy tokens, and logits within 1e-5 of the largest one, in prefill, chunked prefill and batched decode.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gatework import LLM, SamplingParams
from gatework.export.build import build_engine
from gatework.runtime.backends.ort import OrtBackend
from gatework.runtime.engine import Engine
from tests.checkpoints import DENSE_FIRST, EXPERTS_LAST, TABLE, make_checkpoint, odd_sizes, reference_model
from tests.originals import ORIGINALS

# float32 sums of a few hundred terms in another order: 1e-6; an error of meaning shows at 1e-3 and more
RELATIVE = 1e-5
NEW_TOKENS = 64
CASES = [(model, "plain", seed, {}) for model in TABLE for seed in (0, 1, 2)]
CASES += [(model, "plain", 0, {}) for model in ORIGINALS]
CASES += [("qwen2_moe", "dense first", 0, DENSE_FIRST), ("qwen3_moe", "experts last", 0, EXPERTS_LAST)]
CASES += [
    (model, name, seed, sizes)
    for model in ("llama2", "mistral", "mixtral", "dbrx")
    for seed, (name, sizes) in enumerate(odd_sizes(model).items())
]


@pytest.mark.parametrize(
    ("model", "seed", "sizes"),
    [(model, seed, sizes) for model, _, seed, sizes in CASES],
    ids=[f"{model}-{name}-{seed}".replace(" ", "_") for model, name, seed, _ in CASES],
)
@torch.inference_mode()
def test_engine_equals_transformers(tmp_path: Path, model: str, seed: int, sizes: dict[str, int]) -> None:
    path = make_checkpoint(tmp_path, model, seed=seed, max_position_embeddings=96, **sizes)
    oracle = reference_model(path)
    engine = build_engine(path, tmp_path / "engine", precision="fp32", max_batch=2, prefill_chunk=8)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, oracle.config.vocab_size, n).tolist() for n in (13, 5)]

    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    completions = LLM(engine).generate(prompts, params)
    sequences = []
    for prompt, completion in zip(prompts, completions, strict=True):
        sequence = prompt + completion.token_ids
        logits = oracle(torch.tensor([sequence])).logits[0]
        # greedy means: each token is the best one after those before it, so one pass over the sequence judges all 64
        want = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert completion.token_ids == want
        sequences.append((sequence, logits.numpy()))
    check_logits(OrtBackend(Engine.open(engine), max_batch=2), prompts, sequences)


@torch.inference_mode()
def test_alibi_goes_past_the_models_own_context(tmp_path: Path) -> None:
    """The oracle is the same model with a longer table."""
    path = make_checkpoint(tmp_path, "mpt-clip", max_position_embeddings=16)
    engine = build_engine(path, tmp_path / "engine", precision="fp32", max_seq=80, max_batch=2, prefill_chunk=8)
    oracle = reference_model(path)
    oracle.config.max_seq_len = 80
    tokens = np.random.default_rng(0).integers(0, 128, 72).tolist()
    sequence = (tokens, oracle(torch.tensor([tokens])).logits[0].numpy())
    check_logits(OrtBackend(Engine.open(engine), max_batch=2), [tokens[:8], tokens[:5]], [sequence, sequence])


def check_logits(backend: OrtBackend, prompts: list[list[int]], sequences: list[tuple[list[int], np.ndarray]]) -> None:
    """Teacher-forced: prefill in chunks, then decode both rows together, comparing the logits of every step."""
    for slot, prompt in enumerate(prompts):
        for start in range(0, len(prompt), 8):
            chunk = prompt[start : start + 8]
            got = backend.prefill(slot, chunk, start)
            assert_close(
                got, sequences[slot][1][start + len(chunk) - 1], f"prefill of row {slot} to {start + len(chunk)}"
            )
    for step in range(NEW_TOKENS - 1):
        at = [len(prompt) + step for prompt in prompts]
        rows = backend.decode([sequences[row][0][at[row]] for row in range(2)], at)
        for row in range(2):
            assert_close(rows[row], sequences[row][1][at[row]], f"decode of row {row} at {at[row]}")


def assert_close(got: np.ndarray, want: np.ndarray, what: str) -> None:
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= RELATIVE, f"{what}: max |d| / max |logit| is {error:.2e}, tolerance {RELATIVE:.0e}"
