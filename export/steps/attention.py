"""The steps of a layer's attention: to the sequence itself, and to the encoder's output."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from gatework.export.decoder import Layer
from gatework.export.encoder import SourceKeys
from gatework.export.rounding import Rounding, total
from gatework.export.steps.compared import CONTEXT_DRAWS, Compared, Work
from gatework.export.steps.stack import Run, Stack


def attend(stack: Stack, i: int, layer: Layer) -> Generator[Compared, None, Tensor]:
    """The first half of a layer; returns the own run's residual stream after it."""
    own, local, steps, prefix = stack.own, stack.local, stack.steps, stack.prefix
    q, k, v = layer.attn.project(layer.attn_norm(own.hidden), own.step)
    context = _read(stack, layer, q, k, v, own)
    attention = layer.attn.o(context)
    middle = own.hidden + layer.attn_post_norm(attention)
    if local is None:
        return middle
    x, step = local.hidden, local.step

    def projected(at: int) -> Work:
        def work(rounding: Rounding | None) -> Tensor:
            y = _flat(layer.attn.project(layer.attn_norm(x), step)[at])
            return y if rounding is None else rounding.cached(y)

        return work

    yield steps.compare(i, f"{prefix}key", projected(1), _flat(k))
    yield steps.compare(i, f"{prefix}value", projected(2), _flat(v))
    keys, values = (_heads(steps.read(i, prefix + name), stack.config.num_kv_heads) for name in ("key", "value"))

    def contexts(rounding: Rounding | None) -> Tensor:
        queries, *_ = layer.attn.project(layer.attn_norm(x), step)
        y = _read(stack, layer, queries, keys, values, local)[0]
        return y if rounding is None else rounding.sum_of(y, _read(stack, layer, queries, keys, values.abs(), local)[0])

    yield steps.compare(i, f"{prefix}context", contexts, context[0], draws=CONTEXT_DRAWS)
    found = steps.read(i, f"{prefix}context")
    yield steps.compare(i, f"{prefix}attention", lambda _: layer.attn.o(found), attention[0])
    added = layer.attn_post_norm(steps.read(i, f"{prefix}attention"))
    yield steps.compare(i, f"{prefix}residual", total(x[0], added, normed=stack.config.post_norms), middle[0])
    return middle


def _read(stack: Stack, layer: Layer, q: Tensor, k: Tensor, v: Tensor, run: Run) -> Tensor:
    """Attention of every sequence to itself, [1, n, H * Dh]."""
    parts = []
    for a, b in run.spans:
        parts.append(layer.attn.read(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], stack.mask(layer, b - a)))
    return torch.cat(parts, dim=1)


def attend_source(
    stack: Stack, source: Stack, i: int, layer: Layer, middle: Tensor
) -> Generator[Compared, None, Tensor]:
    """Attention to what the encoder `source` ended with; takes and returns the own run's residual stream."""
    with torch.device("meta"):
        project = SourceKeys(stack.config).eval()
    for name, module in (("cross_norm", layer.cross_norm), ("cross", layer.cross), ("cross", project)):
        stack.load(module, f"layers.{i}.{name}.")
    k, v = project(source.own.hidden)
    context = _read_source(layer, layer.cross.queries(layer.cross_norm(middle)), k, v, stack.own, source.own)
    attention = layer.cross.o(context)
    after = middle + attention
    if stack.local is None or source.local is None:
        return after
    local, encoded, steps = stack.local, source.local, stack.steps

    def projected(at: int) -> Work:
        return lambda _: _flat(project(encoded.hidden)[at])

    yield source.steps.compare(i, "cross_key", projected(0), _flat(k))
    yield source.steps.compare(i, "cross_value", projected(1), _flat(v))
    heads = stack.config.num_kv_heads
    keys, values = (_heads(source.steps.read(i, name), heads) for name in ("cross_key", "cross_value"))
    residual = steps.read(i, "residual")[None]

    def contexts(rounding: Rounding | None) -> Tensor:
        queries = layer.cross.queries(layer.cross_norm(residual))
        y = _read_source(layer, queries, keys, values, local, encoded)[0]
        if rounding is None:
            return y
        return rounding.sum_of(y, _read_source(layer, queries, keys, values.abs(), local, encoded)[0])

    yield steps.compare(i, "cross_context", contexts, context[0], draws=CONTEXT_DRAWS)
    found = steps.read(i, "cross_context")
    yield steps.compare(i, "cross_attention", lambda _: layer.cross.o(found), attention[0])
    added = steps.read(i, "cross_attention")
    yield steps.compare(i, "cross_residual", total(residual[0], added), after[0])
    return after


def _read_source(layer: Layer, q: Tensor, k: Tensor, v: Tensor, run: Run, source: Run) -> Tensor:
    """Attention of every sequence to its own source, [1, n, H * Dh]."""
    parts = []
    for (a, b), (c, d) in zip(run.spans, source.spans, strict=True):
        everything = torch.ones(1, 1, b - a, d - c, dtype=torch.bool)
        parts.append(layer.cross.read(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], everything))
    return torch.cat(parts, dim=1)


def _flat(heads: Tensor) -> Tensor:
    """[1, Hkv, n, Dh] -> [n, Hkv * Dh]."""
    return heads[0].transpose(0, 1).flatten(1)


def _heads(rows: Tensor, count: int) -> Tensor:
    """Inverse of `_flat`."""
    return rows[None].unflatten(-1, (count, -1)).transpose(1, 2)
