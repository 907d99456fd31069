"""TensorRT's Python modules, `tensorrt` and `tensorrt_rtx`: imported by name, mended, and given the process's one logger.

Builder and runtime share this; functions elsewhere take the module as `trt`.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from gatework.plugins.errors import GateworkError

# Module: what pip installs for it.
REQUIREMENTS = {"tensorrt": "tensorrt>=10.16,<12", "tensorrt_rtx": "tensorrt-rtx>=1.7,<1.8"}
LIBRARY, PARSER = "libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"


def load_toolchain(name: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`, imported and ready to parse plugins."""
    if name not in REQUIREMENTS:
        raise GateworkError("unknown TensorRT toolchain", got=name, expected=" or ".join(REQUIREMENTS))
    try:
        if name == "tensorrt_rtx":
            link_rtx_library()
            import tensorrt_rtx as trt
        else:
            import tensorrt as trt
    except ImportError as error:
        fix = f"pip install '{REQUIREMENTS[name]}'"
        raise GateworkError(f"the Python module {name} does not load", got=error, fix=fix) from error
    return trt


_links: list[tempfile.TemporaryDirectory[str]] = []


def link_rtx_library() -> None:
    """Let TensorRT-RTX's parser find the core library, or it ends the process at the first plugin node.

    It opens the library as libtensorrt_rtx.so, a name that the Linux wheel lacks, and looks where it was itself loaded
    from (its RPATH is $ORIGIN, taken as the path is spelt). So it is loaded here first, from a folder of
    two links, one of them under the missing name; whoever opens either file later gets the one in memory. If
    TensorRT-RTX is already imported, the link is put beside the library instead.
    """
    spec = find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:  # the libraries come from elsewhere, or are not installed
        return
    folder = Path(spec.origin).parent
    parser, library = (next(folder.glob(f"{name}.*"), None) for name in (PARSER, LIBRARY))
    if parser is None or library is None or (folder / LIBRARY).exists() or _links:
        return
    if spec.name in sys.modules:
        try:
            (folder / LIBRARY).symlink_to(library.name)
        except OSError as error:
            fix = "import it by gatework.plugins.tensorrt_module.load_toolchain, or make the folder writable"
            raise GateworkError(
                "tensorrt_rtx was imported before its library was linked", got=error, fix=fix
            ) from error
        return
    links = tempfile.TemporaryDirectory(prefix="gatework-")
    _links.append(links)  # kept until the process ends
    (Path(links.name) / parser.name).symlink_to(parser)
    (Path(links.name) / LIBRARY).symlink_to(library)
    ctypes.CDLL(str(Path(links.name) / parser.name))


@cache  # TensorRT heeds the first logger of a process only
def process_logger(trt: Any) -> Any:
    """A trt.ILogger that writes to the file of the build in hand, and remembers that build's errors."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.file: IO[str] | None = None
            self.hide = ""
            self.errors: list[str] = []

        @contextmanager
        def writing_to(self, path: Path, hide: str = "") -> Iterator[None]:
            self.hide = hide  # a path of this machine
            with path.open("w", encoding="utf-8") as self.file:
                self.errors = []
                try:
                    yield
                finally:
                    self.file = None

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            if self.file is not None and severity != trt.ILogger.VERBOSE:
                self.file.write(f"[{severity.name}] {message.replace(self.hide, '') if self.hide else message}\n")

    return Logger()
