"""Engines against llama.cpp and transformers on the same random models, turn by turn in one run.

    make bench-peers                                                            # everything, about an hour on two cores
    make bench-peers ARGS='--models mixtral --cells prefill-512 decode-b1'      # about five minutes

Each peer is a process that stays loaded; only one computes at a time. A round measures every cell with every peer, and the
memory's read bandwidth before each turn. Ratios are medians of the rounds' ratios. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.bandwidth import Bandwidth
from benchmarks.peers.cells import AGREE, CELLS, OURS, PEERS, PROMPTS, SAME
from benchmarks.peers.models import prepare
from benchmarks.peers.table import Figures, bandwidth_share, markdown, summary
from benchmarks.peers.worker import Worker
from benchmarks.random_mixtral import SHAPES
from gatework.plugins.machine import usable_cpus

ROOT = Path(__file__).resolve().parents[2]


def start_workers(files: dict[str, tuple[str, Path]], python: Path, logs: Path) -> dict[str, Worker]:
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}  # each at its own default
    env["PYTHONPATH"] = str(ROOT)
    workers = {}
    for name, (kind, path) in files.items():
        interpreter = python if kind == "llama.cpp" else Path(sys.executable)
        workers[name] = Worker(interpreter, kind, path, logs / f"{name}.log", env)
    return workers


def agreement(workers: dict[str, Worker]) -> dict[str, float]:
    """Median correlation of an engine's logits with those of the peer that stores weights in as many bits.

    Raises SystemExit where it is too low: then the two do not compute the same.
    """
    found = {}
    for precision, ours in OURS.items():
        pair = [workers[name] for name in (ours, SAME[precision]) if name in workers]
        if len(pair) == 2:
            each = []
            for tokens in PROMPTS:
                logits = [worker.ask(phase="logits", tokens=tokens)["logits"] for worker in pair]
                each.append(float(np.corrcoef(*logits)[0, 1]))
            found[precision] = statistics.median(each)
            print(f"{precision}: logits and {SAME[precision]}'s correlate by {found[precision]:.4f}", flush=True)
    if found.get("int8", 1.0) < AGREE:
        raise SystemExit(
            f"the int8 engine and llama.cpp do not compute the same: {found['int8']:.4f}, expected {AGREE}"
        )
    return found


def measure(
    workers: dict[str, Worker], names: list[str], rounds: int, bandwidth: Bandwidth
) -> Iterator[tuple[Figures, Figures]]:
    """After every round: tokens per second by cell and peer, a figure a round; and the bandwidth before each."""
    figures, seen = ({name: {peer: [] for peer in workers} for name in names} for _ in range(2))
    order = list(workers)
    for index in range(rounds):
        for name in names:
            for peer in order:
                seen[name][peer].append(bandwidth.measure())
                seconds = workers[peer].ask(**CELLS[name].request())["seconds"]
                figures[name][peer].append(CELLS[name].speed(seconds))
            shown = ", ".join(f"{peer} {figures[name][peer][-1]:.1f}" for peer in order)
            least, most = (pick(seen[name][peer][-1] for peer in order) / 1e9 for pick in (min, max))
            print(f"round {index + 1}, {name}: {shown} tok/s; {least:.1f} to {most:.1f} GB/s", flush=True)
        yield figures, seen
        order.append(order.pop(0))


def run_model(shape: str, args: argparse.Namespace, bandwidth: Bandwidth) -> Iterator[dict[str, Any]]:
    """What is known of one model after every round; prints the table after the last."""
    files = prepare(shape, args.folder, args.python, args.peers)
    workers = start_workers(files, args.python, args.logs)
    try:
        agreed = agreement(workers)
        for figures, seen in measure(workers, args.cells, args.rounds, bandwidth):
            found = results(workers, figures, seen)
            yield found | {"logits_correlation": agreed}
    finally:
        for worker in workers.values():
            worker.close()
    print(f"\n{markdown(shape, found['cells'], found['bandwidth_share'])}\n", flush=True)


def results(workers: dict[str, Worker], figures: Figures, seen: Figures) -> dict[str, Any]:
    read = {name: worker.bytes_per_token for name, worker in workers.items()}
    rates = [rate / 1e9 for by_peer in seen.values() for each in by_peer.values() for rate in each]
    return {
        "cells": summary(figures),
        "figures": figures,
        "weight_bytes_per_token": read,
        "bandwidth_gb_s": {"median": statistics.median(rates), "least": min(rates), "most": max(rates)},
        "bandwidth_share": bandwidth_share(figures, read, seen),
        "versions": {key: value for worker in workers.values() for key, value in worker.versions.items()},
    }


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    facts = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    vectors = [flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "amx", "fma"))]
    return {
        "cpu": facts.get("model name", platform.machine()),
        "cpus": usable_cpus(),
        "vectors": vectors,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="of the models")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"), help="the chart is NAME.png")
    parser.add_argument("--python", type=Path, default=Path("build/peers/.venv/bin/python"), help="that has llama_cpp")
    args = parser.parse_args()
    args.logs = args.python.parents[2]
    for folder in (args.folder, args.out.parent, args.logs):
        folder.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = parse()
    bandwidth = Bandwidth(args.logs)
    result: dict[str, Any] = {"machine": machine(), "models": {}}
    for shape in args.models:
        for found in run_model(shape, args, bandwidth):
            result["models"][shape] = found
            args.out.write_text(json.dumps(result, indent=1))  # a run that is stopped leaves its whole rounds
        subprocess.run([args.python, "-m", "benchmarks.peers.chart", args.out], check=True)
    short = {
        shape: {cell: row["ratios"] for cell, row in model["cells"].items()}
        for shape, model in result["models"].items()
    }
    print(json.dumps({"ratios": short, "out": str(args.out)}))


if __name__ == "__main__":
    main()
