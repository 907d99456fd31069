"""A checkpoint whose weights are rounded with knowledge of a text, layer by layer, while an engine is written from it.

The text runs through the model as the engine will have it: what a layer's weights are rounded for is what the rounded layers
before it, and the rounded weights before them in the layer, make of the text. Memory holds one layer in float32, the second
moments of one matrix's inputs with three more matrices of that size, and the text's hidden states. Nothing is kept on disk.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from gatework.export.calibration import dense_products
from gatework.export.checkpoint import PART_BYTES, Checkpoint
from gatework.export.config import ModelConfig
from gatework.export.decoder import Layer, MoE, norm
from gatework.export.gptq import Grid, Moments, round_matrix
from gatework.export.groups import FINE_BITS, PADDED_GROUP, DenseFormat, fit_group
from gatework.export.options import BuildOptions
from gatework.export.recorder import Recorder
from gatework.export.reference import load_weights
from gatework.export.windows import Groups, Window, WindowRun, embedded_windows, window_size
from gatework.plugins.errors import GateworkWarning
from gatework.plugins.machine import usable_cpus
from gatework.plugins.moe import torch_op

FEW_TOKENS = 1000  # tiny-mixtral is worse of 50 to 200 than of none, and better of 1,000
_INT4_BITS = 4
_HEAD = "lm_head.weight"


def rounded_grids(config: ModelConfig, options: BuildOptions) -> dict[str, Grid]:
    """By canonical name, the numbers that weights can have which an engine holds in 4 bits, or experts in fp8."""
    shapes = config.tensor_shapes()
    experts = [name for name, shape in shapes.items() if len(shape) == 3]
    if options.precision == "fp8":
        return dict.fromkeys(experts, Grid(fp8=True))
    tensorrt = options.device.capability is not None
    width = options.group if tensorrt else fit_group(config.hidden_size, options.group)
    found = {} if width is None else dict.fromkeys(experts, Grid(width))
    dense = DenseFormat(_INT4_BITS, options.group, config.moe is not None, options.pure)
    for name in (name for name in dense_products(config) if name in shapes):  # a tied head is the embedding
        bits, widest = dense.of(name)
        size = fit_group(shapes[name][1], widest) if bits < FINE_BITS else None
        if bits < FINE_BITS and not tensorrt:
            size = size or min(widest, PADDED_GROUP)
        if size is not None:
            found[name] = Grid(size, positive=tensorrt)
    return found


@dataclass(frozen=True, slots=True)
class RoundedCheckpoint(Checkpoint):
    """A checkpoint that gives weights of `rounder` rounded, in float32."""

    rounder: Rounder

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, options: BuildOptions, token_ids: Sequence[int], *, progress: bool = False
    ) -> RoundedCheckpoint:
        """For an engine with these options. Raises GateworkError for a text of one token, warns of a short one."""
        rounder = Rounder(checkpoint, rounded_grids(checkpoint.config, options), token_ids, progress)
        if len(token_ids) < FEW_TOKENS:
            what = f"the calibration text has {len(token_ids)} tokens, and so few may be worse than none"
            warnings.warn(f"{what}; some ten thousand do", GateworkWarning, stacklevel=2)
        return cls(checkpoint.path, checkpoint.config, checkpoint.weights, checkpoint.source, rounder)

    def parts(self, name: str, *, max_bytes: int = PART_BYTES) -> Iterator[Tensor]:
        if name in self.rounder.grids:
            yield from self.rounder.parts(name)
        else:
            yield from Checkpoint.parts(self, name, max_bytes=max_bytes)


class Rounder(WindowRun):
    """A text's way through a checkpoint, which rounds the weights in `grids`.

    It goes as far as the weights that are asked for, and begins anew where they are those of a layer that it has left.
    """

    def __init__(
        self, checkpoint: Checkpoint, grids: dict[str, Grid], token_ids: Sequence[int], progress: bool
    ) -> None:
        self.grids, self._token_ids, self._progress = grids, token_ids, progress
        self._size = window_size(checkpoint.config, token_ids)
        self._through, self._ready = 0, dict[str, Tensor]()  # layers, and the rounded weights of the last one
        super().__init__(checkpoint, [])

    @torch.inference_mode()
    def parts(self, name: str) -> Iterator[Tensor]:
        """A rounded weight, float32: experts one by one, the output head in rows, others whole."""
        if name == _HEAD:
            return self._head()
        self._reach(int(name.split(".")[1]))
        weight = self._ready[name]
        return iter(weight if weight.dim() == 3 else [weight])

    def _reach(self, i: int) -> None:
        """Stand behind layer i, whose weights are ready."""
        if not self._through or i < self._through - 1:
            self.windows = embedded_windows(self.checkpoint, self._token_ids, self._size)
            self._through = 0
        while self._through <= i:
            self._advance()

    def _advance(self) -> None:
        i, threads = self._through, torch.get_num_threads()
        names = [name for name in self.grids if name.startswith(f"layers.{i}.")]
        self._ready = {}
        total = sum(self.checkpoint.weights[name].shape[0] if self._has_experts(name) else 1 for name in names)
        torch.set_num_threads(usable_cpus())
        try:
            what = f"round layer {i}"
            with tqdm(total=total, unit="matrix", desc=what, disable=not self._progress, file=sys.stderr) as self._bar:
                layer = self.layer(i)
        finally:
            torch.set_num_threads(threads)
        self._ready = {name: layer.get_parameter(name.split(".", 2)[2]) for name in names}
        self._through = i + 1

    @torch.inference_mode()
    def _head(self) -> Iterator[Tensor]:
        self._reach(self.config.num_layers - 1)
        last = norm(self.config).eval()
        load_weights(last, self.checkpoint, "norm.")
        moments = Moments(self.config.hidden_size)
        for window in self.windows:
            moments.add(last(window.hidden)[0])
        for part in self.checkpoint.parts(_HEAD):
            yield round_matrix(part.float(), moments.sum, self.grids[_HEAD])

    def _has_experts(self, name: str) -> bool:
        return len(self.checkpoint.weights[name].shape) == 3

    def part(self, layer: Layer, prefix: str, first: str, groups: Groups, run: Callable[[Window], Tensor]) -> None:
        """Round the weights of a part of a layer, in the order in which they are used, and take every window through it."""
        if first == "ffn_norm" and layer.ffn == "moe":
            self._experts(layer, prefix)
        for group in groups:
            if names := [name for name in group if prefix + name in self.grids]:
                weights = [layer.get_parameter(name) for name in names]
                recorder, moments = Recorder(), Moments(weights[0].shape[1])
                recorder.watch(weights[0], moments)
                with recorder:
                    for window in self.windows:
                        run(window)
                for name, weight in zip(names, weights, strict=True):
                    self._round(weight, moments, prefix + name)
        for window in self.windows:
            window.hidden = run(window)

    def _experts(self, layer: Layer, prefix: str) -> None:
        """Each for the tokens that choose it, by the weight that its output has in theirs."""
        moe = cast(MoE, layer.get_submodule("moe"))
        names = f"{prefix}moe.w_in", f"{prefix}moe.w_out"
        if names[0] not in self.grids:
            return
        x = torch.cat([layer.ffn_norm(window.hidden)[0] for window in self.windows])  # [T, D]
        lengths = [window.hidden.shape[1] for window in self.windows]
        routes = [torch_op.route(moe.scores(part), moe.attributes) for part in x.split(lengths)]
        chosen, shares = (torch.cat(each) for each in zip(*routes, strict=True))  # [T, K]
        for e, (w_in, w_out) in enumerate(zip(moe.w_in, moe.w_out, strict=True)):
            rows, choice = (chosen == e).nonzero(as_tuple=True)
            share, inputs = shares[rows, choice], Moments(w_in.shape[1])
            inputs.add(x[rows], share)
            self._round(w_in, inputs, names[0])
            bias = None if moe.b_in is None else moe.b_in[e]
            hidden = Moments(w_out.shape[1])
            hidden.add(torch_op.hidden(x[rows], w_in, moe.attributes, bias), share)
            self._round(w_out, hidden, names[1])

    def _round(self, weight: Tensor, moments: Moments, name: str) -> None:
        """In place."""
        weight.copy_(round_matrix(weight, moments.sum, self.grids[name]))
        self._bar.update()
