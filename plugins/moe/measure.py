"""What `bench` measures on a GPU: the device's limits, every shape, format and number of tokens, a stack of layers, a tiny one.

A case is a dict that goes into the report as it is. One that fails is {"error": ...} beside its name; where the device is
lost with it, such as by an illegal address, the generators end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from gatework.plugins.moe import bench_layers, peers, torch_op
from gatework.plugins.moe.bench_layers import (
    FORMATS,
    SHAPES,
    TINY,
    Shape,
    dequantized,
    formats_of,
    inputs_of,
    random_weights,
    with_format,
)
from gatework.plugins.moe.kernels.launches import Variant, launches
from gatework.plugins.moe.spec import MoEAttributes
from gatework.plugins.moe.workspace import HIDDEN_CODES

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
CHECKED = (1, 64, 4096)  # tokens for which the error is taken
ONE_CODE = ("mixtral", 4096)  # shape and tokens for `bench_one_code`
STACK_LAYERS, STACK_BYTES = 32, 48e9
COPIED, WIDTH = 2 << 30, 8192  # bytes copied, and the side of dense products, for the limits
RATES = {"fp16": "bf16", "int4": "bf16", "fp8-weight-only": "bf16"}  # the format whose products they are


def variants(sm: int, shapes: Iterable[str], formats: Iterable[str], tokens: Iterable[int]) -> set[Variant]:
    """All kernels that `bench_shape`, `bench_stack` and `bench_tiny` launch on a device."""
    calls = [
        (SHAPES[shape].sizes._replace(T=T), with_format(SHAPES[shape].attributes, name), FORMATS[name].dtype)
        for shape in shapes
        for name in formats_of(shape, formats)
        for T in (*tokens, *CHECKED)
    ]
    calls.append((TINY.sizes, TINY.attributes, torch.bfloat16))
    found: set[Variant] = set()
    if "fp8" in formats:
        shape, T = SHAPES[ONE_CODE[0]], ONE_CODE[1]
        with one_code():
            listed = launches(sm, shape.sizes._replace(T=T), with_format(shape.attributes, "fp8"), "bfloat16")
        found |= {launch.variant for launch in listed}
    for sizes, attributes, kind in calls:
        dtype: Literal["float16", "bfloat16"] = "float16" if kind == torch.float16 else "bfloat16"
        found |= {launch.variant for launch in launches(sm, sizes, attributes, dtype)}
    return found


def measure_limits(*, fp8: bool) -> dict[str, float]:
    """Bytes per second of a copy, read and write counted, and of reading; operations per second of large dense products."""
    source = torch.zeros(COPIED // 4, device=bench_layers.DEVICE)
    target = torch.empty_like(source)
    found = {"copy_gb_s": 2 * COPIED / seconds_of(partial(target.copy_, source)) / 1e9}
    found["read_gb_s"] = COPIED / seconds_of(source.amax) / 1e9
    del source, target
    a = torch.randn(WIDTH, WIDTH, device=bench_layers.DEVICE, dtype=torch.bfloat16)
    operations = 2 * WIDTH**3 / 1e12
    found["bf16_tflop_s"] = operations / seconds_of(lambda: a @ a.T)
    i = torch.randint(-127, 127, (WIDTH, WIDTH), device=bench_layers.DEVICE, dtype=torch.int8)
    found["int8_tflop_s"] = operations / seconds_of(lambda: torch._int_mm(i, i.T))
    if fp8:
        f, one = a.to(torch.float8_e4m3fn), torch.ones((), device=bench_layers.DEVICE)
        run = partial(torch._scaled_mm, f, f.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
        found["fp8_tflop_s"] = operations / seconds_of(run)
    return {name: round(value, 1) for name, value in found.items()}


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """Replays a CUDA graph of it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds_of(run: Callable[[], object], *, graph: bool = True, least: float = 0.02) -> float:
    """Median time of a run among enough to fill `least` seconds three times; captured in a CUDA graph unless told not to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, loads, allocates
            run()
    torch.cuda.synchronize()
    repeat = captured(run) if graph else run
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


def kernel_seconds(replay: Callable[[], object]) -> float:
    """The sum of the durations of the kernels that one call runs, as CUPTI tells them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        replay()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    return sum(event.self_device_time_total for event in events) / 1e6


