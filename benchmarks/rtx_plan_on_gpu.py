"""Whether TensorRT-RTX runs a plan on the GPU at hand: one compiled for SM80 ahead of time, and one for the current device.

    python benchmarks/rtx_plan_on_gpu.py examples/tiny-mixtral build/on-gpu/random

Builds each for the first checkpoint, loads it, and says in one JSON line what came of it, TensorRT's own words included. NVIDIA
does not list SM90 for TensorRT-RTX. Where the SM80 plan loads, engines of all checkpoints decode, and their greedy tokens are
counted against those of the float32 model on the CPU; bfloat16 may choose otherwise where two tokens are nearly tied.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from gatework import LLM, SamplingParams
from gatework.export.build import build_engine
from gatework.export.checkpoint import Checkpoint
from gatework.export.options import BuildOptions
from gatework.export.tensorrt.builder import process_logger
from gatework.export.tensorrt.compile import PLAN, compile_tensorrt
from gatework.export.tensorrt.scales import load_scales
from gatework.export.tensorrt.toolchain import Compiler
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.launcher import Launcher
from gatework.plugins.moe.tensorrt import register
from gatework.plugins.tensorrt_module import load_toolchain
from gatework.runtime.backends import tensorrt as backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    args = parser.parse_args()
    trt = load_toolchain("tensorrt_rtx")
    launcher = Launcher(compiling=True)
    register(trt).launcher = launcher
    found = {name: attempt(trt, args.checkpoints[0], sm) for name, sm in (("SM80", "SM80"), ("CURRENT", None))}
    decoded = {}
    if found["SM80"]["reached"] == "context":
        # The engines hold kernels for SM80, which the device may not run: the launcher compiles its own.
        backend.attach_kernels = lambda creator, engine: None
        decoded = {str(path): decode(path) for path in args.checkpoints}
    result = {"tensorrt_rtx": trt.__version__, "device_sm": launcher.sm, "plans": found, "decoded": decoded}
    print(json.dumps(result))


def attempt(trt: Any, source: Path, sm: str | None) -> dict[str, Any]:
    """How far a bf16 plan for `sm` gets; None: the current device."""
    checkpoint = Checkpoint.open(source)
    options = BuildOptions(target="a100", precision="bf16", max_seq=256, plan_only=True).fitted_to(checkpoint.config)
    logger = process_logger(trt)
    reached = "nothing"
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiler = Compiler("tensorrt_rtx", sm, trt.__version__)
            compile_tensorrt(checkpoint, Path(folder), options, compiler, load_scales(checkpoint, options))
            reached = "compiled"
            with register(trt).raising_errors(), logger.writing_to(Path(folder) / "runtime.log"):
                engine = trt.Runtime(logger).deserialize_cuda_engine((Path(folder) / PLAN).read_bytes())
                if engine is None:
                    return {"reached": reached, "error": next(iter(logger.errors), "no reason")}
                reached = "loaded"
                if engine.create_execution_context() is None:
                    return {"reached": reached, "error": next(iter(logger.errors), "no reason")}
            return {"reached": "context"}
        except (GateworkError, RuntimeError) as error:
            return {"reached": reached, "error": " ".join(str(error).split())}


def decode(source: Path) -> dict[str, Any]:
    """Tokens of an SM80 engine, those that a float32 CPU engine gives as well, and tokens per second."""
    prompts, params = [[1, 5, 9], list(range(3, 43))], SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    found, seconds = [], 0.0
    try:
        with tempfile.TemporaryDirectory() as folder:
            for target, precision in (("cpu", "fp32"), ("a100", "bf16")):
                toolchain = {} if target == "cpu" else {"toolchain": "tensorrt_rtx"}
                out = Path(folder) / target
                llm = LLM(build_engine(source, out, target=target, precision=precision, max_seq=256, **toolchain))
                start = time.perf_counter()
                found.append([token for each in llm.generate(prompts, params) for token in each.token_ids])
                seconds = time.perf_counter() - start
    except (GateworkError, RuntimeError) as error:
        return {"error": " ".join(str(error).split())}
    same = sum(a == b for a, b in zip(*found, strict=True))
    return {"tokens": len(found[0]), "same": same, "tok_s": round(len(found[0]) / seconds, 1)}


if __name__ == "__main__":
    main()
