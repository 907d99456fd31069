"""Refusals of checkpoints made to harm: seconds and memory of `gatework build` and `gatework inspect`.

    python -m benchmarks.hostile                # every case of the tests, by both commands: some ten minutes
    python -m benchmarks.hostile pickle zip     # those whose names have one of the words

The checkpoints are those of tests/export/test_hostile.py, and one whose weights have a NaN, which `inspect` does not read. Each
command is a process of its own: seconds from its start to its end, imports included; peak RSS as Linux counts it. Prints the
slowest and the largest of each command; exit code 1 where one was not refused, or not within 2 s and 500 MB.
Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatework.runtime.formatting import table
from tests.export.test_hostile import CASES, run_command, sound_checkpoints, spoil_with_nan

SECONDS, MEGABYTES = 2.0, 500  # the aims
NAN = "weights: NaN"
SHOWN = 3  # of each command's slowest


def refused(words: list[str]) -> dict[str, Any]:
    """Run one command; whether it refused in a line, seconds and peak RSS."""
    status, said, took = run_command(*words)
    ok = status == 2 and said.startswith("gatework: error: ") and said.count("\n") == 1
    return {"refused": ok, "seconds": round(took["seconds"], 2), "megabytes": round(took["peak"] / 1e6)}


def measure(name: str, source: Path, craft: Callable[[Path], object], folder: Path) -> list[dict[str, Any]]:
    """Spoil a copy of a sound checkpoint, and have it refused by both commands."""
    path = Path(shutil.copytree(source, folder / "checkpoint"))
    craft(path)
    commands = {"build": ["build", str(path), "--out", str(folder / "engine")], "inspect": ["inspect", str(path)]}
    if name == NAN or name.startswith("tokenizer"):
        del commands["inspect"]  # which reads neither
    found = [{"case": name, "command": command} | refused(words) for command, words in commands.items()]
    shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="of the names of cases (default: all)")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        forms = sound_checkpoints(Path(temporary))
        cases = {name: (case.form, case.craft) for name, case in CASES.items()} | {NAN: ("hf", spoil_with_nan)}
        for name, (form, craft) in cases.items():
            if not args.words or any(word in name for word in args.words):
                results += measure(name, forms[form], craft, Path(temporary) / "case")
    for command in dict.fromkeys(result["command"] for result in results):
        of_it = [result for result in results if result["command"] == command]
        slowest = sorted(of_it, key=lambda result: -result["seconds"])[:SHOWN]
        largest = max(result["megabytes"] for result in of_it)
        print(f"\n{command}: {len(of_it)} cases, largest {largest} MB; slowest:")
        print(table([(result["case"], f"{result['seconds']:.2f} s") for result in slowest], "<>"))
    missed = [r for r in results if not r["refused"] or r["seconds"] > SECONDS or r["megabytes"] > MEGABYTES]
    print(json.dumps({"cases": len(results), "missed": missed}))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
