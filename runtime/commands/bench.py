"""gatework bench: how fast is an engine on this machine?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gatework.runtime.commands.common import (
    Commands,
    add_command,
    add_share_weights,
    add_stage_processes,
    add_threads,
    positive,
)
from gatework.runtime.formatting import counted, size, table

_ABOUT = """
    Measure load time, prefill, decode and memory with random prompts and greedy tokens, as medians over several
    repetitions. The last line of output is one JSON object.
"""
_EXAMPLES = """
    gatework bench engines/tiny
    gatework bench engines/mixtral --prompt-tokens 2048 --new-tokens 128 --batch 4 --repeat 5
    gatework bench engines/tiny | tail -1 | python -m json.tool
"""


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(commands, "bench", "measure an engine's speed", _ABOUT, _EXAMPLES, run)
    parser.add_argument("engine", type=Path, metavar="ENGINE", help="engine directory")
    parser.add_argument("--prompt-tokens", type=positive, metavar="N", help="per prompt (default: 512, or what fits)")
    parser.add_argument(
        "--new-tokens", type=positive, metavar="N", help="decoded per prompt (default: 64, or what fits)"
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="prompts at once (default: 1)")
    parser.add_argument("--repeat", type=positive, default=3, metavar="N", help="repetitions (default: 3)")
    add_threads(parser)
    add_stage_processes(parser)
    add_share_weights(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, and print."""
    from gatework.runtime.bench import bench

    result = bench(
        args.engine,
        args.prompt_tokens,
        args.new_tokens,
        args.batch,
        args.repeat,
        args.threads,
        stage_processes=args.stage_processes,
        share_weights=args.share_weights,
    )
    weights = size(result["weight_bytes_per_token"])
    prompts, new = (f"{result['batch']} × {counted(result[name], 'token')}" for name in ("prompt_tokens", "new_tokens"))
    rows = [
        ("load", f"{result['load_s']:g} s", ""),
        ("prefill", f"{result['prefill_tok_s']:,.1f} tok/s", prompts),
        ("first token", f"{result['ttft_ms']:,.1f} ms", ""),
        ("decode", f"{result['decode_tok_s']:,.1f} tok/s", new),
        ("weights read", f"{result['gb_s']:,.2f} GB/s", f"{weights} per token"),
        ("peak memory", f"{result['peak_rss_mb']:,.0f} MB", ""),
    ]
    threads = counted(result["threads"], "thread")
    print(f"{result['engine']}: {result['precision']} on {result['target']}, {threads}")
    print(table(rows, "<><"))
    print(json.dumps(result))
    return 0
