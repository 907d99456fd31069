"""The reference decoder against models that transformers does not have: logits by their authors' own code (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from gatework.export.checkpoint import Checkpoint
from gatework.export.reference import load_decoder
from tests.export.test_decoder import assert_close, run
from tests.golden.grok1 import weights as grok1
from tests.golden.openmoe import weights as openmoe

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens [S] and logits [S, V] of two sequences, the longer one first."""
    with np.load(GOLDEN / name / "logits.npz") as file:
        return [(torch.from_numpy(file[f"tokens_{i}"]), torch.from_numpy(file[f"logits_{i}"])) for i in range(2)]


def make(name: str, folder: Path) -> Path:
    if name == "grok1":
        return grok1.write_ckpt(folder / name, grok1.tensors())
    config, tensors = openmoe.make()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["grok1", "openmoe"])
@torch.inference_mode()
def test_equals_the_original(tmp_path: Path, name: str) -> None:
    """Prefill of a ragged batch, then cached decode of rows at different positions."""
    (long, want), (short, want_short) = golden(name)
    decoder = load_decoder(make(name, tmp_path), max_seq=32, all_logits=True)
    ids = torch.stack([long[:8], torch.cat([short[:5], long[:3]])])  # the second row's padding is overwritten later
    logits, cache, _ = run(decoder, ids, [0, 0], decoder.empty_cache(2))
    assert_close(logits[0], want[:8], "prefill of the long row")
    assert_close(logits[1, :5], want_short[:5], "prefill of the short row")
    for step in range(4):
        at = [8 + step, 5 + step]
        logits, cache, _ = run(decoder, torch.stack([long[at[0], None], short[at[1], None]]), at, cache)
        assert_close(logits[0, 0], want[at[0]], f"decode at {at[0]}")
        assert_close(logits[1, 0], want_short[at[1]], f"decode at {at[1]}")
    whole, *_ = run(decoder, long[None], [0], decoder.empty_cache(1))
    assert_close(whole[0], want, "prefill at once")


@torch.inference_mode()
def test_openmoe_drops_as_the_port_does(tmp_path: Path) -> None:
    """With the released capacity some experts are full: in a step of 24 tokens, and in steps of one token of each row."""
    (tokens, kept), _ = golden("openmoe")
    with np.load(GOLDEN / "openmoe" / "logits.npz") as file:
        want, batch, together = (
            torch.from_numpy(file[f"{name}"]) for name in ("dropped_0", "tokens_batch", "dropped_batch")
        )
    assert (want - kept).abs().max() > 0.02 * kept.abs().max()
    checkpoint = Checkpoint.open(make("openmoe", tmp_path), drop_tokens=True)
    assert (checkpoint.config.expert_capacity, checkpoint.config.min_expert_capacity) == (2.0, 4)
    decoder = load_decoder(checkpoint, max_seq=32, all_logits=True)
    logits, *_ = run(decoder, tokens[None], [0], decoder.empty_cache(1))
    assert_close(logits[0], want, "prefill at once")
    rows, length = batch.shape
    logits, cache, _ = run(decoder, batch[:, :4], [0] * rows, decoder.empty_cache(rows))
    assert_close(logits, together[:, :4], "prefill of all rows")
    for at in range(4, length):
        logits, cache, _ = run(decoder, batch[:, at, None], [at] * rows, cache)
        assert_close(logits[:, 0], together[:, at], f"decode at {at}")
