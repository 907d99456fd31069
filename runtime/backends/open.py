"""Which backend runs an engine: the manifest says."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import onnxruntime_version
from gatework.runtime.engine import Engine
from gatework.runtime.scheduler import Backend

MODULES = ("onnxruntime", "tensorrt", "tensorrt_rtx")  # that run engines


def open_backend(
    engine: Engine,
    *,
    max_batch: int,
    threads: int | None = None,
    taps: Sequence[str] = (),
    stage_processes: bool = False,
    share_weights: bool = False,
) -> Backend:
    """Load an engine onto the device that it was built for.

    Args:
        max_batch: cache slots; at most the engine's limit where it holds a plan.
        threads: of ONNX Runtime's CPU pool.
        taps: values inside the graph to leave in the backend's `tapped`; see `shows_inside`.
        stage_processes: run each stage of the engine in a process of its own, without taps.
        share_weights: see `OrtBackend`; other backends hold the weights on their device.

    Raises:
        GateworkError: an engine that cannot run, or that lacks a GPU or a package here.
    """
    if stage_processes:
        if not engine.stages:
            fix = "leave --stage-processes out, or build it with --stages N"
            raise GateworkError(f"{engine.path} has no stages to run in processes", got="one graph", fix=fix)
        from gatework.runtime.backends.processes import ProcessBackend

        return ProcessBackend(engine, max_batch=max_batch, threads=threads, share_weights=share_weights)
    module = module_of(engine)
    if module == "onnxruntime":
        if engine.stages:
            from gatework.runtime.backends.stages import StagedBackend

            return StagedBackend(engine, max_batch=max_batch, threads=threads, taps=taps, share_weights=share_weights)
        from gatework.runtime.backends.ort import OrtBackend

        return OrtBackend(engine, max_batch=max_batch, threads=threads, taps=taps, share_weights=share_weights)
    check_runnable(engine, max_batch)
    from gatework.runtime.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(engine, module, max_batch=max_batch, tapped=bool(taps))


def module_of(engine: Engine) -> str:
    """The Python module that runs the engine."""
    tools = engine.manifest["toolchain"]
    module = next((name for name in MODULES if name in tools), None)
    if module is None:
        what = f"{engine.path} was built by no toolchain that is known here"
        raise GateworkError(what, got=", ".join(tools), expected=" or ".join(MODULES))
    return module


def shows_inside(engine: Engine) -> bool:
    """Whether the engine can give up what it computes inside its layers: graphs can, and plans that were built with taps."""
    return module_of(engine) == "onnxruntime" or bool(engine.manifest["inputs"]["settings"].get("taps"))


def module_version(engine: Engine) -> dict[str, str]:
    """Name and version of the module that runs the engine."""
    module = module_of(engine)
    found = onnxruntime_version() if module == "onnxruntime" else version(module.replace("_", "-"))
    return {module: found}


def check_runnable(engine: Engine, max_batch: int) -> None:
    """Raise where a plan's engine is not whole, or has fewer slots."""
    settings = engine.manifest.get("inputs", {}).get("settings", {})
    if settings.get("strip_weights"):
        fix = "put them in with `gatework refit`"
        raise GateworkError(f"{engine.path} was built with --strip-weights", got="a plan without weights", fix=fix)
    if settings.get("plan_only"):
        fix = "build it again without that option"
        raise GateworkError(f"{engine.path} was built with --plan-only", got="no experts beside the plan", fix=fix)
    if max_batch > engine.limits.max_batch:
        expected, fix = f"at most {engine.limits.max_batch}", "build the engine with a larger --max-batch"
        raise GateworkError("max_batch is beyond the plan's", got=max_batch, expected=expected, fix=fix)
