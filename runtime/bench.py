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

from gatework.plugins.errors import GateworkError, option
from gatework.plugins.machine import usable_cpus
from gatework.runtime.backends.open import module_version
from gatework.runtime.engine import Engine
from gatework.runtime.llm import LLM
from gatework.runtime.sampling import SamplingParams

_PROMPT_TOKENS = 512
_NEW_TOKENS = 64
_WARM_UP = 2  # tokens decoded before anything is measured: mapped weights come in, buffers are made


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
    share_weights: bool = False,
) -> dict[str, Any]:
    """Measure greedy generation from random prompts, fixed by a seed; speeds are medians over the repetitions.

    Args:
        prompt_tokens: per prompt; default: 512, or what new_tokens leave of the engine's max_seq: half of it, at least, where
            they are not given. An encoder reads the prompt by itself, so that both may be as long as if alone.
        new_tokens: decoded per prompt, after the one that prefill gives; default: 64, or what the prompt leaves room for.
        batch: prompts at once. Prefill runs one by one, decode all together.
        stage_processes: run the stages of the engine in processes of their own.
        share_weights: map the weight files instead of copying them; see `LLM`.

    Returns:
        prefill_tok_s and decode_tok_s (tokens per second, of all prompts together); ttft_ms (to the first prompt's first
        token); weight_bytes_per_token (packed weights that one decoded token reads) and gb_s (that many bytes, times
        decode_tok_s, in 1e9 bytes per second: with a batch, more than memory delivers, since its rows share reads);
        peak_rss_mb (1e6 bytes of this process and its stages', weights included); load_s; and what was measured.

    Raises:
        GateworkError: not an engine, or a request that does not fit it.
    """
    counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, "repeat": repeat}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise GateworkError(f"{option(name)} is not positive", got=value, expected="at least 1")
    start = time.perf_counter()
    with LLM(engine_dir, threads=threads, stage_processes=stage_processes, share_weights=share_weights) as llm:
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
    _check_batch(llm.engine, batch)
    count, new_tokens = _fitting(llm.engine, prompt_tokens, new_tokens)
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


def _check_batch(engine: Engine, batch: int) -> None:
    if batch > engine.limits.max_batch:
        expected, fix = f"at most {engine.limits.max_batch}", "build the engine with a larger --max-batch"
        raise GateworkError("--batch is too large for this engine", got=batch, expected=expected, fix=fix)


def _fitting(engine: Engine, prompt_tokens: int | None, new_tokens: int | None) -> tuple[int, int]:
    """Tokens of a prompt, and new ones: those that were asked for, once they are known to fit, and defaults that do."""
    max_seq = engine.limits.max_seq
    if prompt_tokens is None:
        least = min(_NEW_TOKENS, max_seq // 2) if new_tokens is None else new_tokens
        longest = max_seq if engine.has_encoder else max_seq - least
        prompt_tokens = max(1, min(_PROMPT_TOKENS, longest))
    engine.check_prompt(prompt_tokens)
    room = engine.room_after(prompt_tokens)
    if new_tokens is None:
        new_tokens = max(1, min(_NEW_TOKENS, room))
    if new_tokens > room:
        together = f"{max_seq} and {room}, at most" if engine.has_encoder else f"{max_seq} together, at most"
        got, fix = f"{prompt_tokens} and {new_tokens}", "ask for fewer, or build the engine with a larger --max-seq"
        raise GateworkError(
            "--prompt-tokens and --new-tokens do not fit this engine", got=got, expected=together, fix=fix
        )
    return prompt_tokens, new_tokens


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
