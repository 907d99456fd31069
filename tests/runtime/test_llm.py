"""LLM on the bundled checkpoint: batching, streaming, stopping, logprobs, limits, and errors."""

from __future__ import annotations

import itertools
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gatework
from gatework import LLM, SamplingParams
from gatework.export.build import build_engine
from gatework.plugins.errors import GateworkError
from tests.checkpoints import make_checkpoint

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny-mixtral"
PROMPTS = [
    "def read(path):\n",
    "import os\n\nclass Stack:\n    def push(self, item):\n        ",
    "for i in range(",
    "x",
]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    return build_engine(CHECKPOINT, folder / "tiny", precision="int8", max_seq=128, max_batch=3, prefill_chunk=8)


@pytest.fixture(scope="module")
def llm(engine: Path) -> LLM:
    return LLM(engine)


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    """Greedy tokens of each prompt by itself."""
    return [llm.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]


def test_batch_company_changes_nothing(llm: LLM, alone: list[list[int]]) -> None:
    """More prompts than slots, of different lengths and budgets: rows join, finish and move between slots."""
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (3, 24, 9, 17)]
    together = llm.generate(PROMPTS, params)
    for completion, param, tokens in zip(together, params, alone, strict=True):
        assert completion.token_ids == tokens[: param.max_tokens]
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_batch_company_changes_no_bit(tmp_path: Path, precision: str) -> None:
    """Tokens are the same, and in quantised engines log probabilities too, to the last bit: no near tie can fall otherwise."""
    llm = LLM(build_engine(CHECKPOINT, tmp_path / "engine", precision=precision, max_seq=64))
    ids = np.random.default_rng(0).integers(3, 2048, (6, 17)).tolist()
    prompts = [row[: 2 + 3 * i] for i, row in enumerate(ids)]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1)
    together = llm.generate(prompts, params)
    alone = [llm.generate(prompt, params)[0] for prompt in prompts]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    for one, other in zip(together, alone, strict=True):
        values = [np.array([list(step.values()) for step in each.logprobs or []]) for each in (one, other)]
        assert np.abs(values[0] - values[1]).max() <= (
            1e-5 if precision == "fp32" else 0
        )  # its products sum in other orders


WRONG_CALLS: dict[str, Callable[[LLM], object]] = {
    "no prompt": lambda llm: llm.generate(None),
    "a number": lambda llm: llm.generate(5),
    "bytes": lambda llm: llm.generate(b"text"),
    "a dict": lambda llm: llm.generate({"a": 1}),
    "truth values": lambda llm: llm.generate([True, False]),
    "a dict of parameters": lambda llm: llm.generate("text", {"max_tokens": 3}),
    "no threads": lambda llm: LLM(llm.engine.path, threads=0),
    "too many threads": lambda llm: LLM(llm.engine.path, threads=100_000),
    "threads as text": lambda llm: LLM(llm.engine.path, threads="2"),
    "an unknown check": lambda llm: LLM(llm.engine.path, check="ful"),
}


@pytest.mark.parametrize("call", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_arguments_of_the_wrong_kind_are_one_line(llm: LLM, call: Callable[[LLM], object]) -> None:
    with pytest.raises(gatework.GateworkError, match=r"got .*; expected "):
        call(llm)


def test_chunked_prefill_changes_nothing(alone: list[list[int]], tmp_path: Path) -> None:
    whole = build_engine(CHECKPOINT, tmp_path / "whole", precision="int8", max_seq=128)
    assert LLM(whole).generate(PROMPTS[1], GREEDY)[0].token_ids == alone[1]


def test_seeded_sampling_is_reproducible_in_any_company(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, seed=seed) for seed in range(4)]
    together = llm.generate(PROMPTS, params)
    for prompt, param, completion in zip(PROMPTS, params, together, strict=True):
        assert llm.generate(prompt, param)[0].token_ids == completion.token_ids
    assert len({tuple(llm.generate("x", param)[0].token_ids) for param in params}) > 1


def test_text_and_token_ids_are_the_same_prompt(llm: LLM, alone: list[list[int]]) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(PROMPTS[0])
    by_ids, batch = llm.generate(ids, GREEDY), llm.generate([ids, PROMPTS[0]], GREEDY)
    assert [completion.token_ids for completion in (*by_ids, *batch)] == [alone[0]] * 3
    assert by_ids[0].prompt_token_ids == ids
    assert by_ids[0].text == llm.tokenizer.decode(alone[0])


def test_stream_adds_up(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[0], SamplingParams(max_tokens=24, temperature=0, logprobs=1))[0]
    deltas = list(llm.stream(PROMPTS[0], SamplingParams(max_tokens=24, temperature=0, logprobs=1)))
    assert len(deltas) > 1
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert [entry for delta in deltas for entry in delta.logprobs or []] == whole.logprobs
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [whole.finish_reason]


def test_streams_interleave_and_can_be_dropped(llm: LLM, alone: list[list[int]]) -> None:
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS]  # four, for three slots
    next(streams[3])
    streams[3].close()
    taken: list[list[int]] = [[], [], []]
    while any(len(tokens) < GREEDY.max_tokens for tokens in taken):  # type: ignore[operator]
        for stream, tokens in zip(streams, taken, strict=False):
            for delta in itertools.islice(stream, 1):
                tokens += delta.token_ids
    assert taken == alone[:3]
    assert llm.generate(PROMPTS[3], GREEDY)[0].token_ids == alone[3]


