"""Whether TensorRT-RTX runs a plan on the GPU at hand: one compiled for SM80 ahead of time, and one for the current device.

    python benchmarks/rtx_plan_on_gpu.py examples/tiny-mixtral

Builds each in turn, loads it, and says in one JSON line what came of it, TensorRT's own words included. NVIDIA does not list
SM90 for TensorRT-RTX. The whole decoding of such a plan is for `gatework generate`; here one context is made, no more.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    args = parser.parse_args()
    trt = load_toolchain("tensorrt_rtx")
    launcher = Launcher(compiling=True)
    register(trt).launcher = launcher
    found = {name: attempt(trt, args.checkpoint, sm) for name, sm in (("SM80", "SM80"), ("CURRENT", None))}
    print(json.dumps({"tensorrt_rtx": trt.__version__, "device_sm": launcher.sm, "plans": found}))


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


if __name__ == "__main__":
    main()
