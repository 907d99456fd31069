"""verify: an engine goes through given tokens, and the reference through what the engine computed, step by step."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gatework.plugins import engine_format
from gatework.plugins.engine_format import encoder_taps, graph_taps
from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import onnxruntime_version
from gatework.plugins.moe import cpu_ops
from gatework.runtime.backends.device import require_gpu
from gatework.runtime.backends.open import check_runnable, module_of, module_version, open_backend, shows_inside
from gatework.runtime.engine import Engine
from gatework.runtime.verify.bounds import DEFAULT_BOUNDS, Bounds
from gatework.runtime.verify.feed import Case
from gatework.runtime.verify.findings import Findings
from gatework.runtime.verify.memory import weights_released
from gatework.runtime.verify.perplexity import WINDOW
from gatework.runtime.verify.plan import Plan, make_plan
from gatework.runtime.verify.record import Recording
from gatework.runtime.verify.report import VerifyReport
from gatework.runtime.verify.work import Work, work_folder

if TYPE_CHECKING:
    from gatework.export.checkpoint import Checkpoint
    from gatework.export.rounding import Format
    from gatework.plugins.moe.spec import MoEAttributes

_TOOLS = ("gatework", "torch")
_SIZES = ("vocab_size", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim")
_MOST_SLOTS = 8


def verify(
    engine_dir: str | os.PathLike[str],
    checkpoint_dir: str | os.PathLike[str],
    *,
    text: str | None = None,
    prompts: Sequence[str | Sequence[int]] | None = None,
    tokens: int = 64,
    window: int = WINDOW,
    bounds: Bounds | None = None,
    check_fingerprint: bool = True,
    threads: int | None = None,
    work: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> VerifyReport:
    """Compare an engine with the PyTorch reference of its checkpoint.

    Every prompt is prefilled and then decoded in a batch along the engine's own greedy tokens. Then every window, of the text
    or else of random tokens, is decoded token by token from an empty cache, and prefilled. Of the first thousand tokens the
    engine's graph gives up what it computed inside every layer, and each of these values is compared with what the reference
    makes of the engine's own inputs to that step. The reference is read from the checkpoint layer by layer.

    Args:
        text: gives perplexity, and the windows.
        prompts: text or token ids; default: random ids of several lengths, fixed, and the text's first tokens.
        tokens: greedy tokens after each prompt; fewer where the engine's max_seq leaves less room.
        window: tokens of the text per window, at most max_seq.
        bounds: of the logits; default: `DEFAULT_BOUNDS` of the engine's precision, of which those of quality are applied where
            there is a text.
        check_fingerprint: refuse a checkpoint that the engine was not built from.
        threads: of the engine.
        work: folder that keeps what is done, so that the same call goes on where a stopped one was; it is not removed. Size:
            some thousand float32 numbers per token and layer.
        progress: show progress bars on standard error.

    Raises:
        GateworkError: a bad engine or checkpoint, one that does not belong to the other, or a prompt that does not fit.
    """
    from gatework.export.checkpoint import Checkpoint

    start = time.perf_counter()
    engine = Engine.open(engine_dir)
    checkpoint = Checkpoint.open(os.fspath(checkpoint_dir), drop_tokens=engine.model.get("drop_tokens", False))
    _check_pair(engine, checkpoint, check_fingerprint)
    bounds = _bounds(engine, bounds, has_text=text is not None)
    plan = make_plan(engine, text, prompts, tokens, window, taps=shows_inside(engine))
    with work_folder(None if work is None else Path(work)) as folder:
        kept = Work(folder, _key(engine, checkpoint, plan, threads))
        done = kept.recording(plan.cases)
        if done is None:
            recording = Recording(folder, plan.cases, _dropping(checkpoint))
            changed = _run(engine, plan, recording, _slots(engine), threads, progress)
            kept.keep_recording(recording, changed)
        else:
            recording, changed = done
        found = Findings(recording, engine.model)
        found.collect(checkpoint, _format(engine), None if work is None else kept, progress)
    checks = [*found.step_checks(changed), *found.logit_checks(bounds, has_text=text is not None)]
    facts = plan.facts(engine) | found.facts(has_text=text is not None)
    return found.report(
        engine,
        str(checkpoint.path),
        checks,
        facts,
        _versions(engine),
        has_text=text is not None,
        seconds=time.perf_counter() - start,
    )


def compare_engines(
    engine_dir: str | os.PathLike[str],
    other_dir: str | os.PathLike[str],
    *,
    text: str | None = None,
    prompts: Sequence[str | Sequence[int]] | None = None,
    tokens: int = 64,
    window: int = WINDOW,
    bounds: Bounds | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> VerifyReport:
    """Compare an engine with another of the same model, such as one from before an upgrade, which takes the reference's place.

    Both run the same tokens, along the first engine's greedy choices. The other engine's logits are what those of the first are
    judged by, with the bounds of the coarser precision; its values inside the layers are what `accumulated` errors are measured
    against, and nothing says which of the two is right. Arguments as in `verify`.

    Raises:
        GateworkError: a bad engine, or two that are not of one model.
    """
    start = time.perf_counter()
    engine, other = Engine.open(engine_dir), Engine.open(other_dir)
    for name in ("family", *_SIZES, "moe", "drop_tokens"):
        ours, theirs = engine.model.get(name), other.model.get(name)
        if ours != theirs:
            got, expected = f"{ours} and {theirs}", "two engines of one model"
            raise GateworkError(f"the engines differ in {name}", got=got, expected=expected)
    if bounds is None:
        bounds = max(_default_bounds(engine), _default_bounds(other), key=lambda each: each.mean_kl or 0.0)
    taps = shows_inside(engine) and shows_inside(other)
    plan = make_plan(engine, text, prompts, tokens, window, taps=taps)
    longest = max(case.length for case in plan.cases)
    if longest > other.limits.max_seq:
        expected, fix = f"at least {longest}", f"gatework verify {other.path} --against {engine.path}"
        raise GateworkError(
            f"{other.path} takes shorter sequences", got=other.limits.max_seq, expected=expected, fix=fix
        )
    with work_folder(None) as folder:
        recordings = []
        for name, each in (("engine", engine), ("other", other)):
            (folder / name).mkdir()
            recordings.append(Recording(folder / name, plan.cases))
            _run(each, plan, recordings[-1], min(_slots(engine), _slots(other)), threads, progress)
        found = Findings(recordings[0], engine.model)
        found.collect_from(recordings[1])
    checks = [*found.difference_checks(), *found.logit_checks(bounds, has_text=text is not None)]
    facts = plan.facts(engine) | found.facts(has_text=text is not None)
    return found.report(
        engine,
        f"{other.path} ({other.manifest['target']} {other.manifest['precision']})",
        checks,
        facts,
        _versions(engine),
        has_text=text is not None,
        seconds=time.perf_counter() - start,
    )


def _key(engine: Engine, checkpoint: Checkpoint, plan: Plan, threads: int | None) -> dict[str, Any]:
    """What a verification's results depend on."""
    cases = [
        (case.name, case.ids, case.prompt, case.chunk, case.length, case.tapped, case.source) for case in plan.cases
    ]
    fingerprint = checkpoint.fingerprint()
    return {
        "engine": engine.manifest,
        "checkpoint": fingerprint,
        "cases": cases,
        "threads": threads,
        "versions": _versions(engine),
    }


