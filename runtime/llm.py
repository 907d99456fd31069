"""LLM: an engine loaded for generation."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from operator import index
from typing import Self, get_args

from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import MOST_THREADS
from gatework.runtime.backends.open import open_backend
from gatework.runtime.chat import Message, render_chat
from gatework.runtime.engine import Check, Engine
from gatework.runtime.sampling import Sampler, SamplingParams
from gatework.runtime.scheduler import FinishReason, Request, Scheduler
from gatework.runtime.stopping import StopMatcher
from gatework.runtime.tokenizer import Tokenizer, load_tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model made of one prompt.

    text: decoded output without stop strings or special tokens; empty for an engine without a tokenizer.
    token_ids: every generated token, the one that ended the output included.
    logprobs: per token, log probabilities of the chosen token and of the requested number of best ones; None if not asked for.
    finish_reason: "stop" (stop string, stop token or end of sequence), "length" (max_tokens or context full) or "abort".
    """

    text: str
    token_ids: list[int]
    logprobs: list[dict[int, float]] | None
    finish_reason: FinishReason
    prompt_token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to a streamed completion; `finish_reason` is set on the last one."""

    text: str
    token_ids: list[int]
    logprobs: list[dict[int, float]] | None
    finish_reason: FinishReason | None


class LLM:
    """An engine directory, ready to generate.

    Calls from several threads, and streams that are read in turns, share one batch.

    Args:
        engine_dir: a folder written by `gatework build`.
        max_batch: sequences decoded at once; default: the engine's limit.
        threads: CPU threads of ONNX Runtime; default: all that this process may use.
        check: how thoroughly files are verified, see `Engine.open`.
        stage_processes: run each stage of an engine built with --stages in a process of its own, over torch.distributed. They
            end with `close`, at the end of a with block, with this object, or with the program; if one of them ends before,
            calls raise a GateworkError that names its stage.
        share_weights: map an int8 or int4 CPU engine's weight files, as other engines' are, so that all processes that run it
            hold them once. Otherwise each copies them into huge pages, which are read faster, if that takes at most half of
            the memory that is available.

    Raises:
        GateworkError: the folder is not a whole, unaltered engine that this version can run.
    """

    def __init__(
        self,
        engine_dir: str | os.PathLike[str],
        *,
        max_batch: int | None = None,
        threads: int | None = None,
        check: Check = "auto",
        stage_processes: bool = False,
        share_weights: bool = False,
    ) -> None:
        self.engine = Engine.open(engine_dir, check="sizes")
        self.tokenizer: Tokenizer | None = load_tokenizer(self.engine.path)
        batch = self.engine.limits.max_batch if max_batch is None else max_batch
        for name, value, most in (("max_batch", batch, None), ("threads", threads, MOST_THREADS)):
            if value is not None and not (type(value) is int and 1 <= value <= (most or value)):
                expected = "at least 1" if most is None else f"1 to {most}"
                raise GateworkError(f"{name} is out of range", got=repr(value), expected=expected)
        if check not in get_args(Check):
            raise GateworkError("unknown check", got=repr(check), expected=" or ".join(get_args(Check)))
        with ThreadPoolExecutor(1) as pool:  # the weights are hashed while the session is made of them
            hashing = pool.submit(self.engine.check_weights, check)
            self._backend = open_backend(
                self.engine,
                max_batch=batch,
                threads=threads,
                stage_processes=stage_processes,
                share_weights=share_weights,
            )
            hashing.result()
        self._scheduler = Scheduler(self._backend, self.engine.limits.prefill_chunk)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the stages' processes, if there are any, once no call is in progress; later calls raise an error."""
        with self._lock:
            if self.stage_pids:
                self._backend.close()  # type: ignore[attr-defined]

    @property
    def stage_pids(self) -> list[int]:
        """Process ids of the stages that run in processes of their own, in their order."""
        return getattr(self._backend, "pids", [])

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete one prompt or several; the results stand in the order of the prompts.

        Args:
            prompts: text, or token ids, or a list of either. Text is encoded with the tokenizer's special tokens (BOS).
            sampling_params: for all prompts, or one for each.

        Raises:
            GateworkError: an empty or too long prompt, a token id out of range, or text for an engine without a tokenizer.
        """
        if isinstance(prompts, bytes | Mapping) or not hasattr(prompts, "__getitem__"):  # arrays are welcome
            raise _wrong_prompt(prompts)
        batch = [prompts] if _is_single(prompts) else list(prompts)
        params = _per_prompt(sampling_params, len(batch))
        requests = [self._request(prompt, each) for prompt, each in zip(batch, params, strict=True)]  # type: ignore[arg-type]
        with self._lock:
            for request in requests:
                self._scheduler.add(request)
        try:
            while any(request.finish_reason is None for request in requests):
                self._step()
        finally:
            self._abort(requests)
        return [_completion(request) for request in requests]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[Delta]:
        """Complete one prompt, piece by piece. Closing the iterator ends the request."""
        request = self._request(prompt, sampling_params or SamplingParams())
        return self._stream(request)

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> Completion:
        """Answer a conversation, written as {"role": ..., "content": ...} messages, through the model's chat template."""
        return self.generate(self.encode_chat(messages, add_generation_prompt), sampling_params)[0]

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation in the model's chat template."""
        tokenizer = self._tokenizer()
        text = render_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt)
        return tokenizer.encode(text, add_special_tokens=False)

    def _stream(self, request: Request) -> Iterator[Delta]:
        with self._lock:
            self._scheduler.add(request)
        try:
            text = tokens = 0
            while True:
                while request.finish_reason is None and len(request.output_ids) == tokens:
                    self._step()
                delta = _delta(request, text, tokens)
                text, tokens = text + len(delta.text), tokens + len(delta.token_ids)
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._abort([request])

    def _step(self) -> None:
        with self._lock:
            self._scheduler.step()

    def _abort(self, requests: list[Request]) -> None:
        with self._lock:
            for request in requests:
                self._scheduler.abort(request)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            fix = "give token ids (--prompt-ids 1,2,3), or build from a checkpoint with tokenizer files"
            raise GateworkError("this engine has no tokenizer", got="text", expected="token ids", fix=fix)
        return self.tokenizer

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        ids = self._encode(prompt)
        self._check_prompt(ids)
        if params.stop and self.tokenizer is None:
            fix = "leave --stop out, or use stop_token_ids in Python"
            raise GateworkError("stop strings need a tokenizer", got="an engine without one", fix=fix)
        model, source = self.engine.model, None
        if self.engine.has_encoder:
            source, ids = ids, [model["start_token_id"]]
        eos = [] if params.ignore_eos else model["eos_token_ids"]
        return Request(
            prompt_ids=ids,
            params=params,
            sampler=Sampler(params, ids, model["vocab_size"], eos_token_ids=eos),
            stop_ids=frozenset([*eos, *(params.stop_token_ids or ())]),
            decoder=self.tokenizer.stream() if self.tokenizer is not None else None,
            matcher=StopMatcher(params.stop_strings, include_stop=params.include_stop_str_in_output),
            source_ids=source,
        )

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenizer().encode(prompt) if prompt else []
        try:
            if isinstance(prompt, bytes) or any(isinstance(token, bool) for token in prompt):
                raise _wrong_prompt(prompt)
            return [index(token) for token in prompt]
        except TypeError:
            raise _wrong_prompt(prompt) from None

    def _check_prompt(self, ids: list[int]) -> None:
        if not ids:
            raise GateworkError("the prompt is empty", expected="at least one token")
        self.engine.check_prompt(len(ids))
        vocab_size = self.engine.model["vocab_size"]
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise GateworkError("a token id is out of range", got=wrong, expected=f"0 to {vocab_size - 1}")


def _wrong_prompt(prompt: object) -> GateworkError:
    expected = "text or a list of token ids"
    return GateworkError("a prompt is of the wrong type", got=repr(prompt)[:80], expected=expected)


def _is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))


def _per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
        got = repr(params)[:80]
        raise GateworkError("sampling_params are of the wrong type", got=got, expected="SamplingParams, one or a list")
    if len(params) != count:
        raise GateworkError("sampling_params do not match the prompts", got=len(params), expected=f"one, or {count}")
    return list(params)


def _completion(request: Request) -> Completion:
    assert request.finish_reason is not None
    logprobs = request.logprobs if request.params.logprobs is not None else None
    prompt = request.prompt_ids if request.source_ids is None else request.source_ids
    return Completion(request.text, request.output_ids, logprobs, request.finish_reason, prompt)


def _delta(request: Request, text: int, tokens: int) -> Delta:
    logprobs = request.logprobs[tokens:] if request.params.logprobs is not None else None
    return Delta(request.text[text:], request.output_ids[tokens:], logprobs, request.finish_reason)
