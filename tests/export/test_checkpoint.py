"""Checkpoint: every public format gives the same canonical tensors, bit for bit, and every flaw is named at open."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gatework.export.checkpoint import Checkpoint, read_config
from gatework.export.families import FAMILIES
from gatework.export.stored import TORCH_DTYPES, StoredTensor
from gatework.export.zarr import read_zarr
from gatework.plugins.errors import GateworkError
from tests import sparse_ckpt
from tests.checkpoints import TABLE, make_checkpoint, odd_sizes, reference_model
from tests.formats import convert, formats_of
from tests.golden.grok1 import weights as grok1
from tests.golden.openmoe import weights as openmoe
from tests.switch import make_switch
from tests.t5x_format import write_switch_t5x, write_t5x, write_zarr

Edit = Callable[[dict[str, Tensor]], object]


def together(model: str) -> dict[str, Any]:
    """All odd sizes of this model in one."""
    return {name: value for sizes in odd_sizes(model).values() for name, value in sizes.items()}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mixtral"), "mixtral", num_layers=1)


@pytest.fixture
def copy(mixtral: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(mixtral, tmp_path / "copy"))


def edit(path: Path, change: Edit, **metadata: Any) -> None:
    """Rewrite model.safetensors after `change` has altered its tensors in place."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", **metadata)


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---- the same weights from every format


@pytest.mark.parametrize("odd", [False, True], ids=["table", "odd"])
@pytest.mark.parametrize("model", TABLE)
def test_canonical_weights_are_those_transformers_loads(model: str, odd: bool, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, model, **(together(model) if odd else {}))
    checkpoint = Checkpoint.open(path)
    reference = reference_model(path)
    assert sum(p.numel() for p in reference.parameters()) == checkpoint.config.num_parameters()
    expected = ORACLES.get(checkpoint.config.family, llama_weights)(reference)
    assert list(checkpoint.weights) == list(checkpoint.config.tensor_shapes())
    assert expected.keys() == checkpoint.weights.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name


def llama_weights(model: Any) -> dict[str, Tensor]:
    """Canonical weights from the modules of transformers' LLaMA and of what has its vocabulary."""
    weights = {"embed": model.model.embed_tokens, "norm": model.model.norm}
    if not model.config.tie_word_embeddings:
        weights["lm_head"] = model.lm_head
    expected = {f"{name}.weight": module.weight for name, module in weights.items()}
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        parts = {"attn_norm": layer.input_layernorm, "ffn_norm": layer.post_attention_layernorm}
        parts |= {f"attn.{part}": getattr(attention, f"{part}_proj") for part in "qkvo"}
        norms = {"attn.q_norm": "q_norm", "attn.k_norm": "k_norm"}
        parts |= {ours: getattr(attention, theirs) for ours, theirs in norms.items() if hasattr(attention, theirs)}
        if hasattr(mlp, "experts"):
            parts["moe.router"] = mlp.gate
            tensors = {"moe.w_in": mlp.experts.gate_up_proj, "moe.w_out": mlp.experts.down_proj}
            if hasattr(mlp, "shared_expert"):
                parts["moe.shared.router"], shared = mlp.shared_expert_gate, mlp.shared_expert
                tensors["moe.shared.w_in"] = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
                tensors["moe.shared.w_out"] = shared.down_proj.weight
        else:
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            tensors = {"mlp.w_in": gate_up, "mlp.w_out": mlp.down_proj.weight}
        tensors |= {f"{name}.weight": module.weight for name, module in parts.items()}
        biases = {name: getattr(module, "bias", None) for name, module in parts.items()}
        tensors |= {f"{name}.bias": bias for name, bias in biases.items() if bias is not None}
        expected |= {f"layers.{i}.{name}": tensor for name, tensor in tensors.items()}
    return expected