def lost() -> bool:
    """Whether the device no longer works for this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    torch.cuda.empty_cache()
    return False


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it measures, or its error, which the report holds."""
    try:
        return measure()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def bench_device(*, fp8: bool, stack: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The limits, the tiny layer and the stack, by their names in the report."""
    limits = attempt(partial(measure_limits, fp8=fp8))
    yield "limits", limits
    yield "tiny_layer", attempt(bench_tiny)
    if stack and not lost():
        yield "mixtral_fp8_stack", attempt(partial(bench_stack, limits))


def bench_shape(
    name: str, formats: Iterable[str], tokens: tuple[int, ...], limits: dict[str, float], deadline: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """("cases", case) for every format and number of tokens until `deadline` (time.time()); bfloat16's peers once per T."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    dense = random_weights(shape, shape.attributes)
    peers_us: dict[int, dict[str, Any]] = {}
    for each in formats_of(name, formats):
        attributes, dtype = with_format(shape.attributes, each), FORMATS[each].dtype
        weights = dense if each == "bf16" else random_weights(shape, attributes, dtype)
        checked = tuple(T for T in tokens if T in CHECKED)
        errors: dict[Any, Any] = attempt(partial(errors_of, shape, checked, weights, attributes, each))
        for T in tokens:
            case: dict[str, Any] = {"shape": name, "format": each, "tokens": T}
            if time.time() > deadline:
                yield "cases", case | {"not run": "no time left"}
                continue
            case |= {"error": errors["error"]} if "error" in errors else errors.get(T, {})
            case |= attempt(partial(bench_case, shape, T, weights, dense, attributes, each, limits, peers_us))
            yield "cases", case
            if "error" in case and lost():
                return
        if each == "fp8" and name == ONE_CODE[0] and ONE_CODE[1] in tokens and time.time() < deadline:
            yield "fp8_one_code", attempt(partial(bench_one_code, shape, weights, attributes, limits))
        del weights
        torch.cuda.empty_cache()


def bench_case(
    shape: Shape,
    T: int,
    weights: dict[str, Tensor],
    dense: dict[str, Tensor],
    attributes: MoEAttributes,
    name: str,
    limits: dict[str, float],
    peers_us: dict[int, dict[str, Any]],
) -> dict[str, Any]:
    """Its time, its share of the limit and its peers' times; peers_us keeps bfloat16's by T."""
    x, logits = inputs_of(shape, T, FORMATS[name].dtype)
    ours = seconds_of(partial(torch_op.moe, x, logits, attributes=attributes, **weights))
    case: dict[str, Any] = {"us": round(1e6 * ours, 1)}
    if "error" not in limits:
        case |= share_of_limit(shape, attributes, name, T, logits, weights, ours, limits)
    if T not in peers_us:
        peers_us[T] = dense_peers(x.bfloat16(), logits, dense, attributes)
    case["peers_us"] = dict(peers_us[T])
    if name == "fp8":
        run = partial(peers.grouped_fp8, x, logits, attributes=attributes, **weights)
        case["peers_us"]["scaled_grouped_mm fp8"] = microseconds_or_reason(run)
    fastest = min((value for value in case["peers_us"].values() if isinstance(value, float)), default=None)
    case["speedup"] = round(fastest / case["us"], 2) if fastest else None
    return case


@contextmanager
def one_code() -> Iterator[None]:
    """`hidden` in one fp8 code instead of two."""
    before = HIDDEN_CODES["fp8_e4m3"]
    torch_op._launcher.cache_clear()
    HIDDEN_CODES["fp8_e4m3"] = 1
    try:
        yield
    finally:
        HIDDEN_CODES["fp8_e4m3"] = before
        torch_op._launcher.cache_clear()


def bench_one_code(
    shape: Shape, weights: dict[str, Tensor], attributes: MoEAttributes, limits: dict[str, float]
) -> dict[str, Any]:
    """What the second code of `hidden` costs in time and gains in error: the case without it."""
    T = ONE_CODE[1]
    with one_code():
        found = {"tokens": T, "relative_error": errors_of(shape, (T,), weights, attributes, "fp8")[T]["relative_error"]}
        x, logits = inputs_of(shape, T, torch.bfloat16)
        seconds = seconds_of(partial(torch_op.moe, x, logits, attributes=attributes, **weights))
    found["us"] = round(1e6 * seconds, 1)
    share = {} if "error" in limits else share_of_limit(shape, attributes, "fp8", T, logits, weights, seconds, limits)
    return found | share


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
    rate = limits[f"{RATES.get(name, name)}_tflop_s"] * 1e12
    least = {"bandwidth": read / (limits["copy_gb_s"] * 1e9), "products": operations / rate}
    bound = max(least, key=lambda each: least[each])
    return {
        "experts_read": chosen,
        "gb_s": round(read / seconds / 1e9, 1),
        "tflop_s": round(operations / seconds / 1e12, 1),
        "bound_by": bound,
        "share_of_copy": round(least["bandwidth"] / seconds, 3),
        "share_of_gemm": round(least["products"] / seconds, 3),
        "share_of_limit": round(least[bound] / seconds, 3),
    }


def dense_peers(
    x: Tensor, logits: Tensor, dense: dict[str, Tensor], attributes: MoEAttributes
) -> dict[str, float | str]:
    """Microseconds by peer, or why it does not run. int8 and int4 have none: bfloat16's stand for them."""
    grouped, loop = (partial(peer, x, logits, attributes=attributes, **dense) for peer in (peers.grouped, peers.loop))
    return {
        "grouped_mm bf16": microseconds_or_reason(grouped),
        "cuBLAS per expert bf16": microseconds_or_reason(loop, graph=False),
    }


def microseconds_or_reason(run: Callable[[], object], *, graph: bool = True) -> float | str:
    """What this version of PyTorch cannot do on this device is recorded."""
    try:
        return round(1e6 * seconds_of(run, graph=graph), 1)
    except RuntimeError as error:
        return " ".join(str(error).split())[:200]


def errors_of(
    shape: Shape, tokens: tuple[int, ...], weights: dict[str, Tensor], attributes: MoEAttributes, name: str
) -> dict[Any, Any]:
    """By T: ||y - reference|| / ||reference||, the reference in float32 on dequantised weights, and whether it passes."""
    dense = with_format(attributes, "bf16")
    wide = {each: dequantized(weights, each, attributes) for each in ("w_in", "w_out")}
    found = {}
    for T in tokens:
        x, logits = inputs_of(shape, T, FORMATS[name].dtype)
        y = torch_op.moe(x, logits, attributes=attributes, **weights)
        want = torch_op.moe(x.float(), logits, attributes=dense, **wide)
        error = ((y.float() - want).norm() / want.norm()).item()
        found[T] = {"relative_error": round(error, 5), "passed": error <= FORMATS[name].largest_error}
    return found


def bench_stack(limits: dict[str, float]) -> dict[str, Any]:
    """All MoE layers of a Mixtral-8x7B in fp8 at one token, each with weights of its own, in one graph."""
    shape = SHAPES["mixtral"]
    attributes = with_format(shape.attributes, "fp8")
    _, D, E, _ = shape.sizes
    if torch.cuda.mem_get_info()[0] < STACK_BYTES:
        return {"not run": f"it takes {STACK_BYTES / 1e9:.0f} GB of free memory"}
    layers = [random_weights(shape, attributes) for _ in range(STACK_LAYERS)]
    x = torch.randn(1, D, device=bench_layers.DEVICE, dtype=torch.bfloat16)
    logits = [torch.randn(1, E, device=bench_layers.DEVICE) for _ in layers]

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
    """A layer of 64 by 64, in microseconds: under graph replay, of that the kernels, and Python's time to enqueue it."""
    weights = random_weights(TINY, TINY.attributes)
    call = partial(torch_op.moe, *inputs_of(TINY, 1, torch.bfloat16), attributes=TINY.attributes, **weights)

    def run() -> None:
        for _ in range(layers):
            call()

    replayed = seconds_of(run) / layers
    kernels = kernel_seconds(captured(run)) / layers
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    enqueued = (time.perf_counter() - start) / layers
    torch.cuda.synchronize()
    found = {"replayed_us": replayed, "kernels_us": kernels, "launch_overhead_us": replayed - kernels}
    return {name: round(1e6 * value, 2) for name, value in (found | {"enqueued_us": enqueued}).items()}
