"""Whether two engines of one model give the same greedy tokens: prints one JSON line, and exits 1 if not.

python benchmarks/same_tokens.py build/on-gpu/random-cpu build/on-gpu/random-cuda
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np

from gatework import LLM, SamplingParams

NEW_TOKENS = 32
PROMPT_LENGTHS = (1, 7, 33, 100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs=2)
    args = parser.parse_args()
    found, seconds = [], []
    for path in args.engines:
        llm, rng = LLM(path), np.random.default_rng(0)
        prompts = [rng.integers(3, 1000, length).tolist() for length in PROMPT_LENGTHS]
        start = time.perf_counter()
        completions = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True))
        seconds.append(round(time.perf_counter() - start, 2))
        found.append([list(each.token_ids) for each in completions])
    pairs = [pair for rows in zip(*found, strict=True) for pair in zip(*rows, strict=True)]
    same = sum(a == b for a, b in pairs)
    print(json.dumps({"engines": args.engines, "tokens": len(pairs), "same": same, "seconds": seconds}))
    return int(not pairs or same < len(pairs))


if __name__ == "__main__":
    sys.exit(main())
