"""The reference as a whole: loaded from any dtype, asked for logits and greedy tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gatework.export import reference
from gatework.export.checkpoint import Checkpoint
from gatework.export.reference import Reference
from gatework.plugins.errors import GateworkError
from tests.checkpoints import make_checkpoint, reference_model


@torch.inference_mode()
def test_logits_and_greedy_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers, with prompts that come in several chunks."""
    monkeypatch.setattr(reference, "_CHUNK", 4)
    path = make_checkpoint(tmp_path, "mistral")
    ours, oracle = Reference.load(path, max_seq=40), reference_model(path)
    prompt = np.random.default_rng(0).integers(0, 128, 11).tolist()
    tokens = ours.greedy(prompt, 20)
    want = oracle(torch.tensor([prompt + tokens])).logits[0]
    assert tokens == want[len(prompt) - 1 : -1].argmax(-1).tolist()
    got = ours.logits(prompt + tokens)
    assert got.shape == (31, 128)
    assert got.dtype == np.float32
    # float32 sums in another order, see test_decoder.py
    assert np.abs(got - want.numpy()).max() / want.abs().max().item() <= 1e-5


def test_weights_are_those_of_the_checkpoint_in_the_dtype_asked_for(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "dbrx", dtype=torch.bfloat16))
    for dtype in (torch.float32, torch.bfloat16):
        state = Reference.load(checkpoint, 8, dtype).decoder.state_dict()
        assert state.keys() == checkpoint.weights.keys()
        for name, tensor in state.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, checkpoint.read(name).to(dtype)), name


def test_sequences_that_do_not_fit(tmp_path: Path) -> None:
    ours = Reference.load(make_checkpoint(tmp_path, "llama2", num_layers=1), max_seq=8)
    assert len(ours.greedy([1] * 8, 1)) == 1
    with pytest.raises(GateworkError, match="empty"):
        ours.logits([])
    with pytest.raises(GateworkError, match="got 9; expected at most 8"):
        ours.logits([1] * 9)
    with pytest.raises(GateworkError, match="got 9; expected at most 8"):
        ours.greedy([1] * 8, 2)
