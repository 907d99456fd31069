"""How a model knows where tokens stand: rotation, ALiBi or a learned bias, beyond the trained length too, and who sees whom."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatework.export.config import ModelConfig
from gatework.export.yarn import YarnConfig


def rope_tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2j/R), each [length, R/2] float32 (RoFormer, arXiv:2104.09864, section 3.2.2).

    R: the values of a head that rotate, Dh in most models. With dynamic NTK a table for each base, one below the other; which
    one is for a sequence tells `rope_positions`. With YaRN some frequencies are lower, and both are multiplied by its factor.
    """
    R = config.rotary_dim
    exponents = torch.arange(0, R, 2, dtype=torch.int64).float() / max(R, 1)
    bases = [
        config.rope_theta * alpha ** (R / (R - 2)) if alpha > 1 else config.rope_theta
        for alpha in config.ntk_alphas(length)
    ]
    frequencies = [1.0 / (base**exponents) for base in bases]
    factor = 1.0
    if (yarn := config.yarn) is not None:
        frequencies, factor = [_slowed(yarn, each, config.rope_theta) for each in frequencies], yarn.attention_factor
    angles = torch.cat([torch.outer(torch.arange(length).float(), each) for each in frequencies])
    return angles.cos() * factor, angles.sin() * factor


def rope_positions(config: ModelConfig, position_ids: Tensor, prompt_lengths: Tensor | None, max_seq: int) -> Tensor:
    """Rows of `rope_tables` [B, S]: positions, in the table that the prompt's length asks for; prompt_lengths [B, 1 or S]."""
    if config.ntk_length is None:
        return position_ids
    assert prompt_lengths is not None, "dynamic NTK depends on the prompts' lengths"
    steps = range(len(config.ntk_alphas(max_seq)) - 1)
    passed = [(prompt_lengths > config.ntk_length << step).to(torch.int64) for step in steps]
    return position_ids + sum(passed, torch.zeros_like(prompt_lengths)) * max_seq


def _slowed(yarn: YarnConfig, frequencies: Tensor, base: float) -> Tensor:
    """Frequencies [R/2] of the pairs of R values that rotate, which are base^(-2j/R)."""
    R = 2 * len(frequencies)
    begin, end = (
        R * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (yarn.fast, yarn.slow)
    )
    if yarn.truncate:
        begin, end = math.floor(begin), math.ceil(end)
    begin, end = max(begin, 0), min(end, R - 1)
    pairs = torch.arange(len(frequencies)).float()
    ramp = ((pairs - begin) / (end - begin if end != begin else 0.001)).clamp(0, 1)  # 1: slowed
    return frequencies / yarn.factor * ramp + frequencies * (1 - ramp)


def query_scale(config: ModelConfig, position_ids: Tensor) -> Tensor | None:
    """What log-n attention multiplies queries by, from position `logn_length` on, [B, S, 1] float32."""
    if config.logn_length is None:
        return None
    scale = (position_ids + 1).float().log() / math.log(config.logn_length)
    return scale.clamp(min=1.0)[..., None]


def alibi_slopes(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """What ALiBi subtracts from a score per position between query and key, by head: [H] float32 (arXiv:2108.12409).

    For a number of heads that is no power of two, those of the next one: every second from the second, then from the first.
    """
    assert config.alibi_bias_max is not None
    count = 1 << (config.num_heads - 1).bit_length()
    slopes = torch.pow(2.0, torch.arange(1, count + 1, device=device).float() * (-config.alibi_bias_max / count))
    return slopes if count == config.num_heads else torch.cat([slopes[1::2], slopes[::2]])[: config.num_heads]


def relative_buckets(config: ModelConfig, *, both_sides: bool) -> Tensor:
    """The bucket of every offset key - query from -distance to distance: [2 * distance + 1] int64 (T5, arXiv:1910.10683, 2.1).

    Half of the buckets are for one distance each, the others for ranges that grow by a factor. both_sides: half of all are for
    keys after the query; otherwise those, which are never read, go with the query itself.
    """
    assert config.relative_buckets is not None
    offsets = torch.arange(-config.relative_distance, config.relative_distance + 1)
    buckets = config.relative_buckets // 2 if both_sides else config.relative_buckets
    distances = offsets.abs() if both_sides else (-offsets).clamp(min=0)
    exact = buckets // 2
    octaves = torch.log(distances.clamp(min=1).float() / exact) / math.log(config.relative_distance / exact)
    far = (exact + (octaves * (buckets - exact)).to(torch.int64)).clamp(max=buckets - 1)
    chosen = torch.where(distances < exact, distances, far)
    return chosen + (offsets > 0) * buckets if both_sides else chosen


class RelativeBias(nn.Module):
    """What is added to the scores of queries and keys, by head, learned by bucket of their distance."""

    def __init__(self, config: ModelConfig, *, both_sides: bool) -> None:
        super().__init__()
        assert config.relative_buckets is not None
        self.config, self.both_sides, self.distance = config, both_sides, config.relative_distance
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_heads), requires_grad=False)
        self.buckets: Tensor
        self.register_buffer("buckets", relative_buckets(config, both_sides=both_sides), persistent=False)

    def fill(self) -> None:
        """Compute the table, for a module that was made on the meta device."""
        self.buckets = relative_buckets(self.config, both_sides=self.both_sides)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[B, H, S, n], from positions of queries [B, S] and keys [n]."""
        offsets = (keys - queries[..., None]).clamp(-self.distance, self.distance) + self.distance  # [B, S, n]
        return F.embedding(offsets, F.embedding(self.buckets, self.weight)).permute(0, 3, 1, 2)


def attention_mask(
    config: ModelConfig,
    position_ids: Tensor,
    max_seq: int,
    dtype: torch.dtype = torch.float32,
    *,
    window: int | None = None,
    relative_bias: RelativeBias | None = None,
) -> Tensor:
    """True where a query may look: [B, 1, S, S_max], keys at or before it and, with a window, at most W - 1 before it.

    With ALiBi or a learned bias what is added to the scores instead, [B, H, S, S_max] `dtype`.
    """
    keys = torch.arange(max_seq, device=position_ids.device)[None, None, None, :]
    queries = position_ids[:, None, :, None]
    mask = keys <= queries
    if window is not None:
        mask = mask & (keys > queries - window)
    if relative_bias is not None:
        bias = relative_bias(position_ids, keys[0, 0, 0])
        return torch.where(mask, bias.to(dtype), torch.finfo(dtype).min)
    if config.alibi_bias_max is None:
        return mask
    bias = alibi_slopes(config, position_ids.device)[:, None, None] * (keys - queries).float()
    return torch.where(mask, bias.to(dtype), torch.finfo(dtype).min)
