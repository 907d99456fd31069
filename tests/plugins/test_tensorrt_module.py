"""Loading TensorRT's Python modules, and the library name that TensorRT-RTX's wheel lacks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from gatework.plugins import tensorrt_module
from gatework.plugins.errors import GateworkError
from gatework.plugins.tensorrt_module import link_rtx_library, load_toolchain


def test_unknown_toolchain() -> None:
    with pytest.raises(GateworkError, match="got nvinfer; expected tensorrt or tensorrt_rtx"):
        load_toolchain("nvinfer")


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_missing_toolchain(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tensorrt_module, "find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(GateworkError, match=rf"module {name} does not load; .*; fix: pip install '{name[:8]}"):
        load_toolchain(name)


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the wheel's library folder, already imported."""
    folder = tmp_path / "tensorrt_rtx_libs"
    folder.mkdir()
    for name in ("__init__.py", "libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"):
        (folder / name).touch()
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, folder.name, importlib.import_module(folder.name))
    monkeypatch.setattr(tensorrt_module, "_links", [])
    return folder


def test_too_late_for_links_of_our_own(libraries: Path) -> None:
    for _ in range(2):
        link_rtx_library()
        assert (libraries / "libtensorrt_rtx.so").readlink() == Path("libtensorrt_rtx.so.1")


def test_too_late_and_not_writable(libraries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(
        GateworkError, match=r"imported before its library was linked; got .*; fix: import it by"
    ) as error:
        link_rtx_library()
    assert "\n" not in str(error.value)
    assert not (libraries / "libtensorrt_rtx.so").exists()
