"""Mapped weights leave memory while an engine is verified, and nothing else does."""

from __future__ import annotations

import mmap
import sys
import time
from pathlib import Path

import pytest

from gatework.runtime.verify.memory import weights_released

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are released on Linux only")
SIZE = 16 << 20


def resident(path: Path) -> int:
    """Kilobytes of a mapped file that are in this process's memory."""
    total, found = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            found = line.endswith(str(path))
        elif found and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_pages_of_the_engines_files_are_released_and_come_back(tmp_path: Path) -> None:
    engine, other = tmp_path / "engine", tmp_path / "other"
    maps = {}
    for folder in (engine, other):
        folder.mkdir()
        (folder / "weights").write_bytes(bytes(range(256)) * (SIZE // 256))
        with (folder / "weights").open("rb") as file:
            maps[folder] = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        assert maps[folder][:] == bytes(range(256)) * (SIZE // 256)
        assert resident(folder / "weights") == SIZE >> 10
    with weights_released(engine):
        deadline = time.monotonic() + 10
        while resident(engine / "weights") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert resident(engine / "weights") == 0
    assert maps[engine][:] == bytes(range(256)) * (SIZE // 256)
    assert resident(engine / "weights") == resident(other / "weights") == SIZE >> 10


def test_what_can_be_written_to_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[:4] = b"mine"
        with weights_released(tmp_path):
            time.sleep(0.3)
        assert mapped[:4] == b"mine"
