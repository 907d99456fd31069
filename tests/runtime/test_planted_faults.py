"""verify names the layer and the tensor in which a planted fault enters, and what it looks like.

A fault is planted in one place: in the checkpoint that the reference reads (as far apart as the other way round, and quicker
to make), in the engine's graph, in its weights, or in the way it is run. Every engine has its default bounds.
"""

from __future__ import annotations

import ctypes
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gatework.export.build import build_engine
from gatework.plugins.engine_format import ENCODER, MANIFEST, file_table
from gatework.runtime.backends import ort
from gatework.runtime.verify import VerifyReport, verify
from tests.checkpoints import make_checkpoint
from tests.switch import make_switch

LAYERS = 3
SIZES: dict[str, dict[str, Any]] = {"dbrx": {"qkv_clip": 1}}  # so that it bites
PRECISIONS: dict[str, dict[str, Any]] = {"int8": {"group_size": 32}, "int4": {"group_size": 16}}


@dataclass(frozen=True)
class Fault:
    """model and precision: of the engine. place: what `plant` changes. layer, tensor: where the fault enters. note: a word of
    what is said about it."""

    model: str
    place: str
    plant: Callable[..., object]
    layer: int | None
    tensor: str
    note: str = ""
    precision: str = "fp32"


# ---- in the checkpoint: (config, tensors)


def in_config(**fields: Any) -> Callable[..., object]:
    return lambda config, tensors: config.update(fields)


