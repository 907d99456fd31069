"""The reference one layer at a time: its own run over given tokens, and each step of it on an engine's own inputs.

The first says how far an engine has strayed; the second where error enters: what the engine computed at every step, against
what the reference makes of exactly the values that the engine had before that step. The encoder's steps come first, where
there is one. Memory holds one layer's attention, one expert, and the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gatework.export.checkpoint import Checkpoint
from gatework.export.decoder import norm, scaled
from gatework.export.reference import load_weights
from gatework.export.rounding import Format, summed
from gatework.export.steps.attention import attend, attend_source
from gatework.export.steps.compared import Compared, Recorded
from gatework.export.steps.feed_forward import extra, feed_forward
from gatework.export.steps.stack import Stack

_LOGIT_ROWS = 64


class LayerwiseReference:
    """A checkpoint's model over several sequences, and what an engine made of some of them.

    Args:
        sequences: token ids, each from an empty cache.
        prompts: how many tokens of each are its prompt.
        tapped: the sequences, by number, whose steps the engine recorded, in the order of its rows; may repeat.
        form: the engine's number formats.
        sources: what the encoder reads for each sequence, where there is one. The decoder then takes one token a step, so that
            it drops none.
        company: by step, where experts drop tokens: sequence and position of its tokens, [n, 2], in order. The engine has
            recorded `kept_choices` then.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        engine: Recorded,
        sequences: Sequence[Sequence[int]],
        prompts: Sequence[int],
        tapped: Sequence[int],
        form: Format,
        sources: Sequence[Sequence[int]] = (),
        company: Sequence[np.ndarray] = (),
    ) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self.layers = 0  # that are through, the encoder's first
        self._kept: list[tuple[Tensor, int]] = []
        given = (tapped, engine, form, self._generator, self._kept)
        with torch.inference_mode():
            self._encoder = None
            if checkpoint.config.encoder_layers:
                self._encoder = Stack(checkpoint, sources, [1] * len(sources), *given, encoder=True)
            self._decoder = Stack(checkpoint, sequences, prompts, *given)
        starts = np.array([span[0] for span in self._decoder.own.spans])
        self._decoder.company = [torch.from_numpy(starts[step[:, 0]] + step[:, 1]) for step in company]
        self._stacks = [stack for stack in (self._encoder, self._decoder) if stack is not None]

    @property
    def total(self) -> int:
        """Layers of all stacks."""
        return sum(stack.config.num_layers for stack in self._stacks)

    @property
    def hidden(self) -> np.ndarray:
        """Of the own runs, after `layers` layers: [n, D], the encoder's rows first."""
        return torch.cat([stack.own.hidden[0] for stack in self._stacks]).numpy()

    def resume(self, layers: int, hidden: np.ndarray) -> None:
        """Go on after so many layers, with the hidden states that another one had there."""
        self.layers = layers
        rows = [stack.own.hidden.shape[1] for stack in self._stacks]
        for stack, part in zip(self._stacks, torch.from_numpy(hidden).split(rows), strict=True):
            stack.own.hidden = part[None]

    @torch.inference_mode()
    def steps(self) -> Iterator[Compared | int]:
        """Every step up to the last layer's output, in order of computation, and the number of each layer that is through."""
        first = 0
        for stack in self._stacks:
            if self.layers < first + stack.config.num_layers:
                yield from self._through(stack, first)
            first += stack.config.num_layers
            if stack is self._encoder:
                yield from self._encoded(stack)

    def _through(self, stack: Stack, first: int) -> Iterator[Compared | int]:
        """The rest of a stack, whose first layer has that number among those of both."""
        self._generator.manual_seed(self.layers)
        if self.layers == first:
            yield from stack.embedding()
        stack.follow(self.layers - first)
        for i in range(self.layers - first, stack.config.num_layers):
            self._generator.manual_seed(first + i)  # the same draws, wherever a run begins
            yield from self._layer(stack, i)
            stack.follow(i + 1)
            self.layers += 1
            yield first + i

    def _layer(self, stack: Stack, i: int) -> Iterator[Compared]:
        self._kept.clear()
        layer, prefix = stack.layer(i)
        norms = (
            ("attn_post_norm", "ffn_post_norm") if layer.parallel else ("attn_post_norm", "ffn_norm", "ffn_post_norm")
        )
        for name in ("attn_norm", "attn", *norms):
            stack.load(layer.get_submodule(name), f"{prefix}{name}.")
        middle = yield from attend(stack, i, layer)
        if layer.has_cross:
            assert self._encoder is not None
            middle = yield from attend_source(stack, self._encoder, i, layer, middle)
        yield from feed_forward(stack, i, layer, middle)
        if layer.has_extra:
            yield from extra(stack, i, layer)

    def _encoded(self, encoder: Stack) -> Iterator[Compared]:
        """The norm after the encoder's layers; both runs go on to the decoder with what it gives."""
        layers, local, tensor = encoder.config.num_layers, encoder.local, "encoder.norm"
        self._generator.manual_seed(self.layers)
        if self.layers == layers:  # later ones were stored with it
            last = norm(encoder.config).eval()
            load_weights(last, encoder.checkpoint, f"{tensor}.")
            own = last(encoder.own.hidden)
            if local is not None:
                encoder.follow(layers)
                normed = last(local.hidden[0])
                yield encoder.steps.compare(None, tensor, summed(normed), own[0])
            encoder.own.hidden = own
        if local is not None:
            local.hidden = encoder.steps.read(None, tensor)[None]

    @torch.inference_mode()
    def logits(self) -> Iterator[Compared | tuple[int, int, Tensor]]:
        """After `steps`: logits of the own run, as sequence, first position, [n, V]; and the engine's last step of all."""
        stack = self._decoder
        config, checkpoint = stack.config, stack.checkpoint
        with torch.device("meta"):
            last = norm(config).eval()
        load_weights(last, checkpoint, "norm.")
        name = "embed.weight" if config.tie_embeddings else "lm_head.weight"
        table = checkpoint.read(name).float()
        self._kept[:] = [(table, group)] if (group := stack.steps.form.kept.get(name)) is not None else []
        shift = checkpoint.read("lm_head.bias").float() if config.bias == "all" else None

        def head(x: Tensor) -> Tensor:
            return scaled(F.linear(last(x), table, shift), config.logit_multiplier)

        for j, (first, end) in enumerate(stack.own.spans):
            for start in range(first, end, _LOGIT_ROWS):
                yield j, start - first, head(stack.own.hidden[0, start : min(start + _LOGIT_ROWS, end)])
        if stack.local is not None:
            yield self._last(head)

    def _last(self, head: Callable[[Tensor], Tensor]) -> Compared:
        """The engine's logits, of the rows that it has any of."""
        stack = self._decoder
        rows, output = stack.steps.found(stack.config.num_layers - 1, "output")
        found, got = stack.steps.found(None, "logits")
        at = torch.searchsorted(rows, found)
        own = head(stack.own.hidden[0, stack.places[found]])
        want, noise, bias = stack.steps.draws(lambda _: head(output), stack.steps.form.head)
        return Compared(None, "logits", found, got, want[at], noise[at], bias[at], own)
