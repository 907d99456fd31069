"""The reference encoder and decoder against transformers: with and without dropped tokens, in one step and with caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gatework.export.checkpoint import Checkpoint
from gatework.export.reference import load_decoder, load_encoder
from tests.export.test_decoder import assert_close
from tests.switch import Oracle, make_switch

LENGTHS = torch.tensor([24, 13])  # past the distance from which all share a bucket
STEPS = 20


@pytest.mark.parametrize(
    ("sizes", "oracle_sizes"),
    [
        ({}, {}),  # capacity 3: tokens are dropped in encoder and decoder
        ({"expert_capacity": 64}, {}),  # none is, there are fewer
        ({"expert_capacity": 0}, {"expert_capacity": 1000}),  # none ever is
        ({"num_sparse_encoder_layers": 3, "num_layers": 3, "num_sparse_decoder_layers": 2}, {}),  # experts everywhere
        ({"tie_word_embeddings": False, "d_kv": 24, "relative_attention_num_buckets": 6}, {}),
    ],
    ids=["drops", "no_drops", "dropless", "every_layer", "untied"],
)
@torch.inference_mode()
def test_equals_transformers(tmp_path: Path, sizes: dict[str, Any], oracle_sizes: dict[str, Any]) -> None:
    path = make_switch(tmp_path, **sizes)
    oracle, checkpoint = Oracle(path, **oracle_sizes), Checkpoint.open(path)
    encoder, decoder = load_encoder(checkpoint), load_decoder(checkpoint, 32, all_logits=True)
    torch.manual_seed(0)
    ids, targets = torch.randint(0, 128, (2, int(LENGTHS[0]))), torch.randint(0, 128, (2, STEPS))
    hidden, logits = oracle.run(ids, LENGTHS, targets)

    found = encoder.hidden(ids, LENGTHS)
    for row, length in enumerate(LENGTHS):
        assert_close(found[row, :length], hidden[row, :length], f"encoder, row {row}")
    source: dict[str, Any] = {"cross": encoder(ids, LENGTHS), "source_lengths": LENGTHS}
    positions, starts = torch.arange(STEPS).expand(2, -1), torch.zeros(2, dtype=torch.int64)
    got, *_ = decoder(targets, positions, starts, decoder.empty_cache(2), **source)
    assert_close(got, logits, "prefill")

    stepped, cache = oracle.decode(ids, LENGTHS, targets), decoder.empty_cache(2)
    for at in range(STEPS):
        got, *cache = decoder(targets[:, at : at + 1], positions[:, at : at + 1], starts + at, cache, **source)
        assert_close(got[:, 0], stepped[:, at], f"decode at {at}")
    dropped = (stepped - logits).abs().max() > 1e-2  # one step of all targets has experts that are full
    assert dropped == (not sizes or "tie_word_embeddings" in sizes or "num_layers" in sizes)
