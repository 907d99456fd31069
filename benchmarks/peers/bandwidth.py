"""What this machine's memory delivers: reading 1 GiB with all threads, far more than caches hold."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from pathlib import Path

import numpy as np

from gatework.plugins.machine import usable_cpus

SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
uint64_t read_all(const uint64_t *data, size_t n, int threads) {
    uint64_t sum = 0;
    #pragma omp parallel for simd reduction(+ : sum) num_threads(threads) schedule(static)
    for (size_t i = 0; i < n; i++) sum += data[i];
    return sum;
}
"""


class Bandwidth:
    """Compiles the loop with the C compiler that llama.cpp needs anyway ($CC or cc), and owns the memory to read."""

    def __init__(self, folder: Path, nbytes: int = 1 << 30) -> None:
        source, library = folder / "bandwidth.c", folder / "bandwidth.so"
        source.write_text(SOURCE)
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", library, source], check=True)
        self._read = ctypes.CDLL(str(library)).read_all
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._data = np.ones(nbytes // 8, np.uint64)

    def measure(self) -> float:
        """Bytes per second, the best of three passes."""
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            self._read(self._data.ctypes.data, self._data.size, usable_cpus())
            seconds.append(time.perf_counter() - start)
        return self._data.nbytes / min(seconds)
