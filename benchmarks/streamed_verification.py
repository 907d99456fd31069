"""Memory of verifying a large model: an int4 engine of a random checkpoint of 8.6 GB, in a process of its own.

    python -m benchmarks.streamed_verification build/bench/random-mixtral-8gb

Prints the size of the checkpoint, the peak resident memory of the verification, weights of the engine that are mapped from its
files included, and the time. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.random_mixtral import make
from gatework.export.build import build_engine
from gatework.runtime.formatting import size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="made if it is not there")
    parser.add_argument("--shape", default="mixtral-8gb")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--window", default="64")
    args = parser.parse_args()
    if not (args.checkpoint / "config.json").exists():
        make(args.checkpoint, args.shape)
    engine = args.checkpoint.with_name(f"{args.checkpoint.name}-cpu-{args.precision}")
    if not engine.exists():
        build_engine(args.checkpoint, engine, precision=args.precision, max_seq=1024, progress=sys.stderr.isatty())
    words = [str(engine), "--reference", str(args.checkpoint), "--tokens", "8", "--window", args.window]
    program = f"from gatework.runtime.cli import main; import sys; status = main(['verify', *{words!r}]); "
    program += (
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr); sys.exit(status)"
    )
    begin = time.perf_counter()
    child = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - begin
    peak = int(child.stderr.split()[-1]) * 1024
    stored = sum(file.stat().st_size for file in args.checkpoint.iterdir())
    print(
        f"checkpoint {size(stored)}, peak resident memory {size(peak)}, {seconds:.0f} s, exit code {child.returncode}"
    )
    print(json.dumps({"checkpoint": stored, "peak": peak, "seconds": seconds, "status": child.returncode}))
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
