"""A model of true size through the exporter: Mixtral 8x7B, all 32 layers, from files whose 93 GB are holes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.full_size_export import measure


@pytest.mark.parametrize("in_place", [False, True], ids=["linked", "in place"])
def test_mixtral_8x7b(tmp_path: Path, in_place: bool) -> None:
    """Every weight is read where it lies; in place, onnx checks the graph in full."""
    found = measure("mixtral-8x7b", tmp_path, "bfloat16", in_place=in_place)
    assert found["referenced"] == 2 * 46_702_792_704
    assert found["copied"] == 0
    assert found["graph"] < 20e6
    assert found["written"] < 20e6  # tables of rotary angles
    assert found["peak_rss_mb"] < 2000
    assert found["cpu_seconds"] < 60  # of a machine with other work, seconds say little
