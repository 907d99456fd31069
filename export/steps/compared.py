"""A step of an engine beside what the reference makes of the engine's own inputs, and how far rounding may set them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gatework.export.rounding import Format, Rounding, error_sizes
from gatework.plugins.engine_format import tap_name

Work = Callable[[Rounding | None], Tensor]  # rows [n, d] of a step, exact or rounded
DRAWS = 2  # of rounding, per value
# Where queries look at two keys nearly alike, a row's whole error is that of one number, which two draws do not measure.
CONTEXT_DRAWS = 16


class Recorded(Protocol):
    """What an engine computed, by the names of `graph_taps` and `encoder_taps`, `layers.{i}.key`, `.value` and, where there is
    an encoder, `.cross_key` and `.cross_value`."""

    def rows(self, name: str) -> tuple[Tensor, Tensor]:
        """Which rows there are [n] int64, ascending, and the rows [n, d] float32."""


class Compared(NamedTuple):
    """A step of the engine, compared.

    layer: its number in the stack that `tensor` names, see `tap_name`. rows: [n] of the tapped tokens, or of those that the
    encoder read. got: what the engine computed, [n, d]. want: what the reference makes of the engine's inputs. noise: [n]
    expected norm of what rounding adds to a row, and bias: of the sum over the row of that. own: the same rows of the
    reference's own run.
    """

    layer: int | None
    tensor: str
    rows: Tensor
    got: Tensor
    want: Tensor
    noise: Tensor
    bias: Tensor
    own: Tensor


class Comparer:
    """Compares steps of one engine over one set of rows.

    Args:
        form: the engine's number formats.
        kept: of the weights at hand, those without an error, with their groups; see `Rounding`.
        places: [n] of the engine's rows in the reference's own run.
    """

    def __init__(
        self,
        engine: Recorded,
        form: Format,
        generator: torch.Generator,
        kept: list[tuple[Tensor, int]],
        places: Tensor,
    ) -> None:
        self.form, self.kept = form, kept
        self._engine, self._generator, self._places = engine, generator, places

    def found(self, layer: int | None, tensor: str) -> tuple[Tensor, Tensor]:
        """Which rows the engine computed, and what."""
        return self._engine.rows(tap_name(layer, tensor))

    def read(self, layer: int | None, tensor: str) -> Tensor:
        """What the engine computed."""
        return self.found(layer, tensor)[1]

    def compare(
        self,
        layer: int | None,
        tensor: str,
        work: Work,
        own: Tensor,
        form: Format | None = None,
        *,
        rows: Tensor | None = None,
        draws: int = DRAWS,
    ) -> Compared:
        """One step. `work` gives the tapped rows [n, d], all of them or those of `rows`; form: attention's unless given."""
        found, got = self.found(layer, tensor)
        want, noise, bias = self.draws(work, form or self.form.attention, draws)
        if rows is None:
            want, noise, bias = want[found], noise[found], bias[found]
        return Compared(layer, tensor, found, got, want, noise, bias, own[self._places[found]])

    def compared(self, layer: int, tensor: str, want: Tensor, rounded: list[Tensor], own: Tensor) -> Compared:
        """A step whose rows the caller has computed, exact and rounded: those that the engine has."""
        found, got = self.found(layer, tensor)
        noise, bias = error_sizes([y - want for y in rounded])
        return Compared(layer, tensor, found, got, want, noise, bias, own[self._places[found]])

    def draws(self, work: Work, form: Format, draws: int = DRAWS) -> tuple[Tensor, Tensor, Tensor]:
        """What `work` returns without rounding, [n, d], and what rounding does to it; see `error_sizes`."""
        exact, off = work(None), []
        for _ in range(draws):
            with self.rounding(form) as rounding:
                off.append(work(rounding) - exact)
        return exact, *error_sizes(off)

    def rounding(self, form: Format, kept: Sequence[tuple[Tensor, int]] | None = None) -> Rounding:
        """Of products with the weights at hand, or with those of which `kept` have no error."""
        return Rounding(form, self._generator, self.kept if kept is None else kept)
