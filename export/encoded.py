"""What the encoder makes of several prompts, with one layer of it in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gatework.export.checkpoint import Checkpoint
from gatework.export.decoder import Layer, norm, scaled
from gatework.export.encoder import through
from gatework.export.positions import RelativeBias
from gatework.export.reference import load_weights


def encode(checkpoint: Checkpoint, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The stream after the encoder's last norm, [1, S, D] for each prompt, which is run by itself."""
    config = checkpoint.config.encoder
    assert config is not None
    table = checkpoint.read("embed.weight")
    streams = [scaled(table[torch.tensor(ids)][None].float(), config.embed_multiplier) for ids in prompts]
    bias = load_bias(checkpoint, "encoder.", both_sides=True)
    for i in range(config.num_layers):
        with torch.device("meta"):
            layer = Layer(config, i).eval()
        load_weights(layer, checkpoint, f"encoder.layers.{i}.")
        for j, x in enumerate(streams):
            positions = torch.arange(x.shape[1])
            streams[j] = through(layer, x, bias(positions[None], positions))
    last = norm(config).eval()
    load_weights(last, checkpoint, "encoder.norm.")
    return [last(x) for x in streams]


def load_bias(checkpoint: Checkpoint, stack: str, *, both_sides: bool) -> RelativeBias:
    """What all layers of the decoder, or of the `stack` "encoder.", add to their scores."""
    with torch.device("meta"):
        bias = RelativeBias(checkpoint.config, both_sides=both_sides).eval()
    load_weights(bias, checkpoint, f"{stack}relative_bias.")
    bias.fill()
    return bias
