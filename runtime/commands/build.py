"""gatework build: a checkpoint becomes an engine directory."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatework.runtime.commands.common import (
    Commands,
    add_command,
    add_drop_tokens,
    integer,
    memory_size,
    require_build_tools,
)
from gatework.runtime.formatting import counted, size, table

if TYPE_CHECKING:
    from gatework.export.config import ModelConfig
    from gatework.export.tensorrt.preflight import Preflight

_ABOUT = """
    Compile a checkpoint folder (Hugging Face, Mistral or Meta layout) into an engine directory.
    The directory appears only when it is complete.

    Targets and precisions: cpu: fp32, int8, int4. cuda: fp32, bf16, fp16, int8, int4. a100: bf16, fp16, int8, int4.
    ada, rtx50, h100, h200: these and fp8.
    cpu and cuda engines run on ONNX Runtime, cuda on any NVIDIA GPU from SM80 on, and are built on any machine.
    a100, ada and rtx50 are built by TensorRT-RTX on any machine, or by TensorRT on such a GPU; h100 and h200 by TensorRT
    on such a GPU. int8 and fp8 of these need --calibration. Engines with experts hold their GPU kernels, compiled by Triton
    on any machine (pip install 'gatework[triton]').

    --calibration-text makes int4 engines, and experts in fp8, better and their build slower: GPTQ rounds each weight with
    knowledge of the others and of their inputs. The text should be like what the model will see; some ten thousand tokens do.
    --pure makes int4 engines smaller and faster, and less exact; it wants such a text.

    --stages N is for models that no single device holds: N graphs with their weights, each of some whole layers, which run in
    turn in one process, or each in a process of its own (gatework generate --stage-processes).

    Models with an encoder (Switch Transformer) take no --target cuda, --calibration-text, --stages, --strip-weights or --taps.
"""
_EXAMPLES = """
    gatework build examples/tiny-mixtral --precision int8 --out engines/tiny
    gatework build Mixtral-8x7B-v0.1 --precision int4 --max-seq 8192 --max-batch 4 --out engines/mixtral
    gatework build examples/tiny-mixtral --precision int4 --group-size 64 --out engines/tiny --force
    gatework build Mixtral-8x7B-v0.1 --precision int4 --calibration-text sample.txt --out engines/mixtral
    gatework build Mixtral-8x7B-v0.1 --precision int4 --pure --group-size 128 --out engines/mixtral-fast
    gatework build examples/tiny-mixtral --target cuda --precision bf16 --out engines/tiny-cuda
    gatework build dbrx-base --target cuda --precision bf16 --stages 4 --out engines/dbrx
    gatework build examples/tiny-mixtral --target a100 --precision bf16 --out engines/tiny-a100
    gatework build Mixtral-8x7B-v0.1 --target a100 --precision int8 --calibration mixtral.json --out engines/mixtral-a100
