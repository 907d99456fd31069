"""SmoothQuant (arXiv:2211.10438): outliers of activations move into the weights, where int8 takes them better.

Channel j of a norm's output x is divided by s_j, and column j of every weight W [out, D] that x is multiplied with is
multiplied by s_j, so that the products stay what they were: (x / s) (W s)^T = x W^T. Dividing a norm's weight, and its bias
if it has one, divides its output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gatework.export.config import ModelConfig

_LEAST = 1e-5  # a channel's maximum counts as at least this much, as in the authors' code: no s is zero or infinite


def balanced_products(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Norms that can be balanced, each with the weights that its output is multiplied with.

    These are the norms that feed dense products only: the feed-forward norm of a mixture of experts feeds router and experts
    as well, and stays out. With tied embeddings `lm_head.weight` stands for the head's own copy of the embedding table.
    """
    fed: dict[str, tuple[str, ...]] = {}
    if config.encoder is not None:
        fed = {
            f"encoder.{norm}": tuple(f"encoder.{name}" for name in names)
            for norm, names in _fed(config.encoder).items()
        }
        sources = (f"layers.{i}.cross.{name}.weight" for i in range(config.num_layers) for name in "kv")
        fed["encoder.norm.weight"] = tuple(sources)
    return fed | _fed(config) | {"norm.weight": ("lm_head.weight",)}


def _fed(stack: ModelConfig) -> dict[str, tuple[str, ...]]:
    """By the norms in the layers."""
    fed: dict[str, tuple[str, ...]] = {}
    for i in range(stack.num_layers):
        beside = (f"layers.{i}.mlp.w_in",) if stack.parallel else ()
        fed[f"layers.{i}.attn_norm.weight"] = (*(f"layers.{i}.attn.{name}.weight" for name in "qkv"), *beside)
        if stack.encoder_layers:
            fed[f"layers.{i}.cross_norm.weight"] = (f"layers.{i}.cross.q.weight",)
        if stack.has_extra(i):
            fed[f"layers.{i}.extra_norm.weight"] = (f"layers.{i}.extra_mlp.w_in",)
        if not (stack.has_experts(i) or stack.parallel):
            fed[f"layers.{i}.ffn_norm.weight"] = (f"layers.{i}.mlp.w_in",)
    return fed


def column_absmax(x: Tensor) -> Tensor:
    """max |x| over all axes but the last: [..., D] -> [D] float32."""
    low, high = x.flatten(0, -2).aminmax(dim=0)
    return torch.maximum(high, -low).float()


def smoothing_factors(x_absmax: Tensor, w_absmax: Tensor, alpha: float) -> Tensor:
    """s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), equation 4 of the paper: [D], [D] -> [D] float32, positive and finite."""
    return x_absmax.clamp_min(_LEAST) ** alpha / w_absmax.clamp_min(_LEAST) ** (1 - alpha)


def balance_norm(weight: Tensor, factors: Sequence[float]) -> Tensor:
    """A norm's weight or bias [D], divided by the factors [D]; float32."""
    return weight.float() / torch.tensor(factors)


def balance_columns(weight: Tensor, factors: Sequence[float]) -> Tensor:
    """A weight that the norm feeds, or some of its rows, [rows, D], its columns multiplied by the factors [D]; float32."""
    return weight.float() * torch.tensor(factors)