def on_tensors(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., object]:
    """Change every tensor whose name contains `name`."""

    def plant(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        names = [each for each in tensors if name in each]
        assert names
        for each in names:
            tensors[each] = change(tensors[each]).contiguous()

    return plant


def other_half(w: Tensor) -> Tensor:
    """Halves of the last axis exchanged."""
    return torch.cat(w.chunk(2, dim=-1)[::-1], dim=-1)


def swapped(one: str, other: str) -> Callable[..., object]:
    """Exchange the tensors whose names contain `one` with those of `other`."""

    def plant(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if one in name]:
            twin = name.replace(one, other)
            tensors[name], tensors[twin] = tensors[twin], tensors[name]

    return plant


def rotated_experts(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    old = dict(tensors)
    for name in [name for name in tensors if "layers.1." in name and ".experts." in name]:
        head, _, rest = name.partition(".experts.")
        number, _, rest = rest.partition(".")
        tensors[name] = old[f"{head}.experts.{(int(number) + 1) % 8}.{rest}"]


def interleaved(rows: Tensor) -> Tensor:
    """Rows of heads of 16 as the rotary layout of neighbouring pairs has them."""
    return rows.unflatten(0, (-1, 2, 8)).transpose(1, 2).flatten(0, 2)


def taken_as_halves(w: Tensor) -> Tensor:
    """Of what alternates along the last axis, in an order that is read as if it were one half and then the other."""
    return torch.stack(w.chunk(2, dim=-1), dim=-1).flatten(-2)


def row_larger(rows: Tensor) -> Tensor:
    return torch.cat((rows[:1] * 1.01, rows[1:]))


def without_renormalising(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["ffn_config"]["moe_normalize_expert_weights"] = None


# ---- in the graph: (nodes that make the named values, and named tensors)


def attribute(value: str, **attributes: Any) -> Callable[..., object]:
    """Set attributes of the node that makes the value."""

    def plant(made: dict[str, onnx.NodeProto]) -> None:
        node = made[value]
        kept = [each for each in node.attribute if each.name not in attributes]
        del node.attribute[:]
        node.attribute.extend(kept + [onnx.helper.make_attribute(name, new) for name, new in attributes.items()])

    return plant


def attention_scale(value: str, scale: float) -> Callable[..., object]:
    """Set that of the Attention node from which the value comes."""
    return lambda made: attribute(behind(made, value, "Attention").output[0], scale=scale)(made)


def reads_weight(value: str, other: str) -> Callable[..., object]:
    """The product from which the value comes takes another weight."""

    def plant(made: dict[str, onnx.NodeProto]) -> None:
        behind(made, value, "FusedMatMul").input[1] = other

    return plant


def behind(made: dict[str, onnx.NodeProto], value: str, op_type: str) -> onnx.NodeProto:
    """The node of that type from which the value comes, through others that do not change it."""
    node = made[value]
    while node.op_type != op_type:
        assert node.op_type in ("Transpose", "Reshape")
        node = made[node.input[0]]
    return node


def one_sided(made: dict[str, Any]) -> None:
    """The encoder takes the decoder's buckets, which are for keys before the query."""
    made["encoder.relative_bias.buckets"].raw_data = made["relative_bias.buckets"].raw_data


def reads(value: str, at: int, other: str) -> Callable[..., object]:
    """The node that makes the value reads another one in the place of an input."""

    def plant(made: dict[str, onnx.NodeProto]) -> None:
        made[value].input[at] = other

    return plant


# ---- in the weights: (tensors)


def on_codes(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., object]:
    def plant(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return plant


def other_nibble(codes: Tensor) -> Tensor:
    return (codes << 4) | (codes >> 4)


def zero_point_late(codes: Tensor) -> Tensor:
    low, high = (nibbles.clamp(max=14) + 1 for nibbles in (codes & 15, codes >> 4))
    return low | (high << 4)


def other_axis(scales: Tensor) -> Tensor:
    return scales.transpose(-1, -2).reshape(scales.shape)


def with_nan(scales: Tensor) -> Tensor:
    scales = scales.clone()
    scales[0, 0, 0] = torch.nan
    return scales


# ---- in the run: (original `_run` of the backend) -> another


def one_slot_late(run: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def late(self: ort.OrtBackend, step: Any, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return run(self, step, ids, starts + (starts + ids.shape[1] < self.max_seq))

    return late


def position_stale(run: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The second position of a slot keeps what the sequence before left there."""

    def stale(self: ort.OrtBackend, step: Any, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        before = {
            (name, slot): keys(self, name, slot)[:, 1].copy()
            for name in self.cache_names
            for slot in range(self.max_batch)
        }
        logits = run(self, step, ids, starts)
        for (name, slot), old in before.items():
            if old.any():
                keys(self, name, slot)[:, 1] = old
        return logits

    return stale


def chunks_alone(run: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A second chunk of a prompt finds no first one."""

    def alone(self: ort.OrtBackend, step: Any, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        if ids.shape[1] > 1:
            for name in self.cache_names:
                keys(self, name, 0)[:, : starts[0]] = 0
        return run(self, step, ids, starts)

    return alone


def always_at_the_start(run: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def start(self: ort.OrtBackend, step: Any, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return run(self, step, ids, starts * (ids.shape[1] == 1))

    return start


def other_slots_source(run: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The decoder reads what the encoder made for the other one of two slots."""

    def other(self: ort.OrtBackend, step: Any, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        exchange_sources(self)
        logits = run(self, step, ids, starts)
        exchange_sources(self)
        return logits

    return other


def exchange_sources(backend: ort.OrtBackend) -> None:
    assert backend._source is not None
    for kept in backend._source._values.values():
        kept[:] = kept[::-1].copy()


def source_too_long(run: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The decoder sees one place more than the encoder filled."""

    def longer(self: ort.OrtBackend, step: Any, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        assert self._source is not None
        self._source._lengths += 1
        logits = run(self, step, ids, starts)
        self._source._lengths -= 1
        return logits

    return longer


def keys(backend: ort.OrtBackend, name: str, slot: int) -> np.ndarray:
    layout = backend._cache.layout
    block = (ctypes.c_uint8 * layout.slot_bytes).from_address(backend._cache.address(name, slot))
    return np.frombuffer(block, np.float32).reshape(layout.shape(1)[1:])


Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")
BIAS, CROSS = "SelfAttention.relative_attention_bias", "decoder.block.1.layer.1.EncDecAttention"
FAULTS: dict[str, Fault] = {
    # checkpoint
    "embedding rows off by one": Fault("llama2", "checkpoint", on_tensors("embed_tokens", lambda w: w.roll(1, 0)), None, "embedding"),
    "embedding scaled": Fault("llama2", "checkpoint", on_tensors("embed_tokens", lambda w: w * 8), None, "embedding", "scaled by 0.125"),
    "RoPE base": Fault("llama2", "checkpoint", lambda config, _: config["rope_parameters"].update(rope_theta=1.1e4), 0, "key", "all from position 1 on"),
    "RoPE in pairs": Fault("llama2", "checkpoint", lambda c, t: [on_tensors(f"0.{name}", interleaved)(c, t) for name in (Q, K)], 0, "key"),
    "norm epsilon": Fault("mixtral", "checkpoint", in_config(rms_norm_eps=1e-6), 0, "key", "scaled by"),
    "norm weight plus one": Fault("mixtral", "checkpoint", on_tensors("layers.1.post_attention_layernorm", lambda w: w + 1), 1, "router"),
    "two norms exchanged": Fault("mixtral", "checkpoint", swapped("layers.1.input_layernorm", "layers.1.post_attention_layernorm"), 1, "key"),
    "keys and values exchanged": Fault("mixtral", "checkpoint", swapped(f"layers.0.{K}", f"layers.0.{V}"), 0, "key"),
    "query heads exchanged": Fault("llama2", "checkpoint", on_tensors(f"layers.0.{Q}", lambda w: torch.cat(w.chunk(2)[::-1])), 0, "context"),
    "key heads exchanged": Fault("llama2", "checkpoint", on_tensors(f"layers.2.{K}", lambda w: torch.cat(w.chunk(2)[::-1])), 2, "key", "another order"),
    "value transposed": Fault("llama2", "checkpoint", on_tensors(f"layers.1.{V}", lambda w: w.reshape(64, 32).T), 1, "value"),
    "one row of 64 larger by 1 %": Fault("llama2", "checkpoint", on_tensors(f"layers.1.{O}", row_larger), 1, "attention"),
    "window one too long": Fault("mistral", "checkpoint", in_config(sliding_window=5), 0, "context", "all from position 4 on"),
    "no window": Fault("mistral", "checkpoint", in_config(sliding_window=None), 0, "context", "all from position 4 on"),
    "router rows rotated": Fault("mixtral", "checkpoint", on_tensors("layers.0.block_sparse_moe.gate", lambda w: w.roll(1, 0)), 0, "router", "another order"),
    "one expert more per token": Fault("mixtral", "checkpoint", in_config(num_experts_per_tok=3), 0, "experts"),
    "gate and up exchanged": Fault("mixtral", "checkpoint", swapped("layers.1.block_sparse_moe.experts.3.w1", "layers.1.block_sparse_moe.experts.3.w3"), 1, "experts", "rows"),
    "experts rotated": Fault("mixtral", "checkpoint", rotated_experts, 1, "experts"),
    "weights not renormalised": Fault("dbrx", "checkpoint", without_renormalising, 0, "experts"),
    "no clip": Fault("dbrx", "checkpoint", lambda config, _: config["attn_config"].update(clip_qkv=None), 0, "key"),
    "weights cut to bfloat16": Fault("mixtral", "checkpoint", on_tensors("layers.2.block_sparse_moe.experts.0.w2", lambda w: w.bfloat16().float()), 2, "experts"),
    "head off by one row": Fault("llama2", "checkpoint", on_tensors("lm_head", lambda w: w.roll(1, 0)), None, "logits", "another order"),
    "last norm left out": Fault("llama2", "checkpoint", on_tensors("model.norm", torch.ones_like), None, "logits"),
    "bias left out": Fault("qwen2_moe", "checkpoint", on_tensors("layers.1.self_attn.v_proj.bias", torch.zeros_like), 1, "value"),
    "shared expert weighed by the rest": Fault("qwen2_moe", "checkpoint", on_tensors("layers.1.mlp.shared_expert_gate", lambda w: -w), 1, "shared"),
    "slopes of another maximum": Fault("mpt-clip", "checkpoint", lambda config, _: config["attn_config"].update(alibi_bias_max=7), 0, "context"),
    "half of what should rotate": Fault("phi", "checkpoint", lambda config, _: config["rope_parameters"].update(partial_rotary_factor=0.25), 0, "key"),
    "bias of the MLP left out": Fault("phi", "checkpoint", on_tensors("layers.2.mlp.fc2.bias", torch.zeros_like), 2, "mlp"),
    "another soft cap": Fault("grok1", "checkpoint", in_config(max_attn_value=5.1), 0, "context"),
    "embedding's multiplier": Fault("grok1", "checkpoint", in_config(embedding_multiplier_scale=8.08), None, "embedding", "scaled by 0.99"),
    "logits' multiplier": Fault("grok1", "checkpoint", in_config(output_multiplier_scale=0.6), None, "logits", "scaled by 0.96"),
    "norm after attention left out": Fault("grok1", "checkpoint", on_tensors("layers.1.post_attn_norm", torch.ones_like), 1, "residual"),
    "norm after experts left out": Fault("grok1", "checkpoint", on_tensors("layers.1.post_moe_norm", torch.ones_like), 1, "output"),
    "halves of the experts' gates exchanged": Fault("openmoe", "checkpoint", on_tensors("wi_gate", other_half), 1, "experts"),
    "norm of the extra MLP left out": Fault("openmoe", "checkpoint", on_tensors("pre_extra_mlp", torch.ones_like), 1, "extra"),
    "extra MLP left out": Fault("openmoe", "checkpoint", on_tensors("extra_mlp.down", torch.zeros_like), 1, "extra"),
    "sink left out": Fault("gpt-oss", "checkpoint", on_tensors("layers.1.self_attn.sinks", lambda s: s - 30), 1, "context"),
    "windows in the other layers": Fault("gpt-oss", "checkpoint", in_config(layer_types=["full_attention", "sliding_attention", "full_attention"]), 0, "context", "all from position 4 on"),
    "gate and up in halves": Fault("gpt-oss", "checkpoint", on_tensors("layers.1.mlp.experts.gate_up_proj", taken_as_halves), 1, "experts"),
    "bias of the router left out": Fault("gpt-oss", "checkpoint", on_tensors("layers.0.mlp.router.bias", torch.zeros_like), 0, "router"),
    "gates not clamped": Fault("gpt-oss", "checkpoint", in_config(swiglu_limit=7.0), 0, "experts"),
    "another slope of the gates": Fault("gpt-oss", "checkpoint", in_config(swiglu_alpha=1.0), 0, "experts"),
    "bias after the experts left out": Fault("gpt-oss", "checkpoint", on_tensors("layers.2.mlp.experts.down_proj_bias", torch.zeros_like), 2, "experts", "", "int8"),
    "bias after attention left out": Fault("gpt-oss", "checkpoint", on_tensors("layers.2.self_attn.o_proj.bias", torch.zeros_like), 2, "attention"),
    "YaRN without its factor": Fault("gpt-oss", "checkpoint", lambda config, _: config["rope_parameters"].update(attention_factor=1.0), 0, "key", "scaled by"),
    "YaRN from whole pairs": Fault("gpt-oss", "checkpoint", lambda config, _: config["rope_parameters"].update(truncate=True), 0, "key", "all from position 1 on"),
    "encoder's buckets of keys before and after exchanged": Fault("switch", "checkpoint", on_tensors(f"encoder.block.0.layer.0.{BIAS}", lambda w: torch.cat(w.chunk(2)[::-1])), 0, "encoder.context"),
    "decoder's buckets off by one": Fault("switch", "checkpoint", on_tensors(f"decoder.block.0.layer.0.{BIAS}", lambda w: w.roll(1, 0)), 0, "context"),
    "encoder's router rows rotated": Fault("switch", "checkpoint", on_tensors("encoder.block.1.layer.1.mlp.router", lambda w: w.roll(1, 0)), 1, "encoder.router", "another order"),
    "capacity one larger": Fault("switch", "checkpoint", in_config(expert_capacity=4), 1, "encoder.output"),
    "encoder's last norm left out": Fault("switch", "checkpoint", on_tensors("encoder.final_layer_norm", torch.ones_like), None, "encoder.norm", "", "int8"),
    "cross keys and values exchanged": Fault("switch", "checkpoint", swapped(f"{CROSS}.k", f"{CROSS}.v"), 1, "cross_key", "", "int4"),
    "cross query heads exchanged": Fault("switch", "checkpoint", on_tensors(f"{CROSS}.q", lambda w: torch.cat(w.chunk(2)[::-1])), 1, "cross_context"),
    "norm before cross attention left out": Fault("switch", "checkpoint", on_tensors("decoder.block.0.layer.1.layer_norm", torch.ones_like), 0, "cross_context", "", "int8"),
    # graph
    "MLP behind attention": Fault("phi", "graph", reads("layers.1.output", 0, "layers.1.attention"), 1, "output"),
    "attention scale": Fault("llama2", "graph", attribute("layers.1.context", scale=0.26), 1, "context"),
    "a soft cap too many": Fault("llama2", "graph", attribute("layers.0.context", softcap=4.0), 0, "context"),
    "window missing in one layer": Fault("mistral", "graph", attribute("layers.2.context", local_window_size=-1), 2, "context", "all from position 4 on"),
    "residual is the branch": Fault("llama2", "graph", reads("layers.1.residual", 0, "layers.1.attention"), 1, "residual"),
    "another layer's routing": Fault("mixtral", "graph", reads("layers.1.experts", 1, "layers.0.router"), 1, "experts"),
    "sinks of another layer": Fault("gpt-oss", "graph", reads("layers.1.context", 11, "layers.0.attn.sinks"), 1, "context"),
    "another limit of the gates": Fault("gpt-oss", "graph", attribute("layers.2.experts", limit=0.4), 2, "experts", "", "int8"),
    "another layer's rotary position": Fault("llama2", "graph", attribute("layers.0.context", rotary_interleaved=1), 0, "key"),
    "another slope of SiLU": Fault("mixtral", "graph", attribute("layers.2.experts", activation_alpha=1.1), 2, "experts"),
    "router scaled by 1 %": Fault("mixtral", "weights", on_codes("layers.1.moe.router.weight", lambda w: w * 1.01), 1, "router", "scaled by 1.01", "int8"),
    "norm epsilon in int8": Fault("mixtral", "graph", attribute("layers.0.residual", epsilon=1e-2), 0, "router", "", "int8"),
    "encoder's attention divided by the root of the width": Fault("switch", "graph", attention_scale("encoder.layers.0.context", 0.25), 0, "encoder.context"),
    "cross attention divided by the root of the width": Fault("switch", "graph", attention_scale("layers.1.cross_context", 0.25), 1, "cross_context", "", "int4"),
    "encoder's buckets one-sided": Fault("switch", "graph", one_sided, 0, "encoder.context"),
    "cross values of another layer": Fault("switch", "graph", reads_weight("cross.1.v", "layers.0.cross.v.weight"), 1, "cross_value"),
    "weight of the one expert normalised": Fault("switch", "graph", attribute("layers.1.experts", renormalize=1), 1, "experts", "", "int8"),
    "encoder's residual is the branch": Fault("switch", "graph", reads("encoder.layers.1.residual", 0, "encoder.layers.1.attention"), 1, "encoder.residual"),
    # weights
    "int4 nibbles exchanged": Fault("llama2", "weights", on_codes("layers.1.attn.o.weight.codes", other_nibble), 1, "attention", "", "int4"),
    "int4 zero point": Fault("mixtral", "weights", on_codes("layers.2.moe.w_out.codes", zero_point_late), 2, "experts", "", "int4"),
    "int8 scales along the wrong axis": Fault("mixtral", "weights", on_codes("layers.0.attn.o.weight.scales", other_axis), 0, "attention", "", "int8"),
    "int8 scales of the next group": Fault("mixtral", "weights", on_codes("layers.1.moe.w_in.scales", lambda s: s.roll(1, -2)), 1, "experts", "", "int8"),
    "codes of the next expert": Fault("mixtral", "weights", on_codes("layers.0.moe.w_out.codes", lambda c: c.roll(1, 0)), 0, "experts", "", "int8"),
    "a scale that is no number": Fault("mixtral", "weights", on_codes("layers.1.attn.qkv.weight.scales", with_nan), 1, "context", "not finite", "int8"),
    "embedding scales of the next row": Fault("mixtral", "weights", on_codes("embed.weight.scales", lambda s: s.roll(1, 0)), None, "embedding", "", "int8"),
    "encoder's int4 zero point": Fault("switch", "weights", on_codes("encoder.layers.1.moe.w_out.codes", zero_point_late), 1, "encoder.experts", "", "int4"),
    "rotary table of another base": Fault("llama2", "weights", on_codes("rope_sin", lambda t: t * 0.99), 0, "key"),
    # run
    "keys one slot late": Fault("mixtral", "run", one_slot_late, 0, "key"),
    "stale cache": Fault("mixtral", "run", position_stale, 0, "key"),
    "chunks without the past": Fault("mixtral", "run", chunks_alone, 0, "key"),
    "chunks at the start": Fault("mixtral", "run", always_at_the_start, 0, "key"),
    "keys and values of another slot's source": Fault("switch", "run", other_slots_source, 0, "cross_context"),
    "source one token too long": Fault("switch", "run", source_too_long, 0, "cross_context", "", "int8"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """model, precision -> (checkpoint, engine), each made once."""

    @functools.cache
    def make(model: str, precision: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(model)
        if model == "switch":
            path = make_switch(folder)
        else:
            path = make_checkpoint(folder, model, num_layers=LAYERS, **SIZES.get(model, {}))
        settings = PRECISIONS.get(precision, {})
        return path, build_engine(
            path, folder / "engine", precision=precision, prefill_chunk=8, max_batch=2, **settings
        )

    return make


def with_fault(fault: Fault, checkpoint: Path, engine: Path, out: Path) -> tuple[Path, Path]:
    """Checkpoint and engine, one of them a copy in `out` with the fault."""
    if fault.place == "checkpoint":
        out.mkdir()
        config, tensors = (
            json.loads((checkpoint / "config.json").read_text()),
            load_file(checkpoint / "model.safetensors"),
        )
        fault.plant(config, tensors)
        (out / "config.json").write_text(json.dumps(config))
        save_file(tensors, out / "model.safetensors")
        return out, engine
    shutil.copytree(engine, out)
    if fault.place == "graph":
        paths = [path for name in ("model.onnx", ENCODER) if (path := out / name).is_file()]
        models = [onnx.load(path, load_external_data=False) for path in paths]
        made = {value: node for model in models for node in model.graph.node for value in node.output if value}
        fault.plant(made | {tensor.name: tensor for model in models for tensor in model.graph.initializer})
        for path, model in zip(paths, models, strict=True):
            onnx.save(model, path)
    else:
        changed = [_overwrite(path, fault.plant) for path in out.glob("*.safetensors")]
        assert any(changed), "no such tensor"
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"] = file_table(out, list(manifest["files"]))
    (out / MANIFEST).write_text(json.dumps(manifest))
    return checkpoint, out


def _overwrite(path: Path, plant: Callable[..., object]) -> bool:
    """Change tensors in their places: the graph knows where they lie. Whether the file has them."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    tensors = load_file(path)
    old = dict(tensors)
    try:
        plant(tensors)
    except KeyError:
        return False
    for name, tensor in tensors.items():
        if tensor is not old[name]:
            assert tensor.shape == old[name].shape
            first, end = (8 + length + offset for offset in header[name]["data_offsets"])
            content[first:end] = tensor.view(torch.uint8).numpy().tobytes()
    path.write_bytes(content)
    return True


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(
    tmp_path: Path,
    sound: Callable[[str, str], tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    fault = FAULTS[name]
    checkpoint, engine = sound(fault.model, fault.precision)
    if fault.place == "run":
        monkeypatch.setattr(ort.OrtBackend, "_run", fault.plant(ort.OrtBackend._run))
    else:
        checkpoint, engine = with_fault(fault, checkpoint, engine, tmp_path / "faulty")
    report = verify(engine, checkpoint, tokens=4, window=24, check_fingerprint=False)
    assert not report.passed
    found = report.first_divergence
    assert found is not None, str(report)
    assert (found.stage.layer, found.stage.tensor) == (fault.layer, fault.tensor), str(report)
    assert fault.note in found.stage.note
    json.dumps(report.to_dict(), allow_nan=False)


def test_sound_engines_pass(sound: Callable[[str, str], tuple[Path, Path]]) -> None:
    """Those that the faults are planted in."""
    for model, precision in sorted({(fault.model, fault.precision) for fault in FAULTS.values()}):
        checkpoint, engine = sound(model, precision)
        report: VerifyReport = verify(engine, checkpoint, tokens=4, window=24)
        assert report.passed, str(report)
