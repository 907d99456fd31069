"""Where the time of one decode step goes, operator by operator.

    python benchmarks/decode_profile.py build/bench/random-mixtral-cpu-int8

ONNX Runtime times its operators, which costs each about a microsecond; the rest of a step is measured from outside: `session`
is what running the graph takes beyond its operators, `python` what the backend takes beyond the session, `sampling` a greedy
choice. Microseconds per step, means over the steps. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from gatework.runtime.backends.ort import OrtBackend
from gatework.runtime.engine import Engine

WARM_UP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--context", type=int, default=512, help="positions in the cache before the first step")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1, help="sequences that advance together")
    args = parser.parse_args()
    engine = Engine.open(args.engine)
    with tempfile.TemporaryDirectory() as folder:
        backend = OrtBackend(engine, max_batch=args.batch, profile=Path(folder) / "profile")
        walls, choices = _decode(backend, engine, args.context, args.steps, args.batch)
        events = json.loads(Path(backend.session.end_profiling()).read_text())
    microseconds = _by_operator(events, args.steps)
    operators = sum(microseconds.values())
    session = statistics.mean([event["dur"] for event in events if event["name"] == "model_run"][-args.steps :])
    microseconds |= {"session": session - operators, "python": 1e6 * statistics.mean(walls) - session}
    microseconds["sampling"] = 1e6 * statistics.mean(choices)
    total = sum(microseconds.values())
    for name, value in sorted(microseconds.items(), key=lambda item: -item[1]):
        print(f"{name:34} {value:9.1f} us {100 * value / total:5.1f} %")
    print(f"{'a step':34} {total:9.1f} us")
    print(
        json.dumps({"engine": str(args.engine), "us": {name: round(value, 1) for name, value in microseconds.items()}})
    )


def _decode(
    backend: OrtBackend, engine: Engine, context: int, steps: int, batch: int
) -> tuple[list[float], list[float]]:
    """Seconds of each step, and of choosing the next token."""
    rng = np.random.default_rng(0)
    chunk = engine.limits.prefill_chunk
    tokens = []
    for slot in range(batch):
        for start in range(0, context, chunk):
            size = min(chunk, context - start)
            logits = backend.prefill(slot, rng.integers(0, engine.model["vocab_size"], size).tolist(), start)
        tokens.append(int(logits.argmax()))
    walls, choices = [], []
    for position in range(context, context + WARM_UP + steps):
        start_time = time.perf_counter()
        logits = backend.decode(tokens, [position] * batch)
        ran = time.perf_counter()
        tokens = logits.argmax(-1).tolist()
        walls.append(ran - start_time)
        choices.append(time.perf_counter() - ran)
    return walls[WARM_UP:], choices[WARM_UP:]


def _by_operator(events: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Microseconds per step of all nodes of an operator."""
    by_node: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            by_node[event["args"]["op_name"], event["name"]].append(event["dur"])
    totals: dict[str, float] = defaultdict(float)
    for (operator, _), durations in by_node.items():
        totals[operator] += statistics.mean(durations[-steps:])
    return dict(totals)


if __name__ == "__main__":
    main()
