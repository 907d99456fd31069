"""The encoder of an encoder-decoder model: from a prompt to the keys and values that the decoder's layers read of it.

Its layers are the decoder's, but every position sees all others, and there is no cache. Shape letters as in `decoder`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatework.export.config import ModelConfig
from gatework.export.decoder import Layer, Linear, norm, scaled, source_mask
from gatework.export.positions import RelativeBias


class Stack(nn.Module):
    """The layers, and the norm after them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = norm(config)
        self.relative_bias = RelativeBias(config, both_sides=True)


class SourceKeys(nn.Module):
    """Keys and values of one decoder layer's attention to the encoder's output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, width = config, config.num_kv_heads * config.head_dim
        self.k, self.v = (Linear(width, config.hidden_size) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        shape = (self.config.num_kv_heads, self.config.head_dim)
        return [product(x).unflatten(-1, shape).transpose(1, 2) for product in (self.k, self.v)]


class Encoder(nn.Module):
    """Parameters carry the canonical names of ModelConfig.

    Args of `forward`:
        input_ids: [B, S] int64 prompts, padded at their ends with anything.
        source_lengths: [B] int64, how long each is.

    Returns for every decoder layer keys and values in turn, [B, Hkv, S, Dh]. What follows a row's length means nothing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.encoder is not None
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = Stack(config.encoder)
        self.layers = nn.ModuleList(nn.ModuleDict({"cross": SourceKeys(config)}) for _ in range(config.num_layers))

    def forward(self, input_ids: Tensor, source_lengths: Tensor) -> list[Tensor]:
        hidden = self.hidden(input_ids, source_lengths)
        return [value for layer in self.layers for value in layer["cross"](hidden)]  # type: ignore[index]

    def hidden(self, input_ids: Tensor, source_lengths: Tensor) -> Tensor:
        """The stream after all layers and the last norm, [B, S, D]."""
        x = scaled(self.embed(input_ids), self.config.embed_multiplier)
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device)
        bias = self.encoder.relative_bias(positions[None], positions).to(x.dtype)  # [1, H, S, S]
        visible = source_mask(source_lengths, length, length)
        mask = torch.where(visible, bias, torch.finfo(x.dtype).min)
        for layer in self.encoder.layers:
            x = through(layer, x, mask)  # type: ignore[arg-type]
        return self.encoder.norm(x)


def through(layer: Layer, x: Tensor, mask: Tensor) -> Tensor:
    """One layer; mask [B, H, S, S]: what is added to the scores."""
    return layer.feed_forward(attend(layer, x, mask), x)


def attend(layer: Layer, x: Tensor, mask: Tensor) -> Tensor:
    """Its first half."""
    attention, normed = layer.attn, layer.attn_norm(x)
    q, k, v = (attention.heads(product(normed)) for product in (attention.q, attention.k, attention.v))
    return x + attention.o(attention.read(q, k, v, mask))
