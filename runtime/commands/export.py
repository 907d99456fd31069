"""gatework export: a checkpoint becomes a portable ONNX model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gatework.runtime.commands.common import Commands, add_command, require_build_tools
from gatework.runtime.formatting import size

_ABOUT = """
    Write the canonical ONNX model of a checkpoint: model.onnx, with its weights in safetensors files beside it.
    Any ONNX runtime of opset 24 runs it: the gatework::MoE operator carries its definition in standard operators. With its
    manifest the folder is an engine too, which generate, bench and verify take.

    --golden writes inputs.json and outputs.json, the float32 reference's, in Polygraphy's format:
    polygraphy run DIR/model.onnx --onnxrt --load-inputs golden/inputs.json --load-outputs golden/outputs.json
"""
_EXAMPLES = """
    gatework export examples/tiny-mixtral --out onnx/tiny
    gatework export examples/tiny-mixtral --out onnx/tiny --max-seq 64 --golden golden
    gatework export Mixtral-8x7B-v0.1 --dtype bfloat16 --max-seq 4096 --all-logits --out onnx/mixtral
"""


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(commands, "export", "write a checkpoint as portable ONNX", _ABOUT, _EXAMPLES, run)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (default: float32)")
    parser.add_argument("--max-seq", type=int, metavar="N", help="cache positions (default: the model's context)")
    parser.add_argument("--all-logits", action="store_true", help="logits of every position, not only of the last")
    parser.add_argument(
        "--golden", type=Path, metavar="DIR", help="write inputs and outputs for Polygraphy here, a new folder"
    )
    parser.add_argument("--force", action="store_true", help="replace a model that stands at DIR")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(args: argparse.Namespace) -> int:
    """Export, and say how large."""
    require_build_tools("gatework export")
    from gatework.export.build import export_onnx

    out = export_onnx(
        args.checkpoint,
        args.out,
        dtype=args.dtype,
        max_seq=args.max_seq,
        all_logits=args.all_logits,
        golden=args.golden,
        force=args.force,
        progress=not args.quiet and sys.stderr.isatty(),
    )
    if not args.quiet:
        print(f"wrote {out}: {args.dtype}, {size(sum(file.stat().st_size for file in out.iterdir()))}")
    return 0
