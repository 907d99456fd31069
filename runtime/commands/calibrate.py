"""gatework calibrate: the ranges of a checkpoint's activations over a text, for engines that quantise them."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from gatework.plugins.engine_format import sha256
from gatework.plugins.errors import GateworkError
from gatework.runtime.commands.common import (
    Commands,
    add_command,
    check_writable,
    integer,
    number,
    positive,
    read_text,
    require_build_tools,
)
from gatework.runtime.formatting import counted

_ABOUT = """
    Run a text through a checkpoint's layers in float32, one layer in memory at a time, and write how large the inputs of
    its dense products get. Experts are not measured: their activations are scaled as they run.

    The text should be like what the model will see; some thousands of tokens do.
"""
_EXAMPLES = """
    gatework calibrate examples/tiny-mixtral --text examples/tiny-mixtral/heldout.txt --out calibration.json
    gatework calibrate Llama-2-7b-hf --text wiki.txt --smooth 0.5 --out llama-int8.json
    gatework calibrate Mixtral-8x7B-v0.1 --ids tokens.txt --tokens 4096 --window 1024 --out mixtral.json
"""


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(commands, "calibrate", "measure a checkpoint's activations", _ABOUT, _EXAMPLES, run)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text")
    source.add_argument("--ids", type=Path, metavar="FILE", help="token ids in decimal, with white space between them")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--tokens", type=positive, default=8192, metavar="N", help="of the text, from its start (default: 8192)"
    )
    parser.add_argument(
        "--window", type=integer, metavar="N", help="tokens run together (default: 512, or the model's context)"
    )
    parser.add_argument(
        "--smooth",
        type=number,
        metavar="ALPHA",
        help="balance activations and weights by SmoothQuant, for int8; 0.5 suits most models (default: do not)",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(args: argparse.Namespace) -> int:
    """Calibrate, and say over how much."""
    require_build_tools("gatework calibrate")
    from gatework.export.calibrate import calibrate
    from gatework.export.checkpoint import Checkpoint

    start = time.perf_counter()
    _check_out(args.out, args.force)
    checkpoint = Checkpoint.open(args.checkpoint)
    file = args.text if args.ids is None else args.ids
    text = read_text(file)
    token_ids = _encode(checkpoint.path, text) if args.ids is None else _parse_ids(file, text)
    calibration = calibrate(
        checkpoint,
        token_ids[: args.tokens],
        window=args.window,
        smooth=args.smooth,
        text_sha256=sha256(file),
        progress=not args.quiet and sys.stderr.isatty(),
    )
    calibration.save(args.out)
    if not args.quiet:
        ranges, seconds = counted(len(calibration.ranges), "range"), time.perf_counter() - start
        print(f"wrote {args.out}: {ranges} over {counted(calibration.tokens, 'token')}, in {seconds:.1f} s")
    return 0


def _check_out(out: Path, force: bool) -> None:
    """Raise where the file could not be written after all the work."""
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise GateworkError(
            f"{out} is in the way",
            got="a folder, link or device",
            expected="a file to write",
            fix="choose another --out",
        )
    if out.exists() and not force:
        raise GateworkError(f"{out} exists", fix="pass --force to replace it")
    check_writable(out)


def _encode(checkpoint: Path, text: str) -> list[int]:
    from gatework.export.tokenizer_files import encode_text, open_tokenizer

    tokenizer = open_tokenizer(checkpoint)
    if tokenizer is None:
        raise GateworkError(f"{checkpoint} has no tokenizer", fix="give token ids instead of text: --ids FILE")
    return encode_text(checkpoint, tokenizer, text)


def _parse_ids(path: Path, text: str) -> list[int]:
    words = text.split()
    bad = next((word for word in words if not re.fullmatch("[0-9]{1,18}", word)), None)
    if bad is not None:
        raise GateworkError(f"{path} does not hold token ids", got=repr(bad[:20]), expected="decimal numbers")
    return [int(word) for word in words]
