"""The steps of a layer's second half: an MLP, or a router, experts and a shared one; the sum; an extra MLP."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from gatework.export.decoder import MLP, Layer, MoE, SharedExpert, moe_attributes
from gatework.export.reference import load_weights
from gatework.export.rounding import Rounding, total
from gatework.export.steps.compared import DRAWS, Compared, Work
from gatework.export.steps.stack import Stack
from gatework.plugins.engine_format import kept_choices
from gatework.plugins.moe import torch_op
from gatework.plugins.moe.spec import MoEAttributes


def feed_forward(stack: Stack, i: int, layer: Layer, middle: Tensor) -> Iterator[Compared]:
    """Up to the extra MLP, where the layer has one; moves the own run on.

    middle: that run's stream before, [1, n, D].
    """
    local, steps, prefix = stack.local, stack.steps, stack.prefix
    own_x = layer.ffn_input(middle, stack.own.hidden)[0]
    residual = read = None
    if local is not None:
        residual = steps.read(i, "cross_residual" if layer.has_cross else f"{prefix}residual")
        read = layer.ffn_input(residual, local.hidden[0])
    half = _routed if stack.config.has_experts(i) else _dense
    branch = yield from half(stack, i, layer, own_x, read)
    stack.own.hidden = middle + layer.ffn_post_norm(branch[None])
    if residual is not None:
        found, added = _added(stack, i)
        work = total(residual[found], layer.ffn_post_norm(added), normed=stack.config.post_norms)
        name = f"{prefix}{'routed' if layer.has_extra else 'output'}"
        yield steps.compare(i, name, work, stack.own.hidden[0], rows=found)


def _dense(stack: Stack, i: int, layer: Layer, own_x: Tensor, read: Tensor | None) -> Generator[Compared, None, Tensor]:
    """The own run's MLP of its rows; read: what the engine's reads."""
    mlp = cast(MLP, layer.mlp)
    stack.load(mlp, f"{stack.prefix}layers.{i}.mlp.")
    branch: Tensor = mlp(own_x)
    if read is not None:
        form = stack.steps.form.feed_forward
        yield stack.steps.compare(i, f"{stack.prefix}mlp", lambda _: mlp(read), branch, form)
    return branch


def _routed(
    stack: Stack, i: int, layer: Layer, own_x: Tensor, read: Tensor | None
) -> Generator[Compared, None, Tensor]:
    """As `_dense`, of the experts, and the shared one with them."""
    steps, prefix, moe = stack.steps, stack.prefix, cast(MoE, layer.moe)
    load_weights(moe.router, stack.checkpoint, f"{prefix}layers.{i}.moe.router.")
    own_logits = moe.router(own_x)
    drops = stack.config.drop_tokens
    own_served = _served(stack, own_logits) if drops else None
    if read is None:
        (branch,) = _experts(stack, i, [(own_x, own_logits, own_served, False)])
    else:
        yield steps.compare(i, f"{prefix}router", lambda _: moe.router(read), own_logits, steps.form.floats)
        rows, logits = steps.found(i, f"{prefix}router")
        served = steps.read(i, kept_choices(f"{prefix}router")) if drops else None
        local_runs = [(read[rows], logits, served, rounded) for rounded in (False, *[True] * DRAWS)]
        branch, want, *off = _experts(stack, i, [(own_x, own_logits, own_served, False), *local_runs])
        yield steps.compared(i, f"{prefix}experts", want, off, branch)
    kept = stack.kept(own_logits, stack.own)
    if kept is not None:
        branch = branch * kept
    if moe.shared is not None:
        stack.load(moe.shared, f"{prefix}layers.{i}.moe.shared.")
        own_shared = moe.shared(own_x)
        branch = branch + own_shared
        if read is not None:
            work = _shared(moe.shared, read)
            yield steps.compare(i, f"{prefix}shared", work, own_shared, steps.form.feed_forward)
    return branch


def _added(stack: Stack, i: int) -> tuple[Tensor, Tensor]:
    """Which rows the engine's feed-forward part computed, and what of it goes into the stream."""
    steps, prefix = stack.steps, stack.prefix
    if not stack.config.has_experts(i):
        return steps.found(i, f"{prefix}mlp")
    found, added = steps.found(i, f"{prefix}experts")
    assert stack.local is not None
    kept = stack.kept(steps.read(i, f"{prefix}router"), stack.local)
    if kept is not None:
        added = added * kept
    return found, added + steps.read(i, f"{prefix}shared") if stack.config.has_shared(i) else added


