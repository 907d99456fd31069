"""Continuous batching: requests wait, are prefilled one by one into cache slots, and decode together."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

import numpy as np

from gatework.runtime.sampling import Sampler, SamplingParams
from gatework.runtime.stopping import StopMatcher
from gatework.runtime.tokenizer import StreamDecoder

FinishReason = Literal["stop", "length", "abort"]


class Backend(Protocol):
    """What the scheduler needs of an engine; see `gatework.runtime.backends`."""

    max_batch: int
    max_seq: int

    def prefill(self, slot: int, tokens: list[int], start: int, prompt: int | None = None) -> np.ndarray: ...
    def decode(self, tokens: list[int], positions: list[int]) -> np.ndarray: ...
    def move(self, source: int, target: int, length: int) -> None: ...


class EncodingBackend(Backend, Protocol):
    """What it needs besides where the model has an encoder."""

    def encode(self, slot: int, tokens: list[int]) -> None: ...


@dataclass(slots=True, eq=False)
class Request:
    """One sequence on its way through the engine. Text is produced only where there is a tokenizer.

    source_ids: what the encoder reads, where there is one; the decoder's own prompt is its start token then.
    """

    prompt_ids: list[int]
    params: SamplingParams
    sampler: Sampler
    stop_ids: frozenset[int]
    decoder: StreamDecoder | None
    matcher: StopMatcher
    source_ids: list[int] | None = None
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None

    @property
    def length(self) -> int:
        """Tokens so far, prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    def accept(self, logits: np.ndarray, max_seq: int) -> None:
        """Sample the next token from logits [V] and find out whether the request ends with it."""
        sampled = self.sampler.sample(logits)
        self.output_ids.append(sampled.token_id)
        if sampled.top_logprobs is not None:
            self.logprobs.append(sampled.top_logprobs)
        if sampled.token_id in self.stop_ids:
            self.finish_reason = "stop"
        else:
            self._extend_text(sampled.token_id)
            if self.finish_reason is None and (len(self.output_ids) == self.params.max_tokens or self.length > max_seq):
                self.finish_reason = "length"
        if self.finish_reason is not None:
            self._finish_text()

    def _extend_text(self, token_id: int) -> None:
        if self.decoder is not None:
            self._match(self.decoder.push(token_id))

    def _finish_text(self) -> None:
        if self.decoder is not None and not self.matcher.stopped:
            self._match(self.decoder.flush())
            self.text += self.matcher.flush()

    def _match(self, piece: str) -> None:
        if len(self.output_ids) <= self.params.min_tokens:  # stop strings count from there on
            self.text += piece
            return
        self.text += self.matcher.push(piece)
        if self.matcher.stopped:
            self.finish_reason = "stop"


class Scheduler:
    """Advances requests by one step at a time."""

    def __init__(self, backend: Backend, prefill_chunk: int) -> None:
        self.backend, self.prefill_chunk = backend, prefill_chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # index = cache slot

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        """Give up a request; it keeps what it has produced."""
        if request.finish_reason is None:
            request.finish_reason = "abort"
            if request in self.waiting:
                self.waiting.remove(request)
            self._release_finished()

    def step(self) -> None:
        """Prefill the next waiting request if a slot is free, else decode one token for every running one."""
        if self.waiting and len(self.running) < self.backend.max_batch:
            self._prefill(self.waiting.popleft())
        elif self.running:
            self._decode()
        self._release_finished()

    def _prefill(self, request: Request) -> None:
        slot, tokens = len(self.running), request.prompt_ids
        if request.source_ids is not None:
            cast(EncodingBackend, self.backend).encode(slot, request.source_ids)
        for start in range(0, len(tokens), self.prefill_chunk):
            logits = self.backend.prefill(slot, tokens[start : start + self.prefill_chunk], start, len(tokens))
        self.running.append(request)
        request.accept(logits, self.backend.max_seq)

    def _decode(self) -> None:
        tokens = [request.output_ids[-1] for request in self.running]
        positions = [request.length - 1 for request in self.running]
        logits = self.backend.decode(tokens, positions)
        for request, row in zip(self.running, logits, strict=True):
            request.accept(row, self.backend.max_seq)

    def _release_finished(self) -> None:
        """Keep running requests in slots 0..n-1: the last one moves into a slot that falls free."""
        slot = 0
        while slot < len(self.running):
            if self.running[slot].finish_reason is None:
                slot += 1
                continue
            last = self.running.pop()
            if slot < len(self.running):
                if last.finish_reason is None:
                    self.backend.move(len(self.running), slot, last.length - 1)
                self.running[slot] = last
