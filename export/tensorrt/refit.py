"""Putting a checkpoint's dense weights into a plan that was built without them, in place of compiling again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from gatework.export.checkpoint import Checkpoint
from gatework.export.engine_writer import finish_engine
from gatework.export.folder import read_json
from gatework.export.materialize import EXPERTS, write_experts
from gatework.export.options import BuildOptions
from gatework.export.staging import new_directory
from gatework.export.tensorrt.compile import LAYERS, LOG, write_graphs
from gatework.export.tensorrt.scales import load_scales
from gatework.export.tensorrt.toolchain import require_gpu
from gatework.export.uptodate import build_inputs, tool_versions
from gatework.plugins import engine_format
from gatework.plugins.engine_format import KERNELS, PLAN
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.spec import VERSION as PLUGIN_VERSION
from gatework.plugins.moe.tensorrt import register
from gatework.plugins.tensorrt_module import load_toolchain, process_logger


def refit_engine(
    engine: str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    calibration: Path | None = None,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Make a whole engine of one that was built with strip_weights, and a checkpoint: the same one, or a fine-tune of it.

    Needs a GPU of the engine's target and the toolchain that compiled the plan. Not run yet: none was at hand.

    Args:
        calibration: of this checkpoint, for int8 and fp8.

    Raises:
        GateworkError: not such an engine, a checkpoint of another architecture, no GPU, or weights that TensorRT misses.
    """
    engine = Path(engine)
    manifest = _read_stripped(engine)
    require_gpu("putting weights into a plan")
    checkpoint = Checkpoint.open(source, drop_tokens=manifest["model"].get("drop_tokens", False))
    if (model := checkpoint.config.to_dict()) != manifest["model"]:
        differing = ", ".join(name for name in model if model[name] != manifest["model"].get(name))
        raise GateworkError(f"{engine} was built for another architecture than {source}", got=f"other {differing}")
    settings = manifest["inputs"]["settings"] | {"strip_weights": False}
    options = BuildOptions(**settings, calibration=calibration)
    inputs, tools = build_inputs(checkpoint.path, options), tool_versions(options, experts=False)
    options = options.fitted_to(checkpoint.config)
    (module,) = set(tools) & {"tensorrt", "tensorrt_rtx"}
    with new_directory(Path(out), force) as directory:
        copied = [LAYERS, LOG, *_kernels(manifest)]
        if _kernels(manifest):
            tools["triton"] = manifest["toolchain"]["triton"]
            (directory / KERNELS).mkdir()
        for name in copied:
            (directory / name).write_bytes((engine / name).read_bytes())
        names = [PLAN, *copied]
        with tempfile.TemporaryDirectory(prefix=".graph.", dir=directory) as scratch:
            scales = load_scales(checkpoint, options)
            written = write_graphs(checkpoint, Path(scratch), options, scales, progress=progress)
            refit_plan(load_toolchain(module), engine / PLAN, written.graphs[PLAN].path, directory / PLAN)
        if written.experts and not options.plan_only:
            write_experts(written.experts, checkpoint, directory / EXPERTS, progress=progress)
            names.append(EXPERTS)
        finish_engine(directory, names, checkpoint, options, inputs, tools, written.facts)
    return Path(out)


def refit_plan(trt: Any, stripped: Path, graph: Path, plan: Path) -> None:
    """Write `plan`: the stripped plan with all weights of the ONNX file `graph`."""
    logger = process_logger(trt)
    with register(trt).raising_errors():
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(stripped.read_bytes())
        if engine is None:
            raise GateworkError(f"{trt.__name__} cannot load {stripped}", got=next(iter(logger.errors), "no reason"))
        refitter = trt.Refitter(engine, logger)
        parser_refitter = trt.OnnxParserRefitter(refitter, logger)
        if not (parser_refitter.refit_from_file(os.fspath(graph)) and refitter.refit_cuda_engine()):
            missing = refitter.get_missing_weights()
            raise GateworkError(f"{trt.__name__} cannot refit {stripped}", got=f"{len(missing)} weights missing")
        config = engine.create_serialization_config()
        config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
        plan.write_bytes(engine.serialize_with_config(config))


def _read_stripped(engine: Path) -> dict[str, Any]:
    """The manifest of an engine without dense weights, whose plan is unaltered."""
    if not (engine / engine_format.MANIFEST).is_file():
        raise GateworkError(f"{engine} is not an engine", fix="build one with `gatework build --strip-weights`")
    manifest = read_json(engine / engine_format.MANIFEST)
    settings = manifest.get("inputs", {}).get("settings", {})
    if not settings.get("strip_weights"):
        raise GateworkError(f"{engine} was not built with --strip-weights", fix="build it again with that option")
    if (version := manifest["plugin_version"]) != PLUGIN_VERSION:
        what = f"{engine} was built with another version of the MoE operator"
        raise GateworkError(what, got=version, expected=PLUGIN_VERSION, fix="build the engine again")
    for name in (PLAN, LAYERS, LOG, *_kernels(manifest)):
        path = engine / name
        if not path.is_file() or engine_format.sha256(path) != manifest["files"][name]["sha256"]:
            raise GateworkError(f"{path} is damaged or missing", fix="build the engine again")
    return manifest


def _kernels(manifest: dict[str, Any]) -> list[str]:
    return [name for name in manifest["files"] if Path(name).parts == (KERNELS, Path(name).name)]
