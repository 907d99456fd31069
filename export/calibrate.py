"""Calibrating: a text goes through the reference decoder layer by layer, and the inputs of its dense products are measured.

Memory holds the float32 weights of one layer, read when its turn comes, and the hidden states of all windows; so the
largest model that a machine can calibrate is the one whose layer it can hold.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gatework.export import encoder
from gatework.export.calibration import Calibration, Range, check_range
from gatework.export.checkpoint import Checkpoint
from gatework.export.config import ModelConfig
from gatework.export.decoder import Layer, Step, norm, scaled
from gatework.export.positions import RelativeBias, rope_tables
from gatework.export.recorder import Recorder, Tracker
from gatework.export.reference import load_bias, load_weights
from gatework.export.smoothing import balanced_products, column_absmax, smoothing_factors
from gatework.plugins.errors import GateworkError

WINDOW = 512
PERCENTILE = 99.99
_TOOLS = ("gatework", "torch")

# Weights whose products share an input, in each half of a layer, or in a parallel one; the norm before makes the first one.
_Groups: TypeAlias = tuple[tuple[str, ...], ...]
_ATTENTION: _Groups = (("attn.q.weight", "attn.k.weight", "attn.v.weight"), ("attn.o.weight",))
_CROSS: _Groups = (("cross.q.weight",), ("cross.o.weight",))
_MLP: _Groups = (("mlp.w_in",), ("mlp.w_out",))
_SHARED: _Groups = (("moe.shared.w_in",), ("moe.shared.w_out",))
_PARALLEL: _Groups = ((*_ATTENTION[0], *_MLP[0]), _ATTENTION[1], _MLP[1])
_EXTRA: _Groups = (("extra_mlp.w_in",), ("extra_mlp.w_out",))


def calibrate(
    source: str | os.PathLike[str] | Checkpoint,
    token_ids: Sequence[int],
    *,
    window: int | None = None,
    smooth: float | None = None,
    percentile: float = PERCENTILE,
    text_sha256: str | None = None,
    progress: bool = False,
) -> Calibration:
    """Measure the activations of a checkpoint in float32 over a text.

    The text is cut into consecutive windows, and each runs alone, from an empty cache. An encoder reads the first half of
    each, and the decoder behind it goes along the second.

    Args:
        token_ids: the text, at least two tokens.
        window: tokens per window; default: 512, or the model's context where that is shorter.
        smooth: SmoothQuant's alpha, the share of the outliers that moves into the weights, between 0 and 1 (0.5 suits most
            models); None: no balancing.
        percentile: the one to record, in per cent.
        text_sha256: of the file that the tokens come from; default: of the ids in decimal, with single spaces.
        progress: show a progress bar on standard error.

    Raises:
        GateworkError: a bad checkpoint or argument, or activations that are not finite.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(os.fspath(source))
    window = min(WINDOW, checkpoint.config.max_position_embeddings) if window is None else window
    _check_arguments(checkpoint.config, token_ids, window, smooth, percentile)
    run = _Run(checkpoint, smooth, percentile, _windows(checkpoint, token_ids, window))
    run.all(progress)
    if text_sha256 is None:
        text_sha256 = hashlib.sha256(" ".join(map(str, token_ids)).encode()).hexdigest()
    return Calibration(
        fingerprint=checkpoint.fingerprint(),
        text_sha256=text_sha256,
        tokens=len(token_ids),
        window=window,
        percentile=percentile,
        alpha=smooth,
        versions={tool: version(tool) for tool in _TOOLS},
        ranges=run.ranges,
        # the shortest decimals that are these float32 numbers
        smooth={name: tuple(float(str(s)) for s in factors.numpy()) for name, factors in run.factors.items()},
    )


def _check_arguments(
    config: ModelConfig, token_ids: Sequence[int], window: int, smooth: float | None, percentile: float
) -> None:
    if len(token_ids) < 2:
        raise GateworkError("the text is too short", got=f"{len(token_ids)} tokens", expected="at least 2")
    bad = next((token for token in token_ids if not 0 <= token < config.vocab_size), None)
    if bad is not None:
        raise GateworkError("a token id is out of range", got=bad, expected=f"0 to {config.vocab_size - 1}")
    if not 2 <= window <= config.max_position_embeddings:
        expected = f"2 to {config.max_position_embeddings}, the model's context"
        raise GateworkError("window is out of range", got=window, expected=expected)
    if smooth is not None and not 0 < smooth < 1:
        raise GateworkError("smoothing's alpha is out of range", got=smooth, expected="between 0 and 1, such as 0.5")
    if not 0 < percentile <= 100:
        raise GateworkError("percentile is out of range", got=percentile, expected="above 0, at most 100")


