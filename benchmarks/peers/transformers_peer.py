"""transformers in bfloat16 as a peer, as it comes: its own choice of attention and experts, and its dynamic cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from gatework.export.checkpoint import Checkpoint


class TransformersPeer:
    def __init__(self, path: str) -> None:
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self._cache: Any = None
        self.bytes_per_token = 2 * active_parameters(path)
        self.vocab_size: int = self._model.config.vocab_size
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}

    def prefill(self, ids: list[int]) -> np.ndarray:
        self._cache = None
        return self._step([ids])[0]

    def fill(self, batch: int, context: int) -> None:
        """The cache of a few tokens, repeated along the positions: attention costs the same whatever it holds."""
        few = min(context, 128)
        self.prefill(list(range(3, 3 + few)))
        for layer in self._cache.layers:  # [B, Hkv, S, Dh]
            layer.keys, layer.values = (x.repeat(batch, 1, context // few, 1) for x in (layer.keys, layer.values))

    def decode(self, ids: list[int]) -> np.ndarray:
        return self._step([[token] for token in ids])

    @torch.inference_mode()
    def _step(self, ids: list[list[int]]) -> np.ndarray:
        out = self._model(input_ids=torch.tensor(ids), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return out.logits[:, -1].float().numpy()


def active_parameters(path: str) -> int:
    """Parameters that one token's step reads: all but the embedding table and the experts not chosen."""
    config = Checkpoint.open(path).config
    share = config.moe.top_k / config.moe.num_experts if config.moe is not None else 1
    count = 0.0
    for name, shape in config.tensor_shapes().items():
        if name != "embed.weight" or config.tie_embeddings:
            count += int(np.prod(shape)) * (share if name.endswith((".moe.w_in", ".moe.w_out")) else 1)
    return round(count)


load = TransformersPeer
