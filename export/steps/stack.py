"""The layers of a decoder, or of an encoder, over several sequences: what the reference and the engine have before a step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatework.export.checkpoint import Checkpoint
from gatework.export.decoder import Layer, Step, scaled, served
from gatework.export.positions import attention_mask, rope_tables
from gatework.export.reference import load_bias, load_weights
from gatework.export.rounding import Format, stored
from gatework.export.steps.compared import Compared, Comparer, Recorded


@dataclass(slots=True)
class Run:
    """Hidden states on their way through the layers: [1, n, D], spans of sequences, and what the projections need to know."""

    hidden: Tensor
    spans: list[tuple[int, int]]
    step: Step


class Stack:
    """The reference's own run, and the engine's steps.

    Args:
        encoder: the layers are the encoder's: every position sees all others, and experts may drop tokens.
        sequences: token ids, each from the first position on.
        prompts: how many tokens of each are its prompt.
        tapped: the sequences, by number, whose steps the engine recorded, in the order of its rows; may repeat.
        form: the engine's number formats.
        kept: see `Comparer`; all stacks share it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sequences: Sequence[Sequence[int]],
        prompts: Sequence[int],
        tapped: Sequence[int],
        engine: Recorded,
        form: Format,
        generator: torch.Generator,
        kept: list[tuple[Tensor, int]],
        *,
        encoder: bool = False,
    ) -> None:
        longest = max(map(len, sequences))
        config = checkpoint.config.encoder if encoder else checkpoint.config
        assert config is not None
        self.checkpoint, self.config, self.prefix = checkpoint, config.within(longest), "encoder." if encoder else ""
        self.capacity = config.sequence_capacity if encoder else 0  # the decoder takes one token a step, and drops none
        self._sequences, self._prompts, self._longest = sequences, prompts, longest
        self._tables = rope_tables(self.config, longest)
        self._masks = self._make_masks(longest, encoder=encoder)
        self.own = self._start(range(len(sequences)))
        self.local = self._start(tapped) if tapped else None
        starts = [span[0] for span in self.own.spans]
        parts = [torch.arange(len(sequences[j])) + starts[j] for j in tapped]
        self.places = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)  # of tapped rows in the own run
        self.company: list[Tensor] = []  # by step of the engine: its rows of the own run, where experts drop tokens
        self.steps = Comparer(engine, form, generator, kept, self.places)

    def _make_masks(self, longest: int, *, encoder: bool) -> dict[int | None, Tensor]:
        """By window, for the longest sequence; see `mask`. Made here, since biases are in floats whatever products are in."""
        config, positions, bias = self.config, torch.arange(longest)[None], None
        if config.relative_buckets is not None:
            bias = load_bias(self.checkpoint, self.prefix, both_sides=encoder)
        if encoder:
            assert bias is not None
            return {None: bias(positions, positions[0])}
        windows = dict.fromkeys(map(config.window, range(config.num_layers)))
        return {each: attention_mask(config, positions, longest, window=each, relative_bias=bias) for each in windows}

    def _start(self, chosen: Sequence[int]) -> Run:
        """The chosen sequences, embedded."""
        ids = [torch.tensor(list(self._sequences[j])) for j in chosen]
        ends = torch.tensor([0, *map(len, ids)]).cumsum(0).tolist()
        spans = list(itertools.pairwise(ends))
        positions = torch.cat([torch.arange(len(part)) for part in ids])[None]
        lengths = torch.cat([torch.full_like(part, self._prompts[j]) for j, part in zip(chosen, ids, strict=True)])[
            None
        ]
        what = (self.config, positions, positions[:, 0], self._longest, *self._tables)
        step = Step(*what, prompt_lengths=lengths, masked=False)
        table = self.checkpoint.read("embed.weight")
        hidden = scaled(table[torch.cat(ids)][None].float(), self.config.embed_multiplier)
        return Run(hidden, spans, step)

    def layer(self, i: int) -> tuple[Layer, str]:
        """A layer without weights, and what precedes their names."""
        with torch.device("meta"):
            return Layer(self.config, i).eval(), f"{self.prefix}layers.{i}."

    def load(self, module: nn.Module, prefix: str) -> None:
        """Read the weights of a part of the layer at hand; prefix: of their names."""
        load_weights(module, self.checkpoint, prefix)
        groups = {name: self.steps.form.kept.get(prefix + name) for name, _ in module.named_parameters()}
        self.steps.kept += [(module.get_parameter(name), group) for name, group in groups.items() if group is not None]

    def mask(self, layer: Layer, length: int) -> Tensor:
        """Of a sequence; see `attention_mask`."""
        return self._masks[layer.attn.window][..., :length, :length]

    def kept(self, logits: Tensor, run: Run) -> Tensor | None:
        """1 where an expert takes a token of the run, else 0, [n, 1]; logits: the router's, [n, E]. None: all are taken."""
        if not self.capacity:
            return None
        return torch.cat([served(logits[None, a:b], self.capacity)[0] for a, b in run.spans]).float()

    def embedding(self) -> Iterator[Compared]:
        """The step before the first layer."""
        if self.local is not None:
            rows = stored(self.local.hidden[0])
            form = self.steps.form.embedding
            yield self.steps.compare(None, f"{self.prefix}embedding", rows, self.own.hidden[0], form)

    def follow(self, layer: int) -> None:
        """Take the engine's stream after so many layers for the inputs of the next."""
        if self.local is None:
            return
        place = (layer - 1, f"{self.prefix}output") if layer else (None, f"{self.prefix}embedding")
        found, stream = self.steps.found(*place)
        self.local.hidden = torch.zeros_like(self.local.hidden)
        self.local.hidden[0, found] = stream