def _versions(engine: Engine) -> dict[str, str]:
    return {name: version(name) for name in _TOOLS} | module_version(engine) | {"numpy": version("numpy")}


def _check_pair(engine: Engine, checkpoint: Checkpoint, check_fingerprint: bool) -> None:
    if check_fingerprint and checkpoint.fingerprint() != engine.manifest["checkpoint"]["fingerprint"]:
        raise GateworkError(
            f"{engine.path} was not built from {checkpoint.path}",
            got="another fingerprint",
            fix="give the checkpoint that the engine was built from, or build the engine again",
        )
    for name in _SIZES:
        ours, theirs = engine.model[name], getattr(checkpoint.config, name)
        if ours != theirs:
            raise GateworkError(f"engine and reference differ in {name}", got=f"{ours} and {theirs}")
    if (engine.model["moe"] or {}).get("num_experts") != (checkpoint.config.moe and checkpoint.config.moe.num_experts):
        raise GateworkError("engine and reference differ in their experts")


def _bounds(engine: Engine, given: Bounds | None, *, has_text: bool) -> Bounds:
    """Those given, or the engine's; there must be something that is judged."""
    bounds = given or _default_bounds(engine)
    if given is None and not has_text:  # random tokens say nothing of quality
        bounds = replace(bounds, mean_kl=None, top1=None)
    judged = bounds if has_text else replace(bounds, perplexity=None)
    if judged == Bounds() and not shows_inside(engine):
        check_runnable(engine, 1)  # which is the worse news
        require_gpu()
        got = f"{engine.manifest['precision']}, no text, logits alone"
        raise GateworkError("nothing of this engine could be judged", got=got, fix="give --text FILE")
    return bounds


