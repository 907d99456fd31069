"""Calibrating: a text goes through the reference decoder layer by layer, and the inputs of its dense products are measured."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gatework.export.calibration import Calibration, Range, check_range
from gatework.export.checkpoint import Checkpoint
from gatework.export.decoder import Layer, norm
from gatework.export.recorder import Recorder, Tracker
from gatework.export.reference import load_bias, load_weights
from gatework.export.smoothing import balanced_products, column_absmax, smoothing_factors
from gatework.export.windows import Groups, Window, WindowRun, embedded_windows, window_size
from gatework.plugins.errors import GateworkError

PERCENTILE = 99.99
_TOOLS = ("gatework", "torch")


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
    window = window_size(checkpoint.config, token_ids, window)
    if smooth is not None and not 0 < smooth < 1:
        raise GateworkError("--smooth is out of range", got=smooth, expected="between 0 and 1, such as 0.5")
    if not 0 < percentile <= 100:
        raise GateworkError("percentile is out of range", got=percentile, expected="above 0, at most 100")
    run = _Run(checkpoint, smooth, percentile, embedded_windows(checkpoint, token_ids, window))
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


class _Run(WindowRun):
    """The windows' way through one checkpoint, and what has been recorded on it."""

    def __init__(self, checkpoint: Checkpoint, alpha: float | None, percentile: float, windows: list[Window]) -> None:
        super().__init__(checkpoint, windows)
        self.alpha, self.percentile = alpha, percentile
        self.ranges: dict[str, Range] = {}
        self.factors: dict[str, Tensor] = {}  # by norm, [D]

    @torch.inference_mode()
    def all(self, progress: bool) -> None:
        """Layer by layer, each freed before the next one is read."""
        total = self.config.encoder_layers + self.config.num_layers
        with tqdm(total=total, unit="layer", desc="calibrate", disable=not progress, file=sys.stderr) as bar:
            if self.config.encoder_layers:
                self.encode(bar.update)
            for i in range(self.config.num_layers):
                self.layer(i)
                bar.update()
        self.head()

    def part(self, layer: Layer, prefix: str, first: str, groups: Groups, run: Callable[[Window], Tensor]) -> None:
        """Take every window through a part of a layer, and record."""
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
                window.hidden = run(window)
        for group, tracker in trackers.items():
            self.record([prefix + name for name in group], tracker)

    def encode(self, done: Callable[[], object]) -> None:
        """Take every prompt through the encoder, calling `done` for each layer."""
        windows, bias = self.windows, load_bias(self.checkpoint, "encoder.", both_sides=True)
        self.windows = [Window(window.encoded, window.step) for window in windows if window.encoded is not None]
        for i in range(self.config.encoder_layers):
            self.encoder_layer(i, bias)
            done()
        names = [f"layers.{i}.cross.{kind}.weight" for i in range(self.config.num_layers) for kind in "kv"]
        parts = (part for name in names for part in self.checkpoint.parts(name))
        self.last_norm("encoder.norm", names, parts)
        for window, read in zip(windows, self.windows, strict=True):
            window.encoded = read.hidden
        self.windows = windows

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
