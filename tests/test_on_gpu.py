"""What waits for a GPU, as far as it can be checked without one: the script's time, its kernels, its summary."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compile_kernels import variants
from benchmarks.gpu_summary import MET, MISSED, NOT_MEASURED, judge
from gatework.plugins.machine import gpu_capability
from gatework.plugins.moe.bench_layers import FORMATS, SHAPES
from gatework.plugins.moe.kernels.registry import KERNELS
from gatework.plugins.moe.measure import TOKENS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "on_gpu.sh"
TESTS = ("gpu-tests", "sanitizer", "racecheck", "plan-tests", "cuda-tests")


def test_all_steps_take_less_than_eight_minutes() -> None:
    limits = dict(re.findall(r"^step ([\w-]+) (\d+) ", SCRIPT.read_text(), re.MULTILINE))
    assert set(TESTS) | {"moe-bench", "cuda-tokens", "cuda-bench", "rtx-plan"} == set(limits)
    assert sum(map(int, limits.values())) < 480


@pytest.mark.skipif(gpu_capability() is not None, reason="there is a GPU: the script would run")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, tmp_path], env={"BIN": "/none", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert re.fullmatch("no CUDA GPU, or no PyTorch with CUDA in /none: see make gpu-setup\n", done.stderr)


@pytest.mark.parametrize("sm", [80, 90])
def test_every_kernel_is_among_those_compiled_beforehand(sm: int) -> None:
    found = variants(sm)
    assert {variant.kernel for variant in found} == set(KERNELS)
    eight_bit = {kind for variant in found for _, kind in variant.arguments} & {"*fp8e4nv", "*i8"}
    assert eight_bit == ({"*i8"} if sm == 80 else {"*i8", "*fp8e4nv"})


def write(folder: Path, case: dict[str, Any]) -> None:
    """Results in which all is met but for what `case` changes."""
    good = {"share_of_copy": 0.9, "share_of_gemm": 0.7, "speedup": 1.5, "relative_error": 0.004} | case
    cases = [
        good | {"shape": shape, "format": name, "tokens": T} for shape, name, T in product(SHAPES, FORMATS, TOKENS)
    ]
    report = {"cases": cases, "tiny_layer": {"launch_overhead_us": 4.2}, "mixtral_fp8_stack": {"times_streaming": 1.1}}
    (folder / "moe.json").write_text(json.dumps(report))
    steps = [*TESTS, "moe-bench", "cuda-tokens", "cuda-bench", "rtx-plan"]
    (folder / "steps.txt").write_text("".join(f"{name} 0 12\n" for name in steps))
    for name in TESTS:
        (folder / f"{name}.log").write_text("..\n2 passed in 3 s\n")
    (folder / "cuda-tokens.log").write_text('{"tokens": 128, "same": 128, "tok_s": 50.0}\n')
    rtx = {"device_sm": [9, 0], "plans": {"SM80": {"reached": "loaded", "error": "not supported"}}, "decoded": {}}
    (folder / "rtx-plan.log").write_text(json.dumps(rtx) + "\n")


def verdicts(folder: Path) -> dict[str, str]:
    return {line.aim: line.verdict for line in judge(folder) if line.verdict != MET}


def test_the_summary_of_good_results(tmp_path: Path) -> None:
    write(tmp_path, {})
    assert verdicts(tmp_path) == {}


def test_the_summary_of_nothing(tmp_path: Path) -> None:
    assert {line.verdict for line in judge(tmp_path)} == {NOT_MEASURED}


def test_the_summary_of_results_that_fall_short(tmp_path: Path) -> None:
    write(tmp_path, {"share_of_copy": 0.8, "speedup": None})
    (tmp_path / "steps.txt").write_text(
        "gpu-tests 0 9\nsanitizer 127 0\nplan-tests 1 20\ncuda-tests 124 40\ncuda-tokens 1 9\n"
    )
    (tmp_path / "gpu-tests.log").write_text("12 skipped in 3 s\n")
    (tmp_path / "cuda-tokens.log").write_text('{"tokens": 128, "same": 127, "tok_s": 50.0}\n')
    rtx = {"device_sm": [9, 0], "plans": {"SM80": {"reached": "context"}}, "decoded": {"tiny": {"error": "it broke"}}}
    (tmp_path / "rtx-plan.log").write_text(json.dumps(rtx) + "\n")
    assert verdicts(tmp_path) == {
        "bandwidth at T <= 16, bf16 fp8 int8, at least 0.85": MISSED,
        "over the fastest peer, at least 1": NOT_MEASURED,
        "12-layer Mixtral on the target cuda, tokens of the CPU engine": MISSED,
        "TensorRT-RTX: plans for SM80 and CURRENT tried": MISSED,
        "kernels on the device, routing and replayed graphs identical": NOT_MEASURED,
        "compute-sanitizer, memory": NOT_MEASURED,
        "compute-sanitizer, races": NOT_MEASURED,
        "plans and slots on the GPU": MISSED,
        "cuda engines on the GPU": NOT_MEASURED,
    }
