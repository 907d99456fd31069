"""The reference: a checkpoint in PyTorch, for engines to be judged by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gatework.export.checkpoint import Checkpoint
from gatework.export.config import ModelConfig
from gatework.export.decoder import Decoder
from gatework.export.encoder import Encoder
from gatework.export.positions import RelativeBias, rope_tables
from gatework.plugins.errors import GateworkError

_CHUNK = 512  # prompt tokens run at once


def load_decoder(
    source: str | os.PathLike[str] | Checkpoint,
    max_seq: int,
    *,
    dtype: torch.dtype = torch.float32,
    all_logits: bool = False,
) -> Decoder:
    """The decoder of a checkpoint, its weights read one by one, so that memory holds them once.

    Args:
        max_seq: S_max, positions in the cache.
        dtype: of weights and activations.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(os.fspath(source))
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config, max_seq, all_logits=all_logits).eval()
    load_weights(decoder, checkpoint, dtype=dtype)
    decoder.rope_cos, decoder.rope_sin = rope_tables(checkpoint.config, max_seq)
    if decoder.relative_bias is not None:
        decoder.relative_bias.fill()
    return decoder


def load_encoder(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> Encoder:
    """The encoder of a checkpoint that has one; see `load_decoder`."""
    with torch.device("meta"):
        encoder = Encoder(checkpoint.config).eval()
    load_weights(encoder, checkpoint, dtype=dtype)
    encoder.encoder.relative_bias.fill()
    return encoder


def load_weights(
    module: nn.Module, checkpoint: Checkpoint, prefix: str = "", *, dtype: torch.dtype = torch.float32
) -> None:
    """Read the weights of a decoder, or of a part of it, that was made on the meta device.

    Args:
        prefix: what precedes the module's own names in the canonical ones, such as "layers.3.".
        dtype: of the weights in memory.
    """
    for name in [name for name, _ in module.named_parameters()]:
        owner, _, attribute = name.rpartition(".")
        weight = checkpoint.read(prefix + name).to(dtype)
        setattr(module.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))


def load_bias(checkpoint: Checkpoint, stack: str, *, both_sides: bool) -> RelativeBias:
    """What all layers of the decoder, or of the `stack` "encoder.", add to their scores."""
    with torch.device("meta"):
        bias = RelativeBias(checkpoint.config, both_sides=both_sides).eval()
    load_weights(bias, checkpoint, f"{stack}relative_bias.")
    bias.fill()
    return bias


@dataclass(frozen=True, slots=True)
class Reference:
    """A checkpoint's decoder, asked one sequence at a time."""

    decoder: Decoder

    @classmethod
    def load(
        cls, source: str | os.PathLike[str] | Checkpoint, max_seq: int, dtype: torch.dtype = torch.float32
    ) -> Reference:
        """Read a checkpoint whose sequences are to have at most `max_seq` positions."""
        return cls(load_decoder(source, max_seq, dtype=dtype, all_logits=True))

    @property
    def config(self) -> ModelConfig:
        """The model's description."""
        return self.decoder.config

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits [S, V] float32 of every position of a sequence [S], which starts from an empty cache."""
        return self._prefill(token_ids)[0].numpy()

    @torch.inference_mode()
    def greedy(self, prompt_ids: Sequence[int], n: int) -> list[int]:
        """The n tokens that follow a prompt, each the most likely one (the lowest among equals), decoded with the cache."""
        assert n >= 1, n
        self._check_room(len(prompt_ids) + n - 1)
        logits, cache = self._prefill(prompt_ids)
        tokens = [int(logits[-1].argmax())]
        while len(tokens) < n:
            step, cache = self._step(tokens[-1:], len(prompt_ids) + len(tokens) - 1, cache, len(prompt_ids))
            tokens.append(int(step[-1].argmax()))
        return tokens

    def _prefill(self, token_ids: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Logits [S, V] of a prompt, and the cache after it."""
        if not len(token_ids):
            raise GateworkError("the sequence is empty", expected="at least one token")
        self._check_room(len(token_ids))
        cache, parts = self.decoder.empty_cache(1), []
        for start in range(0, len(token_ids), _CHUNK):
            logits, cache = self._step(token_ids[start : start + _CHUNK], start, cache, len(token_ids))
            parts.append(logits)
        return torch.cat(parts), cache

    def _step(
        self, token_ids: Sequence[int], start: int, cache: list[Tensor], prompt: int
    ) -> tuple[Tensor, list[Tensor]]:
        ids = torch.tensor([list(token_ids)])  # [1, S]
        positions = torch.arange(start, start + ids.shape[1])[None]
        logits, *cache = self.decoder(ids, positions, positions[:, 0], cache, torch.tensor([prompt]))
        return logits[0], cache

    def _check_room(self, positions: int) -> None:
        if positions > self.decoder.max_seq:
            raise GateworkError(
                "the sequence is too long for the reference", got=positions, expected=f"at most {self.decoder.max_seq}"
            )
