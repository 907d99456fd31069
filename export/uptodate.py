"""Whether an engine is what a build would make again: the same files, settings and tools. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gatework.export.options import BuildOptions
from gatework.export.tensorrt.toolchain import choose_compiler
from gatework.plugins import engine_format
from gatework.plugins.machine import onnxruntime_version
from gatework.plugins.moe.kernels.compile import require_triton

TOOLS = ("gatework", "torch", "onnx", "onnxscript", "onnx-ir")


def tool_versions(options: BuildOptions, *, experts: bool) -> dict[str, str]:
    """Versions of all that takes part in a build, the compilers that would be chosen on this machine included.

    experts: the model has some. Then GateworkError where a GPU's kernels for them cannot be compiled.
    """
    tools = {tool: version(tool) for tool in TOOLS}
    if options.device.capability is None:
        return tools | {"onnxruntime": onnxruntime_version()}
    compiler = choose_compiler(options.device, options.toolchain)
    if experts and not options.plan_only:
        tools["triton"] = require_triton(f"an engine with experts for {options.target}")
    return tools | {compiler.module: compiler.version}


def build_inputs(source: Path, options: BuildOptions) -> dict[str, Any]:
    """What decides an engine's content, for its manifest: settings, and size and time of every file read.

    Like make, it takes a file for changed when its time of modification is another.
    """
    files = {path.relative_to(source).as_posix(): _stamp(path) for path in source.rglob("*") if path.is_file()}
    settings = asdict(options)
    del settings["timing_cache"]  # changes how long a build takes
    read = {name: _digest(settings.pop(name)) for name in ("calibration", "calibration_text")}
    return {"settings": settings, **read, "files": files}


def is_current(source: Path, out: Path, options: BuildOptions) -> bool:
    """Whether `out` holds a whole engine made from these inputs with these tools."""
    try:
        manifest = json.loads((out / engine_format.MANIFEST).read_text())
        finished = (out / engine_format.MANIFEST).stat().st_mtime_ns  # written last: what is younger was altered
        stamps = {name: _stamp(out / name) for name in manifest["files"]}
        same_files = all(
            stamps[name][0] == facts["size"] and stamps[name][1] <= finished
            for name, facts in manifest["files"].items()
        )
        same_format = manifest["format_version"] == engine_format.FORMAT_VERSION
        same_tools = manifest["toolchain"] == tool_versions(options, experts=manifest["model"]["moe"] is not None)
        return same_files and same_format and same_tools and manifest.get("inputs") == build_inputs(source, options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no engine, or one that cannot be read


def _digest(path: Path | None) -> str | None:
    return engine_format.sha256(path) if path is not None and path.is_file() else None


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