def test_both_layouts_of_grok_1(tmp_path: Path) -> None:
    """hpcai's names, which its conversion script gives to xAI's matrices turned."""
    parameters = grok1.tensors(layers=2)
    config = grok1.CONFIG | {"num_hidden_layers": 2}
    ckpt = Checkpoint.open(grok1.write_ckpt(tmp_path / "xai", parameters, config))
    names = {"rms_norm": "pre_attn_norm", "rms_norm_1": "post_attn_norm", "rms_norm_2": "pre_moe_norm"}
    names |= {"rms_norm_3": "post_moe_norm", "router": "moe_block.gate", "multi_head_attention/linear": "attn.o_proj"}
    names |= {f"multi_head_attention/{name}": f"attn.{name[0]}_proj" for name in ("query", "key", "value")}
    tensors = {}
    for (module, name), value in parameters.items():
        tensor = torch.from_numpy(value if isinstance(value, np.ndarray) else grok1.dequantized(value))
        if module.startswith("language_model"):
            tensors["model.norm.scale" if name == "scale" else "model.embed_tokens.weight"] = tensor
            continue
        _, layer, part = module.split("/", 2)
        prefix = f"model.layers.{layer.removeprefix('decoder_layer_')}"
        if part.startswith("moe/"):
            experts = {f"experts.{e}.{part[4:]}": tensor[e].t() for e in range(grok1.E)}
            tensors |= {f"{prefix}.moe_block.{name}.weight": w.contiguous() for name, w in experts.items()}
        elif name == "scale":
            tensors[f"{prefix}.{names[part]}.scale"] = tensor
        else:
            tensors[f"{prefix}.{names[part]}.weight"] = tensor.t().contiguous()
    path = tmp_path / "hpcai"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path / "model.safetensors")
    checkpoint = Checkpoint.open(path)
    assert checkpoint.config == ckpt.config
    for name in ckpt.weights:
        assert torch.equal(checkpoint.read(name), ckpt.read(name)), name


def test_true_shapes_of_ckpt_0(tmp_path: Path) -> None:
    """770 files of the released sizes, with no config: only what describes the arrays is read."""
    numpy_2 = np.__version__ >= "2"  # spells a module's name with one more letter
    for kind, path in sparse_ckpt.write_sparse_ckpt(tmp_path).items():
        assert path.stat().st_size == sparse_ckpt.KINDS[kind][2] + numpy_2, kind
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.num_parameters() == 315_684_820_992
    assert len(checkpoint.source.tensors) == 770
    assert checkpoint.stored_as == "int8 with scales"
    assert checkpoint.stored_bytes == pytest.approx(318.2e9, rel=1e-3)
    assert torch.equal(checkpoint.read("layers.63.attn.k.weight"), torch.zeros(1024, 6144))


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_weights_of_openmoe(tmp_path: Path, file_format: str) -> None:
    """Both halves of the gate before up; experts turned, dense matrices not."""
    config, arrays = openmoe.make()
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if file_format == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    routed, dense = "model.layers.1.mlp", "model.layers.0.mlp"
    gate_up = [tensors[f"{routed}.experts.{name}"].transpose(1, 2) for name in ("wi_gate", "wi_up")]
    expected = {
        "layers.0.mlp.w_in": torch.cat([tensors[f"{dense}.{name}_proj.weight"] for name in ("gate", "up")]),
        "layers.0.mlp.w_out": tensors[f"{dense}.down_proj.weight"],
        "layers.1.moe.router.weight": tensors[f"{routed}.gate_weight"],
        "layers.1.moe.w_in": torch.cat(gate_up, dim=1),
        "layers.1.moe.w_out": tensors[f"{routed}.experts.wo"].transpose(1, 2),
        "layers.1.extra_norm.weight": tensors["model.layers.1.pre_extra_mlp_layernorm.weight"],
        "layers.1.extra_mlp.w_out": tensors["model.layers.1.extra_mlp.down_proj.weight"],
    }
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name
        parts = torch.cat([part.flatten() for part in checkpoint.parts(name, max_bytes=4096)])
        assert torch.equal(parts, tensor.flatten()), name


