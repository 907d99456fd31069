"""What must be shown on a GPU, and whether `benchmarks/on_gpu.sh` has: met, missed or not measured, a line each.

python -m benchmarks.gpu_summary benchmarks/results      # exit status 0 only if all is met
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from gatework.plugins.moe.bench_layers import FORMATS, SHAPES
from gatework.plugins.moe.measure import TOKENS

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
UNDECIDED = (5, 124, 126, 127, 137)  # pytest ran no test; out of time; no such command; killed


class Line(NamedTuple):
    aim: str
    verdict: str
    found: str


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results")
    lines = judge(folder)
    for line in lines:
        print(f"{line.verdict:13} {line.aim}: {line.found}")
    counts = {verdict: sum(line.verdict == verdict for line in lines) for verdict in (MET, MISSED, NOT_MEASURED)}
    print(json.dumps(counts))
    return int(counts[MET] < len(lines))


def judge(folder: Path) -> list[Line]:
    """A line for every aim."""
    report = _read(folder / "moe.json") or {}
    status = _statuses(folder / "steps.txt")
    few = [T for T in TOKENS if T <= 16]
    lines = [
        _cases(report, ("bf16", "fp8", "int8"), few, "share_of_copy", 0.85, "bandwidth at T <= 16, bf16 fp8 int8"),
        _cases(report, ("int4",), few, "share_of_copy", 0.75, "bandwidth at T <= 16, int4"),
        _cases(report, ("bf16", "fp8"), [4096], "share_of_gemm", 0.65, "dense rate at T = 4096, bf16 fp8"),
        _cases(report, ("bf16", "fp8", "int8", "int4"), TOKENS, "speedup", 1.0, "over the fastest peer"),
        _cases(report, ("bf16",), [1, 64, 4096], "relative_error", 1e-2, "error of bf16", most=True),
        _cases(report, ("fp8",), [1, 64, 4096], "relative_error", 4e-2, "error of fp8", most=True),
        _number(report, "tiny_layer", "launch_overhead_us", 10, "launch overhead of a layer, in microseconds"),
        _number(report, "mixtral_fp8_stack", "times_streaming", 1.25, "32 layers of Mixtral in fp8, times streaming"),
        _tokens(folder, status),
        _rtx(folder),
    ]
    steps = {
        "gpu-tests": "kernels on the device, routing and replayed graphs identical",
        "sanitizer": "compute-sanitizer, memory",
        "racecheck": "compute-sanitizer, races",
        "plan-tests": "plans and slots on the GPU",
        "cuda-tests": "cuda engines on the GPU",
    }
    return lines + [_step(folder, name, aim, status) for name, aim in steps.items()]


def _cases(
    report: dict[str, Any],
    formats: Iterable[str],
    tokens: Iterable[int],
    key: str,
    bar: float,
    aim: str,
    *,
    most: bool = False,
) -> Line:
    """The worst of all shapes' cases against the bar; without every one of them the aim is not met."""
    wanted = {(shape, name, T) for shape in SHAPES for name in formats for T in tokens if name in FORMATS}
    found = {
        at: (case[key], at)
        for case in report.get("cases", [])
        if (at := (case["shape"], case["format"], case["tokens"])) in wanted and case.get(key) is not None
    }
    aim = f"{aim}, {'at most' if most else 'at least'} {bar:g}"
    if not found:
        return Line(aim, NOT_MEASURED, "no case")
    worst, at = (max if most else min)(found.values())
    words = f"worst {worst:g} ({' '.join(map(str, at))}), {len(found)} of {len(wanted)} cases"
    good = worst <= bar if most else worst >= bar
    return Line(aim, MISSED if not good else MET if len(found) == len(wanted) else NOT_MEASURED, words)


def _number(report: dict[str, Any], part: str, key: str, bar: float, aim: str) -> Line:
    found, aim = report.get(part) or {}, f"{aim}, at most {bar:g}"
    if key not in found:
        return Line(aim, NOT_MEASURED, str(found.get("error") or found.get("not run") or "no result"))
    return Line(aim, MET if found[key] <= bar else MISSED, f"{found[key]:g}")


def _tokens(folder: Path, status: dict[str, int]) -> Line:
    aim, found = "12-layer Mixtral on the target cuda, tokens of the CPU engine", _last(folder / "cuda-tokens.log")
    if "cuda-tokens" not in status or found is None or "same" not in found:
        return Line(aim, NOT_MEASURED, _why(status, "cuda-tokens"))
    words = f"{found['same']} of {found['tokens']} tokens, {found['tok_s']:g} tok/s"
    speed = _last(folder / "cuda-bench.log")
    if speed is not None and "decode_tok_s" in speed:
        words += f", one sequence {speed['decode_tok_s']:g} tok/s"
    return Line(aim, MET if found["same"] == found["tokens"] > 0 else MISSED, words)


def _rtx(folder: Path) -> Line:
    """Either outcome is an answer; where a plan runs, engines have to decode."""
    aim, found = "TensorRT-RTX: plans for SM80 and CURRENT tried", _last(folder / "rtx-plan.log")
    if found is None or not found.get("device_sm"):
        return Line(aim, NOT_MEASURED, "no result")
    words = ", ".join(f"{name}: {plan.get('error') or plan.get('reached')}" for name, plan in found["plans"].items())
    decoded = found.get("decoded") or {}
    runs = any(plan.get("reached") == "context" for plan in found["plans"].values())
    if runs:
        words += f"; decoded {json.dumps(decoded)}"
    good = not runs or (bool(decoded) and all("same" in each for each in decoded.values()))
    return Line(aim, MET if good else MISSED, words)


def _step(folder: Path, name: str, aim: str, status: dict[str, int]) -> Line:
    """A step of tests: one that ran none, or skipped them all, has measured nothing."""
    passed = any(" passed" in line for line in _lines(folder / f"{name}.log"))
    if status.get(name) == 0 and passed:
        return Line(aim, MET, "exit 0")
    ran = name in status and status[name] not in (0, *UNDECIDED)
    return Line(aim, MISSED if ran else NOT_MEASURED, _why(status, name))


def _why(status: dict[str, int], name: str) -> str:
    return f"exit {status[name]}, see {name}.log" if name in status else "not run"


def _statuses(file: Path) -> dict[str, int]:
    return {name: int(code) for name, code, _ in map(str.split, _lines(file))}


def _last(file: Path) -> dict[str, Any] | None:
    """The JSON that a log ends with."""
    found = [line for line in _lines(file) if line.startswith("{")]
    return json.loads(found[-1]) if found else None


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines() if file.is_file() else []


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
