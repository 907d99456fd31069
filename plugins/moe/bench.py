"""How fast the MoE operator's GPU kernels are, against the device's limits and against what PyTorch offers.

    python -m gatework.plugins.moe.bench
    python -m gatework.plugins.moe.bench --shapes mixtral --formats bf16,fp8 --tokens 1,4096 --out build/moe.json

First the device's copy bandwidth and dense product rates; then every shape, format and number of tokens: the time under
CUDA-graph replay, its share of the limit (the longer of reading the chosen experts' weights once and of the products), the
peers' times, and for 64 tokens the error against float32 on dequantised weights. Last, all 32 layers of a Mixtral in fp8
at one token, and a layer of tiny size, which is little but launches. Writes JSON; prints it as one line at the end.

It needs a CUDA GPU and has not run on one yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe import peers, torch_op
from gatework.plugins.moe.spec import MoEAttributes, MoESizes

RESULTS = Path("benchmarks/results")
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
FORMATS: dict[str, tuple[Any, int]] = {
    "bf16": ("dense", 0),
    "fp8": ("fp8_e4m3", 0),
    "int8": ("int8", 0),
    "int4": ("int4", 128),
}
CHECKED = 64  # tokens
STACK_LAYERS = 32


class Shape(NamedTuple):
    """Of one MoE layer."""

    sizes: MoESizes  # T is 1
    attributes: MoEAttributes


SHAPES = {
    "mixtral": Shape(MoESizes(1, 4096, 8, 14336), MoEAttributes(top_k=2)),
    "dbrx": Shape(MoESizes(1, 6144, 16, 10752), MoEAttributes(top_k=4)),
    "grok-1": Shape(MoESizes(1, 6144, 8, 32768), MoEAttributes(top_k=2, activation="gelu", renormalize=False)),
    "openmoe-8b": Shape(
        MoESizes(1, 2048, 32, 8192),
        MoEAttributes(top_k=2, glu="three_way", renormalize=False, capacity_factor=2.0, min_capacity=4),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run, and return the exit status: 2 for a user's mistake, or without a GPU."""
    args = _parse(arguments)
    try:
        if not torch.cuda.is_available():
            raise GateworkError(
                "the MoE benchmark needs a CUDA GPU", got="none", fix="run it on a machine that has one"
            )
        out = args.out or RESULTS / f"moe-{torch.cuda.get_device_name().lower().replace(' ', '-')}.json"
        report = benchmark(args)
    except GateworkError as error:
        print(error, file=sys.stderr)
        return 2
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    about = __doc__.split("\n\n")
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
    return parser.parse_args(arguments)


def _listed(text: str, kind: Callable[[str], Any], known: tuple[Any, ...] | None) -> tuple[Any, ...]:
    values = tuple(kind(word) for word in text.split(","))
    if known is not None and (unknown := [value for value in values if value not in known]):
        raise argparse.ArgumentTypeError(f"unknown {unknown[0]}; expected {', '.join(known)}")
    return values


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """All that is asked for, as far as the time allows."""
    start = time.perf_counter()
    major, minor = torch.cuda.get_device_capability()
    formats = [each for each in args.formats if each != "fp8" or (major, minor) >= (8, 9)]
    limits = measure_limits(fp8="fp8" in formats)
    print(json.dumps(limits), flush=True)
    cases: list[dict[str, Any]] = []
    left_out = []
    for shape in args.shapes:
        for name in formats:
            if time.perf_counter() - start > args.seconds:
                left_out.append(f"{shape} {name}")
                continue
            cases += bench_format(shape, name, args.tokens, limits)
            torch.cuda.empty_cache()
    stack = None
    if "fp8" in formats and "mixtral" in args.shapes:
        stack = bench_stack(limits)
    return {
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "versions": {name: version(name) for name in ("gatework", "torch", "triton", "cuda-bindings")}
        | {"cuda": torch.version.cuda},
        "limits": limits,
        "cases": cases,
        "mixtral_fp8_stack": stack,
        "tiny_layer": bench_tiny(),
        "left_out_for_time": left_out,
        "seconds": round(time.perf_counter() - start, 1),
    }