PHI_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
}
PHI_NAMES |= {
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "vocab_size": "vocab_size",
}
PHI_NAMES |= {name: name for name in ("bos_token_id", "eos_token_id")}
PHI_PARTS = {"input_layernorm": "ln", "self_attn.dense": "mixer.out_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


@pytest.mark.parametrize("generation", ["mixformer-sequential", "phi-msft"])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_phi_of_2023(tmp_path: Path, generation: str, file_format: str) -> None:
    """transformers' phi under the names of Microsoft's own code: the same weights, hence logits."""
    path = make_checkpoint(tmp_path, "phi")
    theirs, checkpoint = load_file(path / "model.safetensors"), Checkpoint.open(path)
    raw = json.loads((path / "config.json").read_text())
    layers, rotates = raw["num_hidden_layers"], checkpoint.config.rope_dim
    config = {old: raw[new] for old, new in PHI_NAMES.items()} | {"model_type": generation, "rotary_dim": rotates}
    if generation == "phi-msft":
        block, head, embed, config["architectures"] = (
            "transformer.h.{}",
            "lm_head",
            "transformer.embd.wte",
            ["PhiForCausalLM"],
        )
    else:
        block, head, embed = "layers.{}", f"layers.{layers + 1}", "layers.0.wte"
    tensors = {f"{embed}.weight": theirs["model.embed_tokens.weight"]}
    for kind in ("weight", "bias"):
        tensors |= {f"{head}.ln.{kind}": theirs[f"model.final_layernorm.{kind}"]}
        tensors |= {f"{head}.linear.{kind}": theirs[f"lm_head.{kind}"]}
        for i in range(layers):
            new, old = f"model.layers.{i}", block.format(i + (generation != "phi-msft"))
            tensors |= {f"{old}.{b}.{kind}": theirs[f"{new}.{a}.{kind}"] for a, b in PHI_PARTS.items()}
            qkv = [theirs[f"{new}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors |= {f"{old}.mixer.Wqkv.{kind}": torch.cat(qkv), f"{old}.mixer.rotary_emb.inv_freq": torch.zeros(8)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if file_format == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    old = Checkpoint.open(tmp_path)
    assert replace(old.config, family="phi") == checkpoint.config
    assert all(torch.equal(old.read(name), checkpoint.read(name)) for name in checkpoint.weights)


def test_both_layouts_of_openmoe(tmp_path: Path) -> None:
    """T5X's chunks, whose edges nothing else respects, whole and in parts."""
    config, arrays = openmoe.make()
    t5x = Checkpoint.open(write_t5x(tmp_path / "t5x", config, arrays))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert t5x.config == checkpoint.config
    assert t5x.fingerprint() == Checkpoint.open(t5x.path).fingerprint()
    for name in checkpoint.weights:
        expected = checkpoint.read(name)
        assert torch.equal(t5x.read(name), expected), name
        parts = torch.cat([part.flatten() for part in t5x.parts(name, max_bytes=2048)])
        assert torch.equal(parts, expected.flatten()), name


@pytest.mark.parametrize("gated", [False, True], ids=["base", "xxl"])
def test_both_layouts_of_switch(tmp_path: Path, gated: bool) -> None:
    path = make_switch(tmp_path, tie_word_embeddings=not gated)
    tensors = {name: tensor.numpy() for name, tensor in load_file(path / "model.safetensors").items()}
    config = json.loads((path / "config.json").read_text())
    if not gated:
        del tensors["lm_head.weight"]  # a copy of the embedding
    if gated:  # which transformers' class does not make: a second matrix beside each first one
        config["dense_act_fn"] = "gated-gelu"
        gates = {name.replace(".wi.", ".wi_0."): tensor for name, tensor in tensors.items() if ".wi." in name}
        ups = {name.replace("wi_0", "wi_1"): tensor + 1 for name, tensor in gates.items()}
        tensors = {name: tensor for name, tensor in tensors.items() if ".wi." not in name} | gates | ups
        (path / "config.json").write_text(json.dumps(config))
        save_file({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, path / "model.safetensors")
    checkpoint = Checkpoint.open(path)
    t5x = Checkpoint.open(write_switch_t5x(tmp_path / "t5x", config, tensors))
    if (path / "generation_config.json").exists():
        shutil.copy(path / "generation_config.json", t5x.path)
    assert Checkpoint.open(t5x.path).config == checkpoint.config
    for name in checkpoint.weights:
        expected = checkpoint.read(name)
        assert torch.equal(t5x.read(name), expected), name
        parts = torch.cat([part.flatten() for part in t5x.parts(name, max_bytes=2048)])
        assert torch.equal(parts, expected.flatten()), name


@pytest.mark.parametrize("kind", ["<f4", "<f2", "bfloat16"])
@pytest.mark.parametrize("compressed", [True, False])
def test_zarr(tmp_path: Path, kind: str, compressed: bool) -> None:
    """Rows across chunks, as TensorStore writes them."""
    dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    array = np.random.RandomState(0).standard_normal((7, 5, 3)).astype(dtype)
    write_zarr(tmp_path / "array", array, (3, 2, 3), compressed=compressed)
    stored = read_zarr(tmp_path / "array")
    out = torch.empty((4, 5, 3), dtype=TORCH_DTYPES[stored.dtype])
    stored.read_into(out, 2)
    assert np.array_equal(out.float().numpy(), array[2:6].astype(np.float32))


@pytest.mark.parametrize(
    "content",
    [b"", gzip.compress(bytes(1000))[:15], gzip.compress(bytes(4 * 1000)), bytes(1 << 20), b"nothing"],
    ids=["empty", "cut short", "too much", "larger than it may be", "no gzip"],
)
def test_damaged_chunks(tmp_path: Path, content: bytes) -> None:
    write_zarr(tmp_path / "array", np.zeros(8, np.float32), (4,))
    (tmp_path / "array" / "1").write_bytes(content)
    with pytest.raises(GateworkError, match="array/1 is damaged"):
        read_zarr(tmp_path / "array").read_into(torch.empty(8), 0)


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_weights_of_ckpt_0(tmp_path: Path, inside: bool) -> None:
    """Codes times scales of their block of rows, turned; layers by number; read whole and in parts. Exact."""
    parameters = grok1.tensors(layers=11)
    path = grok1.write_ckpt(tmp_path / "grok", parameters)
    if inside:  # the folder of the files itself
        (path / "config.json").rename(path / "ckpt-0" / "config.json")
        path /= "ckpt-0"
    checkpoint = Checkpoint.open(path)
    assert checkpoint.config.dtype == "float32"
    assert checkpoint.fingerprint() == Checkpoint.open(path).fingerprint()

    def stored(module: str, name: str = "w") -> Tensor:
        found = parameters[f"transformer/decoder_layer_10/{module}", name]
        return torch.from_numpy(found if isinstance(found, np.ndarray) else grok1.dequantized(found))

    gate, up, down = (stored(f"moe/{name}").transpose(1, 2) for name in ("linear", "linear_v", "linear_1"))
    expected = {"moe.w_in": torch.cat([gate, up], dim=1), "moe.w_out": down, "moe.router.weight": stored("router").t()}
    parts = {"q": "query", "k": "key", "v": "value", "o": "linear"}
    expected |= {f"attn.{part}.weight": stored(f"multi_head_attention/{name}").t() for part, name in parts.items()}
    norms = ("attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm")
    expected |= {
        f"{norm}.weight": stored(f"rms_norm{end}", "scale")
        for norm, end in zip(norms, ("", "_1", "_2", "_3"), strict=True)
    }
    for name, tensor in expected.items():
        read = checkpoint.read(f"layers.10.{name}")
        assert torch.equal(read, tensor), name
        rows = torch.cat(list(checkpoint.parts(f"layers.10.{name}", max_bytes=4096)))
        assert torch.equal(rows.view(tensor.shape), tensor), name


def gpt_oss_weights(model: Any) -> dict[str, Tensor]:
    """Canonical weights from the modules of transformers' gpt-oss, in which gate and up alternate."""
    expected = {"embed.weight": model.model.embed_tokens.weight, "norm.weight": model.model.norm.weight}
    expected["lm_head.weight"] = model.lm_head.weight
    for i, layer in enumerate(model.model.layers):
        attention, experts = layer.self_attn, layer.mlp.experts
        parts = {f"attn.{part}": getattr(attention, f"{part}_proj") for part in "qkvo"} | {
            "moe.router": layer.mlp.router
        }
        tensors = {
            f"{name}.{kind}": getattr(module, kind) for name, module in parts.items() for kind in ("weight", "bias")
        }
        norms = {"attn_norm": layer.input_layernorm, "ffn_norm": layer.post_attention_layernorm}
        tensors |= {f"{name}.weight": module.weight for name, module in norms.items()}
        rows, bias = experts.gate_up_proj.transpose(1, 2), experts.gate_up_proj_bias
        tensors |= {
            "attn.sinks": attention.sinks,
            "moe.w_in": torch.cat([rows[:, ::2], rows[:, 1::2]], dim=1),
            "moe.b_in": torch.cat([bias[:, ::2], bias[:, 1::2]], dim=1),
            "moe.w_out": experts.down_proj.transpose(1, 2),
            "moe.b_out": experts.down_proj_bias,
        }
        expected |= {f"layers.{i}.{name}": tensor for name, tensor in tensors.items()}
    return expected


def dbrx_weights(model: Any) -> dict[str, Tensor]:
    """Canonical weights from the modules of transformers' DBRX."""
    config, body = model.config, model.transformer
    weights = {"embed": body.wte, "norm": body.norm_f, "lm_head": model.lm_head}
    expected = {f"{name}.weight": module.weight for name, module in weights.items()}
    kv = config.d_model // config.n_heads * config.attn_config.kv_n_heads
    for i, block in enumerate(body.blocks):
        attention, experts = block.norm_attn_norm.attn, block.ffn.experts.mlp
        q, k, v = attention.Wqkv.weight.split([config.d_model, kv, kv])
        sizes = (config.ffn_config.moe_num_experts, config.ffn_config.ffn_hidden_size, config.d_model)
        w1, v1, w2 = (part.view(sizes) for part in (experts.w1, experts.v1, experts.w2))
        tensors = {
            "attn_norm.weight": block.norm_attn_norm.norm_1.weight,
            "attn.q.weight": q,
            "attn.k.weight": k,
            "attn.v.weight": v,
            "attn.o.weight": attention.out_proj.weight,
            "ffn_norm.weight": block.norm_attn_norm.norm_2.weight,
            "moe.router.weight": block.ffn.router.layer.weight,
            "moe.w_in": torch.cat([w1, v1], dim=1),
            "moe.w_out": w2.transpose(1, 2),
        }
        expected |= {f"layers.{i}.{name}": tensor for name, tensor in tensors.items()}
    return expected


def phi_weights(model: Any) -> dict[str, Tensor]:
    """Canonical weights from the modules of transformers' phi."""
    parts = {"norm": model.model.final_layernorm, "lm_head": model.lm_head}
    expected = {"embed.weight": model.model.embed_tokens.weight}
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        modules = {"attn_norm": layer.input_layernorm, "attn.o": attention.dense}
        modules |= {f"attn.{part}": getattr(attention, f"{part}_proj") for part in "qkv"}
        parts |= {f"layers.{i}.{name}": module for name, module in modules.items()}
        expected |= {f"layers.{i}.mlp.w_in": mlp.fc1.weight, f"layers.{i}.mlp.b_in": mlp.fc1.bias}
        expected |= {f"layers.{i}.mlp.w_out": mlp.fc2.weight, f"layers.{i}.mlp.b_out": mlp.fc2.bias}
    expected |= {f"{name}.weight": module.weight for name, module in parts.items()}
    return expected | {f"{name}.bias": module.bias for name, module in parts.items()}


def mpt_weights(model: Any) -> dict[str, Tensor]:
    """Canonical weights from the modules of transformers' MPT."""
    body = model.transformer
    expected = {"embed.weight": body.wte.weight, "norm.weight": body.norm_f.weight}
    for i, block in enumerate(body.blocks):
        q, k, v = block.attn.Wqkv.weight.chunk(3)
        tensors = {"attn.q.weight": q, "attn.k.weight": k, "attn.v.weight": v}
        tensors |= {"attn_norm.weight": block.norm_1.weight, "attn.o.weight": block.attn.out_proj.weight}
        tensors |= {"ffn_norm.weight": block.norm_2.weight}
        tensors |= {"mlp.w_in": block.ffn.up_proj.weight, "mlp.w_out": block.ffn.down_proj.weight}
        expected |= {f"layers.{i}.{name}": tensor for name, tensor in tensors.items()}
    return expected


ORACLES = {"dbrx": dbrx_weights, "phi": phi_weights, "mpt": mpt_weights, "gpt_oss": gpt_oss_weights}


@pytest.mark.parametrize("odd", [False, True], ids=["table", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["llama1", "codellama", "mistral", "mixtral", "dbrx"])
def test_every_format_gives_the_same_bits(model: str, dtype: torch.dtype, odd: bool, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, model, dtype=dtype, **(together(model) if odd else {}))
    checkpoint = Checkpoint.open(path)
    assert checkpoint.config.dtype == str(dtype).removeprefix("torch.")
    for file_format in formats_of(model):
        other = Checkpoint.open(convert(path, file_format))
        length = {"max_position_embeddings": 0}  # which params.json does not tell
        assert other.config.to_dict() | length == checkpoint.config.to_dict() | length, file_format
        assert read_config(other.path).to_dict() | {"dtype": 0} == other.config.to_dict() | {"dtype": 0}
        for name in checkpoint.weights:
            ours, theirs = checkpoint.read(name), other.read(name)
            assert ours.dtype == theirs.dtype == dtype
            assert torch.equal(ours, theirs), f"{file_format}: {name}"
            for max_bytes in (1, 1000):
                blocks = list(other.parts(name, max_bytes=max_bytes))
                joined = torch.stack(blocks) if ours.dim() == 3 else torch.cat(blocks)
                assert torch.equal(ours, joined), f"{file_format}: {name}"


def test_rows_of_meta_files_are_turned_the_right_way(tmp_path: Path) -> None:
    """Attention scores by Meta's formula, complex numbers of adjacent pairs, equal scores by halves on our rows."""
    path = convert(make_checkpoint(tmp_path, "llama2", num_layers=1), "meta")
    checkpoint = Checkpoint.open(path)
    stored = torch.load(path / "consolidated.00.pth", weights_only=True)
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = torch.outer(torch.arange(5.0), 1e4 ** -(torch.arange(0, 16, 2) / 16)).double()  # [S, Dh/2]

    def pairs(weight: Tensor) -> Tensor:  # -> [S, heads, Dh]
        heads = torch.view_as_complex((x @ weight.double().t()).view(5, -1, 8, 2))
        return torch.view_as_real(heads * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)

    def halves(weight: Tensor) -> Tensor:
        a, b = (x @ weight.double().t()).view(5, -1, 2, 8).unbind(2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    wq, wk = (stored[f"layers.0.attention.w{part}.weight"] for part in "qk")
    theirs = torch.einsum("shd,thd->hst", pairs(wq)[:, :2], pairs(wk))
    q, k = (checkpoint.read(f"layers.0.attn.{part}.weight") for part in "qk")
    ours = torch.einsum("shd,thd->hst", halves(q)[:, :2], halves(k))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)  # float64 sums of 64 terms below 10


# ---- reading piece by piece


def test_parts_are_experts_or_bounded_blocks(mixtral: Path) -> None:
    checkpoint = Checkpoint.open(mixtral)
    assert [tuple(part.shape) for part in checkpoint.parts("layers.0.moe.w_in")] == [(192, 64)] * 8
    blocks = [tuple(part.shape) for part in checkpoint.parts("embed.weight", max_bytes=50 * 64 * 4)]
    assert blocks == [(48, 64), (48, 64), (32, 64)]  # multiples of 16 rows
    assert [tuple(part.shape) for part in checkpoint.parts("norm.weight")] == [(64,)]
    assert all(part.is_contiguous() for name in checkpoint.weights for part in checkpoint.parts(name))


def test_open_reads_headers_only(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr(StoredTensor, "read_into", refuse)
    checkpoint = Checkpoint.open(mixtral)
    with pytest.raises(AssertionError, match="data was read"):
        checkpoint.read("norm.weight")


def test_memory_is_bounded_by_a_part(tmp_path: Path) -> None:
    """A sparse file of 400 MB, read in a process of its own: its peak grows by some parts of 16 MB."""
    config = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 8, "vocab_size": 48_000, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = FAMILIES["llama"].weight_map(read_config(tmp_path))
    header: dict[str, Any] = {}
    end = 0
    for piece in (piece for weight in weights.values() for piece in weight.pieces):
        start, end = end, end + piece.numel * 4
        header[piece.name] = {"dtype": "F32", "shape": piece.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    program = f"""
import resource
from gatework.export.checkpoint import Checkpoint
checkpoint = Checkpoint.open({str(tmp_path)!r})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, seen = peak(), 0
for name in checkpoint.weights:
    for part in checkpoint.parts(name, max_bytes=16 << 20):
        seen += part.nbytes
assert seen == checkpoint.nbytes > 400_000_000
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 64  # the part being read, the one before it, and the allocator's slack


def test_weights_may_differ_in_dtype_among_each_other(copy: Path) -> None:
    def narrow(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].bfloat16()

    edit(copy, narrow)
    checkpoint = Checkpoint.open(copy)
    assert checkpoint.config.dtype == "bfloat16"
    assert checkpoint.read("norm.weight").dtype == checkpoint.dtype("norm.weight") == torch.float32
    assert checkpoint.read("layers.0.moe.w_in").dtype == torch.bfloat16
    expected = sum(checkpoint.read(name).nbytes for name in checkpoint.weights)
    assert checkpoint.nbytes == expected


def test_tied_head_needs_no_tensor_and_ignores_one(copy: Path) -> None:
    edit_json(copy / "config.json", tie_word_embeddings=True)
    with_copy = Checkpoint.open(copy)
    edit(copy, lambda tensors: tensors.pop("lm_head.weight"))
    without = Checkpoint.open(copy)
    assert with_copy.config == without.config
    assert "lm_head.weight" not in without.weights


def test_hugging_face_files_are_preferred(mixtral: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(convert(mixtral, "consolidated"), tmp_path / "both"))
    assert Checkpoint.open(both).source.layout == "consolidated"
    shutil.copytree(mixtral, both, dirs_exist_ok=True)
    assert Checkpoint.open(both).source.layout == "hf"
    (both / "model.safetensors").unlink()
    assert Checkpoint.open(both).source.layout == "consolidated"


def test_hugging_face_cache_links_are_followed(mixtral: Path, tmp_path: Path) -> None:
    """A snapshot in the hub's cache holds links to the repository's blobs and nothing else."""
    snapshot, blobs = tmp_path / "models--m" / "snapshots" / "0123", tmp_path / "models--m" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(mixtral, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert Checkpoint.open(snapshot).config == Checkpoint.open(mixtral).config


# ---- the fingerprint


def test_fingerprint_does_not_depend_on_place(mixtral: Path, copy: Path) -> None:
    assert Checkpoint.open(copy).fingerprint() == Checkpoint.open(mixtral).fingerprint()


@pytest.mark.parametrize("file_format", ["sharded", "meta", "stacked"])
def test_fingerprint_of_every_kind_of_source(mixtral: Path, file_format: str) -> None:
    path = convert(mixtral, file_format)
    first = Checkpoint.open(path).fingerprint()
    assert first == Checkpoint.open(path).fingerprint() != Checkpoint.open(mixtral).fingerprint()
    assert len(first) == 64


def test_fingerprint_sees_weights_and_config(copy: Path) -> None:
    seen = {Checkpoint.open(copy).fingerprint()}
    edit(copy, lambda tensors: tensors["lm_head.weight"][0, 0].add_(1.0))
    seen.add(Checkpoint.open(copy).fingerprint())
    edit_json(copy / "config.json", rms_norm_eps=1e-6)
    seen.add(Checkpoint.open(copy).fingerprint())
    assert len(seen) == 3


# ---- what is refused

EXPERT = "model.layers.0.block_sparse_moe.experts.3.w2.weight"


def test_missing_tensor(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(GateworkError, match=f"{EXPERT} is missing"):
        Checkpoint.open(copy)


def test_extra_tensor(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    with pytest.raises(GateworkError, match=r"q_proj\.bias .* has no place"):
        Checkpoint.open(copy)


def test_misshapen_tensor(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({EXPERT: torch.ones(96, 64)}))
    with pytest.raises(GateworkError, match=rf"{EXPERT} .* got \(96, 64\); expected \(64, 96\)"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.int8], ids=str)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_dtype_that_is_not_read(copy: Path, dtype: torch.dtype, suffix: str) -> None:
    edit(copy, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(dtype)}))
    path = copy if suffix == "safetensors" else convert(copy, "bin")
    with pytest.raises(GateworkError, match=rf"{EXPERT} .* expected float32 or float16 or bfloat16"):
        Checkpoint.open(path)


def test_dtypes_mixed_within_a_weight(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].half()}))
    with pytest.raises(GateworkError, match=r"layers\.0\.moe\.w_out .* float16 and float32"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("call", [Checkpoint.open, read_config])
def test_missing_folder(call: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(GateworkError, match="nowhere does not exist"):
        call(tmp_path / "nowhere")


@pytest.mark.parametrize("call", [Checkpoint.open, read_config])
def test_empty_folder(call: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(GateworkError, match=r"neither config\.json nor params\.json"):
        call(tmp_path)


def test_file_instead_of_folder(mixtral: Path) -> None:
    with pytest.raises(GateworkError, match="is not a folder"):
        Checkpoint.open(mixtral / "config.json")


@pytest.mark.parametrize("config", ["config.json", "params.json"])
def test_folder_without_weights(mixtral: Path, tmp_path: Path, config: str) -> None:
    shutil.copy((convert(mixtral, "meta") if config == "params.json" else mixtral) / config, tmp_path)
    assert read_config(tmp_path).family == "mixtral"
    with pytest.raises(GateworkError, match="has no weights"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[1]", "no JSON object"),
        ("\xff", "is not JSON"),
        ("[" * 90_000, "nested too deeply"),
        ('{"a":' * 90_000, "nested too deeply"),
        ('{"vocab_size": ' + "9" * 10_000 + "}", "a number that is too long"),
        ('{"model_type": "gpt2"}', "llama, mistral, mixtral, dbrx"),
    ],
)
def test_config_that_is_none(copy: Path, text: str, reason: str) -> None:
    (copy / "config.json").write_text(text, encoding="latin-1")
    for call in (Checkpoint.open, read_config):
        with pytest.raises(GateworkError, match=reason):
            call(copy)
    with pytest.raises(GateworkError, match=reason):
        read_config(copy / "config.json")


def test_config_larger_than_the_files(copy: Path) -> None:
    edit_json(copy / "config.json", num_hidden_layers=1_000)
    with pytest.raises(GateworkError, match=r"model\.layers\.1\..* is missing"):
        Checkpoint.open(copy)
