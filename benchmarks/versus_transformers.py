"""An engine against transformers (bfloat16) on the same checkpoint, turn by turn in one run.

    python benchmarks/versus_transformers.py build/bench/random-mixtral build/bench/random-mixtral-cpu-int8

Each round measures prefill and decode of one side, then of the other, so that a machine's drift hits both; the ratios are
medians over rounds. transformers runs as it comes: grouped_mm experts, sdpa attention, dynamic cache. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from gatework import LLM, SamplingParams


def engine_round(llm: LLM, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """(prefill, decode) in tokens per second of one greedy request."""
    params = SamplingParams(max_tokens=new_tokens + 1, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    stream = llm.stream(prompt, params)
    next(stream)
    first = time.perf_counter()
    count = sum(len(delta.token_ids) for delta in stream)
    return len(prompt) / (first - start), count / (time.perf_counter() - first)


@torch.inference_mode()
def transformers_round(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """The same for transformers: a plain loop over the model with its cache, without `generate`'s overhead."""
    start = time.perf_counter()
    out = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    first = time.perf_counter()
    for _ in range(new_tokens):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
    return len(prompt) / (first - start), new_tokens / (time.perf_counter() - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    llm = LLM(args.engine)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.bfloat16).eval()
    prompt = np.random.default_rng(0).integers(3, llm.engine.model["vocab_size"], args.prompt_tokens).tolist()
    sides = {
        "engine": lambda tokens: engine_round(llm, prompt, tokens),
        "transformers": lambda tokens: transformers_round(model, prompt, tokens),
    }
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for run in sides.values():
        run(2)  # warm up
    for _ in range(args.rounds):
        for name, run in sides.items():
            figures[name].append(run(args.new_tokens))
    result: dict[str, object] = {"precision": llm.engine.manifest["precision"], "prompt_tokens": args.prompt_tokens}
    for index, phase in enumerate(("prefill", "decode")):
        for name, rows in figures.items():
            result[f"{name}_{phase}_tok_s"] = round(statistics.median(row[index] for row in rows), 1)
        pairs = zip(figures["engine"], figures["transformers"], strict=True)
        result[f"{phase}_ratio"] = round(statistics.median(ours[index] / theirs[index] for ours, theirs in pairs), 2)
    result |= {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