def test_threads_share_the_batch(llm: LLM, alone: list[list[int]]) -> None:
    results: dict[int, list[int]] = {}

    def work(index: int) -> None:
        results[index] = llm.generate(PROMPTS[index], GREEDY)[0].token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[index] for index in range(4)] == alone


def test_stop_strings(llm: LLM) -> None:
    free = llm.generate(PROMPTS[0], GREEDY)[0].text
    stop = free[10:14]
    cut = free[: free.index(stop)]
    stopped = llm.generate(PROMPTS[0], SamplingParams(max_tokens=24, temperature=0, stop=[stop]))[0]
    assert (stopped.text, stopped.finish_reason) == (cut, "stop")
    params = SamplingParams(max_tokens=24, temperature=0, stop=stop, include_stop_str_in_output=True)
    assert llm.generate(PROMPTS[0], params)[0].text == cut + stop
    assert "".join(delta.text for delta in llm.stream(PROMPTS[0], params)) == cut + stop


def test_stop_tokens_and_eos(llm: LLM, alone: list[list[int]]) -> None:
    stop = next(token for token in alone[0][3:] if token not in alone[0][:3])
    params = SamplingParams(max_tokens=24, temperature=0, stop_token_ids=[stop], ignore_eos=True)
    completion = llm.generate(PROMPTS[0], params)[0]
    assert completion.token_ids == alone[0][: alone[0].index(stop) + 1]
    assert completion.finish_reason == "stop"
    eos = llm.engine.model["eos_token_ids"][0]
    forced = SamplingParams(max_tokens=5, temperature=0, logit_bias={eos: 100})
    completion = llm.generate(PROMPTS[0], forced)[0]
    assert (completion.token_ids, completion.text, completion.finish_reason) == ([eos], "", "stop")


def test_logprobs_are_log_probabilities(llm: LLM) -> None:
    vocab_size = llm.engine.model["vocab_size"]
    completion = llm.generate(PROMPTS[0], SamplingParams(max_tokens=3, temperature=0, logprobs=vocab_size))[0]
    assert completion.logprobs is not None
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(entry) == vocab_size
        assert math.isclose(sum(math.exp(value) for value in entry.values()), 1, rel_tol=1e-5)
        assert token == max(entry, key=lambda each: entry[each])
    assert llm.generate(PROMPTS[0], GREEDY)[0].logprobs is None


def test_the_context_can_be_filled(llm: LLM) -> None:
    """A prompt as long as the cache still yields one token; max_tokens=None stops at the end of the context."""
    full = llm.generate(
        [list(np.arange(128) % 50 + 5)], SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
    )[0]
    assert (len(full.token_ids), full.finish_reason) == (1, "length")
    rest = llm.generate([[5] * 100], SamplingParams(max_tokens=None, temperature=0, ignore_eos=True))[0]
    assert (len(rest.token_ids), rest.finish_reason) == (29, "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "empty"), ([], "empty"), ([5] * 129, "too long"), ([2048], "out of range"), ([-1], "out of range")],
)
def test_bad_prompts(llm: LLM, prompt: str | list[int], message: str) -> None:
    with pytest.raises(GateworkError, match=message):
        llm.generate([prompt])
    with pytest.raises(GateworkError, match=message):
        llm.stream(prompt)


@pytest.mark.parametrize("prompts", [[1.5], [None], [["a"]], [[1, 2.0]]])
def test_prompts_of_the_wrong_type(llm: LLM, prompts: list[object]) -> None:
    with pytest.raises(GateworkError, match="wrong type"):
        llm.generate(prompts)  # type: ignore[arg-type]


def test_arrays_are_prompts(llm: LLM) -> None:
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    rows = llm.generate(list(ids), GREEDY)  # type: ignore[arg-type]
    assert rows == llm.generate(ids.tolist(), GREEDY)
    assert llm.generate(ids[0], GREEDY) == rows[:1]  # type: ignore[arg-type]


def test_one_bad_prompt_spoils_no_others(llm: LLM, alone: list[list[int]]) -> None:
    with pytest.raises(GateworkError):
        llm.generate([PROMPTS[0], ""])
    assert llm.generate(PROMPTS[0], GREEDY)[0].token_ids == alone[0]


def test_parameters_per_prompt_must_match(llm: LLM) -> None:
    with pytest.raises(GateworkError, match="do not match"):
        llm.generate(PROMPTS, [GREEDY])
    assert llm.generate([], GREEDY) == []


def test_engine_without_tokenizer(tmp_path: Path) -> None:
    llm = LLM(build_engine(make_checkpoint(tmp_path, "mixtral"), tmp_path / "engine", precision="int4", max_seq=32))
    completion = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))[0]
    assert len(completion.token_ids) == 4
    assert completion.text == ""
    with pytest.raises(GateworkError, match="no tokenizer"):
        llm.generate("text")
    with pytest.raises(GateworkError, match="no tokenizer"):
        llm.chat([{"role": "user", "content": "hi"}])
    with pytest.raises(GateworkError, match="stop strings"):
        llm.generate([[1]], SamplingParams(stop="x"))


def test_chat(tmp_path: Path, engine: Path, llm: LLM) -> None:
    with pytest.raises(GateworkError, match="template"):
        llm.chat([{"role": "user", "content": "hi"}])
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, checkpoint)
    template = "{{ bos_token }}{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(template)
    talker = LLM(build_engine(checkpoint, tmp_path / "engine", precision="int8", max_seq=128))
    answer = talker.chat([{"role": "user", "content": "def f(x):"}], GREEDY)
    assert answer.token_ids == llm.generate("# user: def f(x):\n", GREEDY)[0].token_ids
