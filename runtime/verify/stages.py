"""One step of the engine against the reference on the same inputs: is it rounding, or a fault?

Every bound is a multiple of the error that the engine's number formats are expected to leave (`gatework.export.rounding`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gatework.runtime.verify.markup import stage_name
from gatework.runtime.verify.record import Recording, Spot

if TYPE_CHECKING:
    from torch import Tensor

    from gatework.export.steps.compared import Compared

# Of all rows together: a sum of many thousand small errors lies within a few per cent of what is expected. Half as much again
# leaves room for what the model leaves out: errors that rows share, and exact powers of two.
_TOGETHER = 1.5
# Of one row: a sum of d squares. For d = 4, the fewest experts in use, a Gaussian one exceeds 4 times its mean once in 10^12.
_ROW = 4.0
# Of one row of what attention reads: where a query is torn between two keys the whole error is one number. A Gaussian one
# exceeds 8 times its deviation, as 16 draws measure it (Student's t), once in a million.
_ROW_OF_ONE = 8.0
# Of the factor between got and want, whose expected deviation is error / sqrt(dimensions): four times that, plus error^2,
# by which rounding to the nearest shrinks a sum.
_GAIN = 4.0
# Of the sum of a row's errors, which a wrong zero point drives one way. Over all rows it is no more certain than one Gaussian
# draw where their inputs are alike.
_BIAS = 4.0
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True, slots=True)
class Stage:
    """What became of one tensor of one layer.

    local: relative error (2-norm, root mean square over rows) where the reference gets the engine's own inputs. expected: what
    rounding predicts of it. accumulated: relative error against the reference's own run. observed, bound: of the test that
    failed, or else of all rows together. row: of the first one beyond its bound, or of the worst; counted as in `Recording`.
    """

    layer: int | None
    tensor: str
    local: float
    expected: float
    accumulated: float
    observed: float
    bound: float
    compared: int
    passed: bool
    row: int
    note: str

    def __str__(self) -> str:
        return stage_name(self.layer, self.tensor)

    @property
    def share(self) -> float:
        """Of the bound that was used up; above 1 it failed."""
        if not self.bound:
            return float(self.observed > 0)
        return self.observed / self.bound

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; a number that is not finite is null."""
        names = ("local", "expected", "accumulated", "observed", "bound")
        numbers = {name: value if np.isfinite(value := getattr(self, name)) else None for name in names}
        rest = {name: getattr(self, name) for name in ("compared", "passed", "note")}
        return {"layer": self.layer, "tensor": self.tensor, **numbers, **rest}


def judge(step: Compared, recording: Recording) -> Stage:
    """Compare a step."""
    got, want, own = (x.numpy().astype(np.float64) for x in (step.got, step.want, step.own))
    rows, noise = step.rows.numpy(), step.noise.numpy().astype(np.float64)
    if not len(rows):
        nan = float("nan")
        return Stage(step.layer, step.tensor, nan, nan, nan, nan, nan, 0, False, 0, "nothing was computed")
    size = _sizes(want)
    with np.errstate(invalid="ignore", over="ignore"):
        errors, expected = np.linalg.norm(got - want, axis=1) / size, noise / size
        sums, bias = (got - want).sum(1) / size, step.bias.numpy() / size
        accumulated = _rms(np.linalg.norm(got - own, axis=1) / _sizes(own))
        gain = float((got * want).sum() / max((want * want).sum(), _TINY))
    local, mean = _rms(errors), _rms(expected)
    limits = (_ROW_OF_ONE if step.tensor.endswith("context") else _ROW) * np.maximum(expected, mean)
    power = np.square(want).mean(0)
    dimensions = power.sum() ** 2 / max(np.square(power).sum(), _TINY)  # that share the energy
    drift, drift_bound = abs(gain - 1), mean**2 + _GAIN * mean / np.sqrt(max(dimensions, 1.0))
    beyond = ~(errors <= limits)
    worst = int(np.argmax(np.where(np.isfinite(errors), errors / np.maximum(limits, _TINY), np.inf)))
    tests = (
        (local, _TOGETHER * mean),
        (float(errors[worst]), float(limits[worst])),
        (drift, drift_bound),
        (_rms(sums), _BIAS * _rms(bias)),
    )
    failed = [(observed, bound) for observed, bound in tests if not observed <= bound]
    observed, bound = failed[0] if failed else tests[0]
    at = worst
    note = ""
    if failed:
        spots = [recording.spot(step.tensor, int(row)) for row in rows]
        if beyond.any():
            at = min(np.flatnonzero(beyond).tolist(), key=lambda i: (spots[i].position, spots[i].case))
        note = _kind(got, want, gain, beyond, spots)
    return Stage(
        step.layer, step.tensor, local, mean, accumulated, observed, bound, len(rows), not failed, int(rows[at]), note
    )


def difference(layer: int | None, tensor: str, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Stage:
    """The same tensor of two engines: rows and values of each. There is nothing to judge it by."""
    (found, got), (others, want) = ((rows.numpy(), values.numpy().astype(np.float64)) for rows, values in (one, other))
    rows, here, there = np.intersect1d(found, others, return_indices=True)  # one may have computed fewer in prefill
    got, want = got[here], want[there]
    size = _sizes(want)
    error = _rms(np.linalg.norm(got - want, axis=1) / size)
    nan = float("nan")
    return Stage(layer, tensor, nan, nan, error, error, float("inf"), len(rows), True, 0, "")


def _kind(got: np.ndarray, want: np.ndarray, gain: float, beyond: np.ndarray, spots: list[Spot]) -> str:
    """What the fault looks like."""
    bad = np.flatnonzero(beyond)
    if not np.isfinite(got).all():
        return "not finite"
    notes = []
    error = _size(got - want)
    earlier = [i for i in range(1, len(spots)) if spots[i].case == spots[i - 1].case]
    if error > 0 and _size(got - gain * want) < 0.3 * error:
        notes.append(f"scaled by {gain:.4g}")
    elif earlier and _size(got[earlier] - want[[i - 1 for i in earlier]]) < 0.3 * _size(got[earlier] - want[earlier]):
        notes.append("rows are those of the position before")
    elif _size(np.sort(got, axis=1) - np.sort(want, axis=1)) < 0.1 * error:
        notes.append("the same values in another order")
    if not len(bad):
        notes.append("no single row is beyond its bound, all together are")
    elif len(bad) < len(spots):
        notes.append(f"{len(bad)} of {len(spots)} rows")
        phases = {spots[i].phase for i in bad}
        others = {spot.phase for spot, off in zip(spots, beyond, strict=True) if not off}
        first = min(spots[i].position for i in bad)
        if len(phases) == 1 and phases != others:
            notes.append(f"in {phases.pop()} alone")
        if first and all(off for spot, off in zip(spots, beyond, strict=True) if spot.position >= first):
            notes.append(f"all from position {first} on")
    return ", ".join(notes)


def _sizes(rows: np.ndarray) -> np.ndarray:
    """What errors of rows [n, d] are measured by, [n]: their norms, and for rows of zeros, such as experts give of tokens that
    they drop, that of all rows."""
    norms = np.linalg.norm(rows, axis=1)
    return np.maximum(np.where(norms > 0, norms, _rms(norms)), _TINY)


def _size(values: np.ndarray) -> float:
    return float(np.linalg.norm(values))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))
