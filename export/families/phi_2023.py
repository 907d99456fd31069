"""phi-1, phi-1.5 and phi-2 as first published: the model of `phi` under other names, with q, k and v in one matrix.

Two generations of Microsoft's own code, told apart by their model_type: one counts embedding, blocks and head as layers of one
sequence, the other has names for the three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gatework.export.config import ModelConfig
from gatework.export.families import hf, layouts, phi
from gatework.export.families.fields import Fields
from gatework.export.weights import WeightMap


@dataclass(frozen=True, slots=True)
class Generation:
    """Names of the class, of the embedding, and, with a number to fill in, of a block and the head."""

    architecture: str
    embedding: str
    block: str
    head: str
    first: int = 0  # number of the first block


GENERATIONS = {
    "mixformer-sequential": Generation(
        "MixFormerSequentialForCausalLM", "layers.0.wte.weight", "layers.{}", "layers.{}", first=1
    ),
    "phi-msft": Generation("PhiForCausalLM", "transformer.embd.wte.weight", "transformer.h.{}", "lm_head"),
}
INERT: dict[str, tuple[Any, ...]] = {
    "activation_function": phi.TANH_GELU,
    "embd_layer": ("default",),
    "num_local_experts": (),  # merges of several phi-2
    "quantization_config": (),
}
BLOCK: dict[str, tuple[Any, ...]] = {"block_cls": ("parallel",), "path": ("parallel",)}
WIDER = 4  # the MLP, than the hidden size
ROTATES, MULTIPLE = 32, 64  # where the file is silent


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a `config.json` whose model_type is a key of GENERATIONS.

    Raises GateworkError naming the field that is missing, wrong, or asks for a feature that Gatework does not have.
    """
    fields = Fields(raw)
    family = str(raw["model_type"])
    hf.refuse_architecture(fields, (GENERATIONS[family].architecture,))
    block = fields.nested("architecture")
    for part, inert in ((fields, INERT), (block, BLOCK)):
        for key, allowed in inert.items():
            part.refuse_unless(key, *allowed)
    block.nested("mixer").refuse_unless("mixer_cls", "mha")
    block.nested("mlp").refuse_unless("mlp_cls", "mlp", "fused_mlp")
    hidden_size, num_heads = fields.integer("n_embd"), fields.integer("n_head")
    head_dim = hf.head_dim(fields, hidden_size, num_heads)
    return ModelConfig(
        family=family,
        vocab_size=padded(fields),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("n_inner", WIDER * hidden_size),
        num_layers=fields.integer("n_layer"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("n_head_kv", num_heads),
        head_dim=head_dim,
        max_position_embeddings=fields.integer("n_positions", 2048),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        rope_dim=min(fields.integer("rotary_dim", ROTATES), head_dim),
        bias="all",
        parallel=True,
        activation="gelu_tanh",
        glu="none",
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=hf.dtype(fields),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def padded(fields: Fields) -> int:
    """Rows of embedding and head: the vocabulary, rounded up."""
    multiple = fields.integer("pad_vocab_size_multiple", MULTIPLE)
    if multiple < 1:
        raise fields.error("pad_vocab_size_multiple", multiple, "at least 1")
    rows: int = -(-fields.integer("vocab_size") // multiple) * multiple
    return rows


def weight_map(config: ModelConfig) -> WeightMap:
    """Where a checkpoint of the config's generation keeps every canonical weight."""
    names = GENERATIONS[config.family]
    shapes, head = config.tensor_shapes(), names.head.format(config.num_layers + names.first)
    whole, weights = {"embed.weight": names.embedding}, WeightMap()
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", names.block.format(i + names.first)
        weights |= layouts.fused_qkv(config, ours, f"{theirs}.mixer.Wqkv")
        for kind in ("weight", "bias"):
            whole |= {
                f"{ours}.attn_norm.{kind}": f"{theirs}.ln.{kind}",
                f"{ours}.attn.o.{kind}": f"{theirs}.mixer.out_proj.{kind}",
                f"{ours}.mlp.{kind[0]}_in": f"{theirs}.mlp.fc1.{kind}",
                f"{ours}.mlp.{kind[0]}_out": f"{theirs}.mlp.fc2.{kind}",
            }
    for kind in ("weight", "bias"):
        whole |= {f"norm.{kind}": f"{head}.ln.{kind}", f"lm_head.{kind}": f"{head}.linear.{kind}"}
    return weights | {ours: layouts.whole(shapes[ours], theirs) for ours, theirs in whole.items()}
