"""gatework verify: is an engine the model of its checkpoint?"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from gatework.plugins.errors import GateworkError
from gatework.runtime.commands.common import Commands, add_command, positive, read_text, require_build_tools

_ABOUT = """
    Compare an engine with the PyTorch reference of the checkpoint that it was built from: logits in prefill and in cached
    decode, greedy tokens, KL divergence and, with --text, perplexity. Bounds depend on the engine's precision.
    Exit code 0: within all bounds; 1: not.

    Give a text that the model knows how to read: without one the prompts are random tokens, where a quantised model strays
    further from its reference than it does in use. In the table, "passes at" is the bound that this engine would just meet,
    "compared" how many values were compared; rows without a bound are for information.
"""
_EXAMPLES = """
    gatework verify engines/tiny --reference examples/tiny-mixtral
    gatework verify engines/tiny --reference examples/tiny-mixtral --text examples/tiny-mixtral/heldout.txt
    gatework verify engines/tiny --reference examples/tiny-mixtral --tokens 16 --json report.json
"""


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(commands, "verify", "compare an engine with its checkpoint", _ABOUT, _EXAMPLES, run)
    parser.add_argument("engine", type=Path, metavar="ENGINE", help="engine directory")
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="CKPT", help="the checkpoint it was built from"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text for perplexity")
    parser.add_argument(
        "--tokens", type=positive, default=64, metavar="N", help="greedy tokens per prompt (default: 64)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here as well")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of the engine (default: all)")


def run(args: argparse.Namespace) -> int:
    """Verify, print the report, and judge."""
    require_build_tools("gatework verify")
    # PyTorch and ONNX Runtime take turns: the threads of one must not spin while the other works. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from gatework.runtime.verify import verify

    if args.json is not None and not args.json.parent.is_dir():
        raise GateworkError(f"cannot write {args.json}", got="no such folder", fix="make it, or write elsewhere")
    report = verify(
        args.engine,
        args.reference,
        text=None if args.text is None else read_text(args.text),
        tokens=args.tokens,
        threads=args.threads,
        progress=sys.stderr.isatty(),
    )
    print(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0 if report.passed else 1
