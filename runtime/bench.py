"""Measuring an engine: load time, prefill and decode speed, memory."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import usable_cpus
from gatework.runtime.backends.open import module_version
from gatework.runtime.llm import LLM
from gatework.runtime.sampling import SamplingParams

_PROMPT_TOKENS = 512
_NEW_TOKENS = 64
_WARM_UP = 2  # tokens decoded before anything is measured: memory-mapped weights come in, buffers are made


@dataclass(frozen=True, slots=True)
class _Round:
    """Seconds of one repetition: to the first token of the first prompt, of all prompts, and of all decoded tokens."""

    first: float
    prefill: float
    decode: float


def bench(
    engine_dir: str | os.PathLike[str],
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    batch: int = 1,
    repeat: int = 3,
    threads: int | None = None,
    *,
    stage_processes: bool = False,
) -> dict[str, Any]:
    """Measure greedy generation from random prompts, fixed by a seed; speeds are medians over the repetitions.

    Args:
        prompt_tokens: per prompt; default: 512, or fewer where the engine's max_seq leaves less room.
        new_tokens: decoded per prompt, after the one that prefill gives; default: 64, or half of what fits.
        batch: prompts at once. Prefill runs one by one, decode all together.
        stage_processes: run the stages of the engine in processes of their own.

    Returns:
        prefill_tok_s and decode_tok_s (tokens per second, of all prompts together); ttft_ms (to the first prompt's first
        token); weight_bytes_per_token (packed weights that one decoded token reads) and gb_s (that many bytes, times
        decode_tok_s, in 1e9 bytes per second: with a batch, more than memory delivers, since its rows share reads);
        peak_rss_mb (1e6 bytes of this process and its stages', memory-mapped weights included); load_s; and what was measured.

    Raises:
        GateworkError: not an engine, or a request that does not fit it.
    """
    for name, value in (("new_tokens", new_tokens), ("batch", batch), ("repeat", repeat)):
        if value is not None and value < 1:
            raise GateworkError(f"{name} is not positive", got=value, expected="at least 1")
    start = time.perf_counter()
    with LLM(engine_dir, threads=threads, stage_processes=stage_processes) as llm:
        load = time.perf_counter() - start
        return _measure(llm, load, prompt_tokens, new_tokens, batch, repeat, threads)


def _measure(
    llm: LLM,
    load: float,
    prompt_tokens: int | None,
    new_tokens: int | None,
    batch: int,
    repeat: int,
    threads: int | None,
) -> dict[str, Any]:
    """See `bench`; load: seconds."""
    if new_tokens is None:
        new_tokens = min(_NEW_TOKENS, llm.engine.limits.max_seq // 2)
    count = _fitting(llm, prompt_tokens, new_tokens, batch)
    prompts = np.random.default_rng(0).integers(0, llm.engine.model["vocab_size"], (batch, count)).tolist()
    _round(llm, prompts, min(_WARM_UP, new_tokens))
    rounds = [_round(llm, prompts, new_tokens) for _ in range(repeat)]
    decode = statistics.median(batch * new_tokens / each.decode for each in rounds)
    per_token = llm.engine.weight_bytes["per_token"]
    return {
        "engine": str(llm.engine.path),
        "precision": llm.engine.manifest["precision"],
        "target": llm.engine.manifest["target"],
        "threads": threads or usable_cpus(),
        "batch": batch,
        "prompt_tokens": count,
        "new_tokens": new_tokens,
        "repeat": repeat,
        "prefill_tok_s": _rounded(statistics.median(batch * count / each.prefill for each in rounds)),
        "decode_tok_s": _rounded(decode),
        "ttft_ms": _rounded(1e3 * statistics.median(each.first for each in rounds)),
        "weight_bytes_per_token": per_token,
        "gb_s": _rounded(per_token * decode / 1e9),
        "peak_rss_mb": _rounded(sum(map(peak_rss, [os.getpid(), *llm.stage_pids])) / 1e6),
        "load_s": _rounded(load),
        "versions": {
            "gatework": version("gatework"),
            **module_version(llm.engine),
            "numpy": version("numpy"),
            "python": platform.python_version(),
        },
    }


def peak_rss(pid: int | None = None) -> int:
    """Most bytes that a process, this one by default, has had in memory."""
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        # Not the first choice: Linux lets a process start with the peak of the one that launched it.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fitting(llm: LLM, prompt_tokens: int | None, new_tokens: int, batch: int) -> int:
    """The prompt length, once everything is known to fit."""
    limits = llm.engine.limits
    if batch > limits.max_batch:
        fix = "build the engine with a larger --max-batch"
        raise GateworkError(
            "batch is too large for this engine", got=batch, expected=f"at most {limits.max_batch}", fix=fix
        )
    room = limits.max_seq - new_tokens
    count = min(_PROMPT_TOKENS, room) if prompt_tokens is None else prompt_tokens
    if not 1 <= count <= room:
        raise GateworkError(
            "prompt and new tokens do not fit this engine",
            got=f"{max(count, 0)} and {new_tokens}",
            expected=f"at least 1 each and {limits.max_seq} together",
        )
    return count


def _round(llm: LLM, prompts: list[list[int]], new_tokens: int) -> _Round:
    """One repetition: streams that are read in turns share a batch, and each step's time can be taken."""
    params = SamplingParams(max_tokens=new_tokens + 1, temperature=0.0, ignore_eos=True)
    streams = [llm.stream(prompt, params) for prompt in prompts]
    start = time.perf_counter()
    next(streams[0])
    first = time.perf_counter() - start
    for stream in streams[1:]:
        next(stream)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(new_tokens):
        for stream in streams:
            next(stream)
    decode = time.perf_counter() - start
    return _Round(first, prefill, decode)


def _rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
