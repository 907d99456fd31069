"""Draws a result file: tokens per second by cell, a panel for each model.

build/peers/.venv/bin/python -m benchmarks.peers.chart benchmarks/results/peers.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLORS = {
    "gatework-int8": "#1b6ca8",
    "gatework-int4": "#7fb8e0",
    "gatework-int4-pure": "#b9dcc0",
    "llama.cpp-q8_0": "#d1782a",
    "llama.cpp-q4_0": "#f0b98a",
    "transformers-bf16": "#8a8a8a",
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars relative to the fastest peer that is not ours, with tokens per second written on them."""
    models = result["models"]
    figure, axes = pyplot.subplots(len(models), figsize=(13, 4 * len(models)), squeeze=False)
    for axis, (name, model) in zip(axes[:, 0], models.items(), strict=True):
        width = 0.8 / len(COLORS)
        for offset, (peer, color) in enumerate(COLORS.items()):
            for x, row in enumerate(model["cells"].values()):
                speed, best = row["tok_s"].get(peer), row["tok_s"].get(row["best_peer"])
                if speed is None or best is None:
                    continue
                left = x + (offset - (len(COLORS) - 1) / 2) * width
                axis.bar(left, speed / best, width, color=color, label=peer if x == 0 else None)
                axis.text(left, speed / best, f"{speed:.0f}", ha="center", va="bottom", fontsize=7)
        axis.axhline(1, color="black", linewidth=0.6)
        axis.set_xticks(range(len(model["cells"])), list(model["cells"]))
        axis.set_ylabel("speed / fastest peer's")
        axis.set_title(f"{name}: tokens per second on {result['machine']['cpu']}, {result['machine']['cpus']} threads")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
