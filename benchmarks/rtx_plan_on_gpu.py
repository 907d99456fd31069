"""Whether TensorRT-RTX runs a plan on the GPU at hand: one compiled for SM80 ahead of time, and one for the current device.

    python benchmarks/rtx_plan_on_gpu.py examples/tiny-mixtral build/on-gpu/random

Builds each for the first checkpoint and loads it, in a process of its own, and says what came of it, TensorRT's own words
included, or the signal that ended it. NVIDIA does not list SM90 for TensorRT-RTX. With the first plan that loads, engines of
all checkpoints decode, and their greedy tokens are counted against those of the float32 model on the CPU; bfloat16 may choose
otherwise where two tokens are nearly tied. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gatework import LLM, SamplingParams
from gatework.export import build
from gatework.export.checkpoint import Checkpoint
from gatework.export.options import BuildOptions
from gatework.export.tensorrt.compile import compile_tensorrt
from gatework.export.tensorrt.scales import load_scales
from gatework.export.tensorrt.toolchain import Compiler
from gatework.plugins.engine_format import PLAN
from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import gpu_capability
from gatework.plugins.moe.launcher import Launcher
from gatework.plugins.moe.tensorrt import register
from gatework.plugins.tensorrt_module import load_toolchain
from gatework.runtime.backends import tensorrt as backend
from gatework.runtime.backends.device import Device
from gatework.runtime.backends.plan import load_plan, new_context

PLANS = {"SM80": "SM80", "CURRENT": None}
LOADED = "context"
SECONDS = 30  # for one process


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--do", choices=("load", "decode"), help=argparse.SUPPRESS)  # in the process of one attempt
    parser.add_argument("--plan", choices=PLANS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.do is not None:
        {"load": load, "decode": decode}[args.do](PLANS[args.plan], args.checkpoints[0])
        return
    found = {plan: in_process("load", plan, args.checkpoints[0]) for plan in PLANS}
    working = next((plan for plan in PLANS if found[plan].get("reached") == LOADED), None)
    decoded = {str(path): in_process("decode", working, path) for path in args.checkpoints} if working else {}
    version = load_toolchain("tensorrt_rtx").__version__
    result = {"tensorrt_rtx": version, "device_sm": gpu_capability(), "plans": found, "decoded": decoded}
    print(json.dumps(result))


def in_process(do: str, plan: str, source: Path) -> dict[str, Any]:
    """What the process said last, and how it ended: 0, an exit status, or minus a signal's number; printed too."""
    command = [sys.executable, __file__, str(source), "--do", do, "--plan", plan]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        said, errors = process.communicate()
    found: dict[str, Any] = {}
    for line in said.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    found["returncode"] = process.returncode
    if process.returncode:
        found.setdefault("error", " ".join(errors.split())[-300:] or "no words")
    print(json.dumps({do: plan, "checkpoint": str(source)} | found), flush=True)
    return found


def load(sm: str | None, source: Path) -> None:
    """Say how far a bf16 plan for `sm` gets, None being the current device: compiled, loaded, context."""
    say(reached="nothing")
    try:
        trt = prepare()
        checkpoint = Checkpoint.open(source)
        options = BuildOptions(target="a100", precision="bf16", max_seq=256, plan_only=True)
        options = options.fitted_to(checkpoint.config)
        with tempfile.TemporaryDirectory() as folder:
            compiler = Compiler("tensorrt_rtx", sm, trt.__version__)
            compile_tensorrt(checkpoint, Path(folder), options, compiler, load_scales(checkpoint, options))
            say(reached="compiled")
            engine = load_plan(trt, register(trt), Path(folder) / PLAN)
            say(reached="loaded")
            new_context(trt, engine, backend.PREFILL, Device().stream_address)
            say(reached=LOADED)
    except (GateworkError, RuntimeError) as error:
        say(error=" ".join(str(error).split()))


def decode(sm: str | None, source: Path) -> None:
    """Say how many tokens an engine with such a plan decodes, how many a float32 CPU engine gives as well, and how fast."""
    # The engines hold kernels for SM80, which the device may not run: the launcher compiles its own.
    backend.attach_kernels = lambda creator, engine: None
    if sm is None:
        chosen = build.choose_compiler
        build.choose_compiler = lambda *arguments: chosen(*arguments)._replace(sm=None)
    prompts, params = [[1, 5, 9], list(range(3, 43))], SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    found = []
    try:
        prepare()
        with tempfile.TemporaryDirectory() as folder:
            for target, precision in (("a100", "bf16"), ("cpu", "fp32")):
                toolchain = {} if target == "cpu" else {"toolchain": "tensorrt_rtx"}
                out = Path(folder) / target
                llm = LLM(build.build_engine(source, out, target=target, precision=precision, max_seq=256, **toolchain))
                start = time.perf_counter()
                found.append([token for each in llm.generate(prompts, params) for token in each.token_ids])
                if target != "cpu":
                    seconds = time.perf_counter() - start
                    say(tokens=len(found[0]), tok_s=round(len(found[0]) / seconds, 1))
        say(same=sum(a == b for a, b in zip(*found, strict=True)))
    except (GateworkError, RuntimeError) as error:
        say(error=" ".join(str(error).split()))


def prepare() -> Any:
    """TensorRT-RTX's module, with kernels for the device behind its plugin."""
    trt = load_toolchain("tensorrt_rtx")
    register(trt).launcher = Launcher(compiling=True)
    return trt


def say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