@dataclass(slots=True)
class _Window:
    """Tokens on their way through the layers, and their prompt's through the encoder, which ends as its output."""

    hidden: Tensor  # [1, S, D] float32
    step: Step
    encoded: Tensor | None = None  # [1, L, D] float32


def _windows(checkpoint: Checkpoint, token_ids: Sequence[int], size: int) -> list[_Window]:
    """The text, embedded; only the rows that it needs stay in memory."""
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
        _Window(embedded(part), steps[len(part)], None if prompt is None else embedded(prompt))
        for part, prompt in zip(parts, prompts, strict=True)
    ]


def _step(config: ModelConfig, positions: Tensor, bias: RelativeBias | None) -> Step:
    """Of one sequence, positions [1, S]."""
    S = positions.shape[1]
    tables, lengths = rope_tables(config, S), torch.tensor([[S]])
    return Step(config, positions, positions[:, 0], S, *tables, prompt_lengths=lengths, relative_bias=bias)


@dataclass(slots=True)
class _Run:
    """The windows' way through one checkpoint, and what has been recorded on it."""

    checkpoint: Checkpoint
    alpha: float | None
    percentile: float
    windows: list[_Window]
    ranges: dict[str, Range] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)  # by norm, [D]

    @property
    def config(self) -> ModelConfig:
        """The decoder takes one token a step, so that no expert of it is ever full."""
        return replace(self.checkpoint.config, sequence_capacity=0)

    @torch.inference_mode()
    def all(self, progress: bool) -> None:
        """Layer by layer, each freed before the next one is read."""
        total = (self.config.encoder_layers + self.config.num_layers) * len(self.windows)
        with tqdm(total=total, unit="window", desc="calibrate", disable=not progress, file=sys.stderr) as bar:
            if self.config.encoder_layers:
                self.encode(bar.update)
            for i in range(self.config.num_layers):
                self.layer(i, bar.update)
        self.head()

    def layer(self, i: int, done: Callable[[], object]) -> None:
        """Take every window through layer i, calling `done` for each."""
        config, prefix = self.config, f"layers.{i}."
        with torch.device("meta"):
            layer = Layer(config, i).eval()
        load_weights(layer, self.checkpoint, prefix)

        def attend(window: _Window) -> None:
            empty = torch.zeros(1, config.num_kv_heads, window.hidden.shape[1], config.head_dim)
            window.hidden, *_ = layer.attend(window.hidden, window.step, empty, empty)

        def feed_forward(window: _Window) -> None:
            window.hidden = layer.feed_forward(window.hidden, window.hidden)
            if not layer.has_extra:
                done()

        def extra(window: _Window) -> None:
            window.hidden = layer.extra(window.hidden)
            done()

        def both(window: _Window) -> None:
            before = window.hidden
            attend(window)
            window.hidden = layer.feed_forward(window.hidden, before)
            done()

        if config.parallel:
            self.part(layer, prefix, "attn_norm", _PARALLEL, both)
            return
        self.part(layer, prefix, "attn_norm", _ATTENTION, attend)
        if layer.has_cross:
            self.part(layer, prefix, "cross_norm", _CROSS, self.attend_source(layer, prefix))
        routed = _SHARED if config.has_shared(i) else ()
        self.part(layer, prefix, "ffn_norm", routed if config.has_experts(i) else _MLP, feed_forward)
        if layer.has_extra:
            self.part(layer, prefix, "extra_norm", _EXTRA, extra)

    def part(self, layer: Layer, prefix: str, first: str, groups: _Groups, run: Callable[[_Window], None]) -> None:
        """Take every window through a part of a layer, which begins with the norm `first`, and record."""
        recorder, trackers = Recorder(), {}
        for group in groups:
            weights = [layer.get_parameter(name) for name in group]
            factors = None
            if group is groups[0]:
                factors = self.balance(f"{prefix}{first}.weight", layer.get_submodule(first), weights)
            trackers[group] = self.tracker(weights[0].shape[1], factors)
            recorder.watch(weights[0], trackers[group])
        with recorder:
            for window in self.windows:
                run(window)
        for group, tracker in trackers.items():
            self.record([prefix + name for name in group], tracker)

    def encode(self, done: Callable[[], object]) -> None:
        """Take every prompt through the encoder."""
        config, windows = self.checkpoint.config.encoder, self.windows
        assert config is not None
        bias = load_bias(self.checkpoint, "encoder.", both_sides=True)
        self.windows = [_Window(window.encoded, window.step) for window in windows if window.encoded is not None]
        for i in range(config.num_layers):
            with torch.device("meta"):
                layer = Layer(config, i).eval()
            load_weights(layer, self.checkpoint, prefix := f"encoder.layers.{i}.")

            def attend(window: _Window, layer: Layer = layer) -> None:
                positions = torch.arange(window.hidden.shape[1])
                window.hidden = encoder.attend(layer, window.hidden, bias(positions[None], positions))

            def feed_forward(window: _Window, layer: Layer = layer) -> None:
                window.hidden = layer.feed_forward(window.hidden, window.hidden)
                done()

            self.part(layer, prefix, "attn_norm", _ATTENTION, attend)
            self.part(layer, prefix, "ffn_norm", () if config.has_experts(i) else _MLP, feed_forward)
        names = [f"layers.{i}.cross.{kind}.weight" for i in range(self.config.num_layers) for kind in "kv"]
        parts = (part for name in names for part in self.checkpoint.parts(name))
        self.last_norm("encoder.norm", names, parts)
        for window, read in zip(windows, self.windows, strict=True):
            window.encoded = read.hidden
        self.windows = windows

    def attend_source(self, layer: Layer, prefix: str) -> Callable[[_Window], None]:
        """What takes a window through a layer's attention to the encoder's output."""
        with torch.device("meta"):
            source = encoder.SourceKeys(self.config).eval()
        load_weights(source, self.checkpoint, f"{prefix}cross.")

        def attend(window: _Window) -> None:
            assert window.encoded is not None
            k, v = source(window.encoded)
            seen = torch.ones(1, 1, window.hidden.shape[1], k.shape[2], dtype=torch.bool)
            window.hidden = window.hidden + layer.cross(layer.cross_norm(window.hidden), k, v, seen)

        return attend

    def head(self) -> None:
        """The last norm; the logits themselves are of no use here."""
        weight = "embed.weight" if self.config.tie_embeddings else "lm_head.weight"
        self.last_norm("norm", ["lm_head.weight"], self.checkpoint.parts(weight))

    def last_norm(self, name: str, products: list[str], weights: Iterable[Tensor]) -> None:
        """Take every window through the norm after a stack's layers; `weights` are those of the products that read it."""
        with torch.device("meta"):
            last = norm(self.config).eval()
        load_weights(last, self.checkpoint, f"{name}.")
        tracker = self.tracker(self.config.hidden_size, self.balance(f"{name}.weight", last, weights))
        for window in self.windows:
            window.hidden = last(window.hidden)
            tracker.add(window.hidden)
        self.record(products, tracker)

    def balance(self, name: str, module: nn.Module, weights: Iterable[Tensor]) -> Tensor | None:
        """The factors [D] of a norm that all windows stand before, and that feeds `weights`; None if it is not balanced."""
        if self.alpha is None or name not in balanced_products(self.config):
            return None
        x_absmax = torch.stack([column_absmax(module(window.hidden)) for window in self.windows]).amax(0)
        w_absmax = torch.stack([column_absmax(weight) for weight in weights]).amax(0)
        self.factors[name] = smoothing_factors(x_absmax, w_absmax, self.alpha)
        return self.factors[name]

    def tracker(self, width: int, factors: Tensor | None) -> Tracker:
        tokens = sum(window.hidden.shape[1] for window in self.windows)
        return Tracker(tokens * width, self.percentile, factors)

    def record(self, names: list[str], tracker: Tracker) -> None:
        """Keep the range of an input that several products share."""
        found = tracker.range()
        for name in names:
            check_range(name, found)
            self.ranges[name] = found
