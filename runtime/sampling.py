"""Choosing the next token: what a request asks for, and the sampler that does it for one request.

A row of logits goes through these steps, in this order:

1. logit_bias, the ban on ending before min_tokens, then repetition, frequency and presence penalties;
2. temperature; 3. top-k; 4. top-p of what top-k left; 5. min-p, relative to the most likely token.

Steps 2 to 5 are skipped at temperature 0. Log-probabilities are those of the raw logits, before step 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from gatework.plugins.errors import GateworkError

_BLOCK = 512  # weights summed at once when drawing: a running sum over the whole vocabulary is ten times slower
_SORTED = 1024  # at most so many candidates are sorted when looking for a nucleus


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a request asks for; names and defaults are those of OpenAI's API and of vLLM.

    Attributes:
        max_tokens: tokens to generate at most; None: until the context is full.
        min_tokens: before so many tokens, neither an end-of-sequence token nor one of stop_token_ids may be chosen.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most likely tokens that has this mass (Holtzman et al. 2020, nucleus sampling).
        min_p: keep tokens at least this many times as likely as the most likely one (Nguyen et al. 2024).
        repetition_penalty: of tokens in prompt or output; positive logits are divided by it, negative ones multiplied
            (Keskar et al. 2019, CTRL, section 4.1).
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: subtracted once per occurrence in the output.
        seed: of the request's own random stream; None: from the operating system.
        stop: strings that end the text. Kept as a tuple.
        stop_token_ids: tokens that end the output. Kept as a tuple.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: how many of the most likely tokens to report at each step; the chosen one is always reported. None: no
            log-probabilities at all.
        include_stop_str_in_output: leave the stop string in the text.
        logit_bias: token id -> added to its logit, within [-100, 100].

    Raises:
        GateworkError: a value is out of range or of the wrong type.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        for name, minimum in _INTEGERS.items():
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL) and not (_is_integer(value) and value >= minimum):
                raise _wrong(name, value, f"an integer of at least {minimum}")
        for name, (holds, range_text) in _REALS.items():
            value = getattr(self, name)
            if not (_is_real(value) and holds(value)):
                raise _wrong(name, value, f"a number {range_text}")
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, as a tuple."""
        return tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0


_OPTIONAL = ("max_tokens", "seed", "logprobs")
_INTEGERS = {"max_tokens": 1, "min_tokens": 0, "top_k": -1, "seed": 0, "logprobs": 0}
_REALS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "of at least 0"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "repetition_penalty": (lambda value: value > 0, "above 0"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "between -2 and 2"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "between -2 and 2"),
}


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token. `top_logprobs` goes from the most likely token down; the chosen one is always in it."""

    token_id: int
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None


class Sampler:
    """Chooses one request's tokens. Its random stream is its own, so batch company changes nothing.

    Args:
        prompt_ids: tokens that the repetition penalty knows from the start.
        vocab_size: V, the length of a row of logits.
        eos_token_ids: the model's end-of-sequence tokens, which min_tokens holds back (unless ignore_eos).

    Raises:
        GateworkError: stop_token_ids or logit_bias names a token outside the vocabulary.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int, eos_token_ids: Iterable[int] = ()
    ) -> None:
        self.params = params
        self._rng = np.random.Generator(np.random.PCG64(params.seed))
        stop_ids = tuple(params.stop_token_ids or ())
        for name, ids in (("stop_token_ids", stop_ids), ("logit_bias", tuple(params.logit_bias or ()))):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise _wrong(name, token_id, f"token ids below {vocab_size}")
        enders = set(stop_ids) | (set() if params.ignore_eos else set(eos_token_ids))
        self._enders = np.array(sorted(enders), np.int64)
        self._num_generated = 0
        self._penalties = _Penalties(params, prompt_ids) if _has_penalties(params) else None

    def sample(self, logits: np.ndarray) -> Sampled:
        """Choose a token from logits [V] float32, which stay as they are.

        Raises:
            GateworkError: the logits hold NaN, or none of them is finite.
        """
        params = self.params
        row = self._adjusted(logits)
        best = int(row.argmax())  # the first NaN, where there is one
        if not math.isfinite(row[best]):
            raise GateworkError(
                "the model's logits cannot be sampled",
                got=f"{row[best]} for token {best}",
                fix="verify the engine; half precision may overflow",
            )
        token_id = best
        if not params.greedy:
            ids, weights = candidates(row, float(row[best]), params)
            drawn = _draw(weights, self._rng.random())
            token_id = drawn if ids is None else int(ids[drawn])
        self._num_generated += 1
        if self._penalties:
            self._penalties.count(token_id)
        if params.logprobs is None:
            return Sampled(token_id)
        top = _top_logprobs(logits, token_id, params.logprobs)
        return Sampled(token_id, top[token_id], top)

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """The logits after step 1: a copy, or the logits themselves where the step changes nothing."""
        bias = self.params.logit_bias
        held_back = len(self._enders) > 0 and self._num_generated < self.params.min_tokens
        if not (bias or held_back or self._penalties):
            return logits
        row = logits.copy()
        for token_id, value in (bias or {}).items():
            row[token_id] += value
        if held_back:
            row[self._enders] = -np.inf
        if self._penalties:
            self._penalties.apply(row)
        return row


