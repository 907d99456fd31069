"""What an engine's number formats cost: products whose operands and results carry the error that rounding leaves.

The error of rounding to a grid of step s is taken as uniform in [-s/2, s/2] and independent from value to value (Widrow and
Kollár, Quantization Noise, 2008, chapter 5). Steps are measured on the tensors themselves. It is a model from above: int4
scales of least squared error, and sums in blocks, leave less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gatework.export.groups import FINE_BITS, FINE_GROUP, PADDED_GROUP, fit_group
from gatework.export.quantize import FP8_LARGEST
from gatework.plugins.moe.cpu_ops import WIDE_BITS

# Half the distance of neighbouring floats around 1. The reference rounds to float32 as well: two equal errors, so sqrt(2).
UNITS = {"float32": 2.0**-23.5, "float16": 2.0**-11, "bfloat16": 2.0**-9}
_SIGMOID = 2.0**-23  # as wide as its error is spread; measured
_STEPS = 4  # roundings that an activation has seen since the last product: norm or gate, rotation, sum


@dataclass(frozen=True, slots=True)
class Format:
    """How an engine holds numbers.

    unit: roundoff of activations, 0.5 ulp. bits: of weights, and of the activations that meet them where `dynamic`; 0: floats.
    group: consecutive weights of a row that share a scale, at most. wide: attention and head take 16 bits where weights have 8.
    experts: the model has some. fine_group: of what `groups.fine` names; 0: a row, as in plans, whose embedding is in floats.
    pure: of what it names the embedding alone has 8 bits.
    kept: weights that have the checkpoint's own codes, and so no error, with their groups. fp8: experts' weights are e4m3, with
    a scale per row; all else is in floats. cache: roundoff of cached keys and values, where activations have more bits; else 0.
    """

    unit: float
    bits: int = 0
    group: int = 0
    dynamic: bool = False
    wide: bool = False
    experts: bool = False
    fine_group: int = FINE_GROUP
    pure: bool = False
    kept: Mapping[str, int] = field(default_factory=dict)
    fp8: bool = False
    cache: float = 0.0

    @property
    def attention(self) -> Format:
        """Of its products, which beside experts have 8 bits at least."""
        return self.head if self.experts else self

    @property
    def routed(self) -> Format:
        """Of experts that a router chooses, whose first product at least takes narrow activations."""
        return replace(self, wide=False)

    @property
    def feed_forward(self) -> Format:
        """Of MLPs and shared experts."""
        return replace(self.routed, fp8=False)

    @property
    def head(self) -> Format:
        """Of the output head, which has 8 bits at least."""
        return self if self.pure else self._fine

    @property
    def embedding(self) -> Format:
        """Of the embedding table."""
        return self._fine if self.fine_group else self.floats

    @property
    def _fine(self) -> Format:
        if 0 < self.bits < FINE_BITS:
            return replace(self, bits=FINE_BITS, group=self.fine_group)
        return replace(self, fp8=False)

    @property
    def floats(self) -> Format:
        """Of routers, sums and attention."""
        return Format(self.unit)


class Rounding(TorchFunctionMode):
    """While active, every `F.linear(x, w)` and `F.embedding(ids, w)` is off by one draw of what rounding costs.

    kept: weights without an error, with the groups in which the activations that meet them are rounded.
    """

    def __init__(self, form: Format, generator: torch.Generator, kept: Sequence[tuple[Tensor, int]] = ()) -> None:
        super().__init__()
        self._form, self._generator, self._kept = form, generator, kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.embedding:
            return func(args[0], self.weight(args[1]), *args[2:], **kwargs)
        return func(*args, **kwargs)

    def _linear(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        unit, terms = self._form.unit, w.shape[-1]
        group = next((group for each, group in self._kept if each is w), None)
        if group is None:
            y = F.linear(self.activation(x, self._form.group), self.weight(w), bias)
        else:
            y = F.linear(self.activation(x, group), w, bias)
        # Partial sums grow with the square root of their length, and each is rounded: the variances add up to n/6 of a term's.
        spread = F.linear(x * x, w * w).sqrt() * (UNITS["float32"] * math.sqrt(terms / 6))
        return y + self._draw(spread * math.sqrt(12)) + self._draw(2 * unit * y.abs())

    def weight(self, w: Tensor) -> Tensor:
        """A weight [..., K] as it is stored."""
        if self._form.fp8:
            return w + self._draw(_fp8_steps(w))
        if not self._form.bits:
            return w if self._form.unit == UNITS["float32"] else w + self._draw(2 * self._form.unit * w.abs())
        return w + self._draw(_group_steps(w, self._form.bits, self._form.group))

    def activation(self, x: Tensor, group: int) -> Tensor:
        """The input [..., K] of a product, in groups of its weight's size."""
        x = x + self._draw(2 * _STEPS * self._form.unit * x.abs())
        if not self._form.dynamic:
            return x
        bits = 16 if self._form.wide and self._form.bits == WIDE_BITS else 8
        return x + self._draw(_group_steps(x, bits, group))

    def sum_of(self, y: Tensor, size: Tensor) -> Tensor:
        """A sum y whose terms have the absolute sum `size`."""
        return y + self._draw(2 * _STEPS * self._form.unit * size)

    def cached(self, y: Tensor) -> Tensor:
        """Keys or values y as the cache has them."""
        return y + self._draw(2 * self._form.cache * y.abs())

    def sigmoid_of(self, y: Tensor) -> Tensor:
        """A sigmoid y: ONNX Runtime's is 0.5 plus an odd function, so that near 0 it is as inexact as near 0.5."""
        return y + self._draw(torch.full_like(y, _SIGMOID))

    def _draw(self, step: Tensor) -> Tensor:
        return (torch.rand(step.shape, generator=self._generator) - 0.5) * step


