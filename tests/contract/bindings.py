"""The Python modules of TensorRT that the code is written for, as surfaces: installed, imported and read by a subprocess.

`tensorrt_rtx` is installed whole. Of `tensorrt` only the bindings are, into build/contract: its libraries take
gigabytes, and to import the bindings it is enough that the few functions which they call in them return null.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.contract.surface import Surface

ROOT = Path(__file__).parents[2]
DUMP = Path(__file__).with_name("dump.py")
CACHE = ROOT / "build" / "contract"
PACKAGE = "tensorrt-cu13-bindings"
# The oldest release that plugins.tensorrt_module allows, and the newest that it was written with.
VERSIONS = ("10.16.1.11", "11.4.0.106")
MODULES = (*VERSIONS, "tensorrt_rtx")

LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
FUNCTIONS = (  # what `nm --dynamic --undefined-only tensorrt.so` lists beside the C and C++ libraries' own
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def surface(name: str) -> Surface:
    """What one of MODULES offers. Where it cannot be had, the calling test is skipped, or fails where CI is set."""
    found = _find(name)
    if isinstance(found, Surface):
        return found
    reason = f"{found}: the code is not checked against TensorRT {name}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _folder(version: str) -> Path:
    return CACHE / f"{version}-{sys.implementation.cache_tag}"


def arguments(name: str) -> list[str]:
    """What names the module to dump.py and objects.py."""
    return ["tensorrt_bindings", str(_folder(name))] if name in VERSIONS else [name]


@cache
def _find(name: str) -> Surface | str:
    """The surface, or why there is none."""
    if name in VERSIONS:
        folder = _folder(name)
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / "lock").open("w") as lock:  # test workers take turns
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists() and (problem := _install(name, folder)):
                return problem
    elif find_spec(name) is None:
        return f"no {name}"
    run = subprocess.run([sys.executable, str(DUMP), *arguments(name)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return Surface(json.loads(run.stdout))


def _install(version: str, folder: Path) -> str | None:
    """Make the folder, whole or not at all; returns what went wrong."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return "no C compiler (set CC)"
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as scratch:
        wanted, partial = f"{PACKAGE}=={version}", Path(scratch, version)
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(partial)]
        pip = subprocess.run([sys.executable, "-m", "pip", "install", *options, wanted], capture_output=True, text=True)
        if pip.returncode:
            return f"pip cannot install {wanted} ({(pip.stderr.strip().splitlines() or ['no reason'])[-1]})"
        source = Path(scratch, "stub.c")
        stub = partial / "tensorrt_bindings" / "stub.so"  # tensorrt.so looks beside itself
        source.write_text("".join(f"void *{function}(void) {{ return 0; }}\n" for function in FUNCTIONS))
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(stub), str(source)], check=True)
        for library in LIBRARIES:
            stub.with_name(f"{library}.so.{version.split('.')[0]}").symlink_to(stub.name)
        partial.rename(folder)
    return None