class _Penalties:
    """The penalised tokens of one request and their counts in the output."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._params = params
        seen = prompt_ids if params.repetition_penalty != 1 else ()  # the other penalties look at the output only
        self._ids = np.unique(np.array(seen, np.int64))
        self._counts = np.zeros(len(self._ids), np.float32)
        self._places = {int(token_id): place for place, token_id in enumerate(self._ids)}

    def count(self, token_id: int) -> None:
        """Take note of a token of the output."""
        if token_id not in self._places:
            self._places[token_id] = len(self._ids)
            self._ids = np.append(self._ids, token_id)
            self._counts = np.append(self._counts, np.float32(0))
        self._counts[self._places[token_id]] += 1

    def apply(self, row: np.ndarray) -> None:
        """Lower the penalised tokens' logits, in place."""
        params, values = self._params, row[self._ids]
        if params.repetition_penalty != 1:
            penalty = np.float32(params.repetition_penalty)
            values = np.where(values > 0, values / penalty, values * penalty)
        values -= np.float32(params.frequency_penalty) * self._counts
        values -= np.float32(params.presence_penalty) * (self._counts > 0)
        row[self._ids] = values


def candidates(row: np.ndarray, highest: float, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """Steps 2 to 5 of a row of logits [V] whose maximum is `highest`.

    Returns:
        The ids of the tokens left (None: all, in order) and their weights, float32, the most likely token's being 1.
    """
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf
        scaled = (row - np.float32(highest)) / np.float32(max(params.temperature, 1e-30))
    ids = None
    if 0 < params.top_k < len(scaled):
        ids = top_k_ids(scaled, params.top_k)
        scaled = scaled[ids]
    weights = np.exp(scaled)
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(weights >= np.float32(params.min_p))
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return ids, weights


def top_k_ids(values: np.ndarray, k: int) -> np.ndarray:
    """Places of the k largest of `values` [N], in ascending order of place; among equals the lowest places."""
    threshold = np.partition(values, len(values) - k)[len(values) - k]
    ids = np.flatnonzero(values >= threshold)
    if len(ids) > k:
        tied = np.flatnonzero(values[ids] == threshold)
        ids = np.delete(ids, tied[k - len(ids) :])
    return ids


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Places of the smallest set of largest weights [N] that has the share `top_p` of their sum; ties to the lowest."""
    total = float(weights.sum(dtype=np.float64))
    missing = top_p * total
    # Weights below the mean of the tail's share cannot make up more than the tail together: none is in the nucleus.
    ids = np.flatnonzero(weights >= total * (1 - top_p) / len(weights))
    inside = []
    while len(ids) > _SORTED:  # cut the undecided in two, and decide about one part
        undecided = weights[ids]
        lightest, heaviest = float(undecided.min()), float(undecided.max())
        if lightest == heaviest:
            break
        heavy = undecided > math.sqrt(lightest * heaviest)
        mass = float(undecided[heavy].sum(dtype=np.float64))
        if mass >= missing:
            ids = ids[heavy]
        else:
            inside.append(ids[heavy])
            ids = ids[~heavy]
            missing -= mass
    order = ids[np.argsort(-weights[ids], kind="stable")]
    count = int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), missing)) + 1
    return np.concatenate([*inside, order[:count]])


def _draw(weights: np.ndarray, uniform: float) -> int:
    """The place where the running sum of weights [N] passes `uniform`, in [0, 1), of their total."""
    starts = np.arange(0, len(weights), _BLOCK)
    ends = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = uniform * ends[-1]
    block = _first_above(ends, target)
    inside = np.cumsum(weights[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
    return int(starts[block]) + _first_above(inside, target - (ends[block - 1] if block else 0.0))


def _first_above(sums: np.ndarray, target: float) -> int:
    """First place whose running sum is above the target; where rounding leaves none, the last that added anything."""
    return int(min(np.searchsorted(sums, target, side="right"), np.searchsorted(sums, sums[-1], side="left")))


def _top_logprobs(logits: np.ndarray, chosen: int, count: int) -> dict[int, float]:
    """The `count` highest log-probabilities (natural) of logits [V], highest first, and the chosen token's."""
    highest = logits.max()
    log_sum = math.log(np.exp(logits - highest).sum(dtype=np.float64)) + float(highest)
    count = min(count, len(logits))
    ids = top_k_ids(logits, count) if count else np.zeros(0, np.int64)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    top = {int(token_id): float(logits[token_id]) - log_sum for token_id in ids}
    top.setdefault(chosen, float(logits[chosen]) - log_sum)
    return top


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(name: str, got: object, expected: str) -> GateworkError:
    return GateworkError(f"{name} is not valid", got=repr(got), expected=expected)


def _stop_strings(stop: object) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(stops, Sequence) or not all(isinstance(item, str) and item for item in stops):
        raise _wrong("stop", stop, "a string or a list of strings, none of them empty")
    return tuple(stops)


def _stop_ids(ids: object) -> tuple[int, ...]:
    items = () if ids is None else ids
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise _wrong("stop_token_ids", ids, "a list of token ids")
    items = tuple(items)
    if not all(_is_integer(item) and item >= 0 for item in items):
        raise _wrong("stop_token_ids", ids, "a list of token ids")
    return tuple(int(item) for item in items)


def _bias(bias: object) -> dict[int, float]:
    pairs = {} if bias is None else bias
    if not isinstance(pairs, Mapping) or not all(
        _is_integer(token_id) and token_id >= 0 and _is_real(value) and -100 <= value <= 100
        for token_id, value in pairs.items()
    ):
        raise _wrong("logit_bias", bias, "token ids with numbers between -100 and 100")
    return {int(token_id): float(value) for token_id, value in pairs.items()}