def _group_steps(values: Tensor, bits: int, group: int) -> Tensor:
    """The step of each value of rows [..., K] that are rounded in groups to signed integers."""
    K = values.shape[-1]
    size = (fit_group(K, group) or min(group, PADDED_GROUP)) if group else K
    padded = F.pad(values, (0, -K % size)).unflatten(-1, (-1, size))
    steps = padded.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return steps.expand_as(padded).flatten(-2)[..., :K]


def _fp8_steps(w: Tensor) -> Tensor:
    """The step of each weight of rows [..., K] that are rounded to e4m3: 3 bits behind the point, and 2^-9 below 2^-6."""
    scale = w.abs().amax(-1, keepdim=True) / FP8_LARGEST
    place = torch.frexp(w / torch.where(scale == 0, 1.0, scale)).exponent - 1  # of the leading bit
    return scale * torch.exp2(place.clamp_min(-6).float() - 3)


def error_sizes(errors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Expected norm [n] of draws of an error [n, d], and expected size of its sum over a row [n]."""
    drawn = torch.stack(errors)
    return drawn.square().sum(-1).mean(0).sqrt(), drawn.sum(-1).square().mean(0).sqrt()


def stored(rows: Tensor) -> Callable[[Rounding | None], Tensor]:
    """Rows of a weight, exact and as they are stored."""
    return lambda rounding: rows if rounding is None else rounding.weight(rows)


def summed(y: Tensor) -> Callable[[Rounding | None], Tensor]:
    """What float arithmetic made without a product, exact and rounded."""
    return lambda rounding: y if rounding is None else rounding.sum_of(y, y.abs())


def total(x: Tensor, y: Tensor, *, normed: bool = False) -> Callable[[Rounding | None], Tensor]:
    """x + y, exact and rounded; where y was normalised first, its own rounding counts."""
    spread = y.abs() if normed else torch.zeros(())

    def work(rounding: Rounding | None) -> Tensor:
        return x + y if rounding is None else rounding.sum_of(x + y, (x + y).abs() + spread)

    return work
