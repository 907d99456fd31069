"""A text on its way through a checkpoint's layers, in windows, with one layer in memory at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from gatework.export.checkpoint import Checkpoint
from gatework.export.config import ModelConfig
from gatework.export.decoder import Layer, Step, scaled
from gatework.export.positions import rope_tables
from gatework.export.reference import load_weights
from gatework.plugins.errors import GateworkError

WINDOW = 512

# Weights whose products share an input, in each half of a layer, or in a parallel one; the norm before makes the first one.
Groups: TypeAlias = tuple[tuple[str, ...], ...]
_ATTENTION: Groups = (("attn.q.weight", "attn.k.weight", "attn.v.weight"), ("attn.o.weight",))
_MLP: Groups = (("mlp.w_in",), ("mlp.w_out",))
_SHARED: Groups = (("moe.shared.w_in",), ("moe.shared.w_out",))
_PARALLEL: Groups = ((*_ATTENTION[0], *_MLP[0]), _ATTENTION[1], _MLP[1])
_EXTRA: Groups = (("extra_mlp.w_in",), ("extra_mlp.w_out",))


@dataclass(slots=True)
class Window:
    """Tokens that run together, from an empty cache."""

    hidden: Tensor  # [1, S, D] float32
    step: Step


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
        raise GateworkError("window is out of range", got=window, expected=expected)
    return window


def embedded_windows(checkpoint: Checkpoint, token_ids: Sequence[int], size: int) -> list[Window]:
    """The text, embedded; only the rows that it needs stay in memory."""
    config = checkpoint.config
    parts = torch.tensor(token_ids).split(size)
    positions = {len(part): torch.arange(len(part))[None] for part in parts}  # [1, S]; the last part may be shorter
    steps = {S: _step(config, at) for S, at in positions.items()}
    table = checkpoint.read("embed.weight")  # [V, D]
    multiplier = config.embed_multiplier
    return [Window(scaled(table[part][None].float(), multiplier), steps[len(part)]) for part in parts]


def _step(config: ModelConfig, positions: Tensor) -> Step:
    """Of one sequence, positions [1, S]."""
    S = positions.shape[1]
    tables, lengths = rope_tables(config, S), torch.tensor([[S]])
    return Step(config, positions, positions[:, 0], S, *tables, prompt_lengths=lengths)


class WindowRun(ABC):
    """The windows' way through one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, windows: list[Window]) -> None:
        self.checkpoint, self.windows = checkpoint, windows

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

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
        groups = (_SHARED if config.has_shared(i) else ()) if config.has_experts(i) else _MLP
        self.part(layer, prefix, "ffn_norm", groups, lambda each: layer.feed_forward(each.hidden, each.hidden))
        if layer.has_extra:
            self.part(layer, prefix, "extra_norm", _EXTRA, lambda each: layer.extra(each.hidden))
        return layer

    @abstractmethod
    def part(self, layer: Layer, prefix: str, first: str, groups: Groups, run: Callable[[Window], Tensor]) -> None:
        """Let `run` take every window through a part of a layer, which begins with the norm `first`.

        groups: the dense products in it, by the names of their weights.
        """
