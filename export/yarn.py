"""Rotation for longer contexts than those trained on: YaRN (arXiv:2309.00071, sections 3.2 to 3.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gatework.plugins.errors import GateworkError

_LONGEST = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """How far each pair of a head's values is slowed down.

    factor: by which pairs are slowed that turn fewer than `slow` times in `original_length` positions; pairs of more than
    `fast` turns keep their speed, and between the two lies a ramp over the pairs.
    attention_factor: of cosine and sine. truncate: the ramp begins and ends at whole pairs.
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("factor", "fast", "slow", "attention_factor"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise GateworkError(f"{name} of YaRN is not a positive number", got=repr(value))
        if self.factor < 1 or self.fast <= self.slow:
            got = f"factor {self.factor}, {self.slow} to {self.fast} turns"
            raise GateworkError(
                "YaRN is out of range", got=got, expected="a factor from 1 on, and more turns than fewest"
            )
        if not (type(self.original_length) is int and 2 <= self.original_length <= _LONGEST):
            expected = f"2 to {_LONGEST}"
            raise GateworkError("original_length of YaRN is out of range", got=self.original_length, expected=expected)
