"""One peer in a process of its own: it loads a model once, and then answers a request a line on standard input.

    python -m benchmarks.peers.worker gatework build/bench/random-mixtral-cpu-int8

Requests are {"phase": "prefill", "tokens": n}, {"phase": "decode", "tokens": n, "batch": B, "context": c} and {"phase":
"logits", "tokens": n}, answers {"seconds": s} and {"logits": [V]}. Every peer gets the same random token ids, in decoding too,
so that they choose the same experts. A step ends when the most likely token is known.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

KINDS = {"gatework": "gatework_peer", "llama.cpp": "llama_cpp_peer", "transformers": "transformers_peer"}
WARM_UP = 2  # steps decoded before the clock starts


class Peer(Protocol):
    """What a worker asks of a way to run the model.

    bytes_per_token: weight bytes that one decoded token reads.
    """

    bytes_per_token: int
    vocab_size: int
    versions: dict[str, str]

    def prefill(self, ids: list[int]) -> np.ndarray:
        """Logits [V] after the prompt, computed from an empty cache."""

    def fill(self, batch: int, context: int) -> None:
        """Give `batch` sequences a cache of `context` positions; what it holds need not be any text's."""

    def decode(self, ids: list[int]) -> np.ndarray:
        """Advance every sequence by its token; logits [B, V]."""


def answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    tokens, random = request["tokens"], np.random.default_rng(0)
    if request["phase"] != "decode":
        ids = random.integers(3, peer.vocab_size, tokens).tolist()
        start = time.perf_counter()
        logits = peer.prefill(ids)
        logits.argmax()
        seconds = time.perf_counter() - start
        return {"seconds": seconds} if request["phase"] == "prefill" else {"logits": logits.tolist()}
    steps = random.integers(3, peer.vocab_size, (tokens + WARM_UP, request["batch"])).tolist()
    peer.fill(request["batch"], request["context"])
    for ids in steps[:WARM_UP]:
        peer.decode(ids)
    start = time.perf_counter()
    for ids in steps[WARM_UP:]:
        peer.decode(ids).argmax(-1)
    return {"seconds": time.perf_counter() - start}


def serve(kind: str, model: str) -> None:
    peer: Peer = import_module(f"benchmarks.peers.{KINDS[kind]}").load(model)
    peer.prefill(list(range(3, 67)))
    hello = {"bytes_per_token": peer.bytes_per_token, "versions": peer.versions}
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(peer, json.loads(line))), flush=True)


class Worker:
    """The other end: starts the process with the given interpreter, and waits until the model is loaded.

    Raises RuntimeError, with the log file's name, where the process dies.
    """

    def __init__(self, python: Path, kind: str, model: Path, log: Path, env: dict[str, str]) -> None:
        self.log = log
        with log.open("w") as stderr:
            command = [python, "-m", "benchmarks.peers.worker", kind, model]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env
            )
        hello = self._read()
        self.bytes_per_token: int = hello["bytes_per_token"]
        self.versions: dict[str, str] = hello["versions"]

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a peer ended early, see {self.log}")
        result: dict[str, Any] = json.loads(line)
        return result


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
