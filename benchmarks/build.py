"""How fast, and in how much memory, an engine is built.

    python benchmarks/build.py build/bench/random-mixtral --precision int8

Writes the engine beside the checkpoint, as NAME-PRECISION. Ends with one JSON line; mb_s is input bytes per second of the whole
build, from opening the checkpoint to the renamed directory, and peak_rss_mb is that of the whole process.
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
    parser.add_argument("--precision", default="int8")
    args = parser.parse_args()
    out = args.checkpoint.with_name(f"{args.checkpoint.name}-{args.precision}")
    start = time.perf_counter()
    build_engine(args.checkpoint, out, precision=args.precision, force=True)
    seconds = time.perf_counter() - start
    megabytes = Checkpoint.open(args.checkpoint).nbytes / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    result = {"precision": args.precision, "input_mb": round(megabytes), "seconds": round(seconds, 1)}
    print(json.dumps(result | {"mb_s": round(megabytes / seconds), "peak_rss_mb": round(peak)}))


if __name__ == "__main__":
    main()
