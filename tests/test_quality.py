"""The bundled checkpoint: real, small, and hardly worse when quantised."""

from __future__ import annotations

from pathlib import Path

import pytest

from gatework.export.build import build_engine
from gatework.export.checkpoint import Checkpoint
from gatework.runtime.verify import verify

CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny-mixtral"
TEXT = (CHECKPOINT / "heldout.txt").read_text()


def test_bundled_checkpoint() -> None:
    config = Checkpoint.open(CHECKPOINT).config
    assert config.family == "mixtral"
    assert (config.moe.num_experts, config.moe.top_k) == (8, 2)  # type: ignore[union-attr]
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 8_000_000


# A quarter of the held-out text keeps this short; `make demo` and benchmarks/README.md have the whole of it.
@pytest.mark.parametrize(
    ("precision", "bound", "kl", "top1"), [("int8", 0.005, 0.001, 0.98), ("int4", 0.01, 0.009, 0.93)]
)
def test_perplexity(tmp_path: Path, precision: str, bound: float, kl: float, top1: float) -> None:
    engine = build_engine(CHECKPOINT, tmp_path / "engine", precision=precision, max_seq=256)
    report = verify(engine, CHECKPOINT, text=TEXT[: len(TEXT) // 4])
    failed = [check for check in report.checks if not check.passed]
    assert report.passed, failed
    (change,) = [check for check in report.checks if check.name == "perplexity change"]
    assert change.observed <= bound
    assert change.compared > 5000
    assert report.quality["kl"]["mean"] <= kl
    assert report.quality["top1"] >= top1