def _default_bounds(engine: Engine) -> Bounds:
    precision = engine.manifest["precision"]
    if precision not in DEFAULT_BOUNDS:
        raise GateworkError("there are no default bounds for this precision", got=precision, fix="pass bounds=")
    return DEFAULT_BOUNDS[precision]


def _format(engine: Engine) -> Format:
    """The number formats of an engine whose inside is compared."""
    from gatework.export.groups import DEFAULT_GROUPS, FINE_GROUP, GPU_GROUPS
    from gatework.export.rounding import UNITS, Format

    precision, on_cpu = engine.manifest["precision"], engine.manifest["target"] in ("cpu", "onnx")
    plan = module_of(engine) != "onnxruntime"
    bits = {"int8": 8, "int4": 4}.get(precision, 0)
    floats = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    kind = floats.get(precision, "float32" if on_cpu else "bfloat16")
    settings = engine.manifest["inputs"]["settings"]
    group = settings["group_size"] or (GPU_GROUPS if plan else DEFAULT_GROUPS).get(precision, 0)
    wide = cpu_ops.usable_library(onnxruntime_version()) is not None  # our own kernels run
    halves = wide and kind == "float32" and engine.manifest[engine_format.CACHE_DTYPE] == "float16"
    experts = engine.model["moe"] is not None
    fine = 0 if plan else FINE_GROUP
    dynamic, kept = bool(bits) and on_cpu, engine.manifest.get(engine_format.KEPT, {})
    pure = settings.get("pure", False)
    form = Format(UNITS[kind], bits, group, dynamic=dynamic, wide=wide, experts=experts, fine_group=fine)
    fp8 = precision == "fp8"  # of experts alone: other plans of it show nothing inside
    return replace(form, pure=pure, kept=kept, fp8=fp8, cache=UNITS["float16"] if halves else 0.0)


def _slots(engine: Engine) -> int:
    """Sequences to run at once."""
    return min(engine.limits.max_batch, _MOST_SLOTS)


def _dropping(checkpoint: Checkpoint) -> MoEAttributes | None:
    """How the model's experts are chosen, if they drop tokens."""
    from gatework.export.decoder import moe_attributes

    return moe_attributes(checkpoint.config) if checkpoint.config.drop_tokens else None


def _run(
    engine: Engine, plan: Plan, recording: Recording, slots: int, threads: int | None, progress: bool
) -> float | None:
    """Run the cases. Returns by how much the values given up inside change the logits; None where nothing is given up."""
    from tqdm import tqdm

    tapped = bool(recording.starts)
    first = plan.cases[next(iter(recording.starts), 0)]
    shipped = None
    if tapped and module_of(engine) == "onnxruntime":  # a plan gives up its values always, or never
        backend = open_backend(engine, max_batch=1, threads=threads, share_weights=True)
        with weights_released(engine.path):
            shipped = _probe(backend, first)
        del backend
    taps = [*encoder_taps(engine.model), *graph_taps(engine.model)] if tapped else []
    backend = open_backend(engine, max_batch=slots, threads=threads, taps=taps, share_weights=True)
    with (
        weights_released(engine.path),
        tqdm(total=plan.rows, unit="tok", desc="engine", disable=not progress, file=sys.stderr) as bar,
    ):
        difference = None if shipped is None else float(np.abs(_probe(backend, first) - shipped).max())
        for group in plan.groups:
            recording.run(backend, group, bar.update)
    return difference


def _probe(backend: Any, case: Case) -> np.ndarray:
    """Logits of a case's first step."""
    if case.source is not None:
        backend.encode(0, case.source)
    return np.array(backend.prefill(0, case.ids[: max(min(case.chunk, case.prompt), 1)], 0))
