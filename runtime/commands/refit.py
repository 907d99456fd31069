"""gatework refit: a checkpoint's dense weights go into a plan that was built without them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gatework.runtime.commands.common import Commands, add_command, require_build_tools

_ABOUT = """
    Make a whole engine of one that `gatework build --strip-weights` made, and a checkpoint of the same architecture: nothing
    is compiled again. Needs a GPU of the engine's target.
"""
_EXAMPLES = """
    gatework refit engines/mixtral-stripped Mixtral-8x7B-Instruct-v0.1 --out engines/instruct
    gatework refit engines/stripped-int8 ~/finetune --calibration finetune.json --out engines/finetune
"""


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(commands, "refit", "put weights into a stripped engine", _ABOUT, _EXAMPLES, run)
    parser.add_argument("engine", type=Path, metavar="ENGINE", help="engine built with --strip-weights")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="engine directory to make")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="of this checkpoint, for int8 and fp8")
    parser.add_argument("--force", action="store_true", help="replace an engine that stands at DIR")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(args: argparse.Namespace) -> int:
    """Refit."""
    require_build_tools("gatework refit")
    from gatework.export.tensorrt.refit import refit_engine

    progress = not args.quiet and sys.stderr.isatty()
    out = refit_engine(
        args.engine, args.checkpoint, args.out, calibration=args.calibration, force=args.force, progress=progress
    )
    if not args.quiet:
        print(f"wrote {out}")
    return 0
