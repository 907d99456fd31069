"""Logits of the tiny OpenMoE of weights.py by its public PyTorch port: python make.py PATH_OF_OPENMOE_PT. See README.md."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch
import weights

HERE = Path(__file__).parent
LENGTHS = (24, 9)
ROWS, PROMPT, STEPS = 12, 4, 3  # of a batch that is prefilled together and then decoded


def native_names(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """As the port's own conversion has them: one matrix per expert, (out, in)."""
    parts = {"wi_gate": "gate_proj", "wi_up": "up_proj", "wo": "down_proj"}
    found = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if last in parts:
            for e, matrix in enumerate(torch.from_numpy(tensor)):
                found[f"{stem}.{e}.{parts[last]}.weight"] = matrix.t()
        else:
            found[name.replace("gate_weight", "gate.weight")] = torch.from_numpy(tensor)
    return found


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """[S, V] of tokens [1, S]."""
    return model(torch.from_numpy(tokens), use_cache=False).logits[0].float().numpy()


@torch.no_grad()
def batch_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """[B, S, V] of tokens [B, S]: the prompts in one step, then one token of every row at a time, with the port's own cache."""
    ids, found, cache = torch.from_numpy(tokens), [], None
    for first, end in ((0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))):
        output = model(
            ids[:, first:end],
            position_ids=torch.arange(first, end).expand(len(ids), -1),
            past_key_values=cache,
            use_cache=True,
        )
        found.append(output.logits.float())
        cache = output.past_key_values
    return torch.cat(found, dim=1).numpy()


def main() -> None:
    package = types.ModuleType("hf_openmoe")  # its __init__ wants a tokenizer's package
    package.__path__ = [str(Path(sys.argv[1]) / "hf_openmoe")]
    sys.modules["hf_openmoe"] = package
    model_module = importlib.import_module("hf_openmoe.modeling_hf_openmoe")
    config_module = importlib.import_module("hf_openmoe.configuration_hf_openmoe")
    fields, tensors = weights.make()
    # so wide that no expert is ever full, whatever the number of tokens: twice as many places as tokens
    fields |= {"router_capacity_factor_eval": 8.0}
    ignored = ("architectures", "model_type", "torch_dtype")
    config = config_module.HFOpenMoeConfig(**{k: v for k, v in fields.items() if k not in ignored})
    model = model_module.HFOpenMoeForCausalLM(config).eval().float()
    print(model.load_state_dict(native_names(tensors)))
    rng = np.random.RandomState(weights.SEED + 1)
    results = {}
    for number, length in enumerate(LENGTHS):
        tokens = rng.randint(0, fields["vocab_size"], (1, length))
        results |= {f"tokens_{number}": tokens[0], f"logits_{number}": logits(model, tokens)}
    batch = rng.randint(0, fields["vocab_size"], (ROWS, PROMPT + STEPS))
    together = batch_logits(model, batch)
    for layer in model.model.layers[1::2]:
        layer.mlp.router.capacity_factor_eval = 2.0  # as released
    results["dropped_0"] = logits(model, results["tokens_0"][None])
    print("dropping changes logits by", np.abs(results["dropped_0"] - results["logits_0"]).max())
    results |= {"tokens_batch": batch, "dropped_batch": batch_logits(model, batch)}
    print("and those of a batch, by position, by", np.abs(results["dropped_batch"] - together).max((0, 2)))
    np.savez_compressed(HERE / "logits.npz", **results)
    print({name: (array.shape, float(np.abs(array).max())) for name, array in results.items()})


if __name__ == "__main__":
    main()
