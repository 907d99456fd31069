"""Makes the golden vectors of this folder with Qwen's own code, of which nothing is kept here; see README.md.

    python tests/golden/qwen/make.py FOLDER_WITH_MODELING_QWEN_PY

Needs torch, transformers 4.46.3, einops and safetensors.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "intermediate_size": 192,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 16,
    "max_position_embeddings": 64,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LENGTH = 40
PROMPTS = (12, 20, LENGTH)  # within the trained length of 16; beyond it; beyond twice of it


@torch.inference_mode()
def main(source: Path) -> None:
    """Draw a model, run it, and write config.json, model.safetensors and logits.npz."""
    sys.path.insert(0, str(source.parent))
    modeling = importlib.import_module(f"{source.name}.modeling_qwen")
    torch.manual_seed(0)
    settings = {name: value for name, value in CONFIG.items() if name not in ("architectures", "torch_dtype")}
    model = modeling.QWenLMHeadModel(
        modeling.QWenConfig(**settings, fp32=True, use_flash_attn=False, attn_dropout_prob=0.0, emb_dropout_prob=0.0)
    ).eval()
    for name, parameter in model.named_parameters():
        is_norm = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
        drawn = parameter.normal_(1.0, 0.1) if is_norm else parameter.normal_(0.0, 0.15)
        parameter.copy_(drawn.bfloat16().float())
    tokens = torch.randint(0, CONFIG["vocab_size"], (1, LENGTH))
    logits = {f"prompt_{prompt}": run(model, tokens, prompt).numpy() for prompt in PROMPTS}
    (HERE / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    save_file({name: p.bfloat16().contiguous() for name, p in model.named_parameters()}, HERE / "model.safetensors")
    np.savez_compressed(HERE / "logits.npz", tokens=tokens[0].numpy(), **logits)


def run(model: torch.nn.Module, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits [LENGTH, V]: the prompt at once, then one token at a time with the cache."""
    found = model(tokens[:, :prompt], use_cache=True)
    parts, past = [found.logits[0]], found.past_key_values
    for at in range(prompt, tokens.shape[1]):
        found = model(tokens[:, at : at + 1], past_key_values=past, use_cache=True)
        past = found.past_key_values
        parts.append(found.logits[0])
    return torch.cat(parts).float()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
