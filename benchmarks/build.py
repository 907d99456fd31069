"""How fast, and in how much memory, an engine is built.

    python benchmarks/build.py build/bench/random-mixtral --precision int8
    python benchmarks/build.py build/bench/sparse-mixtral --target a100 --precision int8 --plan-only --max-seq 4096

Writes the engine beside the checkpoint, as NAME-TARGET-PRECISION. Ends with one JSON line; mb_s is input bytes per second of
the whole build, from opening the checkpoint to the renamed directory, and peak_rss_mb is that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

from gatework.export.build import build_engine
from gatework.export.checkpoint import Checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--max-seq", type=int)
    parser.add_argument("--plan-only", action="store_true")
    args = parser.parse_args()
    out = args.checkpoint.with_name(f"{args.checkpoint.name}-{args.target}-{args.precision}")
    settings = {
        "target": args.target,
        "precision": args.precision,
        "max_seq": args.max_seq,
        "plan_only": args.plan_only,
    }
    start = time.perf_counter()
    build_engine(args.checkpoint, out, force=True, **settings)
    seconds = time.perf_counter() - start
    megabytes = Checkpoint.open(args.checkpoint).nbytes / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    result = {
        "target": args.target,
        "precision": args.precision,
        "input_mb": round(megabytes),
        "seconds": round(seconds, 1),
    }
    if not args.plan_only:
        result["mb_s"] = round(megabytes / seconds)
    files = {file.name: file.stat().st_size for file in out.iterdir() if file.stat().st_size > 10**6}
    print(json.dumps(result | {"peak_rss_mb": round(peak), "files": files}))


if __name__ == "__main__":
    main()
