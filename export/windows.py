"""A text on its way through a checkpoint's layers, in windows, with one layer in memory at a time.

Memory holds the float32 weights of a layer, read when its turn comes, and the hidden states of all windows; so the largest
model that a machine can take a text through is the one whose layer it can hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from gatework.export import encoder
from gatework.export.checkpoint import Checkpoint
from gatework.export.config import ModelConfig
from gatework.export.decoder import Layer, Step, scaled
from gatework.export.positions import RelativeBias, rope_tables
from gatework.export.reference import load_bias, load_weights
from gatework.plugins.errors import GateworkError

WINDOW = 512

# Weights whose products share an input, in each half of a layer, or in a parallel one; the norm before makes the first one.
Groups: TypeAlias = tuple[tuple[str, ...], ...]
_ATTENTION: Groups = (("attn.q.weight", "attn.k.weight", "attn.v.weight"), ("attn.o.weight",))
_CROSS: Groups = (("cross.q.weight",), ("cross.o.weight",))
_MLP: Groups = (("mlp.w_in",), ("mlp.w_out",))
_SHARED: Groups = (("moe.shared.w_in",), ("moe.shared.w_out",))
_PARALLEL: Groups = ((*_ATTENTION[0], *_MLP[0]), _ATTENTION[1], _MLP[1])
_EXTRA: Groups = (("extra_mlp.w_in",), ("extra_mlp.w_out",))


@dataclass(slots=True)
class Window:
    """Tokens that run together, from an empty cache, and their prompt on its way through the encoder, or its output."""

    hidden: Tensor  # [1, S, D] float32
    step: Step
    encoded: Tensor | None = None  # [1, L, D] float32


def window_size(config: ModelConfig, token_ids: Sequence[int], window: int | None = None) -> int:
    """Tokens per window: `window`, or 512, or the model's context where that is shorter.

    Raises GateworkError for a text that is too short or has ids that are out of range, and a window that is.
    """
    if len(token_ids) < 2:
        raise GateworkError("the text is too short", got=f"{len(token_ids)} tokens", expected="at least 2")
    bad = next((token for token in token_ids if not 0 <= token < config.vocab_size), None)
    if bad is not None:
        raise GateworkError("a token id is out of range", got=bad, expected=f"0 to {config.vocab_size - 1}")
    window = min(WINDOW, config.max_position_embeddings) if window is None else window
    if not 2 <= window <= config.max_position_embeddings:
        expected = f"2 to {config.max_position_embeddings}, the model's context"
        raise GateworkError("--window is out of range", got=window, expected=expected)
    return window


def embedded_windows(checkpoint: Checkpoint, token_ids: Sequence[int], size: int) -> list[Window]:
    """The text, embedded, in consecutive windows; only the rows that it needs stay in memory.

    An encoder reads the first half of each, and the decoder behind it goes along the second.
    """
    config = checkpoint.config
    parts = torch.tensor(token_ids).split(size)
    prompts: list[Tensor | None] = [None] * len(parts)
    if config.start_token_id is not None:
        start, halves = torch.tensor([config.start_token_id]), [part.tensor_split(2) for part in parts]
        prompts, parts = [first for first, _ in halves], tuple(torch.cat((start, second)) for _, second in halves)
    positions = {len(part): torch.arange(len(part))[None] for part in parts}  # [1, S]; the last part may be shorter
    bias = None if config.relative_buckets is None else load_bias(checkpoint, "", both_sides=False)
    steps = {S: _step(config, at, bias) for S, at in positions.items()}
    table = checkpoint.read("embed.weight")  # [V, D]

    def embedded(ids: Tensor) -> Tensor:
        return scaled(table[ids][None].float(), config.embed_multiplier)

    return [
        Window(embedded(part), steps[len(part)], None if prompt is None else embedded(prompt))
        for part, prompt in zip(parts, prompts, strict=True)
    ]


def _step(config: ModelConfig, positions: Tensor, bias: RelativeBias | None) -> Step:
    """Of one sequence, positions [1, S]."""
    S = positions.shape[1]
    tables, lengths = rope_tables(config, S), torch.tensor([[S]])
    return Step(config, positions, positions[:, 0], S, *tables, prompt_lengths=lengths, relative_bias=bias)


class WindowRun(ABC):
    """The windows' way through one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, windows: list[Window]) -> None:
        self.checkpoint, self.windows = checkpoint, windows

    @property
    def config(self) -> ModelConfig:
        """Behind an encoder a decoder takes one token a step, so that no expert of it is ever full."""
        return replace(self.checkpoint.config, sequence_capacity=0)

    def layer(self, i: int) -> Layer:
        """Take every window through layer i, and return it."""
        config, prefix = self.config, f"layers.{i}."
        with torch.device("meta"):
            layer = Layer(config, i).eval()
        load_weights(layer, self.checkpoint, prefix)

        def attend(window: Window) -> Tensor:
            empty = torch.zeros(1, config.num_kv_heads, window.hidden.shape[1], config.head_dim)
            return layer.attend(window.hidden, window.step, empty, empty)[0]

        if config.parallel:
            self.part(layer, prefix, "attn_norm", _PARALLEL, lambda each: layer.feed_forward(attend(each), each.hidden))
            return layer
        self.part(layer, prefix, "attn_norm", _ATTENTION, attend)
        if layer.has_cross:
            self.part(layer, prefix, "cross_norm", _CROSS, self._attend_source(layer, prefix))
        groups = (_SHARED if config.has_shared(i) else ()) if config.has_experts(i) else _MLP
        self.part(layer, prefix, "ffn_norm", groups, lambda each: layer.feed_forward(each.hidden, each.hidden))
        if layer.has_extra:
            self.part(layer, prefix, "extra_norm", _EXTRA, lambda each: layer.extra(each.hidden))
        return layer

    def encoder_layer(self, i: int, bias: RelativeBias) -> None:
        """Take every window, of a prompt now, through layer i of the encoder."""
        config, prefix = self.checkpoint.config.encoder, f"encoder.layers.{i}."
        assert config is not None
        with torch.device("meta"):
            layer = Layer(config, i).eval()
        load_weights(layer, self.checkpoint, prefix)

        def attend(window: Window) -> Tensor:
            positions = torch.arange(window.hidden.shape[1])
            return encoder.attend(layer, window.hidden, bias(positions[None], positions))

        self.part(layer, prefix, "attn_norm", _ATTENTION, attend)
        groups = () if config.has_experts(i) else _MLP
        self.part(layer, prefix, "ffn_norm", groups, lambda each: layer.feed_forward(each.hidden, each.hidden))

    def _attend_source(self, layer: Layer, prefix: str) -> Callable[[Window], Tensor]:
        """What takes a window through a layer's attention to the encoder's output."""
        with torch.device("meta"):
            source = encoder.SourceKeys(self.config).eval()
        load_weights(source, self.checkpoint, f"{prefix}cross.")

        def attend(window: Window) -> Tensor:
            assert window.encoded is not None
            k, v = source(window.encoded)
            seen = torch.ones(1, 1, window.hidden.shape[1], k.shape[2], dtype=torch.bool)
            return window.hidden + layer.cross(layer.cross_norm(window.hidden), k, v, seen)

        return attend

    @abstractmethod
    def part(self, layer: Layer, prefix: str, first: str, groups: Groups, run: Callable[[Window], Tensor]) -> None:
        """Take every window through a part of a layer, which begins with the norm `first`: `run` gives its hidden states after.

        groups: the dense products in it, by the names of their weights.
        """
