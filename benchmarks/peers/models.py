"""The files that peers run: checkpoint, engines and GGUF, made where they are missing or out of date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import random_mixtral
from benchmarks.peers.cells import LONGEST, OURS, SAME, SETTINGS


def prepare(shape: str, folder: Path, python: Path, peers: list[str]) -> dict[str, tuple[str, Path]]:
    """peer -> its kind of worker and the model that it loads.

    python: interpreter of the environment that has the gguf package.
    """
    checkpoint = folder / f"random-{shape}"
    config = checkpoint / "config.json"
    if not config.exists():
        random_mixtral.make(checkpoint, shape)
    files: dict[str, tuple[str, Path]] = {"transformers-bf16": ("transformers", checkpoint)}
    for kind, name in OURS.items():
        files[name] = ("gatework", folder / f"random-{shape}-cpu-{kind.replace(' ', '-')}")
        if name in peers:
            command = [Path(sys.executable).with_name("gatework"), "build", checkpoint, *SETTINGS[kind]]
            command += ["--max-seq", str(LONGEST), "--out", files[name][1], "--force", "--if-changed", "--quiet"]
            subprocess.run(command, check=True)
    for name in dict.fromkeys(SAME.values()):
        kind = name.removeprefix("llama.cpp-")
        path = folder / f"random-{shape}-{kind}.gguf"
        files[name] = ("llama.cpp", path)
        if name in peers and not (path.exists() and path.stat().st_mtime > config.stat().st_mtime):
            subprocess.run([python, "-m", "benchmarks.peers.gguf_writer", checkpoint, kind, path], check=True)
    return {name: files[name] for name in peers}
