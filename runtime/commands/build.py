"""gatework build: a checkpoint becomes an engine directory."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gatework.runtime.commands.common import Commands, add_command, require_build_tools
from gatework.runtime.formatting import size

_ABOUT = """
    Compile a checkpoint folder (Hugging Face, Mistral or Meta layout) into an engine directory.
    The directory appears only when it is complete.
"""
_EXAMPLES = """
    gatework build examples/tiny-mixtral --precision int8 --out engines/tiny
    gatework build Mixtral-8x7B-v0.1 --precision int4 --max-seq 8192 --max-batch 4 --out engines/mixtral
    gatework build examples/tiny-mixtral --precision int4 --group-size 64 --out engines/tiny --force
"""


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(commands, "build", "compile a checkpoint into an engine", _ABOUT, _EXAMPLES, run)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="engine directory to make")
    parser.add_argument("--target", default="cpu", help="what the engine runs on (default: cpu)")
    parser.add_argument("--precision", default="int8", help="of the weights: fp32, int8 or int4 (default: int8)")
    parser.add_argument(
        "--max-seq", type=int, metavar="N", help="most tokens of a sequence (default: the model's context)"
    )
    parser.add_argument("--max-batch", type=int, metavar="N", help="most sequences at once (default: 8)")
    parser.add_argument("--prefill-chunk", type=int, metavar="N", help="most prompt tokens per step (default: 512)")
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="weights that share a scale (default: 256 for int8, 32 for int4)"
    )
    parser.add_argument("--force", action="store_true", help="replace an engine that stands at DIR")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(args: argparse.Namespace) -> int:
    """Build, and say how large and how long."""
    require_build_tools("gatework build")
    from gatework.export.build import build_engine

    names = ("max_seq", "max_batch", "prefill_chunk", "group_size")
    limits = {name: value for name in names if (value := getattr(args, name)) is not None}
    start = time.perf_counter()
    out = build_engine(
        args.checkpoint,
        args.out,
        target=args.target,
        precision=args.precision,
        force=args.force,
        progress=not args.quiet and sys.stderr.isatty(),
        **limits,
    )
    if not args.quiet:
        total = sum(file.stat().st_size for file in out.iterdir())
        seconds = time.perf_counter() - start
        print(f"built {out}: {args.precision} for {args.target}, {size(total)}, in {seconds:.1f} s")
    return 0