def extra(stack: Stack, i: int, layer: Layer) -> Iterator[Compared]:
    """The extra MLP of a layer; moves the own run on."""
    for name in ("extra_norm", "extra_mlp"):
        stack.load(layer.get_submodule(name), f"{stack.prefix}layers.{i}.{name}.")
    branch = layer.extra_mlp(layer.extra_norm(stack.own.hidden))
    stack.own.hidden = stack.own.hidden + branch
    if stack.local is None:
        return
    steps, prefix = stack.steps, stack.prefix
    rows, routed = steps.found(i, f"{prefix}routed")

    def work(_: Rounding | None) -> Tensor:
        return layer.extra_mlp(layer.extra_norm(routed))

    yield steps.compare(i, f"{prefix}extra", work, branch[0], steps.form.feed_forward, rows=rows)
    added = steps.read(i, f"{prefix}extra")
    yield steps.compare(i, f"{prefix}output", total(routed, added), stack.own.hidden[0], rows=rows)


def _served(stack: Stack, logits: Tensor) -> Tensor:
    """Which choices [T, K] of the own run's tokens find a place at their expert among those of their steps."""
    attributes = moe_attributes(stack.config)
    chosen, _ = torch_op.route(logits, dropless(attributes))
    served = torch.ones_like(chosen)
    for step in stack.company:
        served[step] = torch_op.kept(chosen[step], logits.shape[1], attributes).to(served.dtype)
    return served


def dropless(attributes: MoEAttributes) -> MoEAttributes:
    """The same where every choice is kept."""
    return replace(attributes, capacity_factor=0.0, min_capacity=0)


def _experts(stack: Stack, i: int, runs: list[tuple[Tensor, Tensor, Tensor | None, bool]]) -> list[Tensor]:
    """The MoE's output [T, D] for each run: tokens [T, D], router logits [T, E], the choices [T, K] that are kept if not all
    are, and whether its products are rounded."""
    steps = stack.steps
    config, checkpoint, layer = stack.config, stack.checkpoint, f"{stack.prefix}layers.{i}.moe"
    attributes, has_bias = dropless(moe_attributes(config)), config.moe is not None and config.moe.bias
    routes = []
    for _, logits, served, _ in runs:
        chosen, shares = torch_op.route(logits, attributes)
        routes.append((chosen, shares if served is None else shares * served))
    outputs = [torch.zeros_like(x) for x, *_ in runs]
    names = [f"{layer}.{name}" for name in ("w_in", "w_out")]
    groups, weights = [steps.form.kept.get(name) for name in names], map(checkpoint.parts, names)
    biases = [checkpoint.read(f"{layer}.{name}").float() for name in ("b_in", "b_out") if has_bias]
    for e, (w_in, w_out) in enumerate(zip(*weights, strict=True)):
        matrices = (w_in.float(), w_out.float())
        coded = [(w, group) for w, group in zip(matrices, groups, strict=True) if group is not None]
        expert = (*matrices, attributes, *(bias[e] for bias in biases))
        for (x, _, _, rounded), (chosen, shares), y in zip(runs, routes, outputs, strict=True):
            rows, choice = (chosen == e).nonzero(as_tuple=True)
            if not len(rows):
                continue
            with steps.rounding(steps.form.routed, coded) if rounded else nullcontext():
                out = torch_op.expert(x[rows], *expert)
            y.index_add_(0, rows, shares[rows, choice][:, None] * out)
    return outputs


def _shared(expert: SharedExpert, x: Tensor) -> Work:
    """What the shared expert adds to rows [n, D]; its router is in floats."""
    share = expert.share(x)

    def work(rounding: Rounding | None) -> Tensor:
        return (share if rounding is None else rounding.sigmoid_of(share)) * MLP.forward(expert, x)

    return work
