"""The reference one layer at a time: its own run over given tokens, and each step of it on an engine's own inputs.

The first says how far an engine has strayed; the second where error enters: what the engine computed at every step, against
what the reference makes of exactly the values that the engine had before that step. Memory holds one layer's attention, one
expert, and the activations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatework.export.checkpoint import Checkpoint
from gatework.export.decoder import MLP, Layer, MoE, SharedExpert, Step, moe_attributes, norm, scaled
from gatework.export.encoded import encode, load_bias
from gatework.export.encoder import SourceKeys
from gatework.export.positions import RelativeBias, attention_mask, rope_tables
from gatework.export.reference import load_weights
from gatework.export.rounding import Format, Rounding, error_sizes, stored, total
from gatework.plugins.engine_format import kept_choices
from gatework.plugins.moe import torch_op
from gatework.plugins.moe.spec import MoEAttributes

_DRAWS = 2  # of rounding, per value
# Where queries look at two keys nearly alike, a row's whole error is that of one number, which two draws do not measure.
_CONTEXT_DRAWS = 16
_LOGIT_ROWS = 64


class Recorded(Protocol):
    """What an engine computed, by the names of `layer_taps`, and `embedding`, `layers.{i}.key` and `.value`."""

    def rows(self, name: str) -> tuple[Tensor, Tensor]:
        """Which rows there are [n] int64, ascending, and the rows [n, d] float32."""


class Compared(NamedTuple):
    """A step of the engine, compared.

    rows: [n] of the tapped tokens. got: what the engine computed, [n, d]. want: what the reference makes of the engine's
    inputs. noise: [n] expected norm of what rounding adds to a row, and bias: of the sum over the row of that.
    own: the same rows of the reference's own run.
    """

    layer: int | None
    tensor: str
    rows: Tensor
    got: Tensor
    want: Tensor
    noise: Tensor
    bias: Tensor
    own: Tensor


@dataclass(slots=True)
class _Run:
    """Hidden states on their way through the layers: [1, n, D], spans of sequences, and what the projections need to know."""

    hidden: Tensor
    spans: list[tuple[int, int]]
    step: Step


class LayerwiseReference:
    """A checkpoint's decoder over several sequences.

    Args:
        sequences: token ids, each from an empty cache.
        prompts: how many tokens of each are its prompt.
        tapped: the sequences, by number, whose steps the engine recorded, in the order of its rows; may repeat.
        form: the engine's number formats.
        sources: what the encoder reads for each sequence, where there is one. The decoder then takes one token a step, so that
            it drops none, and no sequence may be tapped.
        company: by step, where experts drop tokens: sequence and position of its tokens, [n, 2], in order. The engine has
            recorded `kept_choices` then.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sequences: Sequence[Sequence[int]],
        prompts: Sequence[int],
        tapped: Sequence[int],
        form: Format,
        sources: Sequence[Sequence[int]] = (),
        company: Sequence[np.ndarray] = (),
    ) -> None:
        self.checkpoint, self._form, self._prompts = checkpoint, form, prompts
        self._longest = max(map(len, sequences))
        self.config = checkpoint.config.within(self._longest)
        self._generator = torch.Generator().manual_seed(0)
        self._kept: list[tuple[Tensor, int]] = []  # of the weights at hand, those without an error, with their groups
        self.layers = 0  # that are through
        self._sequences, self._tapped = sequences, tapped
        self._tables = rope_tables(self.config, self._longest)
        self._bias = load_bias(checkpoint, "", both_sides=False) if self.config.relative_buckets is not None else None
        with torch.inference_mode():
            self._encoded = encode(checkpoint, sources) if self.config.encoder_layers else []
        assert not (self._encoded and tapped), "steps of a model with an encoder are not compared"
        self._own = self._start(range(len(sequences)))
        starts = [span[0] for span in self._own.spans]
        self._company = [torch.from_numpy(np.array(starts)[step[:, 0]] + step[:, 1]) for step in company]
        parts = [torch.arange(len(sequences[j])) + starts[j] for j in tapped]
        self._places = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)  # of tapped rows in the own run

    def _start(self, chosen: Sequence[int]) -> _Run:
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
        return _Run(hidden, spans, step)

    @property
    def hidden(self) -> np.ndarray:
        """Of the own run, after `layers` layers: [n, D]."""
        return self._own.hidden[0].numpy()

    def resume(self, layers: int, hidden: np.ndarray) -> None:
        """Go on after so many layers, with the hidden states that another one had there."""
        self.layers, self._own.hidden = layers, torch.from_numpy(hidden)[None]

    @torch.inference_mode()
    def steps(self, engine: Recorded) -> Iterator[Compared | int]:
        """Every step up to the last layer's output, in order of computation, and the number of each layer that is through."""
        local = self._start(self._tapped) if self._tapped else None
        if local is not None:
            if not self.layers:
                rows = stored(local.hidden[0])
                yield self._compare(engine, None, "embedding", rows, self._own.hidden[0], self._form.embedding)
            before = f"layers.{self.layers - 1}.output" if self.layers else "embedding"
            local.hidden = engine.rows(before)[1][None]
        for i in range(self.layers, self.config.num_layers):
            self._generator.manual_seed(i)  # the same draws, wherever a run begins
            yield from self._layer(i, local, engine)
            self.layers = i + 1
            yield i

    def _load(self, module: nn.Module, prefix: str) -> None:
        """Read a part of the layer at hand."""
        load_weights(module, self.checkpoint, prefix)
        groups = {name: self._form.kept.get(prefix + name) for name, _ in module.named_parameters()}
        self._kept += [(module.get_parameter(name), group) for name, group in groups.items() if group is not None]

    def _layer(self, i: int, local: _Run | None, engine: Recorded) -> Iterator[Compared]:
        self._kept = []
        with torch.device("meta"):
            layer = Layer(self.config, i).eval()
        norms = (
            ("attn_post_norm", "ffn_post_norm") if layer.parallel else ("attn_post_norm", "ffn_norm", "ffn_post_norm")
        )
        for name in ("attn_norm", "attn", *norms):
            self._load(layer.get_submodule(name), f"layers.{i}.{name}.")
        middle = yield from self._attention(i, layer, local, engine)
        if layer.has_cross:
            middle = self._attend_source(i, layer, middle)
        yield from self._feed_forward(i, layer, middle, local, engine)
        if layer.has_extra:
            yield from self._extra(i, layer, engine, tapped=local is not None)
        if local is not None:
            found, output = engine.rows(f"layers.{i}.output")
            local.hidden = torch.zeros_like(local.hidden)
            local.hidden[0, found] = output

    def _attention(
        self, i: int, layer: Layer, local: _Run | None, engine: Recorded
    ) -> Generator[Compared, None, Tensor]:
        """The first half of a layer; returns the own run's residual stream after it."""
        own = self._own
        q, k, v = layer.attn.project(layer.attn_norm(own.hidden), own.step)
        context = _read(layer, q, k, v, own, self._bias)
        attention = layer.attn.o(context)
        middle = own.hidden + layer.attn_post_norm(attention)
        if local is None:
            return middle
        x, step = local.hidden, local.step

        def projected(at: int) -> Callable[[Rounding | None], Tensor]:
            return lambda _: _flat(layer.attn.project(layer.attn_norm(x), step)[at])

        yield self._compare(engine, i, "key", projected(1), _flat(k))
        yield self._compare(engine, i, "value", projected(2), _flat(v))
        taps = {name: engine.rows(f"layers.{i}.{name}")[1] for name in ("key", "value", "context", "attention")}
        heads = (self.config.num_kv_heads, -1)
        keys, values = (taps[name][None].unflatten(-1, heads).transpose(1, 2) for name in ("key", "value"))

        def contexts(rounding: Rounding | None) -> Tensor:
            queries, *_ = layer.attn.project(layer.attn_norm(x), step)
            y = _read(layer, queries, keys, values, local, self._bias)[0]
            if rounding is None:
                return y
            return rounding.sum_of(y, _read(layer, queries, keys, values.abs(), local, self._bias)[0])

        yield self._compare(engine, i, "context", contexts, context[0], draws=_CONTEXT_DRAWS)
        yield self._compare(engine, i, "attention", lambda _: layer.attn.o(taps["context"]), attention[0])
        yield self._compare(
            engine,
            i,
            "residual",
            total(x[0], layer.attn_post_norm(taps["attention"]), normed=self.config.post_norms),
            middle[0],
        )
        return middle

    def _attend_source(self, i: int, layer: Layer, middle: Tensor) -> Tensor:
        """The own run's residual stream after attention to the encoder's output."""
        with torch.device("meta"):
            source = SourceKeys(self.config).eval()
        parts = (("cross_norm", layer.cross_norm), ("cross", layer.cross), ("cross", source))
        for name, module in parts:
            load_weights(module, self.checkpoint, f"layers.{i}.{name}.")
        found = []
        for (a, b), encoded in zip(self._own.spans, self._encoded, strict=True):
            k, v = source(encoded)
            everything = torch.ones(1, 1, b - a, encoded.shape[1], dtype=torch.bool)
            found.append(layer.cross(layer.cross_norm(middle[:, a:b]), k, v, everything))
        return middle + torch.cat(found, dim=1)

    def _feed_forward(
        self, i: int, layer: Layer, middle: Tensor, local: _Run | None, engine: Recorded
    ) -> Iterator[Compared]:
        """The second half of a layer, up to the extra MLP where it has one; moves the own run on."""
        config, prefix = self.config, f"layers.{i}."
        own_x = layer.ffn_input(middle, self._own.hidden)[0]
        residual = read = None
        if local is not None:
            residual = engine.rows(f"{prefix}residual")[1]
            read = layer.ffn_input(residual, local.hidden[0])
        if not config.has_experts(i):
            mlp = layer.get_submodule("mlp")
            self._load(mlp, f"{prefix}mlp.")
            branch = mlp(own_x)
            if read is not None:
                yield self._compare(engine, i, "mlp", lambda _: mlp(read), branch, self._form.feed_forward)
        else:
            moe = cast(MoE, layer.moe)
            load_weights(moe.router, self.checkpoint, f"{prefix}moe.router.")
            own_logits = moe.router(own_x)
            own_served = self._served(own_logits) if config.drop_tokens else None
            if read is None:
                (branch,) = self._experts(i, [(own_x, own_logits, own_served, False)])
            else:
                yield self._compare(engine, i, "router", lambda _: moe.router(read), own_logits, self._form.floats)
                rows, logits = engine.rows(f"{prefix}router")
                served = engine.rows(kept_choices(f"{prefix}router"))[1] if config.drop_tokens else None
                local_runs = [(read[rows], logits, served, rounded) for rounded in (False, *[True] * _DRAWS)]
                branch, want, *off = self._experts(i, [(own_x, own_logits, own_served, False), *local_runs])
                noise, bias = error_sizes([y - want for y in off])
                got = engine.rows(f"{prefix}experts")[1]
                yield Compared(i, "experts", rows, got, want, noise, bias, branch[self._places[rows]])
            if moe.shared is not None:
                self._load(moe.shared, f"{prefix}moe.shared.")
                own_shared = moe.shared(own_x)
                branch = branch + own_shared
                if read is not None:
                    yield self._compare(
                        engine, i, "shared", _shared(moe.shared, read), own_shared, self._form.feed_forward
                    )
        self._own.hidden = middle + layer.ffn_post_norm(branch[None])
        if residual is not None:
            found, added = engine.rows(f"{prefix}{'experts' if config.has_experts(i) else 'mlp'}")
            if config.has_shared(i):
                added = added + engine.rows(f"{prefix}shared")[1]
            added_up = total(residual[found], layer.ffn_post_norm(added), normed=config.post_norms)
            name = "routed" if layer.has_extra else "output"
            yield self._compare(engine, i, name, added_up, self._own.hidden[0], rows=found)

    def _extra(self, i: int, layer: Layer, engine: Recorded, *, tapped: bool) -> Iterator[Compared]:
        """The extra MLP of a layer; moves the own run on."""
        for name in ("extra_norm", "extra_mlp"):
            self._load(layer.get_submodule(name), f"layers.{i}.{name}.")
        branch = layer.extra_mlp(layer.extra_norm(self._own.hidden))
        self._own.hidden = self._own.hidden + branch
        if tapped:
            rows, routed = engine.rows(f"layers.{i}.routed")
            yield self._compare(
                engine,
                i,
                "extra",
                lambda _: layer.extra_mlp(layer.extra_norm(routed)),
                branch[0],
                self._form.feed_forward,
                rows=rows,
            )
            added = engine.rows(f"layers.{i}.extra")[1]
            yield self._compare(engine, i, "output", total(routed, added), self._own.hidden[0], rows=rows)

    def _served(self, logits: Tensor) -> Tensor:
        """Which choices [T, K] of the own run's tokens find a place at their expert among those of their steps."""
        attributes = moe_attributes(self.config)
        chosen, _ = torch_op.route(logits, dropless(attributes))
        served = torch.ones_like(chosen)
        for step in self._company:
            served[step] = torch_op.kept(chosen[step], logits.shape[1], attributes).to(served.dtype)
        return served

    def _experts(self, i: int, runs: list[tuple[Tensor, Tensor, Tensor | None, bool]]) -> list[Tensor]:
        """The MoE's output [T, D] for each run: tokens [T, D], router logits [T, E], the choices [T, K] that are kept if not
        all are, and whether its products are rounded."""
        attributes, has_bias = moe_attributes(self.config), self.config.moe is not None and self.config.moe.bias
        attributes = dropless(attributes)
        routes = []
        for _, logits, served, _ in runs:
            chosen, shares = torch_op.route(logits, attributes)
            routes.append((chosen, shares if served is None else shares * served))
        outputs = [torch.zeros_like(x) for x, *_ in runs]
        names = [f"layers.{i}.moe.{name}" for name in ("w_in", "w_out")]
        groups = [self._form.kept.get(name) for name in names]
        weights = map(self.checkpoint.parts, names)
        biases = [self.checkpoint.read(f"layers.{i}.moe.{name}").float() for name in ("b_in", "b_out") if has_bias]
        for e, (w_in, w_out) in enumerate(zip(*weights, strict=True)):
            matrices = (w_in.float(), w_out.float())
            coded = [(w, group) for w, group in zip(matrices, groups, strict=True) if group is not None]
            expert = (*matrices, attributes, *(bias[e] for bias in biases))
            for (x, _, _, rounded), (chosen, shares), y in zip(runs, routes, outputs, strict=True):
                rows, choice = (chosen == e).nonzero(as_tuple=True)
                if not len(rows):
                    continue
                mode = Rounding(self._form.feed_forward, self._generator, coded) if rounded else nullcontext()
                with mode:
                    out = torch_op.expert(x[rows], *expert)
                y.index_add_(0, rows, shares[rows, choice][:, None] * out)
        return outputs

    @torch.inference_mode()
    def logits(self, engine: Recorded) -> Iterator[Compared | tuple[int, int, Tensor]]:
        """After `steps`: logits of the own run, as sequence, first position, [n, V]; and the engine's last step of all."""
        config = self.config
        with torch.device("meta"):
            last = norm(config).eval()
        load_weights(last, self.checkpoint, "norm.")
        name = "embed.weight" if config.tie_embeddings else "lm_head.weight"
        table = self.checkpoint.read(name).float()
        self._kept = [(table, self._form.kept[name])] if name in self._form.kept else []
        shift = self.checkpoint.read("lm_head.bias").float() if config.bias == "all" else None

        def head(x: Tensor) -> Tensor:
            return scaled(F.linear(last(x), table, shift), config.logit_multiplier)

        for j, (first, end) in enumerate(self._own.spans):
            for start in range(first, end, _LOGIT_ROWS):
                hidden = self._own.hidden[0, start : min(start + _LOGIT_ROWS, end)]
                yield j, start - first, head(hidden)
        if self._tapped:
            rows, output = engine.rows(f"layers.{config.num_layers - 1}.output")
            want, noise, bias = self._draws(lambda _: head(output), self._form.fine)
            found, got = engine.rows("logits")
            at = torch.searchsorted(rows, found)
            own = head(self._own.hidden[0, self._places[found]])
            yield Compared(None, "logits", found, got, want[at], noise[at], bias[at], own)

    def _compare(
        self,
        engine: Recorded,
        layer: int | None,
        tensor: str,
        work: Callable[[Rounding | None], Tensor],
        own: Tensor,
        form: Format | None = None,
        *,
        rows: Tensor | None = None,
        draws: int = _DRAWS,
    ) -> Compared:
        """One step. `work` gives the tapped rows [n, d], all of them or those of `rows`."""
        found, got = engine.rows(tensor if layer is None else f"layers.{layer}.{tensor}")
        want, noise, bias = self._draws(work, form or self._form.attention, draws)
        if rows is None:
            want, noise, bias = want[found], noise[found], bias[found]
        return Compared(layer, tensor, found, got, want, noise, bias, own[self._places[found]])

    def _draws(
        self, work: Callable[[Rounding | None], Tensor], form: Format, draws: int = _DRAWS
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `work` returns without rounding, [n, d], and what rounding does to it; see `error_sizes`."""
        exact, off = work(None), []
        for _ in range(draws):
            rounding = Rounding(form, self._generator, self._kept)
            with rounding:
                off.append(work(rounding) - exact)
        return exact, *error_sizes(off)


def dropless(attributes: MoEAttributes) -> MoEAttributes:
    """The same where every choice is kept."""
    return replace(attributes, capacity_factor=0.0, min_capacity=0)


def _read(layer: Layer, q: Tensor, k: Tensor, v: Tensor, run: _Run, bias: RelativeBias | None) -> Tensor:
    """Attention of every sequence to itself, [1, n, H * Dh]."""
    parts = []
    for a, b in run.spans:
        positions, window = torch.arange(b - a)[None], layer.attn.window
        mask = attention_mask(layer.attn.config, positions, b - a, window=window, relative_bias=bias)
        parts.append(layer.attn.read(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], mask))
    return torch.cat(parts, dim=1)


def _flat(heads: Tensor) -> Tensor:
    """[1, Hkv, n, Dh] -> [n, Hkv * Dh]."""
    return heads[0].transpose(0, 1).flatten(1)


def _shared(expert: SharedExpert, x: Tensor) -> Callable[[Rounding | None], Tensor]:
    """What the shared expert adds to rows [n, D]; its router is in floats."""
    share = expert.share(x)
    return lambda _: share * MLP.forward(expert, x)
