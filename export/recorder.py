"""Recording what goes into the products with given weights, while a model runs."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gatework.export.calibration import Range


class Taker(Protocol):
    """Takes the inputs [..., D] of a product."""

    def add(self, x: Tensor) -> None: ...


class Tracker:
    """The range of |x| over `count` values that come in parts.

    The percentile is exact, that of numpy's "linear" method: of all values, only those from it upwards are kept. Of 2^25
    values and the 99.99th percentile that is 3,400.

    factors: what the channels are divided by before, [D]; see `smoothing`.
    """

    def __init__(self, count: int, percentile: float, factors: Tensor | None = None) -> None:
        position = (count - 1) * percentile / 100  # of the percentile among the sorted values
        self._fraction = position - math.floor(position)
        self._kept = count - math.floor(position)
        self._missing = count
        self._factors = factors
        self._largest = torch.empty(0)  # descending

    def add(self, x: Tensor) -> None:
        """Take the values of a tensor [..., D] float32."""
        self._missing -= x.numel()
        balanced = x if self._factors is None else x / self._factors
        values = torch.cat((self._largest, balanced.abs().flatten()))
        self._largest = values.topk(min(self._kept, len(values))).values

    def range(self) -> Range:
        """Of all values; not finite if one of them is not."""
        assert self._missing == 0, f"{self._missing} values have not come"
        low, high = self._largest[-1].item(), self._largest[max(-2, -self._kept)].item()
        return Range(absmax=self._largest[0].item(), percentile=min(high, low + (high - low) * self._fraction))


class Recorder(TorchFunctionMode):
    """While active, hands the input of every product `F.linear(x, weight)` with a watched weight to its taker."""

    def __init__(self) -> None:
        super().__init__()
        self._watched: dict[int, tuple[nn.Parameter, Taker]] = {}

    def watch(self, weight: nn.Parameter, taker: Taker) -> None:
        """Record the input of products with this weight."""
        self._watched[id(weight)] = (weight, taker)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and id(args[1]) in self._watched:
            _, taker = self._watched[id(args[1])]
            taker.add(args[0])
        return func(*args, **(kwargs or {}))
