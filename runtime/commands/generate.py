"""gatework generate: prompts in, text out."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatework.plugins.errors import GateworkError, option
from gatework.runtime.commands.common import (
    Commands,
    add_command,
    add_share_weights,
    add_stage_processes,
    add_threads,
    integer,
    number,
    read_text,
)

if TYPE_CHECKING:
    from gatework.runtime.llm import LLM, Completion, Prompt
    from gatework.runtime.sampling import SamplingParams

_ABOUT = """
    Continue one prompt, or several together. The text of a single prompt appears as it is produced.
    An engine without a tokenizer takes --prompt-ids and prints token ids.
    The temperature is 0 unless you set it, so that the same command gives the same text.
"""
_EXAMPLES = """
    gatework generate engines/tiny --prompt "def binary_search(items, target):" --max-tokens 96
    gatework generate engines/tiny --prompt "import " --prompt "class " --json
    gatework generate engines/tiny --file prompt.txt --temperature 0.8 --top-p 0.95 --seed 1
    gatework generate engines/mixtral-instruct --system "Be brief." --chat "What is a router?"
    gatework generate engines/dbrx-in-stages --stage-processes --prompt "The gate opens"
    gatework generate engines/random --prompt-ids 1,5,7 --ignore-eos --logprobs 3
"""


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(commands, "generate", "continue prompts with an engine", _ABOUT, _EXAMPLES, run)
    parser.add_argument("engine", type=Path, metavar="ENGINE", help="engine directory")
    prompt = parser.add_argument_group("prompt (one kind)").add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated")
    prompt.add_argument("--prompt-ids", action="append", type=_ids, metavar="1,2,3", help="token ids; may be repeated")
    prompt.add_argument("--chat", metavar="TEXT", help="a user's message, put into the model's chat template")
    prompt.add_argument("--file", type=Path, metavar="FILE", help="continue the text of a file; - reads standard input")
    parser.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=integer, default=128, metavar="N", help="at most so many (default: 128)")
    sampling.add_argument("--temperature", type=number, default=0.0, metavar="T", help="0 takes the best (default: 0)")
    sampling.add_argument("--top-k", type=integer, default=0, metavar="K", help="of the K best tokens (default: all)")
    sampling.add_argument("--top-p", type=number, default=1.0, metavar="P", help="of the best with mass P (default: 1)")
    sampling.add_argument(
        "--min-p", type=number, default=0.0, metavar="P", help="of those P times as likely as the best"
    )
    sampling.add_argument("--repetition-penalty", type=number, default=1.0, metavar="R", help="above 1 discourages")
    sampling.add_argument(
        "--seed", type=integer, metavar="N", help="of the random stream (default: a new one each time)"
    )
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    output = parser.add_argument_group("output")
    output.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    output.add_argument("--logprobs", type=integer, metavar="N", help="list each token with its N best alternatives")
    output.add_argument("--json", action="store_true", help="one JSON object per prompt and line")
    add_threads(parser)
    add_stage_processes(parser)
    add_share_weights(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, and print."""
    from gatework.runtime.llm import LLM

    if args.system is not None and args.chat is None:
        raise GateworkError("--system goes with --chat", fix="add --chat TEXT")
    params = _sampling_params(args)
    texts = _texts(args)
    settings = {name: getattr(args, name) for name in ("threads", "stage_processes", "share_weights")}
    with LLM(args.engine, **settings) as llm:
        _generate(llm, args, texts, params)
    return 0


def _sampling_params(args: argparse.Namespace) -> SamplingParams:
    from gatework.runtime.sampling import SamplingParams

    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "ignore_eos")
    try:
        return SamplingParams(**{name: getattr(args, name) for name in (*names, "logprobs")})
    except GateworkError as error:  # which begins with the parameter's name
        name, _, rest = str(error).partition(" ")
        raise GateworkError(f"{option(name)} {rest}") from None


def _generate(llm: LLM, args: argparse.Namespace, texts: list[str], params: SamplingParams) -> None:
    prompts = _chat(llm, args) if args.chat is not None else texts if args.prompt_ids is None else args.prompt_ids
    if args.json:
        for completion in llm.generate(prompts, params):
            print(json.dumps(asdict(completion)))
    elif len(prompts) == 1:
        _stream(llm, prompts[0], params, args.echo)
    else:
        for number, completion in enumerate(llm.generate(prompts, params), start=1):
            if len(prompts) > 1:
                print(f"[{number}]")
            _print_completion(llm, completion, args.echo)


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected token ids such as 1,2,3") from None


def _texts(args: argparse.Namespace) -> list[str]:
    """The prompts given as text."""
    if args.file is None:
        return args.prompt or []
    if str(args.file) != "-":
        return [read_text(args.file)]
    if sys.stdin is None:
        raise GateworkError("standard input is closed", fix="give --prompt TEXT, or --file with a file's name")
    try:
        return [sys.stdin.read()]
    except UnicodeDecodeError as error:
        raise GateworkError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _chat(llm: LLM, args: argparse.Namespace) -> list[list[int]]:
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [llm.encode_chat([*system, {"role": "user", "content": args.chat}])]


def _stream(llm: LLM, prompt: Prompt, params: SamplingParams, echo: bool) -> None:
    """Print one completion's text, or token ids without a tokenizer, as it comes."""
    stream = llm.stream(prompt, params)
    first = next(stream)  # a bad prompt is an error before anything is printed
    if echo:
        print(_prompt_text(llm, prompt), end="")
    token_ids: list[int] = []
    logprobs: list[dict[int, float]] = []
    for delta in chain([first], stream):
        ids = " " * bool(token_ids and delta.token_ids) + _joined(delta.token_ids)
        print(ids if llm.tokenizer is None else delta.text, end="", flush=True)
        token_ids += delta.token_ids
        logprobs += delta.logprobs or []
    print()
    _print_logprobs(llm, token_ids, logprobs)


def _prompt_text(llm: LLM, prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return llm.tokenizer.decode(prompt) if llm.tokenizer is not None else _joined(prompt) + " "


def _print_completion(llm: LLM, completion: Completion, echo: bool) -> None:
    prompt = _prompt_text(llm, completion.prompt_token_ids) if echo else ""
    print(prompt + (completion.text if llm.tokenizer is not None else _joined(completion.token_ids)))
    _print_logprobs(llm, completion.token_ids, completion.logprobs or [])


def _joined(ids: Any) -> str:
    return " ".join(map(str, ids))


def _print_logprobs(llm: LLM, token_ids: list[int], logprobs: list[dict[int, float]]) -> None:
    """One line per token: its id, log-probability and text, then the alternatives, the best first."""
    for token_id, row in zip(token_ids, logprobs, strict=False):
        others = [_scored(llm, other, row[other]) for other in row if other != token_id]
        print("  ".join([_scored(llm, token_id, row[token_id]), *(f"| {other}" for other in others)]))


def _scored(llm: LLM, token_id: int, logprob: float) -> str:
    text = "" if llm.tokenizer is None else f" {llm.tokenizer.token(token_id)!r}"
    return f"{token_id} {logprob:.4f}{text}"