"""
_SETTINGS: tuple[str, ...] = (
    "target",
    "precision",
    "max_seq",
    "max_batch",
    "prefill_chunk",
    "group_size",
    "calibration_text",
    "pure",
    "stages",
    "drop_tokens",
    "toolchain",
    "calibration",
)
_SETTINGS += ("strip_weights", "plan_only", "timing_cache", "device_memory", "taps", "weight_only")


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(commands, "build", "compile a checkpoint into an engine", _ABOUT, _EXAMPLES, run)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="engine directory to make")
    parser.add_argument("--target", default="cpu", help="what the engine runs on (default: cpu)")
    parser.add_argument("--precision", default="int8", help="of the weights (default: int8)")
    parser.add_argument(
        "--max-seq", type=integer, metavar="N", help="most tokens of a sequence (default: the model's context)"
    )
    parser.add_argument("--max-batch", type=integer, metavar="N", help="most sequences at once (default: 8)")
    parser.add_argument("--prefill-chunk", type=integer, metavar="N", help="most prompt tokens per step (default: 512)")
    parser.add_argument(
        "--group-size",
        type=integer,
        metavar="N",
        help="weights that share a scale (default: cpu and cuda 128 for int8, 32 for int4; else 128 for int4)",
    )
    parser.add_argument(
        "--calibration-text",
        type=Path,
        metavar="FILE",
        help="round int4 weights, and experts in fp8, for what this sample text (UTF-8) makes of their inputs",
    )
    parser.add_argument(
        "--pure",
        action="store_true",
        default=None,
        help="int4 (cpu, cuda): 4 bits for attention beside experts and the output head too, not 8",
    )
    parser.add_argument(
        "--stages",
        type=integer,
        metavar="N",
        help="cut the model at layer boundaries into N parts (cpu, cuda; default: 1)",
    )
    add_drop_tokens(parser)
    parser.add_argument("--force", action="store_true", help="replace an engine that stands at DIR")
    parser.add_argument(
        "--if-changed",
        action="store_true",
        help="do nothing if DIR is what would be built: same files, settings, tools",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    _add_gpu_options(parser)


def _add_gpu_options(parser: argparse.ArgumentParser) -> None:
    gpu = parser.add_argument_group("TensorRT targets")
    gpu.add_argument(
        "--calibration", type=Path, metavar="FILE", help="ranges of activations, from `gatework calibrate`"
    )
    gpu.add_argument(
        "--weight-only",
        action="store_true",
        default=None,
        help="fp8 of models with experts without rounding activations: long prompts are computed as finely as decode, no "
        "faster than in bf16; experts alone have 8 bits, and no --calibration is needed",
    )
    gpu.add_argument("--toolchain", help="tensorrt or tensorrt_rtx (default: the first that can build here)")
    gpu.add_argument(
        "--strip-weights",
        action="store_true",
        default=None,
        help="keep dense weights out of the plan, in a file beside it, for refitting",
    )
    gpu.add_argument(
        "--plan-only", action="store_true", default=None, help="build the plan and leave the experts unpacked"
    )
    gpu.add_argument(
        "--taps",
        action="store_true",
        default=None,
        help="for verification: a plan that gives up what it computes inside its layers (bf16, fp16, int4; fp8 --weight-only)",
    )
    gpu.add_argument("--timing-cache", type=Path, metavar="FILE", help="kernel timings to reuse and to add to")
    gpu.add_argument("--device-memory", type=memory_size, metavar="SIZE", help="such as 40GiB (default: the target's)")


def run(args: argparse.Namespace) -> int:
    """Build, and say how large and how long."""
    require_build_tools("gatework build")
    from gatework.export.options import BuildOptions
    from gatework.export.uptodate import is_current

    settings: dict[str, Any] = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    if args.if_changed and is_current(args.checkpoint, args.out, BuildOptions(**settings)):
        if not args.quiet:
            print(f"{args.out} is up to date")
        return 0
    from gatework.export.build import build_engine

    start = time.perf_counter()
    out = build_engine(
        args.checkpoint,
        args.out,
        force=args.force,
        progress=not args.quiet and sys.stderr.isatty(),
        report=None if args.quiet else _report,
        **settings,
    )
    if not args.quiet:
        total = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        seconds = time.perf_counter() - start
        print(f"built {out}: {args.precision} for {args.target}, {size(total)}, in {seconds:.1f} s")
    return 0


def _report(found: Preflight) -> None:
    """What is going to be built, before the work begins."""
    from gatework.export.tensorrt.kernels import most_tokens
    from gatework.export.tensorrt.scales import static_products

    options, config, compiler = found.options, found.config, found.compiler
    experts = "packed beside the plan"
    if options.plan_only:
        experts = "left unpacked"
    where = f"for {compiler.sm}, ahead of time" if compiler.sm else "for the GPU at hand"
    ranges = f"from {options.calibration}" if options.calibration else "none"
    precision = f"{options.precision}, weight-only" if options.weight_only else options.precision
    if static_products(config, options) and options.calibration is None:  # then it is of the plan alone
        ranges = "placeholders: this plan's numbers mean nothing"
    cached = f"{counted(options.max_batch, 'sequence')} of {counted(options.max_seq or 0, 'position')}"
    cached += ", and their prompts" if config.encoder_layers else ""
    rows = [
        ("target", options.target, f"{compiler.module} {compiler.version}, {where}"),
        ("precision", precision, f"activation ranges: {ranges}"),
        ("layers", f"{config.num_layers}", counted(config.moe_layers, "MoE plugin")),
        *_encoder_rows(config),
        ("plan", size(found.plan), "left out: stripped" if options.strip_weights else "dense weights, without kernels"),
        ("experts", size(found.experts), experts if config.moe else "none"),
        ("kernels", f"{found.kernels}", "of the MoE operator, compiled by Triton" if found.kernels else "none"),
        ("KV cache", size(found.kv_cache), cached),
        ("scratch", size(found.scratch), f"estimated, for steps of {counted(most_tokens(config, options), 'token')}"),
        ("in all", size(found.needed), f"of {size(found.memory)}: {'fits' if found.fits else 'DOES NOT FIT'}"),
    ]
    print(table(rows, "<><"), flush=True)


def _encoder_rows(config: ModelConfig) -> list[tuple[str, str, str]]:
    """Of the table, where there is an encoder."""
    if config.encoder is None:
        return []
    plugins = counted(config.encoder.moe_layers, "MoE plugin")
    return [("encoder", f"{config.encoder_layers}", f"{plugins}, a plan of its own")]
