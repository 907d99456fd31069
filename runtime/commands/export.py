"""gatework export: a checkpoint becomes a portable ONNX model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gatework.plugins.engine_format import IN_PLACE
from gatework.plugins.errors import GateworkError
from gatework.runtime.commands.common import Commands, add_command, add_drop_tokens, integer, require_build_tools
from gatework.runtime.formatting import counted, size

if TYPE_CHECKING:
    from gatework.export.references import References

_ABOUT = """
    Write the canonical ONNX model of a checkpoint: model.onnx, and its weights as external data beside it.
    Any ONNX runtime of opset 24 runs it: the gatework::MoE operator carries its definition in standard operators.

    With --out a folder is made. With its manifest it is an engine too, which generate, bench and verify take. Its weights are
    written anew; --link lets it share the checkpoint's files instead, so that no weight is copied and none is read: the graph
    stacks, transposes and casts them. Shared files are clones where the disk has them (XFS, Btrfs), else hard links. A hard
    link is the same file: what changes it in place changes both, and onnx's own loader (not ONNX Runtime) refuses it
    for as long as it has its second name. Deleting the checkpoint breaks neither.

    Without --out, model.onnx goes into the checkpoint's folder and reads the files there. Every ONNX tool takes that; it has
    no manifest.

    --golden writes inputs.json and outputs.json, the float32 reference's, in Polygraphy's format, of models without an encoder:
    polygraphy run DIR/model.onnx --onnxrt --load-inputs golden/inputs.json --load-outputs golden/outputs.json
"""
_EXAMPLES = """
    gatework export examples/tiny-mixtral --out onnx/tiny
    gatework export examples/tiny-mixtral --out onnx/tiny --max-seq 64 --golden golden
    gatework export Mixtral-8x7B-v0.1 --dtype bfloat16 --max-seq 4096 --link --out onnx/mixtral
    gatework export Mixtral-8x7B-v0.1 --dtype bfloat16
"""


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(commands, "export", "write a checkpoint as portable ONNX", _ABOUT, _EXAMPLES, run)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to make (default: into CKPT itself)")
    parser.add_argument("--link", action="store_true", help="share the checkpoint's files; on another disk: copy")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (default: float32)")
    parser.add_argument("--max-seq", type=integer, metavar="N", help="cache positions (default: the model's context)")
    parser.add_argument("--all-logits", action="store_true", help="logits of every position, not only of the last")
    add_drop_tokens(parser)
    parser.add_argument(
        "--golden", type=Path, metavar="DIR", help="write inputs and outputs for Polygraphy here, a new folder"
    )
    parser.add_argument("--force", action="store_true", help="replace a model that stands there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(args: argparse.Namespace) -> int:
    """Export, and say how large."""
    require_build_tools("gatework export")
    from gatework.export.build import export_onnx

    if args.link and args.out is None:
        raise GateworkError("--link shares files with a folder", got="no --out", fix="name one, or leave --link out")
    shared: list[References] = []
    out = export_onnx(
        args.checkpoint,
        args.out,
        dtype=args.dtype,
        max_seq=args.max_seq,
        all_logits=args.all_logits,
        drop_tokens=bool(args.drop_tokens),
        golden=args.golden,
        link=args.link,
        force=args.force,
        progress=not args.quiet and sys.stderr.isatty(),
        report=shared.append,
    )
    if not args.quiet:
        own = [out / name for name in IN_PLACE] if args.out is None else out.iterdir()
        nbytes = sum(file.stat().st_size for file in own if file.is_file())
        what = out / IN_PLACE[-1] if args.out is None else out
        print(f"wrote {what}: {args.dtype}, {size(nbytes)}")
        for found in shared:
            print(f"weights: {size(found.nbytes)} of the checkpoint's files, {found.how}")
            for why, names in found.written.items():
                others = f" and {counted(len(names) - 1, 'other')}" if names[1:] else ""
                print(f"copied {names[0]}{others}: {why}")
    return 0