def measure_limits(*, fp8: bool) -> dict[str, float]:
    """Bytes per second of a copy, read and write counted; operations per second of large dense products."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = {"copy_gb_s": 2 * source.numel() / seconds_of(partial(target.copy_, source)) / 1e9}
    del source, target
    N = 8192
    a = torch.randn(N, N, device="cuda", dtype=torch.bfloat16)
    operations = 2 * N**3 / 1e12
    found["bf16_tflop_s"] = operations / seconds_of(lambda: a @ a.T)
    i = torch.randint(-127, 127, (N, N), device="cuda", dtype=torch.int8)
    found["int8_tflop_s"] = operations / seconds_of(lambda: torch._int_mm(i, i.T))
    if fp8:
        f, one = a.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
        run = partial(torch._scaled_mm, f, f.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
        found["fp8_tflop_s"] = operations / seconds_of(run)
    return {name: round(value, 1) for name, value in found.items()}


def seconds_of(run: Callable[[], object], *, graph: bool = True, least: float = 0.05) -> float:
    """Median time of a run among enough to fill `least` seconds three times; captured in a CUDA graph unless told not to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, loads, allocates
            run()
    torch.cuda.synchronize()
    repeat: Callable[[], object] = run
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        repeat = captured.replay
    repeat()

    def timed(count: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(count):
            repeat()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / count

    count = max(3, int(least / max(timed(3), 1e-6)))
    return statistics.median(timed(count) for _ in range(3))


def random_weights(shape: Shape, attributes: MoEAttributes) -> dict[str, Tensor]:
    """Weights and scales of one layer; products of them keep the order of magnitude of what goes in."""
    _, D, E, I = shape.sizes
    found = {}
    for name, rows, columns in (("w_in", attributes.w_in_rows(I), D), ("w_out", D, I)):
        spread = columns**-0.5
        experts = [_random_expert(rows, columns, spread, attributes.weight_format) for _ in range(E)]
        found[name] = torch.stack(experts)
        if attributes.weight_format != "dense":
            step = spread / {"fp8_e4m3": 100.0, "int8": 40.0, "int4": 2.5}[attributes.weight_format]
            scales = torch.rand(E, rows, attributes.groups(columns), device="cuda")
            found[f"{name}_scale"] = step * (0.5 + scales)
    return found


def _random_expert(rows: int, columns: int, spread: float, weight_format: str) -> Tensor:
    if weight_format == "int4":
        return torch.randint(0, 256, (rows, (columns + 1) // 2), device="cuda", dtype=torch.uint8)
    w = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    if weight_format == "fp8_e4m3":
        return (100 * w).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (40 * w).round().clamp(-127, 127).to(torch.int8) if weight_format == "int8" else spread * w


def dequantized(weights: dict[str, Tensor], name: str, columns: int, attributes: MoEAttributes) -> Tensor:
    """float32 [E, rows, columns]."""
    w = weights[name]
    if attributes.weight_format == "dense":
        return w.float()
    if attributes.weight_format == "int4":
        w = torch.stack(((w & 15).to(torch.int8) - 8, (w >> 4).to(torch.int8) - 8), dim=-1).flatten(-2)[..., :columns]
    scale = weights[f"{name}_scale"]
    return w.float() * scale.repeat_interleave(attributes.group_size or columns, dim=-1)[..., :columns]


def with_format(attributes: MoEAttributes, name: str) -> MoEAttributes:
    """The same operator on weights of a format of FORMATS."""
    weight_format, group = FORMATS[name]
    return MoEAttributes.from_dict(attributes.to_dict() | {"weight_format": weight_format, "group_size": group})


def bench_format(shape_name: str, name: str, tokens: tuple[int, ...], limits: dict[str, float]) -> list[dict[str, Any]]:
    """One case per number of tokens, on the same weights."""
    shape = SHAPES[shape_name]
    attributes = with_format(shape.attributes, name)
    torch.manual_seed(0)
    weights = random_weights(shape, attributes)
    dense = weights if name == "bf16" else random_weights(shape, shape.attributes)
    found = []
    for T in tokens:
        _, D, E, _ = shape.sizes
        x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
        logits = 2 * torch.randn(T, E, device="cuda")
        ours = seconds_of(partial(torch_op.moe, x, logits, attributes=attributes, **weights))
        case: dict[str, Any] = {"shape": shape_name, "format": name, "tokens": T, "us": round(1e6 * ours, 1)}
        case |= share_of_limit(shape, attributes, name, T, logits, weights, ours, limits)
        case["peers_us"] = peers_of(x, logits, weights, dense, attributes, name)
        fastest = min((value for value in case["peers_us"].values() if isinstance(value, float)), default=None)
        case["speedup"] = round(fastest / case["us"], 2) if fastest else None
        if T == CHECKED:
            case |= error_of(shape, x, logits, weights, attributes)
        print(json.dumps(case), flush=True)
        found.append(case)
    return found


def share_of_limit(
    shape: Shape,
    attributes: MoEAttributes,
    name: str,
    T: int,
    logits: Tensor,
    weights: dict[str, Tensor],
    seconds: float,
    limits: dict[str, float],
) -> dict[str, Any]:
    """Bytes and operations that no implementation avoids, and the time they take at the measured rates over ours."""
    _, D, E, I = shape.sizes
    ids, _ = torch_op.route(logits, attributes)
    chosen = len(ids.unique())
    read = sum(w.numel() * w.element_size() for w in weights.values()) * chosen / E + 4 * T * D
    operations = 2 * T * attributes.top_k * D * I * (attributes.matrices + 1)
    rate = limits[f"{'bf16' if name == 'int4' else name}_tflop_s"] * 1e12
    least = {"bandwidth": read / (limits["copy_gb_s"] * 1e9), "products": operations / rate}
    bound = max(least, key=lambda each: least[each])
    return {
        "experts_read": chosen,
        "gb_s": round(read / seconds / 1e9, 1),
        "tflop_s": round(operations / seconds / 1e12, 1),
        "bound_by": bound,
        "share_of_limit": round(least[bound] / seconds, 3),
    }


def peers_of(
    x: Tensor,
    logits: Tensor,
    weights: dict[str, Tensor],
    dense: dict[str, Tensor],
    attributes: MoEAttributes,
    name: str,
) -> dict[str, Any]:
    """Microseconds by peer, or why it does not run. int8 and int4 have none: bfloat16's stand for them."""
    runs: dict[str, tuple[Callable[[], object], bool]] = {
        "grouped_mm bf16": (partial(peers.grouped, x, logits, attributes=attributes, **dense), True),
        "cuBLAS per expert bf16": (partial(peers.loop, x, logits, attributes=attributes, **dense), False),
    }
    if name == "fp8":
        runs["scaled_grouped_mm fp8"] = (partial(peers.grouped_fp8, x, logits, attributes=attributes, **weights), True)
    found: dict[str, Any] = {}
    for peer, (run, graph) in runs.items():
        try:
            found[peer] = round(1e6 * seconds_of(run, graph=graph), 1)
        except RuntimeError as error:  # this version of PyTorch cannot do it on this device: recorded
            found[peer] = " ".join(str(error).split())[:200]
    return found


def error_of(
    shape: Shape, x: Tensor, logits: Tensor, weights: dict[str, Tensor], attributes: MoEAttributes
) -> dict[str, float]:
    """||y - reference|| / ||reference||, the reference in float32 on dequantised weights."""
    _, D, _, I = shape.sizes
    y = torch_op.moe(x, logits, attributes=attributes, **weights)
    dense = MoEAttributes.from_dict(attributes.to_dict() | {"weight_format": "dense", "group_size": 0})
    wide = {name: dequantized(weights, name, columns, attributes) for name, columns in (("w_in", D), ("w_out", I))}
    want = torch_op.moe(x.float(), logits, attributes=dense, **wide)
    return {"relative_error": round(((y.float() - want).norm() / want.norm()).item(), 5)}


def bench_stack(limits: dict[str, float]) -> dict[str, Any]:
    """All MoE layers of a Mixtral-8x7B in fp8 at one token, each with weights of its own, in one graph."""
    shape = SHAPES["mixtral"]
    attributes = with_format(shape.attributes, "fp8")
    _, D, E, _ = shape.sizes
    need = 48e9
    if torch.cuda.mem_get_info()[0] < need:
        return {"not run": f"it takes {need / 1e9:.0f} GB of free memory"}
    layers = [random_weights(shape, attributes) for _ in range(STACK_LAYERS)]
    x = torch.randn(1, D, device="cuda", dtype=torch.bfloat16)
    logits = [torch.randn(1, E, device="cuda") for _ in layers]

    def run() -> None:
        hidden = x
        for weights, each in zip(layers, logits, strict=True):
            hidden = torch_op.moe(hidden, each, attributes=attributes, **weights)

    seconds = seconds_of(run)
    nbytes = sum(w.numel() * w.element_size() for layer in layers for w in layer.values()) * attributes.top_k / E
    least = nbytes / (limits["copy_gb_s"] * 1e9)
    return {
        "layers": STACK_LAYERS,
        "us": round(1e6 * seconds, 1),
        "active_gb": round(nbytes / 1e9, 3),
        "streaming_us": round(1e6 * least, 1),
        "times_streaming": round(seconds / least, 3),
    }


def bench_tiny(layers: int = 32) -> dict[str, float]:
    """A layer of 64 by 64: under graph replay, its launches and the shortest kernels; and Python's time to enqueue it."""
    shape = Shape(MoESizes(1, 64, 8, 64), MoEAttributes(top_k=2))
    weights = random_weights(shape, shape.attributes)
    x, logits = torch.randn(1, 64, device="cuda", dtype=torch.bfloat16), torch.randn(1, 8, device="cuda")
    call = partial(torch_op.moe, x, logits, attributes=shape.attributes, **weights)
    replayed = seconds_of(lambda: [call() for _ in range(layers)]) / layers
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(layers):
        call()
    enqueued = (time.perf_counter() - start) / layers
    torch.cuda.synchronize()
    return {"replayed_us": round(1e6 * replayed, 2), "enqueued_us": round(1e6 * enqueued, 2)}


if __name__ == "__main__":
    sys.exit(main())
