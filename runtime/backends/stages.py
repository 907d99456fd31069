"""An engine in stages, run in turn in this process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gatework.runtime.backends.ort import OrtBackend
from gatework.runtime.backends.steps import Steps
from gatework.runtime.engine import Engine, Stage


class StagedBackend(Steps):
    """Hands the stream from stage to stage; arguments as of `OrtBackend`."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int,
        threads: int | None = None,
        taps: Sequence[str] = (),
        share_weights: bool = False,
    ) -> None:
        self.stages = [
            OrtBackend(
                engine,
                max_batch=max_batch,
                threads=threads,
                taps=_computed_by(stage, taps),
                stage=stage,
                share_weights=share_weights,
            )
            for stage in engine.stages
        ]
        super().__init__(max_batch, engine.limits.max_seq, one_by_one=self.stages[0].one_by_one)

    def forward(self, slot: int, x: np.ndarray, starts: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """See `Steps`."""
        self.tapped = {}
        for stage in self.stages:
            x = stage.forward(slot, x, starts, prompts)
            self.tapped |= stage.tapped
        return x

    def _copy(self, source: int, target: int, length: int) -> None:
        for stage in self.stages:
            stage.move(source, target, length)

    @property
    def cache_names(self) -> tuple[str, ...]:
        """`0.k`, `0.v`, `1.k`, ..."""
        return tuple(name for stage in self.stages for name in stage.cache_names)

    def cached(self, name: str, slot: int, length: int) -> np.ndarray:
        """See `OrtBackend`."""
        return next(stage for stage in self.stages if name in stage.cache_names).cached(name, slot, length)


def _computed_by(stage: Stage, taps: Sequence[str]) -> list[str]:
    """The taps of its layers; what comes before them all is the first stage's."""
    layers = {tap: int(tap.split(".")[1]) if tap.startswith("layers.") else 0 for tap in taps}
    return [tap for tap, layer in layers.items() if stage.first <= layer < stage.end]
