"""Exports models of the public ones' true sizes to canonical ONNX: seconds, memory, and what of the weights is copied.

    python -m benchmarks.full_size_export                             # all of them, in build/bench
    python -m benchmarks.full_size_export mixtral-8x7b --dtype float32
    python -m benchmarks.full_size_export dbrx --in-place             # the graph beside the checkpoint's files; checked by onnx

The checkpoints are those of `sparse_checkpoint.py`, whose weights take no room; no weight is read but those that have to be
copied. Each export is a process of its own: seconds from its start to its end, imports included, and of those the ones that a
processor worked; peak RSS as Linux counts it (VmHWM). graph: size of model.onnx. referenced: bytes that the graph reads from
the checkpoint's files. written: bytes on disk of everything else. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.sparse_checkpoint import CKPT, MODELS, make
from gatework.plugins.engine_format import IN_PLACE
from gatework.runtime.formatting import size, table

AIMS = {"mixtral-8x7b": 60, "dbrx": 90, "grok-1": 150, CKPT: 150}  # seconds
CHILD = """
import json, os, sys
from gatework.export.build import export_onnx
source, out, dtype = sys.argv[1:]
found = []
export_onnx(source, out or None, dtype=dtype, link=bool(out), report=found.append)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
(shared,) = found
used = os.times()
result = {"cpu_seconds": round(used.user + used.system, 1), "peak_rss_mb": round(peak / 1e3)}
result |= {"how": shared.how, "referenced": shared.nbytes, "copied": sum(map(len, shared.written.values()))}
print(json.dumps(result))
"""


def measure(model: str, folder: Path, dtype: str, *, in_place: bool) -> dict[str, Any]:
    """Make the checkpoint anew, and export it."""
    checkpoint, out = folder / f"sparse-{model}", folder / f"export-{model}"
    for old in (checkpoint, out):
        shutil.rmtree(old, ignore_errors=True)
    make(model, checkpoint)
    start = time.perf_counter()
    command = [sys.executable, "-c", CHILD, str(checkpoint), "" if in_place else str(out), dtype]
    child = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    home = checkpoint if in_place else out
    own = [home / name for name in IN_PLACE] if in_place else list(home.iterdir())
    result = {"model": model, "dtype": dtype, "seconds": round(seconds, 1)} | json.loads(child.stdout.splitlines()[-1])
    result["graph"] = (home / IN_PLACE[-1]).stat().st_size
    result["written"] = sum(512 * path.stat().st_blocks for path in own if path.is_file())
    if in_place:
        check(home / IN_PLACE[-1])
    return result


def check(path: Path) -> None:
    """Raise unless onnx takes the model; it reads no weight."""
    import onnx

    from gatework.plugins.moe.onnx_op import register_schema

    register_schema()
    onnx.checker.check_model(path, full_check=True)


def row(result: dict[str, Any]) -> list[str]:
    """One line of the table."""
    seconds, aim = f"{result['seconds']:.1f}", AIMS.get(result["model"])
    seconds += f" (aim {aim})" if aim else ""
    sizes = [size(result[name]) for name in ("graph", "referenced", "written")]
    return [
        result["model"],
        seconds,
        f"{result['cpu_seconds']:.1f}",
        f"{result['peak_rss_mb']} MB",
        *sizes,
        str(result["copied"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join([*MODELS, CKPT])} (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="where checkpoints and models go")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--in-place", action="store_true", help="the graph goes into the checkpoint's folder")
    parser.add_argument("--keep", action="store_true", help="leave checkpoints and models there")
    args = parser.parse_args()
    results = []
    for model in args.models or [*MODELS, CKPT]:
        results.append(measure(model, args.folder, args.dtype, in_place=args.in_place))
        print(" ".join(row(results[-1])), file=sys.stderr)
        for made in () if args.keep else (args.folder / f"sparse-{model}", args.folder / f"export-{model}"):
            shutil.rmtree(made, ignore_errors=True)
    header = ["model", "seconds", "of CPU", "peak RSS", "graph", "referenced", "written", "weights copied"]
    print(table([header, *map(row, results)], "<>>>>>>>"))
    print(json.dumps({"exports": results}))


if __name__ == "__main__":
    main()
