"""Tiny random checkpoints of Switch Transformer, with transformers' class for their oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.modeling_outputs import MoEModelOutput

from tests.checkpoints import new_folder

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_experts": 4,
    "expert_capacity": 3,  # tokens are dropped
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}


def switch_config(encoder_layers: int, num_layers: int) -> SwitchTransformersConfig:
    """With experts in every second layer."""
    layers = {"num_layers": encoder_layers, "num_decoder_layers": num_layers}
    sparse = {"num_sparse_encoder_layers": encoder_layers // 2, "num_sparse_decoder_layers": num_layers // 2}
    return SwitchTransformersConfig(**SIZES | layers | sparse)


def make_switch(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a checkpoint, weights as in `checkpoints.random_model`; overrides by names of the config."""
    path = new_folder(folder, "switch")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**SIZES | overrides))
        for name, parameter in model.named_parameters():
            parameter.normal_(*((1.0, 0.1) if "norm" in name else (0.0, 0.15)))
    kept = {name: value.clone() for name, value in model.state_dict().items() if "embed_tokens" not in name}
    model.save_pretrained(path, state_dict=kept)
    return path


class Oracle:
    """transformers' model of a checkpoint in float32."""

    def __init__(self, path: Path, **overrides: Any) -> None:
        self.model = SwitchTransformersForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", **overrides
        ).eval()
        self.model.set_input_embeddings(
            self.model.shared
        )  # without a tied head transformers 5 takes them for three tables

    def run(self, ids: Tensor, lengths: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder output [B, S, D], and logits [B, T, V] of targets [B, T] in one step, for prompts [B, S] padded behind."""
        found = self.model(input_ids=ids, attention_mask=_mask(ids, lengths), decoder_input_ids=targets)
        return found.encoder_last_hidden_state, found.logits

    def decode(self, ids: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        """The same logits, one step for each target."""
        mask = _mask(ids, lengths)
        encoded = self.model.get_encoder()(input_ids=ids, attention_mask=mask)
        encoded, past = MoEModelOutput(encoded.last_hidden_state), EncoderDecoderCache(DynamicCache(), DynamicCache())
        steps = (targets[:, at : at + 1] for at in range(targets.shape[1]))
        given = {"encoder_outputs": encoded, "attention_mask": mask, "past_key_values": past, "use_cache": True}
        return torch.cat([self.model(decoder_input_ids=step, **given).logits for step in steps], 1)

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        """transformers' own generation, without the token that it starts from."""
        found: Tensor = self.model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, num_beams=1)
        return found[0, 1:].tolist()


def _mask(ids: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(ids.shape[1]) < lengths[:, None]).long()
