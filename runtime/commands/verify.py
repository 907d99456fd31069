"""gatework verify: is an engine the model of its checkpoint?"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from gatework.plugins.errors import GateworkError
from gatework.runtime.commands.common import (
    Commands,
    add_command,
    add_threads,
    check_writable,
    positive,
    read_text,
    require_build_tools,
)

_ABOUT = """
    Compare an engine with the PyTorch reference of the checkpoint that it was built from: every step inside every layer
    (keys and values, what the heads read, router logits, experts, the residual stream), then logits in prefill and in cached
    decode, greedy tokens, KL divergence and, with --text, perplexity. Exit code 0: within all bounds; 1: not;
    2: a mistake in use, told in one line.

    A step is judged on the engine's own inputs to it, so the report names where a fault enters, not where it shows. Its
    bound is one and a half times the error that the engine's number formats leave there, computed from the weights and
    activations at hand; bounds of the logits depend on the precision. Without a text the tokens are random, and quality
    is not judged. In the tables, "passes at" is the bound that this engine would just meet; rows without a bound are
    for information.

    With --against another engine takes the reference's place, such as the one from before an upgrade: the logits of both are
    compared, and what they computed inside the layers.

    The reference is read layer by layer: memory holds one layer, one expert, and the activations.
"""
_EXAMPLES = """
    gatework verify engines/tiny --reference examples/tiny-mixtral
    gatework verify engines/tiny --reference examples/tiny-mixtral --text examples/tiny-mixtral/heldout.txt
    gatework verify engines/new --against engines/old
    gatework verify engines/tiny --reference examples/tiny-mixtral --html report.html --junit report.xml --json report.json
"""


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(commands, "verify", "compare an engine with its checkpoint", _ABOUT, _EXAMPLES, run)
    parser.add_argument("engine", type=Path, metavar="ENGINE", help="engine directory")
    other = parser.add_mutually_exclusive_group(required=True)
    other.add_argument("--reference", type=Path, metavar="CKPT", help="the checkpoint it was built from")
    other.add_argument("--against", type=Path, metavar="ENGINE", help="another engine of the same model, instead")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text for perplexity")
    parser.add_argument(
        "--tokens", type=positive, default=64, metavar="N", help="greedy tokens per prompt (default: 64)"
    )
    parser.add_argument("--window", type=positive, default=256, metavar="N", help="tokens per window (default: 256)")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep what is done here; the same command goes on from it"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report here as a page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here as JSON")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the report here as JUnit XML")
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Verify, print the report, and judge."""
    require_build_tools("gatework verify")
    # PyTorch and ONNX Runtime take turns: the threads of one must not spin while the other works. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from gatework.runtime.verify import compare_engines, verify
    from gatework.runtime.verify.html import to_html
    from gatework.runtime.verify.junit import to_junit

    for path in (args.html, args.json, args.junit):
        if path is not None:
            check_writable(path)
    if args.work is not None and args.against is not None:
        raise GateworkError("--work is for --reference", got="--against", fix="leave --work out")
    settings: dict[str, Any] = {"work": args.work} if args.against is None else {}
    judge, other = (verify, args.reference) if args.against is None else (compare_engines, args.against)
    report = judge(
        args.engine,
        other,
        window=args.window,
        **settings,
        text=None if args.text is None else read_text(args.text),
        tokens=args.tokens,
        threads=args.threads,
        progress=sys.stderr.isatty(),
    )
    print(report)
    found = report.to_dict()
    writers = ((args.html, to_html), (args.json, _to_json), (args.junit, to_junit))
    for path, write in writers:
        if path is not None:
            path.write_text(write(found), encoding="utf-8", errors="backslashreplace")  # a path may be no text
    return 0 if report.passed else 1


def _to_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=1, allow_nan=False) + "\n"
