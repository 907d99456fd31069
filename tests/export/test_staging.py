"""Folders that appear complete or not at all, and what becomes of those that killed builds leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gatework.export.staging import check_free, new_directory
from gatework.plugins.errors import GateworkError

KILLED = """
import os, signal, sys
from pathlib import Path
from gatework.export.staging import new_directory
with new_directory(Path(sys.argv[1]), force=False) as directory:
    (directory / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def age(folder: Path) -> None:
    """Make a folder an hour old."""
    os.utime(folder, (folder.stat().st_atime - 3600, folder.stat().st_mtime - 3600))


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not locked there, and so not removed")
def test_the_next_build_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    assert subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".engine.")
    with new_directory(out, force=False):
        assert left.exists()  # it might be another build's that has just begun
    out.rmdir()
    age(left)
    with new_directory(out, force=False) as directory:
        assert not left.exists()
        age(directory)
        with new_directory(out, force=False):
            assert directory.exists()  # at work, however old
        out.rmdir()
    assert list(tmp_path.iterdir()) == [out]


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_directory(tmp_path / "a" / "b", force=False) as directory:
            (directory / "half").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_engines_only(tmp_path: Path) -> None:
    engine, other = tmp_path / "engine", tmp_path / "other"
    for folder, files in ((engine, ["manifest.json", "model.onnx"]), (other, ["model.onnx"])):
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    check_free(engine, force=True)
    with pytest.raises(GateworkError, match="exists and is not empty; fix: choose another"):
        check_free(other, force=True)


def test_of_two_builds_at_once_the_slower_gives_way(tmp_path: Path) -> None:
    out = tmp_path / "engine"

    def build_both() -> None:
        with new_directory(out, force=False), new_directory(out, force=False) as faster:
            (faster / "manifest.json").write_text("faster")

    with pytest.raises(GateworkError, match="exists and is not empty; fix: pass --force"):
        build_both()
    assert (out / "manifest.json").read_text() == "faster"
    assert list(tmp_path.iterdir()) == [out]
