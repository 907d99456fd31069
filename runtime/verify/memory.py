"""Keeping the engine's mapped weights out of this process's memory while it is verified.

An engine's weights are mapped from its files, so every page that a step reads counts as resident until something else needs
the memory. A verification reads all of them, for models that are larger than the memory they may take.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAPS = Path("/proc/self/smaps")
_DONTNEED = 4  # MADV_DONTNEED, of Linux
_INTERVAL = 0.1  # seconds; a step maps some hundred megabytes in that time


@contextmanager
def weights_released(folder: Path) -> Iterator[None]:
    """Meanwhile, pages of files in `folder` that are mapped leave this process's memory ten times a second.

    Pre: whatever maps them has been loaded, and only reads them from now on. They stay in the system's cache as long as there
    is room, and come back when they are read. Linux only; elsewhere nothing happens.
    """
    ranges = list(_mapped(folder))
    if not ranges:
        yield
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    done = threading.Event()

    def release() -> None:
        while not done.wait(_INTERVAL):
            for start, length in ranges:
                advise(start, length, _DONTNEED)

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _mapped(folder: Path) -> Iterator[tuple[int, int]]:
    """Address and length of what is mapped from files in the folder, and as it is there: nothing is lost by dropping it.

    ONNX Runtime maps weights writably. What it has rearranged while it loaded them is its own copy, "Anonymous", and no kernel
    writes to weights after that.
    """
    if not _MAPS.exists():
        return
    root, place, ours = folder.resolve(), (0, 0), False
    for line in _MAPS.read_text().splitlines():
        field, _, rest = line.partition(" ")
        if not field.endswith(":"):  # a mapping begins: addresses, rights, offset, device, inode, path
            start, end = (int(number, 16) for number in field.split("-"))
            path = rest.split(maxsplit=4)[4:]
            place, ours = (start, end - start), bool(path) and root in Path(path[0]).parents
        elif ours and field == "Anonymous:" and int(rest.split()[0]) == 0:
            yield place
