"""Whether two engines of one model give the same greedy tokens, also where no environment runs both. Prints one JSON line.

python benchmarks/same_tokens.py build/on-gpu/random-cpu --write build/on-gpu/tokens.json
python benchmarks/same_tokens.py build/on-gpu/random-cuda --against build/on-gpu/tokens.json    # exit status 1 if not
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from gatework import LLM, SamplingParams

NEW_TOKENS = 32
PROMPT_LENGTHS = (1, 7, 33, 100)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine")
    do = parser.add_mutually_exclusive_group(required=True)
    do.add_argument("--write", type=Path, metavar="FILE", help="keep the tokens")
    do.add_argument("--against", type=Path, metavar="FILE", help="compare with kept ones")
    args = parser.parse_args()
    llm, rng = LLM(args.engine), np.random.default_rng(0)
    prompts = [rng.integers(3, 1000, length).tolist() for length in PROMPT_LENGTHS]
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    llm.generate(prompts, params)  # reads the weights, captures the graphs
    start = time.perf_counter()
    tokens = [token for each in llm.generate(prompts, params) for token in each.token_ids]
    found = {
        "engine": args.engine,
        "tokens": len(tokens),
        "tok_s": round(len(tokens) / (time.perf_counter() - start), 1),
    }
    if args.write is not None:
        args.write.write_text(json.dumps(tokens) + "\n")
        print(json.dumps(found))
        return 0
    same = sum(a == b for a, b in zip(tokens, json.loads(args.against.read_text()), strict=True))
    print(json.dumps(found | {"same": same}))
    return int(not tokens or same < len(tokens))


if __name__ == "__main__":
    sys.exit(main())
