"""Calibration: the ranges of a model's activations over a text, and the file that keeps them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gatework.export.checkpoint import Checkpoint, and_more
from gatework.export.config import ModelConfig
from gatework.export.folder import read_json
from gatework.export.smoothing import balanced_products
from gatework.plugins.errors import GateworkError

FORMAT_VERSION = 1
_LEAST_SCALE = float(np.finfo(np.float32).tiny)
_AGAIN = "make it again with `gatework calibrate`"


def dense_products(config: ModelConfig) -> tuple[str, ...]:
    """The weights of all dense products, whose inputs have ranges: no router, and no expert, which is scaled as it runs.

    `lm_head.weight` is among them with tied embeddings as well.
    """
    matrices = [name for name, shape in config.tensor_shapes().items() if len(shape) == 2]
    others = (".router.weight", "relative_bias.weight", ".moe.b_in", ".moe.b_out")
    dense = (name for name in matrices if name != "embed.weight" and not name.endswith(others))
    return tuple(dict.fromkeys([*dense, "lm_head.weight"]))


@dataclass(frozen=True, slots=True)
class Range:
    """How large |x| gets: absmax, the largest value; percentile, the one that so many per cent of them do not exceed."""

    absmax: float
    percentile: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Ranges of the inputs of all dense products of one checkpoint, and the factors that balance them, if any.

    fingerprint: of the checkpoint. text_sha256: of the text's file. tokens, window: how many were run, and how many at once.
    percentile: which one, in per cent. alpha: SmoothQuant's, None without balancing. versions: of the tools.
    ranges: by the canonical name of the product's weight; where a balanced norm makes the input, of the balanced input.
    smooth: s [D] of every balanced norm, by the name of its weight; what it means and how it is applied: `smoothing`.

    Raises GateworkError for a range that is negative or not finite, for factors that are not positive and finite, and for
    an alpha without factors or the other way round.
    """

    fingerprint: str
    text_sha256: str
    tokens: int
    window: int
    percentile: float
    alpha: float | None
    versions: Mapping[str, str]
    ranges: Mapping[str, Range]
    smooth: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        for name, found in self.ranges.items():
            check_range(name, found)
        for name, factors in self.smooth.items():
            if not all(_is_finite(factor) and factor > 0 for factor in factors):
                raise GateworkError(
                    f"a smoothing factor of {name} is not valid", expected="finite, above 0", fix=_AGAIN
                )
        if (self.alpha is None) != (not self.smooth):
            got = f"alpha {self.alpha} and {len(self.smooth)} smoothed norms"
            raise GateworkError("alpha and smoothing factors go together", got=got, fix=_AGAIN)

    def scale(self, name: str, largest: float, method: Literal["absmax", "percentile"] = "absmax") -> float:
        """The scale that maps the range of an input to `largest`: x = q * scale with |q| <= largest.

        A range of zero, or so small that float32 has no normal number for its scale, gives 1.0: any scale takes such
        values to zero.

        Args:
            name: of the product's weight.
            largest: of the quantised type: 448 for fp8 e4m3, 127 for int8.
            method: the percentile clips what lies beyond it, for finer steps below.

        Raises:
            GateworkError: there is no such range.
        """
        if name not in self.ranges:
            raise GateworkError(f"the calibration has no range for {name}", expected="a dense product's weight")
        found = self.ranges[name]
        scale = (found.absmax if method == "absmax" else found.percentile) / largest
        return scale if scale >= _LEAST_SCALE else 1.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON with a checksum to `path`, in place of what stood there, complete or not at all.

        Raises OSError where the file cannot be written.
        """
        path = Path(path)
        fields = {"format_version": FORMAT_VERSION, **asdict(self)}
        fields["checksum"] = _checksum(fields)
        staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            staging.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
            staging.replace(path)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], checkpoint: Checkpoint) -> Calibration:
        """Read a file that `save` wrote and that belongs to `checkpoint`.

        Raises GateworkError for a file that is missing, no JSON, of another format version, altered, incomplete or made
        from another checkpoint.
        """
        path = Path(path)
        if not path.is_file():
            raise GateworkError(
                f"{path} is no calibration", got="no such file", fix="make one with `gatework calibrate`"
            )
        fields = read_json(path)
        if (found := fields.get("format_version")) != FORMAT_VERSION:
            what = f"{path} is no calibration of this version's format"
            raise GateworkError(what, got=f"format_version {found!r}", expected=FORMAT_VERSION, fix=_AGAIN)
        if fields.pop("checksum", None) != _checksum(fields):
            raise GateworkError(f"{path} is damaged: its content was altered", fix=_AGAIN)
        del fields["format_version"]
        calibration = cls._from_fields(fields, path)
        if calibration.fingerprint != checkpoint.fingerprint():
            what = f"{path} was not made from {checkpoint.path}"
            raise GateworkError(what, got="another fingerprint", fix="calibrate this checkpoint")
        calibration._check_names(checkpoint.config, path)
        return calibration

    @classmethod
    def _from_fields(cls, fields: dict[str, Any], path: Path) -> Calibration:
        try:
            fields["ranges"] = {name: Range(**found) for name, found in fields["ranges"].items()}
            fields["smooth"] = {name: tuple(factors) for name, factors in fields["smooth"].items()}
            return cls(**fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise GateworkError(f"{path} does not hold what a calibration does: {error}", fix=_AGAIN) from None

    def _check_names(self, config: ModelConfig, path: Path) -> None:
        """Raise unless there is a range for every dense product, and factors for every norm or for none."""
        norms = balanced_products(config) if self.alpha is not None else ()
        for what, found, expected in (
            ("range", self.ranges, dense_products(config)),
            ("smoothing factors", self.smooth, norms),
        ):
            if missing := [name for name in expected if name not in found]:
                raise GateworkError(f"{path} has no {what} for {missing[0]}{and_more(missing)}", fix=_AGAIN)
            if extra := [name for name in found if name not in expected]:
                raise GateworkError(
                    f"{path} has a {what} for {extra[0]}, which takes none{and_more(extra)}", fix=_AGAIN
                )
        for name, factors in self.smooth.items():
            if len(factors) != config.hidden_size:
                what = f"{path} has the wrong number of smoothing factors for {name}"
                raise GateworkError(what, got=len(factors), expected=config.hidden_size, fix=_AGAIN)


def check_range(name: str, found: Range) -> None:
    """Raise GateworkError unless 0 <= percentile <= absmax, all finite."""
    values = (found.percentile, found.absmax)
    if not (all(map(_is_finite, values)) and 0 <= found.percentile <= found.absmax):
        got = f"absmax {found.absmax}, percentile {found.percentile}"
        raise GateworkError(f"the range of {name} is not valid", got=got, expected="finite, 0 <= percentile <= absmax")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checksum(fields: dict[str, Any]) -> str:
    """sha256, in hex, of all fields as JSON without spaces, keys sorted."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
