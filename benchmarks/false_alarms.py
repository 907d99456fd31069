"""Sound engines of random checkpoints, which verification must pass: every family and precision, many seeds.

    python -m benchmarks.false_alarms --seeds 20

Prints, for each family and precision, how many failed and the largest share of its bound that any step used up. Exit code 1
if one failed. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from gatework.export.build import build_engine
from gatework.runtime.verify import verify
from tests.checkpoints import TABLE, make_checkpoint

PRECISIONS = ("fp32", "int8", "int4")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--models", nargs="+", default=["llama2", "mistral", "mixtral", "dbrx"], choices=list(TABLE))
    args = parser.parse_args()
    found: dict[str, dict[str, float | int]] = {}
    for model in args.models:
        for precision in PRECISIONS:
            name = f"{model} {precision}"
            found[name] = {"failed": 0, "share": 0.0, "values": 0}
            for seed in tqdm(range(args.seeds), desc=name, leave=False, disable=not sys.stderr.isatty()):
                _one(model, precision, seed, found[name])
            print(
                f"{name:14s} {found[name]['failed']} of {args.seeds} failed, largest share {found[name]['share']:.2f}",
                flush=True,
            )
    failed = sum(int(each["failed"]) for each in found.values())
    print(json.dumps({"seeds": args.seeds, "failed": failed, "engines": len(found) * args.seeds, "found": found}))
    return int(failed > 0)


def _one(model: str, precision: str, seed: int, found: dict[str, float | int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' own progress bars
            checkpoint = make_checkpoint(Path(folder), model, seed)
        engine = build_engine(checkpoint, Path(folder) / "engine", precision=precision, prefill_chunk=16, max_batch=3)
        report = verify(engine, checkpoint, tokens=16)
    found["failed"] += not report.passed
    found["share"] = max(found["share"], *(stage.share for stage in report.stages))
    found["values"] += sum(stage.compared for stage in report.stages)
    if not report.passed:
        print(f"{model} {precision} seed {seed}: {report.summary}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
