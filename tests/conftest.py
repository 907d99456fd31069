"""For every test: workers share the CPUs, and graphs that were traced once are not traced again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if _worker and hasattr(os, "sched_setaffinity"):  # each takes its part instead of fighting over them, subprocesses too
    _cpus = sorted(os.sched_getaffinity(0))
    _share = _cpus[int(_worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.sched_setaffinity(0, _share or _cpus)


@pytest.fixture(autouse=True, scope="session")
def _trace_once() -> Iterator[None]:
    """Builds of one architecture start from copies of one traced graph: tracing takes seconds and depends on nothing else."""
    from gatework.export import engine_writer, onnx_export
    from gatework.export.tensorrt import compile as tensorrt_compile

    traced = cache(onnx_export.trace)

    def trace(*args: Any, **settings: Any) -> Any:
        return traced(*args, **settings).clone()

    with pytest.MonkeyPatch.context() as patch:
        for module in (engine_writer, tensorrt_compile):
            patch.setattr(module, "trace", trace)
        yield
