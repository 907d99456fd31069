"""The parity matrix: every family, precision and target that this machine can run, each engine judged by `verify`.

    python -m benchmarks.parity                                       # what `make parity` runs; pages in build/parity
    python -m benchmarks.parity --seeds 20 --targets cpu              # false alarms: many random checkpoints of each family

Random checkpoints in the public formats, and the bundled one with its text. A cell fails if one of its engines does. Exit code
1 if a cell failed. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from gatework.export.build import build_engine, export_onnx
from gatework.runtime.formatting import table
from gatework.runtime.verify import VerifyReport, verify
from gatework.runtime.verify.html import to_html
from tests.checkpoints import MODELS, make_checkpoint
from tests.switch import make_switch

TINY = Path(__file__).parents[1] / "examples" / "tiny-mixtral"
QWEN = TINY.parents[1] / "tests" / "golden" / "qwen"  # transformers has no such class to draw random ones from
SWITCH = "switch"  # transformers makes its checkpoints by another class
FOLDERS = {folder.name: folder for folder in (TINY, QWEN)}
ALL = [*FOLDERS, *MODELS, SWITCH]
REFUSED = {("mpt", "cuda"), ("mpt-clip", "cuda"), ("qwen", "cuda"), ("gpt-oss", "cuda"), (SWITCH, "cuda")}
PRECISIONS = {"cpu": ("fp32", "int8", "int4"), "onnx": ("fp32",), "cuda": ("fp32", "bf16", "fp16", "int8", "int4")}


@dataclass(slots=True)
class Cell:
    """share: the largest of its bound that any step used up. values: rows compared inside the layers."""

    model: str
    target: str
    precision: str
    engines: int = 0
    failed: int = 0
    share: float = 0.0
    values: int = 0
    kl: float = 0.0

    def add(self, report: VerifyReport) -> None:
        """Count an engine."""
        self.engines += 1
        self.failed += not report.passed
        self.share = max([self.share, *(stage.share for stage in report.stages)])
        self.values += sum(stage.compared for stage in report.stages)
        self.kl = max(self.kl, report.quality["kl"]["mean"] if report.quality["kl"] else float("inf"))


def main() -> int:
    here = ["cpu", "onnx"] + ["cuda"] * ("CUDAExecutionProvider" in onnxruntime.get_available_providers())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="random checkpoints of each family (default: 1)")
    parser.add_argument("--models", nargs="+", default=ALL, choices=ALL)
    parser.add_argument(
        "--targets", nargs="+", default=here, choices=list(PRECISIONS), help=f"default: {' '.join(here)}"
    )
    parser.add_argument("--pages", type=Path, metavar="DIR", help="folder for a page per engine")
    args = parser.parse_args()
    pairs = [(m, target) for m in args.models for target in args.targets if (m, target) not in REFUSED]
    cells = [Cell(m, target, p) for m, target in pairs for p in PRECISIONS[target]]
    for cell in tqdm(cells, unit="cell", disable=not sys.stderr.isatty()):
        for seed, checkpoint in enumerate(_checkpoints(cell.model, args.seeds)):
            report = _judge(cell, checkpoint)
            cell.add(report)
            if not report.passed:
                print(f"{cell.model} {cell.target} {cell.precision}, seed {seed}: {report.summary}", flush=True)
            if args.pages is not None:
                args.pages.mkdir(parents=True, exist_ok=True)
                page = args.pages / f"{cell.model}-{cell.target}-{cell.precision}-{seed}.html"
                page.write_text(to_html(report.to_dict()), encoding="utf-8")
    rows = [("model", "target", "precision", "engines", "failed", "share of bound", "mean KL")]
    rows += [
        (c.model, c.target, c.precision, str(c.engines), str(c.failed), f"{c.share:.2f}", f"{c.kl:.2g}") for c in cells
    ]
    print(table(rows, "<<<>>>>"))
    failed = sum(cell.failed > 0 for cell in cells)
    print(f"{len(cells) - failed} of {len(cells)} cells passed")
    print(json.dumps({"failed": failed, "cells": [asdict(cell) for cell in cells]}))
    return int(failed > 0 or not cells)


def _checkpoints(model: str, seeds: int) -> Iterator[Path]:
    if model in FOLDERS:
        yield FOLDERS[model]
    if model == TINY.name:
        return
    makers = {QWEN.name: _redrawn, SWITCH: make_switch}
    for seed in range(int(model in FOLDERS), seeds):
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stderr(io.StringIO()):  # transformers' own progress bars
                checkpoint = makers.get(model, partial(make_checkpoint, model=model))(Path(folder), seed=seed)
            yield checkpoint


def _redrawn(folder: Path, *, seed: int) -> Path:
    """Qwen's checkpoint with other random weights, each tensor's as large as they were."""
    out = Path(shutil.copytree(QWEN, folder / "qwen"))
    generator = torch.Generator().manual_seed(seed)
    for file in out.glob("*.safetensors"):
        tensors = {
            name: (torch.randn(w.shape, generator=generator) * w.float().std() + w.float().mean()).to(w.dtype)
            for name, w in load_file(file).items()
        }
        save_file(tensors, file)
    return out


def _judge(cell: Cell, checkpoint: Path) -> VerifyReport:
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")[:20_000] if checkpoint == TINY else None
    with tempfile.TemporaryDirectory() as folder:
        out, length = Path(folder) / "engine", 256 if text else None
        if cell.target == "onnx":
            engine = export_onnx(checkpoint, out, max_seq=length)
        else:
            limits = {"prefill_chunk": 16, "max_batch": 3, "max_seq": length}
            engine = build_engine(checkpoint, out, target=cell.target, precision=cell.precision, **limits)
        return verify(engine, checkpoint, text=text, tokens=16)


if __name__ == "__main__":
    sys.exit(main())
