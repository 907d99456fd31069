"""Logits of the tiny Grok-1 of weights.py by xAI's own code: python make.py PATH_OF_GROK_1. See README.md for what it needs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import weights

HERE = Path(__file__).parent
LENGTHS = (24, 9)


def load(source: Path) -> ModuleType:
    """The release's model.py, with float32 wherever it says bfloat16: sharp enough to tell a wrong formula from rounding."""
    module = ModuleType("model")
    sys.modules["model"] = module
    exec(compile(source.read_text().replace("jnp.bfloat16", "jnp.float32"), str(source), "exec"), module.__dict__)
    return module


def parameters(model: ModuleType) -> dict[str, dict[str, Any]]:
    """As the release's code wants them: scales for every row, since this machine holds all eight of their shards."""
    tree: dict[str, dict[str, Any]] = {}
    for (module, name), tensor in weights.tensors().items():
        value: Any = tensor
        if isinstance(tensor, weights.QuantizedWeight8bit):
            rows, groups = tensor.weight.shape[-2], tensor.scales.shape[-2]
            scales = np.repeat(tensor.scales.astype(np.float32), rows // groups, axis=-2)
            value = model.QuantizedWeight8bit(jnp.asarray(tensor.weight), jnp.asarray(scales))
        tree.setdefault(module, {})[name] = value
    return tree


def main() -> None:
    model = load(Path(sys.argv[1]) / "model.py")
    config = model.LanguageModelConfig(
        vocab_size=weights.V,
        pad_token=0,
        eos_token=2,
        sequence_len=64,
        embedding_multiplier_scale=weights.EMBEDDING_MULTIPLIER,
        output_multiplier_scale=weights.OUTPUT_MULTIPLIER,
        fprop_dtype=jnp.float32,
        model=model.TransformerConfig(
            emb_size=weights.D,
            widening_factor=2,
            key_size=weights.HEAD_DIM,
            num_q_heads=weights.HEADS,
            num_kv_heads=weights.KV_HEADS,
            num_layers=weights.LAYERS,
            attn_output_multiplier=weights.ATTENTION_MULTIPLIER,
            shard_activations=True,
            num_experts=weights.E,
            num_selected_experts=2,
        ),
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    forward = hk.transform(lambda tokens: config.make(mesh=mesh)(tokens).logits)
    rng = np.random.RandomState(weights.SEED + 1)
    results: dict[str, np.ndarray] = {}
    tree = None
    with mesh, jax.default_matmul_precision("float32"):
        for number, length in enumerate(LENGTHS):
            tokens = rng.randint(1, weights.V, (1, length))  # 0 is the pad token, whose position nobody sees
            if tree is None:
                leaves = jax.tree_util.tree_leaves_with_path(forward.init(jax.random.PRNGKey(0), tokens))
                order = [(path[0].key, path[1].key) for path, _ in leaves]
                assert order == list(weights.tensors()), order  # that of the files
                tree = parameters(model)
            results[f"tokens_{number}"] = tokens[0]
            results[f"logits_{number}"] = np.asarray(forward.apply(tree, None, tokens), np.float32)[0]
    np.savez_compressed(HERE / "logits.npz", **results)
    print({name: (array.shape, float(np.abs(array).max())) for name, array in results.items()})


if __name__ == "__main__":
    main()
