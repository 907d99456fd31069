"""How fast the MoE operator's GPU kernels are, against the device's limits and against what PyTorch offers.

    python -m gatework.plugins.moe.bench
    python -m gatework.plugins.moe.bench --shapes mixtral --formats bf16,fp8 --tokens 1,4096 --out build/moe.json
    python -m gatework.plugins.moe.bench --tune mixtral --formats int4 --tokens 1,16

First the device's bandwidth and dense product rates, a layer of tiny size, which is little but launches, and all 32 layers
of a Mixtral in fp8 at one token. Then every shape, format and number of tokens: the time under CUDA-graph replay, its
share of the limit (the longer of reading the chosen experts' weights once and of the products), the peers' times, and for
1, 64 and 4096 tokens the error against float32 on dequantised weights. Each shape runs in a process of its own, so that an
illegal access ends no other. The JSON is written after every case. Exit status 1 if something failed.

--tune times tiles instead, and prints a table of them.

It needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe import measure, tune
from gatework.plugins.moe.bench_layers import FORMATS, SHAPES
from gatework.plugins.moe.measure import TOKENS

RESULTS = Path("benchmarks/results")
Part = Callable[[], Iterator[tuple[str, dict[str, Any]]]]  # yields names in the report and what goes there


def main(arguments: list[str] | None = None) -> int:
    """Run, and return the exit status: 1 if a case failed, 2 for a user's mistake, or without a GPU."""
    args = _parse(arguments)
    try:
        if not torch.cuda.is_available():
            raise GateworkError(
                "the MoE benchmark needs a CUDA GPU", got="none", fix="run it on a machine that has one"
            )
    except GateworkError as error:
        print(error, file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    formats = [each for each in args.formats if not each.startswith("fp8") or (major, minor) >= (8, 9)]
    if args.tune:
        for line in tune.table(args.tune, formats, args.tokens):
            print(line, flush=True)
        return 0
    out = args.out or RESULTS / f"moe-{torch.cuda.get_device_name().lower().replace(' ', '-')}.json"
    names = ("gatework", "torch", "triton", "cuda-bindings")
    about = {
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "versions": {name: version(name) for name in names} | {"cuda": torch.version.cuda},
    }
    report = benchmark(out, about, args.shapes, formats, args.tokens, args.seconds)
    print(json.dumps(report))
    return int(failed(report))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m gatework.plugins.moe.bench",
        description=about[0],
        epilog="\n\n".join(about[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lists = {"shapes": tuple(SHAPES), "formats": tuple(FORMATS), "tokens": TOKENS}
    for name, known in lists.items():
        kind = int if name == "tokens" else str
        parser.add_argument(
            f"--{name}",
            type=partial(_listed, kind=kind, known=None if kind is int else known),
            default=known,
            metavar="A,B",
            help=f"default: {','.join(map(str, known))}",
        )
    parser.add_argument("--seconds", type=float, default=240, help="start no case later than this (default: 240)")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {RESULTS}/moe-DEVICE.json)")
    parser.add_argument("--tune", choices=SHAPES, metavar="SHAPE", help="time tiles for a shape, and nothing else")
    return parser.parse_args(arguments)


def _listed(text: str, kind: Callable[[str], Any], known: tuple[Any, ...] | None) -> tuple[Any, ...]:
    values = tuple(kind(word) for word in text.split(","))
    if known is not None and (unknown := [value for value in values if value not in known]):
        raise argparse.ArgumentTypeError(f"unknown {unknown[0]}; expected {', '.join(known)}")
    return values


def benchmark(
    out: Path, about: dict[str, Any], shapes: list[str], formats: list[str], tokens: tuple[int, ...], seconds: float
) -> dict[str, Any]:
    """All that is asked for, as far as the time allows; shapes share what is left of it evenly."""
    start = time.time()
    report: dict[str, Any] = about | {"limits": {"error": "not measured"}, "cases": [], "failed": []}
    fp8 = "fp8" in formats
    collect(partial(measure.bench_device, fp8=fp8, stack=fp8 and "mixtral" in shapes), report, out)
    for number, shape in enumerate(shapes):
        now = time.time()
        deadline = now + (start + seconds - now) / (len(shapes) - number)
        collect(partial(measure.bench_shape, shape, formats, tokens, report["limits"], deadline), report, out)
    report["seconds"] = round(time.time() - start, 1)
    _write(out, report)
    return report


def collect(part: Part, report: dict[str, Any], out: Path) -> None:
    """Run a part in a process of its own; the report holds what it yields as soon as it does, and whether it broke."""
    context = get_context("forkserver")
    context.set_forkserver_preload([measure.__name__])  # imports PyTorch once, without touching CUDA
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(part, sending))
    process.start()
    sending.close()
    while True:
        try:
            name, value = receiving.recv()
        except (EOFError, OSError):  # it has ended, in the middle of a message even
            break
        if isinstance(report.get(name), list):
            report[name].append(value)
        else:
            report[name] = value
        print(json.dumps({name: value}), flush=True)
        _write(out, report)
    process.join()
    if process.exitcode:
        report["failed"].append({"error": f"exit status {process.exitcode}"})
        _write(out, report)


def _send(part: Part, connection: Connection) -> None:
    gc.freeze()  # every capture collects garbage: what was imported is none
    try:
        for each in part():
            connection.send(each)
    except Exception as error:
        connection.send(("failed", {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}))


def failed(report: dict[str, Any]) -> bool:
    """Whether something broke, or was wrong."""
    parts = [*report["cases"], *(value for value in report.values() if isinstance(value, dict))]
    return bool(report["failed"]) or any("error" in part or part.get("passed") is False for part in parts)


def _write(out: Path, report: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial_file = out.with_name(f".{out.name}")
    partial_file.write_text(json.dumps(report, indent=1) + "\n")
    partial_file.replace(out)


if __name__ == "__main__":
    sys.exit(main())
