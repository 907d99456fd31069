"""The reference decoder against transformers: logits and every layer's hidden state, however it is stepped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gatework.export.decoder import Decoder
from gatework.export.reference import load_decoder
from tests.checkpoints import DENSE_FIRST, EXPERTS_LAST, TABLE, make_checkpoint, odd_sizes, reference_model

# float32, 2 layers: rounding of sums in another order stays below 1e-6; an error of meaning shows at 1e-3 and more.
RELATIVE = 1e-5
CASES = [(model, "plain", {}) for model in TABLE]
CASES += [("qwen2_moe", "dense first", DENSE_FIRST), ("qwen3_moe", "experts last", EXPERTS_LAST)]
CASES += [
    (model, name, sizes)
    for model in ("llama2", "mistral", "mixtral", "dbrx")
    for name, sizes in odd_sizes(model).items()
]


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    error = (got - want).abs().max().item() / want.abs().max().item()
    assert error <= RELATIVE, f"{what}: max |d| / max |x| = {error:.2e}, tolerance {RELATIVE:.0e}"


def run(
    decoder: Decoder, ids: Tensor, starts: list[int], cache: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One step of rows that begin at `starts`; returns all logits, the cache, and each layer's output."""
    hidden: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *call: hidden.append(call[2][0])) for layer in decoder.layers]
    begin = torch.tensor(starts)
    positions = begin[:, None] + torch.arange(ids.shape[1])
    logits, *cache = decoder(ids, positions, begin, cache)
    for hook in hooks:
        hook.remove()
    return logits, cache, hidden


@pytest.mark.parametrize(
    ("model", "sizes", "seed"),
    [(model, sizes, seed) for seed, (model, _, sizes) in enumerate(CASES)],
    ids=[f"{model}-{name}".replace(" ", "_") for model, name, _ in CASES],
)
@torch.inference_mode()
def test_equals_transformers(tmp_path: Path, model: str, sizes: dict[str, int], seed: int) -> None:
    """Prefill of a ragged batch, then cached decode of rows at different positions, past the sliding window."""
    path = make_checkpoint(tmp_path, model, seed=seed, **sizes)
    oracle = reference_model(path)
    decoder = load_decoder(path, max_seq=48, all_logits=True)
    torch.manual_seed(seed)
    lengths, steps = [9, 5], 12
    tokens = torch.randint(0, decoder.config.vocab_size, (2, max(lengths) + steps))
    want = [oracle(tokens[b : b + 1, : n + steps], output_hidden_states=True) for b, n in enumerate(lengths)]

    logits, cache, hidden = run(decoder, tokens[:, : max(lengths)], [0, 0], decoder.empty_cache(2))
    for b, n in enumerate(lengths):
        assert_close(logits[b, :n], want[b].logits[0, :n], f"prefill logits of row {b}")
        for i in range(decoder.config.num_layers - 1):  # transformers' last hidden state is normalised
            assert_close(hidden[i][b, :n], want[b].hidden_states[i + 1][0, :n], f"prefill layer {i} of row {b}")
    for step in range(steps):  # the shorter row overwrites what its padding left in the cache
        at = [n + step for n in lengths]
        ids = torch.stack([tokens[b, at[b] : at[b] + 1] for b in range(2)])
        logits, cache, hidden = run(decoder, ids, at, cache)
        for b in range(2):
            assert_close(logits[b, 0], want[b].logits[0, at[b]], f"decode logits of row {b} at {at[b]}")
            for i in range(decoder.config.num_layers - 1):
                assert_close(hidden[i][b, 0], want[b].hidden_states[i + 1][0, at[b]], f"decode layer {i} of row {b}")


@torch.inference_mode()
def test_chunked_prefill_equals_one_step(tmp_path: Path) -> None:
    decoder = load_decoder(make_checkpoint(tmp_path, "mistral"), max_seq=32, all_logits=True)
    ids = torch.randint(0, 128, (1, 20), generator=torch.Generator().manual_seed(0))
    whole, *_ = run(decoder, ids, [0], decoder.empty_cache(1))
    cache, parts = decoder.empty_cache(1), []
    for start, end in ((0, 7), (7, 8), (8, 20)):
        logits, cache, _ = run(decoder, ids[:, start:end], [start], cache)
        parts.append(logits)
    assert_close(torch.cat(parts, 1), whole, "chunked prefill")


@torch.inference_mode()
def test_last_logits_only(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "mixtral")
    ids = torch.arange(6)[None]
    everything, *_ = run(
        load_decoder(path, max_seq=16, all_logits=True), ids, [0], load_decoder(path, 16).empty_cache(1)
    )
    last, *_ = run(load_decoder(path, max_seq=16), ids, [0], load_decoder(path, 16).empty_cache(1))
    assert last.shape == (1, 1, 128)
    assert_close(last[:, 0], everything[:, -1], "last position")


@torch.inference_mode()
def test_tied_embeddings(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama2", tie_embeddings=True)
    decoder, oracle = load_decoder(path, max_seq=16, all_logits=True), reference_model(path)
    assert not hasattr(decoder, "lm_head")
    ids = torch.arange(8)[None]
    logits, *_ = run(decoder, ids, [0], decoder.empty_cache(1))
    assert_close(logits, oracle(ids).logits, "tied head")
